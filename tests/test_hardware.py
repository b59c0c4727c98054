"""Profiles: facts of cards, the refusals that follow, and that they decide how fast and never what."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

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


def profile(name: str) -> Hardware:
    values = yaml.safe_load((CONF / "hardware" / f"{name}.yaml").read_text())
    del values["defaults"]
    return Hardware(**values | {"card": Card(**values.get("card", {})), "device": Device[values["device"]]})


@pytest.mark.parametrize("name", GROUPS["hardware"])
def test_a_profile_holds_the_facts_of_its_card_and_how_to_use_it_and_nothing_else(name: str):
    ours = profile(name)
    assert set(yaml.safe_load((CONF / "hardware" / f"{name}.yaml").read_text())) <= {
        "defaults",
        *(field.name for field in fields(Hardware)),
    }
    facts = [getattr(ours.card, field.name) for field in fields(Card)]
    if name == "auto":
        assert set(facts) == {None}
    elif ours.device is Device.cuda:
        assert None not in facts
        # developer.nvidia.com/cuda-gpus; bfloat16 from 8.0, float8 from 8.9
        assert ours.card.bfloat16 == (ours.card.compute_capability >= 8.0)
        assert ours.card.float8 == (ours.card.compute_capability >= 8.9)
    else:
        assert None not in (
            ours.card.name,
            ours.card.bfloat16,
            ours.card.float16,
            ours.card.float8,
            ours.card.bitsandbytes,
        )


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
def test_what_a_card_cannot_do_is_refused_with_what_to_type(run: Run, name: str, precision: Precision, remedy: str):
    asked = replace(run, hardware=profile(name), precision=precision)
    with pytest.raises(UsageError) as refusal:
        rules.check(asked)
    assert str(refusal.value).endswith(f"; type {remedy}")
    # What it says to type is then taken.
    setting, _, value = remedy.partition("=")
    if setting == "precision":
        instead = {"fp32": Precision(), "fp16": FP16, "bf16": BF16}[value]
    else:
        instead = replace(precision, compute=Dtype[value])
    rules.check(replace(asked, precision=instead))


@pytest.mark.parametrize("optimizer", [AdamW8bit(lr=1e-4), Adam8bit(lr=1e-4)])
def test_8_bit_optimizers_are_refused_on_a_mac(run: Run, optimizer):
    with pytest.raises(UsageError, match="type optimizer=adamw$"):
        rules.check(replace(run, hardware=profile("m2_max"), optimizer=optimizer))


@pytest.mark.parametrize("name", [name for name in GROUPS["hardware"] if name not in ("auto", "cpu", "m2_max", "t4")])
@pytest.mark.parametrize("precision", [Precision(), BF16, FP16, FP8, MIXED])
def test_newer_cards_take_every_precision_and_optimizer(run: Run, name: str, precision: Precision):
    rules.check(replace(run, hardware=profile(name), precision=precision, optimizer=AdamW8bit(lr=1e-4)))


def test_a_profile_of_a_machine_that_is_not_this_one_is_refused_when_it_is_opened(run: Run):
    missing = "cuda" if not torch.cuda.is_available() else "mps"
    with pytest.raises(UsageError, match=f"hardware.device={missing}"):
        open_device(replace(run, hardware=Hardware(device=Device[missing])))


def test_the_facts_of_an_open_device_are_asked_where_no_profile_gives_them():
    card = detect_card(torch.device("cpu"))
    assert (card.bfloat16, card.float16, card.bitsandbytes) == (True, False, True)
    assert card.memory_gib > 0.5


def test_with_no_profile_the_opened_device_refuses_before_any_weights(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    data = ["dataset.pairs=2", "dataset.held_out=1", "tracking=none", f"out={tmp_path}"]
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine's own device can do more")
    assert main([*tiny, *data, "precision=fp16"]) == 64
    assert "type precision=bf16" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_one_experiment_on_two_profiles_has_one_identity_and_equal_losses(tiny: list[str], tmp_path: Path):
    experiment = [
        "dataset.pairs=6",
        "dataset.held_out=2",
        "steps=3",
        "batch=5",
        "method.rank=2",
        "evaluation.every=3",
        "evaluation.images=1",
        "sample.steps=1",
        "tracking=none",
    ]
    found = {}
    # The second as a small card is used: sample by sample, with checkpointing, and data read beside it.
    for name, how in {
        "cpu": [],
        "rtx3060": ["hardware.device=cpu", "hardware.micro_batch=2", "hardware.workers=1"],
    }.items():
        assert main([*tiny, *experiment, f"hardware={name}", *how, f"out={tmp_path / name}"]) == 0
        (journal,) = (tmp_path / name).glob("*/journal.jsonl")
        values = [record["values"] for _, record in read_records(journal) if "values" in record]
        losses = [
            value[key] for value in values for key in ("train/loss", "train/grad_norm", "val/loss") if key in value
        ]
        found[journal.parent.name, name] = losses
    (one, here), (other, there) = found
    assert (one, here, there) == (other, "cpu", "rtx3060")
    assert found[one, here] == pytest.approx(found[other, there], abs=1e-6)
    assert len(found[one, here]) == 8
