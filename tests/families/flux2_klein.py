"""FLUX.2 [klein]; see tests/families/__init__.py."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from parity import our_pictures
from safetensors.torch import load_file
from synthetic import DEVICE

from families import Case, Pictures, Published, Request
from trainer.core.digests import Digests
from trainer.core.errors import UsageError
from trainer.model.flux2.tiny import TEXT_LAYERS, TEXT_LENGTH, save_tiny_checkpoint
from trainer.model.flux2_klein import Flux2Klein

BASE_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
BASE_9B = BASE_4B | {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}


class Flux2KleinCase(Case):
    pictures = {
        "guidance": Pictures(guidance=4.0),
        "no guidance": Pictures(lora=False),
        # The pipeline takes no smaller control images.
        "controls": Pictures(guidance=4.0, control_sizes=((64, 80), (96, 64)), lora=False),
        "many steps": Pictures(steps=12, lora=False),
    }
    extra_targets = (
        *("attn.add_q_proj", "attn.to_add_out", "ff.linear_in", "ff_context.linear_out", "norm_out.linear", "proj_out"),
        *("x_embedder", "context_embedder"),
    )
    # flux_to_diffusers in comfy/utils.py
    comfyui_prefix = "transformer."
    comfyui_layers = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.linear_(in|out))"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
        r"|x_embedder|context_embedder|proj_out|norm_out\.linear"
    )
    published = {
        "base 4B": Published(
            "black-forest-labs/FLUX.2-klein-base-4B",
            3_875_544_576,
            trainable=8_355_840,
            layers=60,
            configs={"transformer": BASE_4B},
        ),
        "base 9B": Published(
            "black-forest-labs/FLUX.2-klein-base-9B",
            9_078_581_248,
            trainable=13_893_632,
            layers=80,
            configs={"transformer": BASE_9B},
        ),
    }
    golden = {
        "torch 2.13.0, AVX512": [
            1.2785652631521502,
            0.02493942266820245,
            1.5335897397324816,
            0.04545841821571381,
            1.5089373425897663,
            0.03481122573991508,
            1.5678980320606488,
            0.02440672130784202,
            1.4652704353375459,
            0.031101762684014655,
        ],
    }

    def generate(self, pipeline: Any, request: Request) -> np.ndarray:
        """One picture at a time: of several prompts, all have the same control images."""
        return np.concatenate([self._generate(pipeline, one) for one in request.split()])

    def _generate(self, pipeline: Any, request: Request) -> np.ndarray:
        (controls,) = request.controls
        return pipeline(
            image=controls or None,
            prompt=request.captions[0],
            height=request.height,
            width=request.width,
            num_inference_steps=request.pictures.steps,
            guidance_scale=request.pictures.guidance,
            latents=request.noise,
            max_sequence_length=request.family.text_length,
            text_encoder_out_layers=tuple(request.family.text_layers),
            output_type="np",
        ).images

    def latents(self, pipeline: Any, pixels: torch.Tensor) -> torch.Tensor:
        return pipeline._encode_vae_image(pixels, None)


CASE = Flux2KleinCase()


def test_a_distilled_checkpoint_ignores_the_guidance_as_its_pipeline_does(tmp_path: Path, family: Flux2Klein):
    assert family.classifier_free_guidance
    save_tiny_checkpoint(tmp_path, is_distilled=True)
    distilled = dataclasses.replace(family, path=str(tmp_path))
    distilled.check_configs()
    assert not distilled.classifier_free_guidance
    request = CASE.request(distilled, Pictures(guidance=4.0))
    network = distilled.load_network(torch.float32, DEVICE)
    found, expected = our_pictures(request, network), CASE.generate(CASE.load_pipeline(distilled), request)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [16, 64, 65, 66])
@pytest.mark.parametrize("steps", [4, 28, 50])
def test_the_shift_depends_on_tokens_and_steps_as_in_the_pipeline(side: int, steps: int, family: Flux2Klein):
    assert family.time_shift(side, side, steps) == pytest.approx(np.exp(compute_empirical_mu(side**2, steps)))


def test_the_shift_in_training_is_that_of_flux_1(family: Flux2Klein):
    """exp(0.5) at 256 tokens and exp(1.15) at 4096, as in the scheduler of FLUX.1."""
    assert family.time_shift(16, 16) == pytest.approx(np.exp(0.5), rel=1e-3)
    assert family.time_shift(64, 64) == pytest.approx(np.exp(1.15), rel=1e-3)


@pytest.mark.parametrize("layers", [[1], [1, 4], [0, 1], []])
def test_layers_that_the_language_model_lacks_are_refused(layers: list[int], family: Flux2Klein):
    with pytest.raises(UsageError, match=r"type \[9,18,27\]"):
        dataclasses.replace(family, text_layers=layers).check_configs()


def test_another_chat_template_is_another_tokenizer(family: Flux2Klein, tmp_path: Path, digests: Digests):
    """It decides the prompt, so it is part of the digest, and of exported checkpoints."""
    before = family.component_digests(digests)
    copy = Path(shutil.copytree(family.path or "", tmp_path / "copy"))
    (copy / "tokenizer" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    changed = dataclasses.replace(family, path=str(copy)).component_digests(digests)
    assert {name for name in before if before[name] != changed[name]} == {"tokenizer"}
    family.save_pipeline([], tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer" / "chat_template.jinja").is_file()


def test_tokens_of_the_template_are_counted(family: Flux2Klein):
    (counts, limit) = family.count_caption_tokens(["make it night", "make it night night"])["tokenizer"]
    assert limit == TEXT_LENGTH and len(TEXT_LAYERS) == 2
    assert counts[0] < counts[1] <= limit


def test_original_layout_is_the_opposite_of_the_conversion_of_diffusers(family: Flux2Klein, tmp_path: Path):
    tensors = load_file(Path(family.path or "") / "transformer" / "diffusion_pytorch_model.safetensors")
    path = tmp_path / "flux2.safetensors"
    family.save_single_file(tensors.__getitem__, torch.float32, path)
    converted = convert_flux2_transformer_checkpoint_to_diffusers(load_file(path))
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensors[name]) for name in tensors)
    network = dataclasses.replace(family, transformer=str(path)).load_network(torch.float32)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in network.state_dict().items())
