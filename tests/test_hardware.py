"""Hardware profiles: what cards can do, the refusals that follow, and that hardware never changes the result."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trainer.__main__ import main
from trainer.config import rules
from trainer.config.compose import compose_config, to_run
from trainer.config.groups import CONF, GROUPS
from trainer.config.rules import open_device
from trainer.config.schema import Run
from trainer.core.dtypes import Dtype
from trainer.core.errors import UsageError
from trainer.hardware import Card, Device, Hardware
from trainer.hardware.devices import detect_card
from trainer.model.flux_kontext import FluxKontext
from trainer.optimizer import Optimizer
from trainer.optimizer.adam8bit import Adam8bit
from trainer.optimizer.adamw8bit import AdamW8bit
from trainer.precision import Precision, Storage
from trainer.tracking.journal import read_records

FP16 = Precision(Storage.fp16, Dtype.float16)
BF16 = Precision(Storage.bf16, Dtype.bfloat16)
FP8 = Precision(Storage.fp8, Dtype.bfloat16)
MIXED = Precision(Storage.fp32, Dtype.bfloat16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    torch.set_num_threads(1)
    return ["model=flux_kontext", *FluxKontext.save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))]


@pytest.fixture(scope="module")
def run(tiny: list[str]) -> Run:
    return to_run(compose_config(tiny))


def read_profile(name: str) -> dict[str, Any]:
    values = yaml.safe_load((CONF / "hardware" / f"{name}.yaml").read_text())
    del values["defaults"]
    return values


def build_hardware(name: str) -> Hardware:
    values = read_profile(name)
    return Hardware(**values | {"card": Card(**values.get("card", {})), "device": Device[values["device"]]})


@pytest.mark.parametrize("name", GROUPS["hardware"])
def test_profile_has_all_capabilities_of_its_card(name: str):
    hardware = build_hardware(name)
    card = hardware.card
    assert set(read_profile(name)) <= {field.name for field in fields(Hardware)}
    if name == "auto":
        assert card == Card()
    elif hardware.device is Device.cuda and card.name.startswith("NVIDIA"):
        assert None not in [getattr(card, field.name) for field in fields(Card)]
        # developer.nvidia.com/cuda-gpus; bfloat16 from 8.0, float8 from 8.9
        assert card.bfloat16 == (card.compute_capability >= 8.0)
        assert card.float8 == (card.compute_capability >= 8.9)
    else:
        assert None not in (card.name, card.bfloat16, card.float16, card.float8)
    if name not in ("auto", "cpu"):
        assert card.bandwidth
        supported = {"bfloat16": card.bfloat16, "float16": card.float16, "float8": card.float8}
        assert set(card.tflops) == {"float32", *(dtype for dtype, works in supported.items() if works)}


@pytest.mark.parametrize(
    ("name", "precision", "remedy"),
    [
        ("m2_max", FP16, "precision=fp32"),
        ("m2_max", BF16, "precision=fp32"),
        ("m2_max", FP8, "precision.compute=float32"),
        ("m2_max", MIXED, "precision.compute=float32"),
        ("t4", BF16, "precision=fp16"),
        ("t4", FP8, "precision.compute=float16"),
        ("t4", MIXED, "precision.compute=float16"),
        ("t4", replace(FP16, compute=Dtype.bfloat16), "precision.compute=float16"),
        ("cpu", FP16, "precision=bf16"),
        ("cpu", replace(FP8, compute=Dtype.float16), "precision.compute=bfloat16"),
    ],
)
def test_unsupported_precision_is_refused_with_a_remedy_that_works(
    run: Run, name: str, precision: Precision, remedy: str
):
    unsupported = replace(run, hardware=build_hardware(name), precision=precision)
    with pytest.raises(UsageError) as refusal:
        rules.check(unsupported)
    assert str(refusal.value).endswith(f"; type {remedy}")
    setting, _, value = remedy.partition("=")
    if setting == "precision":
        supported = {"fp32": Precision(), "fp16": FP16, "bf16": BF16}[value]
    else:
        supported = replace(precision, compute=Dtype[value])
    rules.check(replace(unsupported, precision=supported))


@pytest.mark.parametrize("optimizer", [AdamW8bit(lr=1e-4), Adam8bit(lr=1e-4)])
def test_8bit_optimizers_are_refused_on_a_mac(run: Run, optimizer: Optimizer):
    with pytest.raises(UsageError, match="type optimizer=adamw$"):
        rules.check(replace(run, hardware=build_hardware("m2_max"), optimizer=optimizer))


@pytest.mark.parametrize("name", sorted({*GROUPS["hardware"]} - {"auto", "cpu", "m2_max", "m3_max", "m4_max", "t4"}))
@pytest.mark.parametrize("precision", [Precision(), BF16, FP16, FP8, MIXED])
def test_newer_cards_support_every_precision_and_optimizer(run: Run, name: str, precision: Precision):
    rules.check(replace(run, hardware=build_hardware(name), precision=precision, optimizer=AdamW8bit(lr=1e-4)))


def test_device_that_this_machine_does_not_have_is_refused(run: Run):
    missing = "cuda" if not torch.cuda.is_available() else "mps"
    with pytest.raises(UsageError, match=f"hardware.device={missing}"):
        open_device(replace(run, hardware=Hardware(device=Device[missing])))


def test_capabilities_of_an_open_device_are_detected():
    card = detect_card(torch.device("cpu"))
    assert (card.bfloat16, card.float16, card.bitsandbytes) == (True, False, True)
    assert card.memory_gib > 0.5


def test_auto_profile_refuses_before_weights_are_loaded(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("the device of this machine supports float16")
    data = ["dataset.pairs=2", "dataset.held_out=1", "tracking=none", f"out={tmp_path}"]
    assert main([*tiny, *data, "precision=fp16"]) == 64
    assert "type precision=bf16" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_hardware_changes_neither_identity_nor_losses(tiny: list[str], tmp_path: Path):
    experiment = [
        *("dataset.pairs=6", "dataset.held_out=2", "steps=3", "batch=5", "method.rank=2"),
        *("evaluation.every=3", "evaluation.images=1", "sample.steps=1", "tracking=none"),
    ]
    profiles = {
        "cpu": [],
        # As on a small card: micro-batches, gradient checkpointing and a process that loads the data.
        "rtx3060": ["hardware.device=cpu", "hardware.micro_batch=2", "hardware.workers=1"],
    }
    identities, losses = [], []
    for name, overrides in profiles.items():
        assert main([*tiny, *experiment, f"hardware={name}", *overrides, f"out={tmp_path / name}"]) == 0
        (journal,) = (tmp_path / name).glob("*/journal.jsonl")
        identities.append(journal.parent.name)
        values = [record["values"] for _, record in read_records(journal) if "values" in record]
        losses.append(
            [value[key] for value in values for key in ("train/loss", "train/grad_norm", "val/loss") if key in value]
        )
    assert identities[0] == identities[1]
    assert len(losses[0]) == 8
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
