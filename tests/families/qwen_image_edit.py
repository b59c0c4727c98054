"""Qwen-Image-Edit, and Plus with several control images; see tests/families/__init__.py."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin

from families import Case, Pictures, Published, Request
from trainer.core.batch import Batch, collate, get_conditions
from trainer.core.errors import DataError, UsageError
from trainer.dataset.sample import Sample
from trainer.dataset.transform import TransformedSample
from trainer.method.lora import Lora
from trainer.method.trainable import trainable_parameters
from trainer.model import Family
from trainer.model.flux.tokens import pack
from trainer.model.qwen.template import IMAGE_TOKEN, SYSTEM, SYSTEM_TOKENS
from trainer.model.qwen_image_edit import QwenImageEdit
from trainer.objective import Flow
from trainer.optimizer.adamw import AdamW

CONTROL_SIZES = ((96, 64), (64, 96))
"""(width, height) of the first and the second control image; the pipelines keep images of CONTROL_AREA as they are."""
CONTROL_AREA, VISION_AREA = 96 * 64, 64 * 64
PLUS = {"numbered": True, "vision_area": VISION_AREA}


class Processor(Qwen2VLProcessor):
    """The processor without its part for videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, **rest):
        self.image_token, self.video_token = IMAGE_TOKEN, "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class QwenImageEditCase(Case):
    # Their prompts differ in length.
    captions = ("make it night", "paint the photo of a house and a tree")
    settings = {"objective": Flow(terminal=0.02)}
    pictures = {
        "guidance": Pictures(guidance=4.0, control_sizes=CONTROL_SIZES[:1]),
        "plus with one": Pictures(guidance=4.0, control_sizes=CONTROL_SIZES[:1], settings=PLUS, lora=False),
        "plus with two": Pictures(guidance=4.0, control_sizes=CONTROL_SIZES, settings=PLUS, lora=False),
    }
    extra_targets = ("add_k_proj", "img_mlp.net.2", "img_mod.1", "proj_out", "img_in")
    # comfy/ldm/qwen_image/model.py
    comfyui_layers = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|(img|txt)_mlp\.net\.(0\.proj|2)|(img|txt)_mod\.1)"
        r"|img_in|txt_in|proj_out|norm_out\.linear|time_text_embed\.timestep_embedder\.linear_[12]"
    )
    unread = dict.fromkeys(
        ("*.1.attn.add_q_proj.*", "*.1.attn.to_add_out.*", "*.1.attn.norm_added_q.weight", "*.1.txt_mlp.*"),
        "the text stream's output of the last block is discarded",
    )
    published = {
        "Edit": Published(
            "Qwen/Qwen-Image-Edit",
            20_430_401_088,
            trainable=11_796_480,
            layers=240,
            settings={"objective": Flow(terminal=0.02)},
        )
    }
    golden = {
        "torch 2.13.0, AVX512": [
            1.3443999970344642,
            0.06776251263634918,
            1.5400633716575567,
            0.0937737609821519,
            1.5780224074574523,
            0.09933976370967992,
            1.5285121191513975,
            0.08784270725490796,
            1.2740505068939534,
            0.065877429062039,
        ],
    }

    def load_pipeline(self, family: Family) -> Any:
        name = "QwenImageEditPlusPipeline" if family.numbered else "QwenImageEditPipeline"
        folder = Path(family.path) / "processor"
        processor = Processor(Qwen2VLImageProcessorPil.from_pretrained(folder), Qwen2Tokenizer.from_pretrained(folder))
        kind = getattr(importlib.import_module("diffusers"), name)
        pipeline = kind.from_pretrained(family.path, processor=processor, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        pass_token_types(pipeline)
        return pipeline

    def generate(self, pipeline: Any, request: Request) -> np.ndarray:
        if request.family.numbered and len(request.captions) > 1:
            return np.concatenate([self.generate(pipeline, one) for one in request.split()])
        controls, module = request.controls, importlib.import_module(type(pipeline).__module__)
        calculate, areas = module.calculate_dimensions, {1024 * 1024: CONTROL_AREA}
        with pytest.MonkeyPatch.context() as patch:
            if request.family.numbered:
                patch.setattr(module, "CONDITION_IMAGE_SIZE", VISION_AREA)
                patch.setattr(module, "VAE_IMAGE_SIZE", CONTROL_AREA)
            # The pipelines resize control images to an area of 1024 x 1024.
            patch.setattr(module, "calculate_dimensions", lambda area, ratio: calculate(areas.get(area, area), ratio))
            return pipeline(
                # Plus takes the control images of one sample, the other pipeline one control image of each sample.
                image=controls[0] if request.family.numbered else [image for (image,) in controls],
                prompt=list(request.captions),
                negative_prompt=[""] * len(request.captions),
                true_cfg_scale=request.pictures.guidance,
                height=request.height,
                width=request.width,
                num_inference_steps=request.pictures.steps,
                latents=pack(request.noise),
                output_type="np",
            ).images

    def denoiser_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # The pipeline passes no mask if nothing is padded; ours is padded to the longest prompt of the batch.
        mask = inputs.pop("encoder_hidden_states_mask", None)
        if mask is not None:
            inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][mask.bool()]
        return inputs | {"img_shapes": torch.tensor(inputs["img_shapes"])}

    def latents(self, pipeline: Any, pixels: torch.Tensor) -> torch.Tensor:
        return pipeline._encode_vae_image(pixels[:, :, None], generator=None)[:, :, 0]


CASE = QwenImageEditCase()
CPU = torch.device("cpu")


def pass_token_types(pipeline: Any) -> None:
    """Adds the token types that diffusers 0.42 does not pass on (see `QwenEncoder.inputs`), if they are missing."""
    forward, token = pipeline.text_encoder.forward, pipeline.text_encoder.config.image_token_id

    def with_token_types(**arguments):
        return forward(**{"mm_token_type_ids": (arguments["input_ids"] == token).int(), **arguments})

    pipeline.text_encoder.forward = with_token_types


def make_samples(family: QwenImageEdit, controls: int) -> list[TransformedSample]:
    return CASE.request(family, Pictures(control_sizes=CONTROL_SIZES[:controls])).samples


def encode_conditions(family: QwenImageEdit) -> Batch:
    encoder = family.build_encoder(CPU)
    names = family.recipes(dict.fromkeys(family.components, ""), 1)
    examples = [{name: encoder.encode(name, sample) for name in names} for sample in make_samples(family, 1)]
    return get_conditions(collate(examples))


def test_configs_for_forecasts_come_with_the_program():
    plus = QwenImageEdit(path="Qwen/Qwen-Image-Edit-2509", vision_area=147456, numbered=True).with_published_configs()
    assert plus.shapes(1024, 1024, [(512, 512)])["prompt"] == (512 + 196, 3584)
    assert plus.component_config("transformer")["num_layers"] == 60


def test_dropped_prompt_tokens_are_the_system_text(family: QwenImageEdit):
    encoder = family.build_encoder(CPU)
    ids = encoder.inputs(make_samples(family, 1)[0])["input_ids"][0]
    assert encoder._tokenizer.decode(ids[:SYSTEM_TOKENS]) == SYSTEM


def test_prompt_depends_on_control_images_even_without_a_caption(family: QwenImageEdit):
    family = dataclasses.replace(family, **PLUS)
    encoder = family.build_encoder(CPU)
    (first, second), (_, other) = (sample.sample.controls for sample in make_samples(family, 2))
    for caption in ("", "make it night"):
        samples = [Sample("id", first, caption, (first, last)) for last in (second, other)]
        prompts = [encoder.encode("prompt", TransformedSample(sample, 48, 32)) for sample in samples]
        assert (prompts[0] - prompts[1]).abs().max() > 0.01
    recipes = family.recipes(dict.fromkeys(family.components, ""), 2)
    assert all(recipes[name].fields == ("caption", "controls") for name in ("prompt", "prompt_mask"))


def test_padding_of_the_prompt_does_not_change_predictions(family: QwenImageEdit):
    network, conditions = family.load_network(torch.float32), encode_conditions(family)
    latents, t = CASE.request(family, Pictures()).noise, torch.tensor([0.3, 0.7])
    shorter = conditions["prompt_mask"].sum(1).argmin()
    other_padding = torch.where(conditions["prompt_mask"][..., None], conditions["prompt"], 7.0)
    with torch.no_grad():
        expected = family.predict(network, latents, t, conditions)[shorter]
        assert torch.equal(
            family.predict(network, latents, t, conditions | {"prompt": other_padding})[shorter], expected
        )


def test_time_shift_has_the_published_values(family: QwenImageEdit):
    # The latents of the published VAE have an eighth of the image's side.
    assert [f"{family.time_shift(side // 8, side // 8):.2f}" for side in (512, 768, 1024)] == ["1.71", "1.83", "2.00"]


def test_too_long_instructions_and_impossible_settings_are_refused(family: QwenImageEdit):
    sample = make_samples(family, 1)[1]
    short = dataclasses.replace(family, text_length=10)
    with pytest.raises(DataError, match="sample paint the photo of a house and a tree.*type model.text_length="):
        short.build_encoder(CPU).encode("prompt", sample)
    with pytest.raises(UsageError, match="model.text_length="):
        dataclasses.replace(family, text_length=0)
    with pytest.raises(UsageError, match="model.vision_area="):
        dataclasses.replace(family, vision_area=100)


def test_layers_that_never_get_a_gradient_do_not_stop_training(family: QwenImageEdit):
    """The text stream's output of the last block is discarded."""
    network = family.load_network(torch.float32)
    Lora(rank=2, alpha=2.0).attach(network, ("add_q_proj", "add_k_proj", "to_add_out", "txt_mlp.net.2"), seed=0)
    parameters = trainable_parameters(network)
    optimizer = AdamW(lr=1e-2).build(parameters.values(), seed=0)
    t = torch.tensor([0.3, 0.7])
    family.predict(
        network, CASE.request(family, Pictures()).noise, t, encode_conditions(family)
    ).square().sum().backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    optimizer.step()
    unchanged = {
        name.partition(".lora_")[0]
        for name, parameter in parameters.items()
        if "lora_B" in name and not parameter.any()
    }
    assert unchanged == {
        f"transformer_blocks.1.{name}" for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.2")
    }
    without_gradient = {name.partition(".lora_")[0] for name, parameter in parameters.items() if parameter.grad is None}
    # The text's queries are concatenated with the image's, so their gradient exists and is zero.
    assert unchanged - without_gradient == {"transformer_blocks.1.attn.add_q_proj"}
