"""Z-Image; see tests/families/__init__.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from parity import our_pictures
from safetensors.torch import load_file
from synthetic import DEVICE, normal

from families import Case, Pictures, Published, Request
from trainer.core.errors import UsageError
from trainer.model.z_image import ZImage
from trainer.model.zimage.tiny import TEXT_LENGTH, save_tiny_checkpoint

BLOCKS = r"(layers|noise_refiner|context_refiner)\.\d+"


class ZImageCase(Case):
    # Of these, only the second has more tokens than the first multiple to which the transformer fills up texts.
    captions = ("make it night", "paint the photo of the night and make it a photo of paint")
    pictures = {
        "guidance": Pictures(guidance=5.0),
        "normalized guidance": Pictures(guidance=5.0, settings={"cfg_normalization": 0.9}, lora=False),
        "no guidance": Pictures(lora=False),
    }
    extra_targets = (
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "layers.0.adaLN_modulation.0", "cap_embedder.1"),
        *("all_x_embedder.2-1", "all_final_layer.2-1.linear", "t_embedder.mlp.0"),
    )
    lora_std = 0.1
    # z_image_to_diffusers in comfy/utils.py
    comfyui_layers = (
        rf"{BLOCKS}\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)"
        r"|cap_embedder\.1|all_x_embedder\.2-1|all_final_layer\.2-1\.(linear|adaLN_modulation\.1)|t_embedder\.mlp\.[02]"
    )
    published = {
        "Z-Image": Published(
            "Tongyi-MAI/Z-Image", 6_154_908_736, trainable=8_355_840, layers=136, configs={"transformer": {}}
        ),
    }

    golden = {
        "torch 2.13.0, AVX512": [
            1.369457511341666,
            0.23920605659656172,
            1.360056994045379,
            0.18616056471188025,
            1.4352387877854382,
            0.20184802633384483,
            1.353062637296518,
            0.1852701791709636,
            1.389805661679925,
            0.23376566122308048,
        ],
    }

    def denoiser_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The transformer first normalizes the states of the text, which are large here."""
        text = inputs["cap_feats"]
        return inputs | {"cap_feats": torch.nn.functional.rms_norm(text, text.shape[-1:])}

    def generate(self, pipeline: Any, request: Request) -> np.ndarray:
        guidance = request.pictures.guidance
        return pipeline(
            prompt=list(request.captions),
            height=request.height,
            width=request.width,
            num_inference_steps=request.pictures.steps,
            guidance_scale=guidance if guidance > 1 else 0.0,
            cfg_normalization=request.family.cfg_normalization,
            cfg_truncation=request.family.cfg_truncation,
            latents=request.noise,
            max_sequence_length=request.family.text_length,
            output_type="np",
        ).images


CASE = ZImageCase()


def test_pictures_whose_guidance_ends_early_match_the_pipeline(family: ZImage):
    """The pipeline leaves out the passes without caption of such steps, the program ignores their results."""
    steps, pictures = 6, Pictures(guidance=5.0, steps=6)
    times = family.sampling_times(steps, 6, 4)[:-1]
    family = dataclasses.replace(family, cfg_truncation=0.3)
    assert 0 < sum(1 - t > 0.3 for t in times) < steps
    request = CASE.request(family, pictures)
    network, pipeline = family.load_network(torch.float32, DEVICE), CASE.load_pipeline(family)
    found = our_pictures(request, network)
    np.testing.assert_allclose(found, CASE.generate(pipeline, request), rtol=0, atol=1e-5)
    guided = our_pictures(CASE.request(dataclasses.replace(family, cfg_truncation=1.0), pictures), network)
    assert np.abs(found - guided).max() > 1e-3


def test_only_predictions_that_are_too_large_are_normalized(family: ZImage):
    family = dataclasses.replace(family, cfg_normalization=1.0)
    conditional = normal((2, 16, 4, 4), "conditional")
    unconditional = torch.stack([2 * conditional[0], conditional[1] / 2])
    guided = family.apply_guidance(conditional, unconditional, 0.5, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(guided, torch.stack([conditional[0] / 2, conditional[1]]))


@pytest.mark.parametrize("options", [{"shift": 6.0}, {"shift": 3.0}, {"use_dynamic_shifting": True}])
def test_sampling_times_are_those_of_the_scheduler(options: dict[str, Any], tmp_path: Path):
    save_tiny_checkpoint(tmp_path, **options)
    family = ZImage(path=str(tmp_path), text_length=TEXT_LENGTH)
    family.check_configs()
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**options)
    # 1024 tokens, which are a fifth of the way from exp(0.5) to exp(1.15).
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8), mu=0.63)
    assert family.sampling_times(8, 64, 64) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_prompts_match_the_pipeline_and_are_cut_like_there(family: ZImage):
    family = dataclasses.replace(family, text_length=24)
    (counts, limit) = family.count_caption_tokens(CASE.captions)["tokenizer"]
    assert min(counts) < limit == 24 < max(counts)
    encoder = family.build_encoder(DEVICE)
    samples = CASE.request(family, Pictures()).samples
    expected, _ = CASE.load_pipeline(family).encode_prompt(list(CASE.captions), max_sequence_length=24)
    assert [len(prompt) for prompt in expected] == [min(count, 24) for count in counts]
    for sample, prompt in zip(samples, expected, strict=True):
        torch.testing.assert_close(encoder.encode("prompt", sample), prompt.detach().cpu(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_length": 0}, "type 512"),
        ({"cfg_normalization": -1.0}, "cannot be negative"),
        ({"cfg_truncation": 1.5}, "from 0 to 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        ZImage(path="model", **settings)


def test_texts_and_images_beyond_the_positions_are_refused(family: ZImage):
    dataclasses.replace(family, text_length=992).check_configs()
    with pytest.raises(UsageError, match="type model.text_length=992"):
        dataclasses.replace(family, text_length=993).check_configs()
    family.shapes(8192, 32)
    with pytest.raises(UsageError, match="of 32x8208 px is too large: .* up to 8192 px"):
        family.shapes(8208, 32)


def test_original_layout_is_the_opposite_of_the_conversion_of_diffusers(family: ZImage, tmp_path: Path):
    tensors = load_file(Path(family.path or "") / "transformer" / "diffusion_pytorch_model.safetensors")
    path = tmp_path / "z_image.safetensors"
    family.save_single_file(tensors.__getitem__, torch.float32, path)
    converted = convert_z_image_transformer_checkpoint_to_diffusers(load_file(path))
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensors[name]) for name in tensors)
    network = dataclasses.replace(family, transformer=str(path)).load_network(torch.float32)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in network.state_dict().items())
