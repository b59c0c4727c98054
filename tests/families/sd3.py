"""Stable Diffusion 3 and 3.5; see tests/families/__init__.py."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from parity import our_pictures
from safetensors.torch import load_file, save_file
from synthetic import DEVICE

from families import Case, Pictures, Published, Request
from trainer.core.errors import DataError, UsageError
from trainer.core.files import write_json
from trainer.model import Family
from trainer.model.mmdit.tiny import T5_LENGTH, save_tiny_checkpoint
from trainer.model.sd3 import SD3

LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
MEDIUM = LARGE | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}


class SD3Case(Case):
    pictures = {
        "guidance": Pictures(guidance=7.0),
        "no guidance": Pictures(lora=False),
        "no T5": Pictures(guidance=4.5, settings={"t5": False}, lora=False),
    }
    extra_targets = ("attn2.to_q", "attn2.to_out.0", "norm1.linear", "ff.net.0.proj", "ff_context.net.2")
    # mmdit_to_diffusers in comfy/utils.py
    comfyui_prefix = "transformer."
    comfyui_layers = (
        r"transformer_blocks\.\d+\.(attn2?\.(to_[qkv]|to_out\.0)|attn\.(add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear)"
        r"|context_embedder|pos_embed\.proj|norm_out\.linear|proj_out|time_text_embed\.\w+\.linear_[12]"
    )
    unread = {"transformer_blocks.1.attn.*add*_q*": "the last block discards what the text attends to"}
    # Of the model cards' transformer/config.json.
    published = {
        "3 medium": Published(
            "stabilityai/stable-diffusion-3-medium-diffusers",
            2_028_328_000,
            trainable=4_694_016,
            layers=191,
            configs={"transformer": MEDIUM | {"qk_norm": None}},
        ),
        "3.5 medium": Published(
            "stabilityai/stable-diffusion-3.5-medium",
            2_243_171_520,
            trainable=4_694_016,
            layers=191,
            configs={"transformer": MEDIUM | {"pos_embed_max_size": 384, "dual_attention_layers": [*range(13)]}},
        ),
        "3.5 large": Published(
            "stabilityai/stable-diffusion-3.5-large",
            8_056_627_520,
            trainable=11_790_336,
            layers=303,
            configs={"transformer": LARGE},
        ),
    }
    golden = {
        "torch 2.13.0, AVX512": [
            1.3457069683732896,
            0.09428950646273403,
            1.2428482623373729,
            0.08270385837992314,
            1.417054871894602,
            0.12163745176576082,
            1.6660048769948759,
            0.13936205386311157,
            1.4003603722995877,
            0.14195681418953673,
        ],
    }

    def load_pipeline(self, family: Family) -> Any:
        options = {} if family.t5 else {"text_encoder_3": None, "tokenizer_3": None}
        return Case.load_pipeline(self, family, **options)

    def generate(self, pipeline: Any, request: Request) -> np.ndarray:
        return pipeline(
            prompt=list(request.captions),
            height=request.height,
            width=request.width,
            num_inference_steps=request.pictures.steps,
            guidance_scale=request.pictures.guidance,
            latents=request.noise,
            max_sequence_length=request.family.text_length,
            output_type="np",
        ).images


CASE = SD3Case()


@pytest.mark.parametrize(
    "transformer", [{"qk_norm": None, "dual_attention_layers": ()}, {"dual_attention_layers": ()}], ids=["3", "large"]
)
def test_pictures_of_other_sizes_of_the_model_match_the_pipeline(transformer: dict[str, Any], tmp_path: Path):
    """Their blocks have other layers than those of the tiny checkpoint. This one has no T5 either."""
    save_tiny_checkpoint(tmp_path, with_t5=False, **transformer)
    request = CASE.request(SD3(path=str(tmp_path), t5=False, text_length=T5_LENGTH), Pictures(guidance=7.0))
    network = request.family.load_network(torch.float32, DEVICE)
    found, expected = our_pictures(request, network), CASE.generate(CASE.load_pipeline(request.family), request)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 28])
@pytest.mark.parametrize("dynamic", [False, True])
def test_sampling_times_are_those_of_the_scheduler(steps: int, dynamic: bool, tmp_path: Path):
    """The pipeline leaves the sigmas to the scheduler."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    scheduler.save_pretrained(tmp_path / "scheduler")
    family = SD3(path=str(tmp_path))
    # The smallest and the largest number of tokens of the dynamic shift, which is exp(mu).
    for side, mu in ((32, 0.5), (128, 1.15)):
        scheduler.set_timesteps(steps, mu=mu if dynamic else None)
        assert family.sampling_times(steps, side, side) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_checkpoint_without_t5_says_what_to_type(tmp_path: Path):
    save_tiny_checkpoint(tmp_path, with_t5=False)
    with pytest.raises(UsageError, match="type model.t5=false"):
        SD3(path=str(tmp_path)).check_configs()
    SD3(path=str(tmp_path), t5=False).check_configs()


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "num_train_timesteps=500"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ("scheduler/scheduler_config.json", {"shift_terminal": 0.1}, "type model.objective.terminal=0.1"),
        ("transformer/config.json", {"in_channels": 16}, "in_channels=16"),
        ("transformer/config.json", {"patch_size": 1}, "patch_size=1"),
    ],
)
def test_config_that_is_not_followed_is_refused(
    file: str, changes: dict[str, Any], message: str, family: SD3, tmp_path: Path
):
    folder = Path(family.path or "")
    for path in folder.rglob("*.json"):
        copy = tmp_path / path.relative_to(folder)
        write_json(copy, json.loads(path.read_text()) | (changes if path == folder / file else {}))
    with pytest.raises((DataError, UsageError), match=message):
        dataclasses.replace(family, path=str(tmp_path)).check_configs()


def test_image_that_is_too_large_is_refused(family: SD3):
    assert family.shapes(32, 192)["latents"] == (4, 4, 24)
    with pytest.raises(UsageError, match="of 208x32 px is too large: .* up to 192 px"):
        family.shapes(32, 208)
    with pytest.raises(UsageError, match="of 32x208 px is too large"):
        family.predict(family.load_network(torch.float32), torch.zeros(1, 4, 26, 4), torch.ones(1), {})


def test_captions_are_counted_for_clip_and_for_t5(family: SD3):
    counts = family.count_caption_tokens(["make it night"])
    # CLIP's tokenizer adds a start and an end, T5's an end.
    assert counts == {"tokenizer": ([5], 8), "tokenizer_3": ([4], 10)}
    without_t5 = dataclasses.replace(family, t5=False)
    assert list(without_t5.count_caption_tokens(["make it night"])) == ["tokenizer"]


def test_original_layout_is_the_opposite_of_the_conversion_of_diffusers(family: SD3, tmp_path: Path):
    tensors = load_file(Path(family.path or "") / "transformer" / "diffusion_pytorch_model.safetensors")
    path = tmp_path / "mmdit.safetensors"
    family.save_single_file(tensors.__getitem__, torch.float32, path)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(load_file(path))
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensors[name]) for name in tensors)
    original = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(original, tmp_path / "with_prefix.safetensors")
    network = dataclasses.replace(family, transformer=str(tmp_path / "with_prefix.safetensors")).load_network(
        torch.float32
    )
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in network.state_dict().items())
