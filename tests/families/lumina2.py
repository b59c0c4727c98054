"""Lumina Image 2.0; see tests/families/__init__.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers
from parity import our_pictures
from synthetic import DEVICE

from families import Case, Pictures, Published, Request
from trainer.core.errors import DataError, UsageError
from trainer.core.files import write_json
from trainer.model.lumina2 import Lumina2


class Lumina2Case(Case):
    # Of different lengths, so that one is padded in a batch.
    captions = ("make it night", "paint the photo of a night")
    pictures = {
        "guidance": Pictures(guidance=4.0),
        "plain guidance": Pictures(guidance=4.0, settings={"cfg_normalization": False}, lora=False),
        "no guidance": Pictures(lora=False),
    }
    extra_targets = ("feed_forward.linear_1", "norm1.linear", "timestep_embedder.linear_1", "norm_out.linear_2")
    # With more, the rounding of merged weights shows in the pictures.
    lora_std = 0.2
    published = {
        "2.0": Published(
            "Alpha-VLLM/Lumina-Image-2.0",
            2_609_769_152,
            trainable=3_686_400,
            layers=120,
            configs={"transformer": {"cap_feat_dim": 2304}},
        )
    }
    golden = {
        "torch 2.13.0, AVX512": [
            1.344952745681061,
            0.20481070950244043,
            1.4016839105104912,
            0.27342235350151706,
            1.443892191918064,
            0.27938593365073755,
            1.5200781415259954,
            0.19730525784502098,
            1.3672241001295125,
            0.2618838745317899,
        ],
    }

    def denoiser_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # The pipeline pads all prompts to the same length.
        mask = inputs.pop("encoder_attention_mask").bool()
        return inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"][mask]}

    def generate(self, pipeline: Any, request: Request) -> np.ndarray:
        return pipeline(
            prompt=list(request.captions),
            height=request.height,
            width=request.width,
            num_inference_steps=request.pictures.steps,
            guidance_scale=request.pictures.guidance,
            cfg_normalization=request.family.cfg_normalization,
            cfg_trunc_ratio=request.family.cfg_truncation,
            latents=request.noise,
            max_sequence_length=request.family.text_length,
            output_type="np",
        ).images


CASE = Lumina2Case()


@pytest.mark.parametrize("steps", [4, 6])
def test_pictures_whose_guidance_ends_early_match_the_pipeline(steps: int, family: Lumina2):
    """The pipeline leaves out the passes without caption of such steps, the program ignores their results."""
    family, pictures = dataclasses.replace(family, cfg_truncation=0.5), Pictures(guidance=4.0, steps=steps)
    request, network = CASE.request(family, pictures), family.load_network(torch.float32, DEVICE)
    found = our_pictures(request, network)
    np.testing.assert_allclose(found, CASE.generate(CASE.load_pipeline(family), request), rtol=0, atol=1e-5)
    guided = our_pictures(CASE.request(dataclasses.replace(family, cfg_truncation=1.0), pictures), network)
    assert np.abs(found - guided).max() > 1e-3


def test_sampling_times_are_those_of_the_scheduler(family: Lumina2):
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=6.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8))
    assert family.sampling_times(8, 64, 64) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_prompts_are_cut_like_in_the_pipeline(family: Lumina2):
    family = dataclasses.replace(family, text_length=12)
    (counts, limit) = family.count_caption_tokens(["", *CASE.captions])["tokenizer"]
    assert counts[0] == 1 < min(counts[1:]) < limit == 12 < max(counts)
    prompts, masks, *_ = CASE.load_pipeline(family).encode_prompt(
        list(CASE.captions), do_classifier_free_guidance=False, max_sequence_length=12
    )
    encoder = family.build_encoder(DEVICE)
    for sample, prompt, mask in zip(CASE.request(family, Pictures()).samples, prompts, masks, strict=True):
        expected = prompt[mask.bool()].detach().cpu()
        torch.testing.assert_close(encoder.encode("prompt", sample), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"), [({"text_length": 0}, "type 256"), ({"cfg_truncation": 1.5}, "from 0 to 1")]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        Lumina2(path="anything", **settings)


def test_texts_and_images_beyond_the_positions_are_refused(family: Lumina2):
    dataclasses.replace(family, text_length=299).check_configs()
    with pytest.raises(UsageError, match="type model.text_length=299"):
        dataclasses.replace(family, text_length=300).check_configs()
    family.shapes(8192, 32)
    with pytest.raises(UsageError, match="of 32x8208 px is too large: .* up to 8192 px"):
        family.shapes(8208, 32)


def test_dynamic_shift_is_refused(family: Lumina2, tmp_path: Path):
    """The pipeline would take the number of channels for that of tokens."""
    for path in Path(family.path or "").rglob("*.json"):
        copy = tmp_path / path.relative_to(family.path or "")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    write_json(tmp_path / "scheduler" / "scheduler_config.json", {"use_dynamic_shifting": True})
    with pytest.raises(DataError, match="use_dynamic_shifting=True"):
        dataclasses.replace(family, path=str(tmp_path)).check_configs()


def test_original_layout_is_the_opposite_of_the_conversion_of_diffusers(tmp_path: Path):
    """diffusers' conversion knows the published width only. Each tensor has one value, to save memory."""
    write_json(tmp_path / "transformer" / "config.json", {"cap_feat_dim": 2304, "num_layers": 1})
    family = Lumina2(path=str(tmp_path))
    layout, shapes = family.original_layout("transformer"), family.meta_model().state_dict()
    tensors = {
        name: torch.tensor(float(i), dtype=torch.bfloat16).expand(shape.shape)
        for i, (name, shape) in enumerate(shapes.items())
    }
    parts: dict[str, dict[int, torch.Tensor]] = {"norm_final.weight": {0: torch.zeros(1)}}
    for name, tensor in tensors.items():
        (piece,) = layout(name).pieces
        parts.setdefault(piece.key, {})[piece.first] = tensor
    original = {
        key: torch.cat([rows[first] for first in sorted(rows)]) if len(rows) > 1 else rows[min(rows)]
        for key, rows in parts.items()
    }
    converted = convert_lumina2_to_diffusers(original)
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensors[name]) for name in tensors)
