"""Each option of `precision` trains, resumes bit for bit, exports and samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.config import rules
from trainer.config.groups import option_names
from trainer.hardware import Card
from trainer.training.checkpoint import Checkpoints

# native needs a checkpoint that is quantized already, see test_prequantized.py.
CASES = [[f"precision={name}"] for name in option_names("precision") if name != "native"]
CASES.append(["precision=fp8", "precision.float8_products=true"])


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param(case, id=" ".join(case), marks=() if case == ["precision=fp8"] else pytest.mark.slow)
        for case in CASES
    ],
)
def test_precision_trains_resumes_exports_and_samples(
    precision: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # A CPU refuses float16 because it is slow.
    card = Card(name="CPU", bfloat16=True, float16=True, float8=True, bitsandbytes=True)
    monkeypatch.setattr(rules, "detect_card", lambda device: card)
    command = [
        *(*precision, "method.rank=2", "dataset.pairs=4", "dataset.held_out=1", "batch=2", "save.every=1"),
        *("hardware.device=cpu", "lr_scheduler=constant", "tracking=none"),
        *("evaluation.images=1", "evaluation.samples=1", "sample.steps=1"),
    ]

    def train_to(steps: int, out: Path, *overrides: str) -> Path:
        """Returns the folder of the run."""
        before = set(out.glob("*/checkpoints"))
        assert main([*command, f"out={out}", f"steps={steps}", *overrides]) == 0
        (checkpoints,) = set(out.glob("*/checkpoints")) - before
        return checkpoints.parent

    whole = train_to(2, tmp_path / "whole")
    first = train_to(1, tmp_path / "parts")
    resumed = train_to(2, tmp_path / "parts", f"resume={first}")
    expected, found = (Checkpoints(folder / "checkpoints", 9).load(2).weights for folder in (whole, resumed))
    assert found and all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    exported = load_file(whole / "export" / "pytorch_lora_weights.safetensors")
    assert exported and all(tensor.isfinite().all() for tensor in exported.values())
    before = set(whole.rglob("*.png"))
    assert main([f"run={whole}", "stage=sample", "sample.steps=1"]) == 0
    assert set(whole.rglob("*.png")) - before
