"""FLUX Kontext against diffusers' own pipeline."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from synthetic import DEVICE, NoiseSource, normal

from trainer.config.schema import Run
from trainer.config.sections import Export, Format
from trainer.core.batch import collate, get_conditions
from trainer.dataset.sample import Sample
from trainer.dataset.transform import Transform
from trainer.export.write import write_exports
from trainer.method.lora import Lora
from trainer.method.trainable import trainable_parameters
from trainer.model.flux.tokens import pack
from trainer.model.flux_kontext import FluxKontext
from trainer.precision import Precision

HEIGHT, WIDTH = 32, 48
CAPTIONS = ["make it night", "paint the photo"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> FluxKontext:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("flux")
    FluxKontext.save_tiny_checkpoint(folder)
    return FluxKontext(path=str(folder), text_length=8)


def pipeline(family: FluxKontext):
    from diffusers import FluxKontextPipeline

    loaded = FluxKontextPipeline.from_pretrained(family.path, torch_dtype=torch.float32).to(DEVICE)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def control_pictures(width: int, height: int) -> list[NoiseSource]:
    return [NoiseSource(f"control {i}", width, height) for i in range(2)]


def noise(family: FluxKontext) -> torch.Tensor:
    shape = family.shapes(HEIGHT, WIDTH)["latents"]
    return torch.stack([normal(shape, "noise", i) for i in range(2)])


def conditions(family: FluxKontext, size: tuple[int, int] = (WIDTH, HEIGHT)) -> dict[str, torch.Tensor]:
    """Of two samples with control pictures of this (width, height)."""
    encoder, target = family.build_encoder(DEVICE), NoiseSource("target", WIDTH, HEIGHT)
    samples = [
        Sample(text, target, text, (image,)) for image, text in zip(control_pictures(*size), CAPTIONS, strict=True)
    ]
    views = [Transform(((WIDTH, HEIGHT),), (size,)).apply(sample) for sample in samples]
    row = collate([{part: encoder.encode(part, view) for part in ("control", "prompt", "pooled")} for view in views])
    return {part: tensor.to(DEVICE) for part, tensor in row.items()}


def theirs(family: FluxKontext, pipe, steps: int = 3, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    return pipe(
        image=torch.stack(
            [torch.from_numpy(image.pixels()).permute(2, 0, 1) / 255 for image in control_pictures(*size)]
        ),
        prompt=CAPTIONS,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=steps,
        guidance_scale=2.5,
        latents=pack(noise(family)),
        max_area=HEIGHT * WIDTH,
        _auto_resize=False,
        max_sequence_length=family.text_length,
        output_type="np",
    ).images


def ours(family: FluxKontext, network, steps: int = 3, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    cond, start = conditions(family, size), noise(family)
    with torch.no_grad():
        latents = family.objective.sample(
            lambda x, t: family.predict(network, x, t, cond, 2.5), start, steps, family.time_shift(*start.shape[2:])
        )
        return family.build_encoder(DEVICE).decode(latents).permute(0, 2, 3, 1).cpu().numpy()


def watch(network, calls: list) -> None:
    """Note every argument and the result of each forward pass."""
    forward = network.forward

    def noted(**arguments):
        result = forward(**arguments)
        calls.append({**arguments, "result": result[0]})
        return result

    network.forward = noted


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (80, 64)])
def test_transformer_inputs_and_predictions_equal_those_of_the_pipeline(family: FluxKontext, size: tuple[int, int]):
    """Also with control pictures of another size than their targets."""
    pipe, network = pipeline(family), family.load_network(torch.float32, DEVICE).eval()
    expected, found = [], []
    watch(pipe.transformer, expected)
    watch(network, found)
    np.testing.assert_allclose(ours(family, network, size=size), theirs(family, pipe, size=size), atol=1e-5)
    assert len(found) == len(expected) == 3
    for mine, other in zip(found, expected, strict=True):
        tensors = {name for name, value in mine.items() if torch.is_tensor(value)}
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
            torch.testing.assert_close(mine[name], other[name], rtol=0, atol=1e-5, msg=name)
        assert mine["result"].abs().mean() > 0.01


def test_a_second_control_picture_is_told_from_the_first_by_its_position_ids(family: FluxKontext):
    """diffusers' pipeline reads one; the paper numbers them, and the transformer is the same."""
    network, calls = family.load_network(torch.float32, DEVICE).eval(), []
    watch(network, calls)
    encoder = family.build_encoder(DEVICE)
    sources = control_pictures(WIDTH, HEIGHT)
    sample = Sample(
        "id", NoiseSource("target", WIDTH, HEIGHT), CAPTIONS[0], (sources[0], replace(sources[1], width=32, height=64))
    )
    view = Transform(((WIDTH, HEIGHT),), ((WIDTH, HEIGHT), (32, 64))).apply(sample)
    row = collate(
        [
            {
                part: encoder.encode(part, view).to(DEVICE)
                for part in family.recipes(dict.fromkeys(family.components, ""), 2)
            }
        ]
    )
    x = noise(family)[:1]
    with torch.no_grad():
        found = family.predict(network, x, torch.tensor([0.5], device=DEVICE), get_conditions(row))
    (call,) = calls
    theirs = network.__class__.forward
    pipe = pipeline(family)
    sizes = [(2, 3), (2, 3), (4, 2)]
    ids = [pipe._prepare_latent_image_ids(1, *size, DEVICE, torch.float32) for size in sizes]
    for number, one in enumerate(ids):
        one[:, 0] = number
    assert torch.equal(call["img_ids"], torch.cat(ids))
    tokens = [
        pipe._pack_latents(part, 1, part.shape[1], *part.shape[2:]) for part in (x, row["control"], row["control_2"])
    ]
    with torch.no_grad():
        expected = theirs(
            network,
            **{name: value for name, value in call.items() if name != "result"}
            | {"hidden_states": torch.cat(tokens, 1)},
        )[0]
    torch.testing.assert_close(pack(found), expected[:, : tokens[0].shape[1]], rtol=0, atol=1e-5)


def test_resolution_shift_has_the_published_values(family: FluxKontext):
    # Tokens of the real model's latents: f = 8 and 2 x 2 patches.
    assert [round(family.time_shift(side // 8, side // 8), 2) for side in (512, 768, 1024)] == [1.88, 2.33, 3.16]


@pytest.fixture(scope="module")
def lora(family: FluxKontext) -> tuple[Run, torch.nn.Module, np.ndarray]:
    """A run, its network with an adapter that changes much, and what it draws. Alpha is not the rank, and there is dropout in training."""
    network = family.load_network(torch.float32, DEVICE)
    method = Lora(
        rank=4,
        alpha=8.0,
        dropout=0.5,
        targets=["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out", "norm_out.linear"],
    )
    method.attach(network, family.target_modules, seed=0)
    before = ours(family, network.eval())
    with torch.no_grad():
        for name, parameter in trainable_parameters(network).items():
            parameter.copy_(0.3 * normal(tuple(parameter.shape), name))
    after = ours(family, network)
    assert np.abs(after - before).max() > 0.01
    run = Run(
        model=family,
        method=method,
        precision=Precision(),
        export=Export(formats=[Format[name] for name in Lora.formats]),
    )
    return run, network, after


@pytest.mark.parametrize("format", [Format[name] for name in Lora.formats])
def test_a_fresh_pipeline_draws_with_each_export_what_the_trained_network_draws(lora, format: Format, tmp_path: Path):
    run, network, expected = lora
    run = dataclasses.replace(run, export=Export(formats=[format]))
    weights = {name: parameter.detach() for name, parameter in trainable_parameters(network).items()}
    (path,) = write_exports(run, network, weights, tmp_path)
    if format is Format.pipeline:
        again = dataclasses.replace(run.model, path=str(path))
        np.testing.assert_allclose(ours(again, again.load_network(torch.float32, DEVICE).eval()), expected, atol=1e-5)
        pipe = pipeline(again)
    else:
        pipe = pipeline(run.model)
        if format is Format.peft:
            pipe.transformer = PeftModel.from_pretrained(pipe.transformer, str(path)).get_base_model()
        else:
            pipe.load_lora_weights(path.parent, weight_name=path.name)
    np.testing.assert_allclose(theirs(run.model, pipe), expected, atol=1e-5)


COMFYUI = (
    r"(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out"
    r"|norm(1|1_context)?\.linear)|x_embedder|context_embedder|proj_out|norm_out\.linear|time_text_embed\.\w+\.linear_[12]"
)
"""The layers of FLUX by the names that ComfyUI knows them by, each after `transformer.` (flux_to_diffusers in its comfy/utils.py)."""


def test_comfyui_finds_every_layer_and_its_alpha(lora, tmp_path: Path):
    # Its rule: W += (alpha / rank, or 1 without an alpha) B A, whatever the metadata say.
    run, network, expected = lora
    run = dataclasses.replace(run, export=Export(formats=[Format.comfyui]))
    (path,) = write_exports(run, network, {n: p.detach() for n, p in trainable_parameters(network).items()}, tmp_path)
    tensors, fresh = load_file(path), run.model.load_network(torch.float32, DEVICE).eval()
    for key in [key for key in tensors if key.endswith(".lora_B.weight")]:
        layer = key.removesuffix(".lora_B.weight")
        up, down = tensors.pop(key), tensors.pop(f"{layer}.lora_A.weight")
        scale = tensors.pop(f"{layer}.alpha").item() / len(down) if f"{layer}.alpha" in tensors else 1
        name = layer.removeprefix("transformer.")
        assert re.fullmatch(COMFYUI, name), name
        fresh.get_submodule(name).weight.data += (scale * up @ down).to(DEVICE)
    assert not tensors
    np.testing.assert_allclose(ours(run.model, fresh), expected, atol=1e-5)
