"""Each family compared with diffusers' own pipeline on its tiny checkpoint; see tests/families/__init__.py.

What reaches the denoiser (hence the encoders of prompts and control images, packing, positions and times), its
predictions, the pictures, latents of training images, and LoRA files read by pipelines and merged as ComfyUI does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, PARTS, Tiny, case_of, each_pictures, path_of
from parity import (
    LORA_FORMATS,
    TrainedLora,
    assert_same_passes,
    denoiser_of,
    load_peft_export,
    merge_comfyui_lora,
    our_pictures,
    passes,
    record_calls,
    train_lora,
)
from synthetic import DEVICE, NoiseSource

from trainer.config.sections import Format
from trainer.dataset.sample import Sample
from trainer.dataset.transform import TransformedSample
from trainer.model import Family


def same_pictures(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_says_how_its_pipeline_is_called(name: str):
    case = case_of(name)
    assert all(part in PARTS and reason for part, reason in case.left_out.items()), f"left_out names {', '.join(PARTS)}"
    if "pictures" in case.left_out:
        assert not case.pictures
        pytest.skip(case.left_out["pictures"])
    assert case.pictures, f"set pictures in {path_of(name)}, or say in left_out why there are none"
    guided = any(pictures.guidance > 1 for pictures in case.pictures.values())
    assert guided, f"set a guidance above 1 in some of the pictures in {path_of(name)}"


@pytest.mark.parametrize(("name", "key"), each_pictures())
def test_all_that_reaches_the_denoiser_and_the_pictures_match_the_pipeline(
    name: str, key: str, tiny_checkpoint: Callable[[str], Tiny]
):
    case = case_of(name)
    request = case.request(case.family(tiny_checkpoint(name)), case.pictures[key])
    pipeline, network = case.load_pipeline(request.family), request.family.load_network(torch.float32, DEVICE)
    ours, theirs = (record_calls(denoiser_of(request.family, holder)) for holder in (network, pipeline))
    found, expected = our_pictures(request, network), case.generate(pipeline, request)
    assert theirs, "the pipeline does not call its denoiser"
    assert_same_passes(passes(case, ours), passes(case, theirs), case.tolerance)
    same_pictures(found, expected, case.tolerance)
    # Equal captions or a dead network would match too.
    assert np.abs(found[0] - found[1]).max() > 0.01
    results = [one["result"] for one in passes(case, theirs)]
    assert all(torch.stack(list(result)).abs().mean() > 0.01 for result in results)
    if request.pictures.guidance > 1:
        plain = dataclasses.replace(request, pictures=dataclasses.replace(request.pictures, guidance=1.0))
        assert np.abs(our_pictures(plain, network) - found).max() > 10 * case.tolerance, "guidance changes nothing"


@pytest.mark.parametrize("name", FAMILIES)
def test_latents_of_images_match_the_pipeline(name: str, tiny_checkpoint: Callable[[str], Tiny]):
    case = case_of(name)
    case.need("pictures")
    family = case.family(tiny_checkpoint(name))
    image = NoiseSource("target", 48, 32)
    pixels = torch.from_numpy(image.pixels()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = case.latents(case.load_pipeline(family), pixels.to(DEVICE))[0].cpu()
    found = family.build_encoder(DEVICE).encode("latents", TransformedSample(Sample("1", image, ""), 48, 32))
    torch.testing.assert_close(found, expected, rtol=0, atol=case.tolerance)


# LoRA exports

EACH_LORA = pytest.mark.parametrize(
    ("name", "key"), each_pictures(lambda family, pictures: "lora" in family.methods and pictures.lora)
)


def need_format(family: Family, format: Format) -> None:
    if format.name in family.unsupported_formats:
        pytest.skip(family.unsupported_formats[format.name])


@pytest.fixture(scope="module")
def trained_lora(tiny_checkpoint: Callable[[str], Tiny]) -> Callable[[str, str], TrainedLora]:
    """Returns a LoRA for these pictures of a family, trained when it is first asked for."""

    @cache
    def train(name: str, key: str) -> TrainedLora:
        case = case_of(name)
        return train_lora(case, case.request(case.family(tiny_checkpoint(name)), case.pictures[key]))

    return train


@EACH_LORA
@pytest.mark.parametrize("format", LORA_FORMATS, ids=lambda format: format.name)
def test_pipeline_with_an_export_generates_the_pictures_of_the_trained_network(
    name: str, key: str, format: Format, trained_lora: Callable[[str, str], TrainedLora], tmp_path: Path
):
    lora = trained_lora(name, key)
    case, request, family = lora.case, lora.request, lora.family
    need_format(family, format)
    if format is Format.comfyui and Format.diffusers.name in family.unsupported_formats:
        pytest.skip(
            "diffusers reads no LoRA of this model; test_comfyui_finds_every_layer_and_its_alpha merges the file"
        )
    path = lora.export(format, tmp_path)
    if format is Format.pipeline:
        family = dataclasses.replace(family, path=str(path))
        merged = dataclasses.replace(request, family=family)
        network = family.load_network(torch.float32, DEVICE)
        same_pictures(our_pictures(merged, network), lora.pictures, case.tolerance)
    pipeline: Any = case.load_pipeline(family)
    if format is Format.peft:
        load_peft_export(family, pipeline, path)
    elif format is not Format.pipeline:
        pipeline.load_lora_weights(path.parent, weight_name=path.name)
    same_pictures(case.generate(pipeline, request), lora.pictures, case.tolerance)


@EACH_LORA
def test_comfyui_finds_every_layer_and_its_alpha(
    name: str, key: str, trained_lora: Callable[[str, str], TrainedLora], tmp_path: Path
):
    lora = trained_lora(name, key)
    case, family = lora.case, lora.family
    need_format(family, Format.comfyui)
    network = family.load_network(torch.float32, DEVICE)
    path = lora.export(Format.comfyui, tmp_path)
    merge_comfyui_lora(path, partial(case.find_comfyui_layer, network), case.comfyui_factors)
    same_pictures(our_pictures(lora.request, network), lora.pictures, case.tolerance)
