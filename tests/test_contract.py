"""What the trainer asks of a model family, and what it refuses in words; see `trainer/model/__init__.py`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from families import Tiny
from synthetic import noise_sample

from trainer.config import rules
from trainer.config.compose import compose_config, to_run
from trainer.config.groups import GROUPS
from trainer.config.schema import Run
from trainer.config.sections import Export, Format
from trainer.core.batch import RESERVED, Batch
from trainer.core.dtypes import Dtype
from trainer.core.errors import UsageError
from trainer.evaluation.sampling import generate_images
from trainer.hardware import Hardware
from trainer.model import Family, Recipe, encoder_dtypes
from trainer.model.sd15 import SD15
from trainer.model.sdxl import SDXL
from trainer.stages.data_report import describe_long_captions
from trainer.training.build import apply_hardware
from trainer.training.data import check_names, unconditional_samples

CPU = torch.device("cpu")


@pytest.fixture
def sd15(tiny_checkpoint) -> SD15:
    family = tiny_checkpoint("sd15").family()
    assert isinstance(family, SD15)
    return family


@pytest.fixture
def sdxl(tiny_checkpoint) -> SDXL:
    family = tiny_checkpoint("sdxl").family()
    assert isinstance(family, SDXL)
    return family


# Sampling


class Decoder:
    """An encoder whose images are the first three channels of the latents."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, :3].sigmoid()


def sampled_times(family: SD15, guidance: float, calls: list[tuple[str, float]]) -> None:
    """Appends what is predicted while an image is generated: `caption` or `none`, and the time."""
    example = {"latents": torch.zeros(4, 4, 4), "prompt": torch.ones(1)}
    sample = noise_sample("a photo", 32, 32)
    without = [example | {"prompt": torch.zeros(1)}] * len(unconditional_samples(run_of(family, guidance), [sample]))

    def predict(latents: torch.Tensor, t: torch.Tensor, conditions: Batch, guidance: float) -> torch.Tensor:
        calls.append(("caption" if conditions["prompt"].any() else "none", t.item()))
        return torch.tanh(latents)

    encoder: Any = Decoder()
    options = {"steps": 3, "guidance": guidance, "device": CPU, "batch_size": 1}
    for _ in generate_images(family, predict, encoder, [example], without or None, [0], **options):
        pass


def run_of(family: SD15, guidance: float = 1.0) -> Run:
    run = Run(model=family)
    return dataclasses.replace(run, sample=dataclasses.replace(run.sample, guidance=guidance, steps=3))


@dataclass(slots=True)
class OwnSampler(SD15):
    def sampling_times(self, steps: int, height: int, width: int) -> list[float]:
        return [float(height * 100 - i * width) for i in range(steps)] + [-1.0]

    def apply_guidance(
        self, conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float, t: torch.Tensor
    ) -> torch.Tensor:
        # Guidance in the first step alone.
        return torch.where(t == 400, torch.full_like(conditional, guidance), conditional)


def test_family_has_its_own_sampling_times_and_guidance(sd15: SD15):
    family = OwnSampler(path=sd15.path)
    calls: list[tuple[str, float]] = []
    sampled_times(family, 3.0, calls)
    assert calls == [(kind, t) for t in (400.0, 396.0, 392.0) for kind in ("caption", "none")]


@pytest.mark.parametrize(("guidance", "passes"), [(1.5, 6), (1.0, 3), (0.5, 3), (0.0, 3)])
def test_guidance_of_one_or_less_predicts_once(sd15: SD15, guidance: float, passes: int):
    calls: list[tuple[str, float]] = []
    sampled_times(sd15, guidance, calls)
    assert len(calls) == passes


# Names of cached tensors


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_reserved_names_of_cached_tensors_are_refused(name: str):
    names = dict.fromkeys(("latents", "latents_std", "prompt", name), Recipe((), ""))
    message = f"trainer.model.sd15: SD15.recipes names a cached tensor {name}, and training adds one of this name"
    with pytest.raises(UsageError, match=re.escape(message)):
        check_names(SD15(path="folder"), names)


# Formats


@dataclass(slots=True)
class WithoutLoader(SD15):
    unsupported_formats: ClassVar[Mapping[str, str]] = {"diffusers": "its pipeline has no LoRA loader"}


def test_formats_that_a_family_lacks_are_refused_and_not_the_default():
    composed = to_run(compose_config(["model=sd15", "method=lora"]))
    run = dataclasses.replace(composed, model=WithoutLoader(path="folder"))
    assert run.export.select(run.method.formats, run.model.unsupported_formats) == [Format.peft]
    run = dataclasses.replace(run, export=Export([Format.peft, Format.diffusers]))
    message = (
        "export.formats: diffusers does not exist for this model (its pipeline has no LoRA loader); type "
        "export.formats=[peft,comfyui,pipeline,single_file]"
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        rules.check(run)


@pytest.mark.parametrize("name", sorted(GROUPS["model"]))
def test_families_write_every_format_of_their_methods_or_say_why_not(name: str):
    kind = GROUPS["model"][name]
    formats = {format for method in kind.methods for format in GROUPS["method"][method].formats}
    assert kind.unsupported_formats.keys() <= formats and all(kind.unsupported_formats.values())
    for format, method in (("diffusers", "pipeline_class"), ("comfyui", "comfyui_key")):
        if format in formats - kind.unsupported_formats.keys():
            assert getattr(kind, method).__qualname__ != f"Family.{method}", format


# Hardware


@pytest.mark.parametrize(
    ("setting", "method", "attribute"),
    [
        ("gradient_checkpointing", "enable_gradient_checkpointing", "_supports_gradient_checkpointing"),
        ("compile", "compile_repeated_blocks", "_repeated_blocks"),
    ],
)
def test_networks_that_cannot_follow_a_hardware_setting_are_refused(
    sd15: SD15, setting: str, method: str, attribute: str
):
    run = dataclasses.replace(run_of(sd15), hardware=Hardware(**{setting: True}))
    network: Any = sd15.meta_model()
    apply_hardware(run, network)
    setattr(network, attribute, None)
    with pytest.raises(UsageError, match=rf"{setting}=true: UNet2DConditionModel.*; type hardware.{setting}=false"):
        apply_hardware(run, network)
    with pytest.raises(UsageError, match=rf"Linear, the network of this model.*has no attribute '{method}'"):
        apply_hardware(run, torch.nn.Linear(1, 1))


# Encoders


def test_each_encoder_may_have_its_dtype_which_decides_what_it_makes(tiny: Tiny):
    family = dataclasses.replace(tiny.family(), encoder_dtype=Dtype.float32)
    if not family.encoders:
        pytest.skip("all that this family caches is made without its encoders")
    controls = min(1, max(family.control_counts))
    sample = noise_sample("make it night", 32, 48, controls)

    def encode(family: Family) -> tuple[dict[str, Recipe], dict[str, torch.Tensor]]:
        recipes = family.recipes(dict.fromkeys(family.components, ""), controls)
        encoder = family.build_encoder(CPU)
        return recipes, {name: encoder.encode(name, sample) for name in recipes}

    recipes, tensors = encode(family)
    for name in family.encoders:
        other_recipes, others = encode(dataclasses.replace(family, encoder_dtypes={name: Dtype.bfloat16}))
        changed = {part for part in recipes if recipes[part] != other_recipes[part]}
        assert any(not torch.equal(tensors[part], others[part]) for part in changed), name
        assert all(torch.equal(tensors[part], others[part]) for part in recipes.keys() - changed), name
        assert changed != recipes.keys() or len(family.encoders) == 1, name


def test_unknown_encoders_are_refused(sdxl: SDXL):
    # The VAE has its own setting.
    with pytest.raises(UsageError, match="its keys can be text_encoder, text_encoder_2"):
        dataclasses.replace(sdxl, encoder_dtypes={"vae": Dtype.bfloat16})


def test_large_encoders_in_float32_are_warned_of(sdxl: SDXL, monkeypatch: pytest.MonkeyPatch):
    assert not any("float32" in warning for warning in sdxl.warnings())
    numbers = sum(parameter.numel() for parameter in sdxl.meta_component("text_encoder").parameters())
    monkeypatch.setattr(encoder_dtypes, "LARGE_ENCODER_BYTES", 4 * numbers - 1)
    assert any(warning.startswith("text_encoder takes") for warning in sdxl.warnings())
    monkeypatch.setattr(encoder_dtypes, "LARGE_ENCODER_BYTES", 4 * numbers)
    assert not any(warning.startswith("text_encoder takes") for warning in sdxl.warnings())


# Captions


@dataclass(slots=True)
class TwoTokenizers(SD15):
    def count_caption_tokens(self, captions: Any) -> dict[str, tuple[list[int], int]]:
        counts = [len(caption.split()) for caption in captions]
        return {"tokenizer": (counts, 2), "tokenizer_3": (counts, 4)}


def test_each_tokenizer_has_its_limit(tmp_path: Path):
    (tmp_path / "tokenizer").mkdir()
    samples = [noise_sample("word " * length, 32, 32).sample for length in (1, 3, 5)]
    lines = describe_long_captions(run_of(TwoTokenizers(path=str(tmp_path))), samples)
    assert len(lines) == 2
    assert lines[0].startswith("2 captions are longer than the 2 tokens that the model reads (tokenizer),")
    assert lines[1].startswith("1 captions are longer than the 4 tokens that the model reads (tokenizer_3),")
