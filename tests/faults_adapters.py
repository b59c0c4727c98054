"""Damaged adapter files are refused, or read as they are."""

from __future__ import annotations

from pathlib import Path

import adapter_mutations
import fuzz
from fault_table import fault
from program import Harness

from trainer.model.flux_kontext import FluxKontext


@fault("F41", "adapter files with 1,000 mutations of each kind", len(adapter_mutations.KINDS), [])
def damaged_adapters(harness: Harness, out: Path, trial: int) -> None:
    FluxKontext.save_tiny_checkpoint(out / "model")
    family = FluxKontext(path=str(out / "model"), text_length=8)
    read = adapter_mutations.trial(adapter_mutations.KINDS[trial], family, out)
    failures = fuzz.find_failures(1000, read)
    assert not failures, "\n".join(failures[:3])
