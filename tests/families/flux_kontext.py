"""FLUX.1 Kontext; see tests/families/__init__.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from parity import record_calls
from synthetic import DEVICE, NoiseSource, normal

from families import Case, Pictures, Published, Request
from trainer.core.batch import collate, get_conditions
from trainer.dataset.sample import Sample
from trainer.dataset.transform import Resolution, Transform
from trainer.model.flux.tokens import pack
from trainer.model.flux_kontext import FluxKontext


class FluxKontextCase(Case):
    pictures = {
        "control": Pictures(guidance=2.5, control_sizes=((48, 32),)),
        "control of another size": Pictures(guidance=2.5, control_sizes=((80, 64),), lora=False),
    }
    extra_targets = ("proj_mlp", "proj_out", "norm_out.linear")
    # flux_to_diffusers in comfy/utils.py
    comfyui_prefix = "transformer."
    comfyui_layers = (
        r"(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out|norm(1|1_context)?\.linear)"
        r"|x_embedder|context_embedder|proj_out|norm_out\.linear|time_text_embed\.\w+\.linear_[12]"
    )
    published = {
        "Kontext": Published("black-forest-labs/FLUX.1-Kontext-dev", 11_901_408_320, trainable=9_338_880, layers=190)
    }
    golden = {
        "torch 2.13.0, AVX512": [
            1.3145386465805269,
            0.08949942101053893,
            1.3630077366238278,
            0.07970928489450042,
            1.4205035235804404,
            0.08625643831954395,
            1.4941573277788864,
            0.09233096794470201,
            1.3430457270085892,
            0.12535149505344456,
        ],
    }

    def generate(self, pipeline: Any, request: Request) -> np.ndarray:
        controls = [torch.from_numpy(np.array(control)).permute(2, 0, 1) / 255 for (control,) in request.controls]
        return pipeline(
            image=torch.stack(controls),
            prompt=list(request.captions),
            height=request.height,
            width=request.width,
            num_inference_steps=request.pictures.steps,
            guidance_scale=request.pictures.guidance,
            latents=pack(request.noise),
            max_area=request.height * request.width,
            _auto_resize=False,
            max_sequence_length=request.family.text_length,
            output_type="np",
        ).images


CASE = FluxKontextCase()


def test_position_ids_distinguish_two_control_images(family: FluxKontext):
    """diffusers' pipeline reads one control image. The paper numbers them, and the transformer is the same."""
    network = family.load_network(torch.float32, DEVICE)
    calls = record_calls(network)
    encoder = family.build_encoder(DEVICE)
    controls = (NoiseSource("control 0", 48, 32), NoiseSource("control 1", 32, 64))
    sample = Transform((Resolution("48x32", ((48, 32),)),), ((48, 32), (32, 64))).apply(
        Sample("id", NoiseSource("target", 48, 32), "make it night", controls)
    )
    names = family.recipes(dict.fromkeys(family.components, ""), 2)
    batch = collate([{name: encoder.encode(name, sample).to(DEVICE) for name in names}])
    noise = normal(family.shapes(32, 48)["latents"], "noise")[None]
    with torch.no_grad():
        found = family.predict(network, noise, torch.tensor([0.5], device=DEVICE), get_conditions(batch))
    (call,) = calls
    pipeline = CASE.load_pipeline(family)
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
        expected = network(**call | {"hidden_states": torch.cat(tokens, 1)})[0]
    torch.testing.assert_close(pack(found), expected[:, : tokens[0].shape[1]], rtol=0, atol=1e-5)


def test_time_shift_has_the_published_values(family: FluxKontext):
    # The latents of the published VAE have an eighth of the image's side.
    assert [round(family.time_shift(side // 8, side // 8), 2) for side in (512, 768, 1024)] == [1.88, 2.33, 3.16]


def test_configs_for_forecasts_come_with_the_program(tmp_path: Path):
    shapes = CASE.published_family("Kontext", tmp_path).shapes(1024, 1024, [(1024, 1024)])
    assert shapes["prompt"] == (512, 4096) and shapes["control"] == shapes["latents"] == (16, 128, 128)
