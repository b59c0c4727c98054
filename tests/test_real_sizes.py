"""The published networks, built without weights: how many parameters train with the default targets."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from trainer.config.groups import GROUPS
from trainer.method.lora import Lora
from trainer.method.trainable import trainable_parameters
from trainer.model.published.__main__ import clip_vocabulary

HUB_IDS = {
    "flux_kontext": "black-forest-labs/FLUX.1-Kontext-dev",
    "qwen_image_edit": "Qwen/Qwen-Image-Edit",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
COUNTS = {
    "flux_kontext": (11_901_408_320, 9_338_880, 190),
    # Published for this model at rank 8: 1,594,368 of 861,115,332.
    "sd15": (859_520_964, 1_594_368, 128),
    "qwen_image_edit": (20_430_401_088, 11_796_480, 240),
    "sdxl": (2_567_463_684, 11_612_160, 560),
}
"""Parameters of the network, trainable parameters at rank 8, and adapted layers."""


ENCODERS = {
    "sd15": {"vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {"vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
}
"""Parameters of the encoders."""


def published(name: str, **settings: Any) -> Any:
    """Returns a family with the configs that come with the program."""
    return GROUPS["model"][name](path=HUB_IDS[name], **settings).with_published_configs()


@pytest.mark.parametrize("name", HUB_IDS)
def test_parameter_counts_of_published_networks(name: str):
    family = published(name)
    network = family.meta_model()
    total = sum(parameter.numel() for parameter in network.parameters())
    Lora(rank=8, alpha=8.0).attach(network, family.target_modules, seed=0)
    parameters = trainable_parameters(network)
    trainable = sum(parameter.numel() for parameter in parameters.values())
    assert (total, trainable, len(parameters) // 2) == COUNTS[name]


@pytest.mark.parametrize("name", ENCODERS)
def test_single_file_needs_no_other_file(name: str, tmp_path: Path):
    """The configs and tokenizers are those of the published model."""
    path = tmp_path / "base.safetensors"
    path.touch()
    family = GROUPS["model"][name](path=str(path))
    assert family.folder() == published(name).folder()
    published(name).check_configs()
    for component, count in ENCODERS[name].items():
        assert sum(parameter.numel() for parameter in family.meta_component(component).parameters()) == count
    text = [320, 1125, 539, 320, 2368]
    for suffix, padding in zip(family.text_suffixes, (49407, 0), strict=False):
        assert family.tokenize(f"tokens{suffix}", "A photo  of a cat").tolist() == [
            49406,
            *text,
            49407,
            *[padding] * 70,
        ]
    # As OpenAI's own tokenizer says.
    assert family.tokenize("tokens", "l'été 12 🙂").tolist()[1:8] == [331, 262, 3459, 39694, 272, 273, 14860]


def test_vocabulary_of_clip_follows_from_its_merges():
    package = resources.files("trainer.model.published")
    assert "MIT License" in (package / "LICENSE.CLIP").read_text()
    for name in ENCODERS:
        for folder in (package / HUB_IDS[name]).iterdir():
            if folder.name.startswith("tokenizer"):
                _, *merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
                assert json.loads((folder / "vocab.json").read_text(encoding="utf-8")) == clip_vocabulary(merges)


def test_configs_for_forecasts_come_with_the_program():
    shapes = published("flux_kontext").shapes(1024, 1024, [(1024, 1024)])
    assert shapes["prompt"] == (512, 4096) and shapes["control"] == shapes["latents"] == (16, 128, 128)
    plus = GROUPS["model"]["qwen_image_edit"](path="Qwen/Qwen-Image-Edit-2509", vision_area=147456, numbered=True)
    assert plus.with_published_configs().shapes(1024, 1024, [(512, 512)])["prompt"] == (512 + 196, 3584)
    assert plus.with_published_configs().component_config("transformer")["num_layers"] == 60
