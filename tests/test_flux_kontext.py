"""FLUX Kontext compared with diffusers' pipeline."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import (
    LORA_FORMATS,
    TrainedLora,
    find_comfyui_layer,
    load_adapter_export,
    merge_comfyui_lora,
    record_calls,
    train_lora,
)
from synthetic import DEVICE, NoiseSource, normal

from trainer.config.sections import Format
from trainer.core.batch import Batch, collate, get_conditions
from trainer.dataset.sample import Sample
from trainer.dataset.transform import Transform
from trainer.model.flux.tokens import pack
from trainer.model.flux_kontext import FluxKontext

HEIGHT, WIDTH = 32, 48
CAPTIONS = ["make it night", "paint the photo"]
STEPS = 3
GUIDANCE = 2.5


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> FluxKontext:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("flux")
    FluxKontext.save_tiny_checkpoint(folder)
    return FluxKontext(path=str(folder), text_length=8)


def load_pipeline(family: FluxKontext) -> Any:
    pipeline = family.pipeline_class().from_pretrained(family.path, torch_dtype=torch.float32).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def control_images(width: int, height: int) -> list[NoiseSource]:
    return [NoiseSource(f"control {i}", width, height) for i in range(len(CAPTIONS))]


def initial_noise(family: FluxKontext) -> torch.Tensor:
    shape = family.shapes(HEIGHT, WIDTH)["latents"]
    return torch.stack([normal(shape, "noise", i) for i in range(len(CAPTIONS))])


def encode_conditions(family: FluxKontext, control_size: tuple[int, int]) -> Batch:
    encoder, target = family.build_encoder(DEVICE), NoiseSource("target", WIDTH, HEIGHT)
    transform = Transform(((WIDTH, HEIGHT),), (control_size,))
    samples = [
        transform.apply(Sample(caption, target, caption, (control,)))
        for control, caption in zip(control_images(*control_size), CAPTIONS, strict=True)
    ]
    batch = collate(
        [{name: encoder.encode(name, sample) for name in ("control", "prompt", "pooled")} for sample in samples]
    )
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def pipeline_images(family: FluxKontext, pipeline: Any, control_size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    controls = [torch.from_numpy(control.pixels()).permute(2, 0, 1) / 255 for control in control_images(*control_size)]
    return pipeline(
        image=torch.stack(controls),
        prompt=CAPTIONS,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=pack(initial_noise(family)),
        max_area=HEIGHT * WIDTH,
        _auto_resize=False,
        max_sequence_length=family.text_length,
        output_type="np",
    ).images


def our_images(family: FluxKontext, network: Any, control_size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    conditions, noise = encode_conditions(family, control_size), initial_noise(family)

    def predict(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return family.predict(network, latents, t, conditions, GUIDANCE)

    with torch.no_grad():
        latents = family.sample(predict, noise, STEPS)
        return family.build_encoder(DEVICE).decode(latents).permute(0, 2, 3, 1).cpu().numpy()


@pytest.mark.parametrize("control_size", [(WIDTH, HEIGHT), (80, 64)], ids=["size of the target", "another size"])
def test_transformer_inputs_predictions_and_images_match_the_pipeline(
    family: FluxKontext, control_size: tuple[int, int]
):
    pipeline, network = load_pipeline(family), family.load_network(torch.float32, DEVICE).eval()
    expected, found = [], []
    record_calls(pipeline.transformer, expected)
    record_calls(network, found)
    ours, theirs = (
        our_images(family, network, control_size),
        pipeline_images(family, pipeline, control_size),
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert len(found) == len(expected) == STEPS
    for our_call, their_call in zip(found, expected, strict=True):
        tensors = {name for name, value in our_call.items() if torch.is_tensor(value)}
        assert tensors >= {
            "hidden_states",
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
            "img_ids",
            "txt_ids",
            "guidance",
            "result",
        }
        for name in tensors:
            torch.testing.assert_close(our_call[name], their_call[name], rtol=0, atol=1e-5, msg=name)
        assert our_call["result"].abs().mean() > 0.01


def test_position_ids_distinguish_two_control_images(family: FluxKontext):
    """diffusers' pipeline reads one control image. The paper numbers them, and the transformer is the same."""
    network, calls = family.load_network(torch.float32, DEVICE).eval(), []
    forward = network.forward
    record_calls(network, calls)
    encoder = family.build_encoder(DEVICE)
    first, second = control_images(WIDTH, HEIGHT)
    controls = (first, dataclasses.replace(second, width=32, height=64))
    sample = Transform(((WIDTH, HEIGHT),), ((WIDTH, HEIGHT), (32, 64))).apply(
        Sample("id", NoiseSource("target", WIDTH, HEIGHT), CAPTIONS[0], controls)
    )
    names = family.recipes(dict.fromkeys(family.components, ""), 2)
    batch = collate([{name: encoder.encode(name, sample).to(DEVICE) for name in names}])
    noise = initial_noise(family)[:1]
    with torch.no_grad():
        found = family.predict(network, noise, torch.tensor([0.5], device=DEVICE), get_conditions(batch))
    (call,) = calls
    pipeline = load_pipeline(family)
    # In tokens: 2 x 3 for the target and the first control image, 4 x 2 for the second.
    image_ids = [
        pipeline._prepare_latent_image_ids(1, *size, DEVICE, torch.float32) for size in [(2, 3), (2, 3), (4, 2)]
    ]
    for number, ids in enumerate(image_ids):
        ids[:, 0] = number
    assert torch.equal(call["img_ids"], torch.cat(image_ids))
    tokens = [
        pipeline._pack_latents(latents, 1, latents.shape[1], *latents.shape[2:])
        for latents in (noise, batch["control"], batch["control_2"])
    ]
    del call["result"]
    with torch.no_grad():
        expected = forward(**call | {"hidden_states": torch.cat(tokens, 1)})[0]
    torch.testing.assert_close(pack(found), expected[:, : tokens[0].shape[1]], rtol=0, atol=1e-5)


def test_time_shift_has_the_published_values(family: FluxKontext):
    # The latents of the published VAE have an eighth of the image's side.
    assert [round(family.time_shift(side // 8, side // 8), 2) for side in (512, 768, 1024)] == [1.88, 2.33, 3.16]


@pytest.fixture(scope="module")
def lora(family: FluxKontext) -> TrainedLora:
    network = family.load_network(torch.float32, DEVICE)
    extra_targets = ["proj_mlp", "proj_out", "norm_out.linear"]
    return train_lora(family, network, extra_targets, lambda network: our_images(family, network), std=0.3)


@pytest.mark.parametrize("format", LORA_FORMATS)
def test_pipeline_with_an_export_generates_the_images_of_the_trained_network(
    lora: TrainedLora, format: Format, tmp_path: Path
):
    family, path = lora.family, lora.export(format, tmp_path)
    if format is Format.pipeline:
        merged = dataclasses.replace(family, path=str(path))
        network = merged.load_network(torch.float32, DEVICE).eval()
        np.testing.assert_allclose(our_images(merged, network), lora.images, atol=1e-5)
        pipeline = load_pipeline(merged)
    else:
        pipeline = load_pipeline(family)
        load_adapter_export(pipeline, format, path)
    np.testing.assert_allclose(pipeline_images(family, pipeline), lora.images, atol=1e-5)


COMFYUI_LAYERS = (
    r"(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out|norm(1|1_context)?\.linear)"
    r"|x_embedder|context_embedder|proj_out|norm_out\.linear|time_text_embed\.\w+\.linear_[12]"
)
"""The layers that ComfyUI knows, each after `transformer.` (flux_to_diffusers in its comfy/utils.py)."""


def test_comfyui_finds_every_layer_and_its_alpha(lora: TrainedLora, tmp_path: Path):
    network = lora.family.load_network(torch.float32, DEVICE).eval()
    find_layer = partial(find_comfyui_layer, network, "transformer.", COMFYUI_LAYERS)
    merge_comfyui_lora(lora.export(Format.comfyui, tmp_path), find_layer)
    np.testing.assert_allclose(our_images(lora.family, network), lora.images, atol=1e-5)
