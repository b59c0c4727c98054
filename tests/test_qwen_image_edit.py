"""Qwen-Image-Edit, and Plus with several control images, compared with diffusers' pipelines."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
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
from PIL import Image
from synthetic import NoiseSource
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin

from trainer.config.sections import Format
from trainer.core.batch import Batch, Example, collate, get_conditions
from trainer.core.errors import DataError, UsageError
from trainer.core.rng import generator, normal, uniform
from trainer.dataset.sample import Sample
from trainer.dataset.transform import Transform, TransformedSample
from trainer.evaluation.held_out_loss import held_out_loss
from trainer.method.full import Full
from trainer.method.lora import Lora
from trainer.method.trainable import trainable_parameters
from trainer.model.flux.tokens import pack
from trainer.model.qwen.template import IMAGE_TOKEN, SYSTEM, SYSTEM_TOKENS
from trainer.model.qwen_image_edit import QwenImageEdit
from trainer.objective import Flow, denoising_losses
from trainer.optimizer.adamw import AdamW

HEIGHT, WIDTH = 32, 48
CAPTIONS = ["make it night", "paint the photo of a house and a tree"]
CONTROL_SIZES = [(96, 64), (64, 96)]
"""(width, height) of the first and the second control image; the pipelines keep images of CONTROL_AREA as they are."""
CONTROL_AREA, VISION_AREA = 96 * 64, 64 * 64
STEPS = 3
GUIDANCE = 4.0
CPU = torch.device("cpu")
TRANSFORM = Transform(((WIDTH, HEIGHT),))


@pytest.fixture(scope="module")
def edit(tmp_path_factory: pytest.TempPathFactory) -> QwenImageEdit:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("qwen")
    QwenImageEdit.save_tiny_checkpoint(folder)
    return QwenImageEdit(path=str(folder), objective=Flow(terminal=0.02))


@pytest.fixture(scope="module")
def plus(edit: QwenImageEdit) -> QwenImageEdit:
    return dataclasses.replace(edit, numbered=True, vision_area=VISION_AREA)


class Processor(Qwen2VLProcessor):
    """The processor without its part for videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, **rest):
        self.image_token, self.video_token = IMAGE_TOKEN, "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def load_pipeline(family: QwenImageEdit, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads the pipeline of a family, at the small sizes of these tests."""
    name = "pipeline_qwenimage_edit_plus" if family.numbered else "pipeline_qwenimage_edit"
    module = importlib.import_module(f"diffusers.pipelines.qwenimage.{name}")
    pipeline_class = module.QwenImageEditPlusPipeline if family.numbered else module.QwenImageEditPipeline
    if family.numbered:
        monkeypatch.setattr(module, "CONDITION_IMAGE_SIZE", VISION_AREA)
        monkeypatch.setattr(module, "VAE_IMAGE_SIZE", CONTROL_AREA)
    calculate, areas = module.calculate_dimensions, {1024 * 1024: CONTROL_AREA}
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: calculate(areas.get(area, area), ratio))
    folder = Path(family.path) / "processor"
    processor = Processor(Qwen2VLImageProcessorPil.from_pretrained(folder), Qwen2Tokenizer.from_pretrained(folder))
    pipeline = pipeline_class.from_pretrained(family.path, processor=processor, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pass_token_types(pipeline)
    return pipeline


def pass_token_types(pipeline: Any) -> None:
    """Adds the token types that diffusers 0.42 does not pass on (see `QwenEncoder.inputs`), if they are missing."""
    forward, token = pipeline.text_encoder.forward, pipeline.text_encoder.config.image_token_id

    def with_token_types(**arguments):
        return forward(**{"mm_token_type_ids": (arguments["input_ids"] == token).int(), **arguments})

    pipeline.text_encoder.forward = with_token_types


def make_samples(controls: int) -> list[Sample]:
    target = NoiseSource("target", WIDTH, HEIGHT)
    return [
        Sample(
            caption,
            target,
            caption,
            tuple(NoiseSource(f"{i} {caption}", *size) for i, size in enumerate(CONTROL_SIZES[:controls])),
        )
        for caption in CAPTIONS
    ]


def encode_examples(family: QwenImageEdit, controls: int, drop_caption: bool = False) -> list[Example]:
    encoder = family.build_encoder(CPU)
    transform = Transform(((WIDTH, HEIGHT),), tuple(CONTROL_SIZES))
    samples = [transform.apply(sample, drop_caption=drop_caption) for sample in make_samples(controls)]
    names = family.recipes(dict.fromkeys(family.components, ""), controls)
    return [{name: encoder.encode(name, sample) for name in names} for sample in samples]


def encode_conditions(family: QwenImageEdit, controls: int = 1, drop_caption: bool = False) -> Batch:
    return get_conditions(collate(encode_examples(family, controls, drop_caption)))


def initial_noise(family: QwenImageEdit) -> torch.Tensor:
    shape = family.shapes(HEIGHT, WIDTH)["latents"]
    return torch.stack([normal(shape, "noise", i) for i in range(len(CAPTIONS))])


def our_images(family: QwenImageEdit, network: Any, controls: int = 1) -> np.ndarray:
    conditions, unconditional = (encode_conditions(family, controls, dropped) for dropped in (False, True))
    noise = initial_noise(family)

    def predict(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        predictions = (family.predict(network, latents, t, batch) for batch in (conditions, unconditional))
        return family.apply_guidance(*predictions, GUIDANCE, t)

    with torch.no_grad():
        latents = family.sample(predict, noise, STEPS)
        return family.build_encoder(CPU).decode(latents).permute(0, 2, 3, 1).numpy()


def pipeline_images(family: QwenImageEdit, pipeline: Any, which: slice = slice(None), controls: int = 1) -> np.ndarray:
    images = [[control.open() for control in sample.controls] for sample in make_samples(controls)[which]]
    return pipeline(
        # Plus takes the control images of one sample, the other pipeline one control image of each sample.
        image=images[0] if family.numbered else [controls[0] for controls in images],
        prompt=CAPTIONS[which],
        negative_prompt=[""] * len(images),
        true_cfg_scale=GUIDANCE,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        latents=pack(initial_noise(family))[which],
        output_type="np",
    ).images


def assert_same_call(ours: dict[str, Any], theirs: dict[str, Any], which: slice = slice(None)) -> None:
    """Compares the arguments and results of two forward passes; `which` are the samples of ours that theirs has."""
    for name in ("hidden_states", "timestep", "result"):
        torch.testing.assert_close(ours[name][which], theirs[name], rtol=0, atol=1e-5, msg=name)
    prompt, mask = theirs["encoder_hidden_states"], theirs["encoder_hidden_states_mask"]
    mask = torch.ones(prompt.shape[:2]) if mask is None else mask
    our_mask, length = ours["encoder_hidden_states_mask"][which], prompt.shape[1]
    assert torch.equal(our_mask[:, :length], mask.bool())
    assert not our_mask[:, length:].any()
    torch.testing.assert_close(ours["encoder_hidden_states"][which][:, :length], prompt, rtol=0, atol=1e-5)
    assert ours["img_shapes"][which] == theirs["img_shapes"]
    assert ours.keys() - theirs.keys() == set()
    assert theirs["guidance"] is None
    assert ours["result"].abs().mean() > 0.01


def test_transformer_inputs_predictions_and_images_match_the_pipeline(edit: QwenImageEdit, monkeypatch):
    """Two captions of different lengths in one batch, with guidance."""
    pipeline, network = load_pipeline(edit, monkeypatch), edit.load_network(torch.float32)
    expected, found = [], []
    record_calls(pipeline.transformer, expected)
    record_calls(network, found)
    np.testing.assert_allclose(our_images(edit, network), pipeline_images(edit, pipeline), atol=1e-5)
    assert len(found) == len(expected) == 2 * STEPS
    assert len({example["prompt"].shape[0] for example in encode_examples(edit, 1)}) == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_call(ours, theirs)


def test_plus_with_two_control_images_matches_its_pipeline(plus: QwenImageEdit, monkeypatch):
    """The pipeline takes one sample at a time, so our batch has padding that it lacks."""
    pipeline, network = load_pipeline(plus, monkeypatch), plus.load_network(torch.float32)
    found = []
    record_calls(network, found)
    images = our_images(plus, network, controls=2)
    for i in range(len(CAPTIONS)):
        expected, which = [], slice(i, i + 1)
        record_calls(pipeline.transformer, expected)
        np.testing.assert_allclose(images[which], pipeline_images(plus, pipeline, which, controls=2), atol=1e-5)
        assert len(expected) == len(found)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same_call(ours, theirs, which)
            assert len(ours["img_shapes"][0]) == 3
        pipeline.transformer.forward = type(pipeline.transformer).forward.__get__(pipeline.transformer)


@pytest.mark.parametrize(("name", "controls"), [("edit", 1), ("plus", 1), ("plus", 2)])
def test_language_model_inputs_match_the_pipeline(name: str, controls: int, request, monkeypatch):
    family = request.getfixturevalue(name)
    pipeline, calls = load_pipeline(family, monkeypatch), []
    forward = pipeline.text_encoder.forward
    pipeline.text_encoder.forward = lambda **arguments: calls.append(arguments) or forward(**arguments)
    encoder = family.build_encoder(CPU)
    transform = Transform(((WIDTH, HEIGHT),), tuple(CONTROL_SIZES))
    for i, sample in enumerate(make_samples(controls)):
        pipeline_images(family, pipeline, slice(i, i + 1), controls)
        # The second call is for the empty prompt, which depends on the images too.
        for call, drop_caption in zip(calls[-2:], (False, True), strict=True):
            inputs = encoder.inputs(transform.apply(sample, drop_caption=drop_caption))
            for field in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw"):
                assert torch.equal(inputs[field], call[field]), field
    inputs = encoder.inputs(TRANSFORM.apply(make_samples(controls)[0]))
    assert len(inputs["image_grid_thw"]) == controls


def test_dropped_prompt_tokens_are_the_system_text(edit: QwenImageEdit):
    encoder = edit.build_encoder(CPU)
    ids = encoder.inputs(TRANSFORM.apply(make_samples(1)[0]))["input_ids"][0]
    assert encoder._tokenizer.decode(ids[:SYSTEM_TOKENS]) == SYSTEM


def test_prompt_depends_on_control_images_even_without_a_caption(plus: QwenImageEdit):
    encoder = plus.build_encoder(CPU)
    (first, second), (_, other) = (sample.controls for sample in make_samples(2))
    for caption in ("", "make it night"):
        prompts = [
            encoder.encode("prompt", TRANSFORM.apply(Sample("id", first, caption, (first, last))))
            for last in (second, other)
        ]
        assert (prompts[0] - prompts[1]).abs().max() > 0.01
    recipes = plus.recipes(dict.fromkeys(plus.components, ""), 2)
    assert all(recipes[name].fields == ("caption", "controls") for name in ("prompt", "prompt_mask"))


def test_padding_of_the_prompt_does_not_change_predictions(edit: QwenImageEdit):
    network, conditions = edit.load_network(torch.float32), encode_conditions(edit)
    latents, t = initial_noise(edit), torch.tensor([0.3, 0.7])
    shorter = conditions["prompt_mask"].sum(1).argmin()
    other_padding = torch.where(conditions["prompt_mask"][..., None], conditions["prompt"], 7.0)
    with torch.no_grad():
        expected = edit.predict(network, latents, t, conditions)[shorter]
        assert torch.equal(edit.predict(network, latents, t, conditions | {"prompt": other_padding})[shorter], expected)


def test_time_shift_has_the_published_values(edit: QwenImageEdit):
    # The latents of the published VAE have an eighth of the image's side.
    assert [f"{edit.time_shift(side // 8, side // 8):.2f}" for side in (512, 768, 1024)] == ["1.71", "1.83", "2.00"]


def test_too_long_instructions_and_impossible_settings_are_refused(edit: QwenImageEdit):
    sample = TRANSFORM.apply(make_samples(1)[1])
    short = dataclasses.replace(edit, text_length=10)
    with pytest.raises(DataError, match="sample paint the photo of a house and a tree.*type model.text_length="):
        short.build_encoder(CPU).encode("prompt", sample)
    with pytest.raises(UsageError, match="model.text_length="):
        dataclasses.replace(edit, text_length=0)
    with pytest.raises(UsageError, match="model.vision_area="):
        dataclasses.replace(edit, vision_area=100)


def test_default_targets_of_the_published_network_are_the_image_stream_attention(tmp_path: Path):
    # The transformer's default arguments are the published sizes.
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"_class_name": "QwenImageTransformer2DModel"}))
    published = QwenImageEdit(path=str(tmp_path))
    network = published.meta_model()
    assert sum(p.numel() for p in network.parameters()) == 20_430_401_088
    Lora(rank=16, alpha=16.0).attach(network, published.target_modules, seed=0)
    parameters = trainable_parameters(network)
    assert len(parameters) == 2 * 4 * 60
    assert sum(p.numel() for p in parameters.values()) == 60 * 4 * 16 * (3072 + 3072)
    layers = {re.sub(r"\.\d+\.", ".N.", name.partition(".lora_")[0]) for name in parameters}
    assert layers == {f"transformer_blocks.N.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}


def test_layers_that_never_get_a_gradient_do_not_stop_training(edit: QwenImageEdit):
    """The text stream's output of the last block is discarded."""
    network = edit.load_network(torch.float32)
    Lora(rank=2, alpha=2.0).attach(network, ("add_q_proj", "add_k_proj", "to_add_out", "txt_mlp.net.2"), seed=0)
    parameters = trainable_parameters(network)
    optimizer = AdamW(lr=1e-2).build(parameters.values(), seed=0)
    t = torch.tensor([0.3, 0.7])
    edit.predict(network, initial_noise(edit), t, encode_conditions(edit)).square().sum().backward()
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


@dataclasses.dataclass(frozen=True)
class PlainColor:
    """An image of one random color, or of its negative; see `trainer.dataset.source.Source`."""

    name: str
    negative: bool = False

    def open(self) -> Image.Image:
        color = generator("colour", self.name).integers(0, 256, 3)
        return Image.new("RGB", self.size(), tuple(255 - color if self.negative else color))

    def digest(self) -> str:
        return f"{self.name} {self.negative}"

    def size(self) -> tuple[int, int]:
        return 16, 16


TRAINING_STEPS = 160
TRAINING_SAMPLES, HELD_OUT_SAMPLES = 48, 16


def make_negatives(family: QwenImageEdit) -> list[Example]:
    """Examples whose targets are the negatives of their control images, with normalized latents."""
    encoder = family.build_encoder(CPU)
    names = family.recipes(dict.fromkeys(family.components, ""), 1)
    examples = []
    for i in range(TRAINING_SAMPLES + HELD_OUT_SAMPLES):
        target, control = PlainColor(str(i), negative=True), PlainColor(str(i))
        sample = TransformedSample(Sample(str(i), target, "make it night", (control,)), 16, 16)
        examples.append({name: encoder.encode(name, sample) for name in names})
    latents = torch.stack([example["latents"] for example in examples])
    latents = (latents - latents.mean((0, 2, 3), keepdim=True)) / latents.std((0, 2, 3), keepdim=True)
    return [example | {"latents": own} for example, own in zip(examples, latents, strict=True)]


def train_and_evaluate(family: QwenImageEdit, examples: list[Example]) -> float:
    """Returns the held-out loss after training all weights for a short time."""
    network = family.load_network(torch.float32)
    Full().attach(network, family.target_modules, seed=0)
    parameters = list(trainable_parameters(network).values())
    optimizer = AdamW(lr=1e-2).build(parameters, seed=0)
    predict = partial(family.predict, network)
    for step in range(1, TRAINING_STEPS):
        batch = collate([examples[(8 * step + i) % TRAINING_SAMPLES] for i in range(8)])
        latents = batch["latents"]
        noise = torch.stack([normal(tuple(latents.shape[1:]), "noise", step, i) for i in range(8)])
        quantiles = [uniform("time", step, i) + 2**-54 for i in range(8)]
        t = torch.tensor([family.objective.quantile_to_time(quantile, 1.5) for quantile in quantiles])
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, step / 10) * (1 - step / TRAINING_STEPS)
        optimizer.zero_grad()
        denoising_losses(family.objective, predict, latents, noise, t, get_conditions(batch)).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    held_out = [(str(i), examples[i]) for i in range(TRAINING_SAMPLES, len(examples))]
    return held_out_loss(family, predict, held_out, CPU, 16)["val/loss"]


def test_training_learns_from_control_images(edit: QwenImageEdit):
    examples = make_negatives(edit)
    # Each example gets the control image and the prompt of another in its group of 16.
    mismatched = [
        examples[i // 16 * 16 + (i + 5) % 16] | {"latents": example["latents"]} for i, example in enumerate(examples)
    ]
    assert train_and_evaluate(edit, examples) < 0.9 * train_and_evaluate(edit, mismatched)


@pytest.fixture(scope="module")
def lora(edit: QwenImageEdit) -> TrainedLora:
    extra_targets = ["add_k_proj", "img_mlp.net.2", "img_mod.1", "proj_out", "img_in"]
    network = edit.load_network(torch.float32)
    return train_lora(edit, network, extra_targets, lambda network: our_images(edit, network), std=0.3)


@pytest.mark.parametrize("format", LORA_FORMATS)
def test_pipeline_with_an_export_generates_the_images_of_the_trained_network(
    lora: TrainedLora, format: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    family, path = lora.family, lora.export(format, tmp_path)
    if format is Format.pipeline:
        pipeline = load_pipeline(dataclasses.replace(family, path=str(path)), monkeypatch)
    else:
        pipeline = load_pipeline(family, monkeypatch)
        load_adapter_export(pipeline, format, path)
    np.testing.assert_allclose(pipeline_images(family, pipeline), lora.images, atol=1e-5)


COMFYUI_LAYERS = (
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    r"|(img|txt)_mlp\.net\.(0\.proj|2)|(img|txt)_mod\.1)"
    r"|img_in|txt_in|proj_out|norm_out\.linear|time_text_embed\.timestep_embedder\.linear_[12]"
)
"""The layers that ComfyUI knows, each after `diffusion_model.` (comfy/ldm/qwen_image/model.py)."""


def test_comfyui_finds_every_layer_and_its_alpha(lora: TrainedLora, tmp_path: Path):
    network = lora.family.load_network(torch.float32).eval()
    find_layer = partial(find_comfyui_layer, network, "diffusion_model.", COMFYUI_LAYERS)
    merge_comfyui_lora(lora.export(Format.comfyui, tmp_path), find_layer)
    np.testing.assert_allclose(our_images(lora.family, network), lora.images, atol=1e-5)
