"""Qwen-Image-Edit, and Plus with several control pictures, against diffusers' own pipelines."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from synthetic import NoiseSource
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin

from trainer.config.schema import Run
from trainer.config.sections import Export, Format
from trainer.core.batch import collate, get_conditions
from trainer.core.errors import DataError, UsageError
from trainer.core.rng import generator, normal, uniform
from trainer.dataset.sample import Sample
from trainer.dataset.transform import Transform, TransformedSample
from trainer.evaluation.held_out_loss import held_out_loss
from trainer.export.write import write_exports
from trainer.method.full import Full
from trainer.method.lora import Lora
from trainer.method.trainable import trainable_parameters
from trainer.model.flux.tokens import pack
from trainer.model.qwen.template import IMAGE_TOKEN, SYSTEM, SYSTEM_TOKENS
from trainer.model.qwen_image_edit import QwenImageEdit
from trainer.objective import Flow, denoising_losses
from trainer.optimizer.adamw import AdamW
from trainer.precision import Precision

HEIGHT, WIDTH = 32, 48
CAPTIONS = ["make it night", "paint the photo of a house and a tree"]
CONTROLS = [(96, 64), (64, 96)]
"""(width, height) of a first and a second control picture: such that the pipelines, told of this area, leave them as they are."""
AREA, SEEN = 96 * 64, 64 * 64
STEPS = 3
STEPS_TO_LEARN = 160


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("qwen")
    QwenImageEdit.save_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def edit(folder: Path) -> QwenImageEdit:
    return QwenImageEdit(path=str(folder), objective=Flow(terminal=0.02))


@pytest.fixture(scope="module")
def plus(edit: QwenImageEdit) -> QwenImageEdit:
    return dataclasses.replace(edit, numbered=True, vision_area=SEEN)


class Processor(Qwen2VLProcessor):
    """The real one, less its part for videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, **rest):
        self.image_token, self.video_token = IMAGE_TOKEN, "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def pipeline(family: QwenImageEdit, monkeypatch: pytest.MonkeyPatch):
    """The pipeline of a family, at the small sizes of these tests."""
    name = "pipeline_qwenimage_edit_plus" if family.numbered else "pipeline_qwenimage_edit"
    module = importlib.import_module(f"diffusers.pipelines.qwenimage.{name}")
    kind = module.QwenImageEditPlusPipeline if family.numbered else module.QwenImageEditPipeline
    if family.numbered:
        monkeypatch.setattr(module, "CONDITION_IMAGE_SIZE", SEEN)
        monkeypatch.setattr(module, "VAE_IMAGE_SIZE", AREA)
    whole = module.calculate_dimensions
    areas = {1024 * 1024: AREA}
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: whole(areas.get(area, area), ratio))
    parts = Path(family.path) / "processor"
    processor = Processor(Qwen2VLImageProcessorPil.from_pretrained(parts), Qwen2Tokenizer.from_pretrained(parts))
    loaded = kind.from_pretrained(family.path, processor=processor, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    with_kinds_of_tokens(loaded)
    return loaded


def with_kinds_of_tokens(pipe) -> None:
    """diffusers 0.42 forgets to hand them on, see QwenEncoder.inputs; where it does not, this changes nothing."""
    forward, token = pipe.text_encoder.forward, pipe.text_encoder.config.image_token_id

    def told(**arguments):
        return forward(**{"mm_token_type_ids": (arguments["input_ids"] == token).int(), **arguments})

    pipe.text_encoder.forward = told


def watch(network, calls: list) -> None:
    """Note every argument and the result of each forward pass."""
    forward = network.forward

    def noted(**arguments):
        result = forward(**arguments)
        calls.append({**arguments, "result": result[0]})
        return result

    network.forward = noted


def samples(controls: int) -> list[Sample]:
    target = NoiseSource("target", WIDTH, HEIGHT)
    return [
        Sample(
            caption,
            target,
            caption,
            tuple(NoiseSource(f"{i} {caption}", *size) for i, size in enumerate(CONTROLS[:controls])),
        )
        for caption in CAPTIONS
    ]


def rows(family: QwenImageEdit, controls: int, drop_caption: bool = False) -> list[dict[str, torch.Tensor]]:
    encoder = family.build_encoder(torch.device("cpu"))
    transform = Transform(((WIDTH, HEIGHT),), tuple(CONTROLS))
    views = [transform.apply(sample, drop_caption=drop_caption) for sample in samples(controls)]
    parts = family.recipes(dict.fromkeys(family.components, ""), controls)
    return [{part: encoder.encode(part, view) for part in parts} for view in views]


def noise(family: QwenImageEdit) -> torch.Tensor:
    shape = family.shapes(HEIGHT, WIDTH)["latents"]
    return torch.stack([normal(shape, "noise", i) for i in range(len(CAPTIONS))])


def ours(family: QwenImageEdit, network, controls: int = 1) -> np.ndarray:
    cond, bare = (get_conditions(collate(rows(family, controls, dropped))) for dropped in (False, True))
    start = noise(family)

    def step(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return family.apply_guidance(family.predict(network, x, t, cond), family.predict(network, x, t, bare), 4.0)

    with torch.no_grad():
        latents = family.objective.sample(step, start, STEPS, family.time_shift(*start.shape[2:]))
        return family.build_encoder(torch.device("cpu")).decode(latents).permute(0, 2, 3, 1).numpy()


def theirs(family: QwenImageEdit, pipe, chosen: slice = slice(None), controls: int = 1) -> np.ndarray:
    pictures = [[control.open() for control in sample.controls] for sample in samples(controls)[chosen]]
    return pipe(
        # Plus takes the pictures of one sample, the other pipeline one picture of each sample.
        image=pictures[0] if family.numbered else [own[0] for own in pictures],
        prompt=CAPTIONS[chosen],
        negative_prompt=[""] * len(pictures),
        true_cfg_scale=4.0,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        latents=pack(noise(family))[chosen],
        output_type="np",
    ).images


def compared(mine: dict, other: dict, place: slice = slice(None)) -> None:
    """The arguments and result of a forward pass of ours, the samples in `place` of it, with those of the pipeline's."""
    for name in ("hidden_states", "timestep", "result"):
        torch.testing.assert_close(mine[name][place], other[name], rtol=0, atol=1e-5, msg=name)
    length = other["encoder_hidden_states"].shape[1]
    mask = other["encoder_hidden_states_mask"]
    mask = torch.ones(other["encoder_hidden_states"].shape[:2]) if mask is None else mask
    assert torch.equal(mine["encoder_hidden_states_mask"][place][:, :length], mask.bool())
    assert not mine["encoder_hidden_states_mask"][place][:, length:].any()
    torch.testing.assert_close(
        mine["encoder_hidden_states"][place][:, :length], other["encoder_hidden_states"], rtol=0, atol=1e-5
    )
    assert mine["img_shapes"][place] == other["img_shapes"]
    assert mine.keys() - other.keys() == set()
    assert other["guidance"] is None
    assert mine["result"].abs().mean() > 0.01


def test_transformer_inputs_predictions_and_pictures_equal_those_of_the_pipeline(edit: QwenImageEdit, monkeypatch):
    """Two captions of different lengths at once, with guidance."""
    pipe, network = pipeline(edit, monkeypatch), edit.load_network(torch.float32)
    expected, found = [], []
    watch(pipe.transformer, expected)
    watch(network, found)
    np.testing.assert_allclose(ours(edit, network), theirs(edit, pipe), atol=1e-5)
    assert len(found) == len(expected) == 2 * STEPS
    lengths = [row["prompt"].shape[0] for row in rows(edit, 1)]
    assert len(set(lengths)) == 2
    for mine, other in zip(found, expected, strict=True):
        compared(mine, other)


def test_plus_reads_two_controls_as_its_pipeline_does(plus: QwenImageEdit, monkeypatch):
    """That pipeline takes one sample at a time, so ours pads where it does not."""
    pipe, network = pipeline(plus, monkeypatch), plus.load_network(torch.float32)
    found = []
    watch(network, found)
    drawn = ours(plus, network, controls=2)
    for i in range(len(CAPTIONS)):
        expected, place = [], slice(i, i + 1)
        watch(pipe.transformer, expected)
        np.testing.assert_allclose(drawn[place], theirs(plus, pipe, place, controls=2), atol=1e-5)
        assert len(expected) == len(found)
        for mine, other in zip(found, expected, strict=True):
            compared(mine, other, place)
            assert len(mine["img_shapes"][0]) == 3
        pipe.transformer.forward = type(pipe.transformer).forward.__get__(pipe.transformer)


@pytest.mark.parametrize(("name", "controls"), [("edit", 1), ("plus", 1), ("plus", 2)])
def test_the_language_model_is_given_what_the_pipeline_gives_it(name: str, controls: int, request, monkeypatch):
    family = request.getfixturevalue(name)
    pipe, calls = pipeline(family, monkeypatch), []
    forward = pipe.text_encoder.forward
    pipe.text_encoder.forward = lambda **arguments: calls.append(arguments) or forward(**arguments)
    encoder = family.build_encoder(torch.device("cpu"))
    for i, sample in enumerate(samples(controls)):
        theirs(family, pipe, slice(i, i + 1), controls)
        # The second call is for the empty prompt, which sees the pictures too.
        for call, dropped in zip(calls[-2:], (False, True), strict=True):
            found = encoder.inputs(Transform(((WIDTH, HEIGHT),), tuple(CONTROLS)).apply(sample, drop_caption=dropped))
            for field in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw"):
                assert torch.equal(found[field], call[field]), field
    assert len(encoder.inputs(Transform(((WIDTH, HEIGHT),)).apply(samples(controls)[0]))["image_grid_thw"]) == controls


def test_what_is_dropped_of_the_prompt_is_the_system_text(edit: QwenImageEdit):
    encoder = edit.build_encoder(torch.device("cpu"))
    ids = encoder.inputs(Transform(((WIDTH, HEIGHT),)).apply(samples(1)[0]))["input_ids"][0]
    assert encoder._tokenizer.decode(ids[:SYSTEM_TOKENS]) == SYSTEM


def test_prompts_depend_on_the_control_pictures_also_where_the_caption_is_empty(plus: QwenImageEdit):
    encoder, transform = plus.build_encoder(torch.device("cpu")), Transform(((WIDTH, HEIGHT),))
    one, other = (sample.controls for sample in samples(2))
    for caption in ("", "make it night"):
        made = [
            encoder.encode("prompt", transform.apply(Sample("id", one[0], caption, (one[0], second))))
            for second in (one[1], other[1])
        ]
        assert (made[0] - made[1]).abs().max() > 0.01
    made = plus.recipes(dict.fromkeys(plus.components, ""), 2)
    assert all(made[name].fields == ("caption", "controls") for name in ("prompt", "prompt_mask"))


def test_padding_is_not_read(edit: QwenImageEdit):
    network, cond = edit.load_network(torch.float32), get_conditions(collate(rows(edit, 1)))
    x, t = noise(edit), torch.tensor([0.3, 0.7])
    short = cond["prompt_mask"].sum(1).argmin()
    junk = cond | {"prompt": torch.where(cond["prompt_mask"][..., None], cond["prompt"], 7.0)}
    with torch.no_grad():
        assert torch.equal(edit.predict(network, x, t, cond)[short], edit.predict(network, x, t, junk)[short])


def test_resolution_shift_has_the_published_values(edit: QwenImageEdit):
    # Tokens of the real model's latents: f = 8 and 2 x 2 patches.
    assert [f"{edit.time_shift(side // 8, side // 8):.2f}" for side in (512, 768, 1024)] == ["1.71", "1.83", "2.00"]


def test_instructions_that_are_too_long_are_refused(edit: QwenImageEdit):
    few = dataclasses.replace(edit, text_length=10)
    view = Transform(((WIDTH, HEIGHT),)).apply(samples(1)[1])
    with pytest.raises(DataError, match="sample paint the photo of a house and a tree.*type model.text_length="):
        few.build_encoder(torch.device("cpu")).encode("prompt", view)
    for wrong in ({"text_length": 0}, {"vision_area": 100}):
        with pytest.raises(UsageError, match=f"model.{next(iter(wrong))}="):
            dataclasses.replace(edit, **wrong)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> QwenImageEdit:
    """The published sizes, which are the transformer's default arguments; no weights."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": "QwenImageTransformer2DModel"}))
    return QwenImageEdit(path=str(folder))


def test_the_default_targets_of_the_published_network_are_all_that_see_the_picture(real: QwenImageEdit):
    network = real.meta_model()
    assert sum(p.numel() for p in network.parameters()) == 20_430_401_088
    Lora(rank=16, alpha=16.0).attach(network, real.target_modules, seed=0)
    parameters = trainable_parameters(network)
    assert len(parameters) == 2 * 4 * 60
    assert sum(p.numel() for p in parameters.values()) == 60 * 4 * 16 * (3072 + 3072)
    layers = {re.sub(r"\.\d+\.", ".N.", name.partition(".lora_")[0]) for name in parameters}
    assert layers == {f"transformer_blocks.N.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}


def test_layers_that_never_get_a_gradient_stop_no_training(edit: QwenImageEdit):
    """The text's stream ends in the last block."""
    network = edit.load_network(torch.float32)
    Lora(rank=2, alpha=2.0).attach(network, ("add_q_proj", "add_k_proj", "to_add_out", "txt_mlp.net.2"), seed=0)
    parameters = trainable_parameters(network)
    cond, x, t = get_conditions(collate(rows(edit, 1))), noise(edit), torch.tensor([0.3, 0.7])
    optimizer = AdamW(lr=1e-2).build(parameters.values(), seed=0)
    edit.predict(network, x, t, cond).square().sum().backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    optimizer.step()
    still = {
        name.partition(".lora_")[0]
        for name, parameter in parameters.items()
        if "lora_B" in name and not parameter.any()
    }
    assert still == {f"transformer_blocks.1.{name}" for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.2")}
    without = {name.partition(".lora_")[0] for name, parameter in parameters.items() if parameter.grad is None}
    # The queries of the text are joined with the picture's, so theirs is a zero.
    assert still - without == {"transformer_blocks.1.attn.add_q_proj"}


@dataclasses.dataclass(frozen=True)
class Colour:
    """A picture of one colour, or of its negative; see `trainer.dataset.source.Source`."""

    name: str
    negative: bool = False

    def open(self) -> Image.Image:
        colour = generator("colour", self.name).integers(0, 256, 3)
        return Image.new("RGB", self.size(), tuple(255 - colour if self.negative else colour))

    def digest(self) -> str:
        return f"{self.name} {self.negative}"

    def size(self) -> tuple[int, int]:
        return 16, 16


def test_it_learns_what_only_the_control_pictures_tell(edit: QwenImageEdit):
    """Targets are the negatives of their controls. Where each has the control and prompt of another, there is less to learn."""
    encoder, parts = edit.build_encoder(torch.device("cpu")), edit.recipes(dict.fromkeys(edit.components, ""), 1)
    views = [
        TransformedSample(Sample(str(i), Colour(str(i), negative=True), "make it night", (Colour(str(i)),)), 16, 16)
        for i in range(64)
    ]
    whole = [{part: encoder.encode(part, view) for part in parts} for view in views]
    # As wide as a real VAE's.
    latents = torch.stack([row["latents"] for row in whole])
    latents = (latents - latents.mean((0, 2, 3), keepdim=True)) / latents.std((0, 2, 3), keepdim=True)

    def reached(moved: int) -> float:
        told = [whole[i // 16 * 16 + (i + moved) % 16] for i in range(64)]
        rows = [row | {"latents": own} for row, own in zip(told, latents, strict=True)]
        network = edit.load_network(torch.float32)
        Full().attach(network, edit.target_modules, seed=0)
        parameters = list(trainable_parameters(network).values())
        optimizer = AdamW(lr=1e-2).build(parameters, seed=0)
        for step in range(1, STEPS_TO_LEARN):
            row = collate([rows[(8 * step + i) % 48] for i in range(8)])
            clean = row["latents"]
            noises = torch.stack([normal(tuple(clean.shape[1:]), "noise", step, i) for i in range(8)])
            times = torch.tensor(
                [edit.objective.quantile_to_time(uniform("time", step, i) + 2**-54, 1.5) for i in range(8)]
            )
            optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, step / 10) * (1 - step / STEPS_TO_LEARN)
            optimizer.zero_grad()
            losses = denoising_losses(
                edit.objective, partial(edit.predict, network), clean, noises, times, get_conditions(row)
            )
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        held_out = [(str(i), rows[i]) for i in range(48, 64)]
        return held_out_loss(edit, partial(edit.predict, network), held_out, torch.device("cpu"), 16)["val/loss"]

    assert reached(0) < 0.9 * reached(5)


@pytest.fixture(scope="module")
def lora(edit: QwenImageEdit) -> tuple[Run, torch.nn.Module, np.ndarray]:
    """A run, its network with an adapter that changes much, and what it draws. Alpha is not the rank, and there is dropout in training."""
    network = edit.load_network(torch.float32)
    method = Lora(
        rank=4,
        alpha=8.0,
        dropout=0.5,
        targets=[*edit.target_modules, "add_k_proj", "img_mlp.net.2", "img_mod.1", "proj_out", "img_in"],
    )
    method.attach(network, edit.target_modules, seed=0)
    before = ours(edit, network.eval())
    with torch.no_grad():
        for name, parameter in trainable_parameters(network).items():
            parameter.copy_(0.3 * normal(tuple(parameter.shape), name))
    after = ours(edit, network)
    assert np.abs(after - before).max() > 0.01
    run = Run(
        model=edit, method=method, precision=Precision(), export=Export(formats=[Format[name] for name in Lora.formats])
    )
    return run, network, after


@pytest.mark.parametrize("format", [Format[name] for name in Lora.formats])
def test_a_fresh_pipeline_draws_with_each_export_what_the_trained_network_draws(
    lora, format: Format, tmp_path: Path, monkeypatch
):
    run, network, expected = lora
    run = dataclasses.replace(run, export=Export(formats=[format]))
    weights = {name: parameter.detach() for name, parameter in trainable_parameters(network).items()}
    (path,) = write_exports(run, network, weights, tmp_path)
    if format is Format.pipeline:
        pipe = pipeline(dataclasses.replace(run.model, path=str(path)), monkeypatch)
    else:
        pipe = pipeline(run.model, monkeypatch)
        if format is Format.peft:
            pipe.transformer = PeftModel.from_pretrained(pipe.transformer, str(path)).get_base_model()
        else:
            pipe.load_lora_weights(path.parent, weight_name=path.name)
    np.testing.assert_allclose(theirs(run.model, pipe), expected, atol=1e-5)


COMFYUI = (
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|(img|txt)_mlp\.net\.(0\.proj|2)|(img|txt)_mod\.1)"
    r"|img_in|txt_in|proj_out|norm_out\.linear|time_text_embed\.timestep_embedder\.linear_[12]"
)
"""The layers of Qwen-Image by ComfyUI's own names, each after `diffusion_model.` (comfy/ldm/qwen_image/model.py)."""


def test_comfyui_finds_every_layer_and_its_alpha(lora, tmp_path: Path):
    # Its rule: W += (alpha / rank, or 1 without an alpha) B A, whatever the metadata say.
    run, network, expected = lora
    run = dataclasses.replace(run, export=Export(formats=[Format.comfyui]))
    (path,) = write_exports(run, network, {n: p.detach() for n, p in trainable_parameters(network).items()}, tmp_path)
    tensors, fresh = load_file(path), run.model.load_network(torch.float32).eval()
    for key in [key for key in tensors if key.endswith(".lora_B.weight")]:
        layer = key.removesuffix(".lora_B.weight")
        up, down = tensors.pop(key), tensors.pop(f"{layer}.lora_A.weight")
        scale = tensors.pop(f"{layer}.alpha").item() / len(down) if f"{layer}.alpha" in tensors else 1
        name = layer.removeprefix("diffusion_model.")
        assert re.fullmatch(COMFYUI, name), name
        fresh.get_submodule(name).weight.data += scale * up @ down
    assert not tensors
    np.testing.assert_allclose(ours(run.model, fresh), expected, atol=1e-5)
