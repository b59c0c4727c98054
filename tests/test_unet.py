"""The families with a UNetFamily against diffusers' own pipelines."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from synthetic import noise_sample

from trainer.config.groups import GROUPS
from trainer.config.schema import Run
from trainer.config.sections import Export, Format
from trainer.core.dtypes import Dtype
from trainer.core.errors import DataError
from trainer.core.rng import normal
from trainer.dataset.sample import Sample
from trainer.dataset.transform import TransformedSample
from trainer.export.write import write_exports
from trainer.method.full import Full
from trainer.method.lora import Lora
from trainer.method.trainable import trainable_parameters
from trainer.model.unet.family import Posterior, UNetFamily
from trainer.objective import Diffusion, Prediction, Schedule
from trainer.precision import Precision

HEIGHT, WIDTH = 32, 56
CAPTIONS = ["make it night", "paint the photo"]
KINDS = ["sd15", "sdxl"]


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> UNetFamily:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    kind = GROUPS["model"][request.param]
    kind.save_tiny_checkpoint(folder)
    return kind(path=str(folder))


def pipeline(family: UNetFamily):
    loaded = family.pipeline_class().from_pretrained(family.path, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def noise(family: UNetFamily) -> torch.Tensor:
    shape = family.shapes(HEIGHT, WIDTH)["latents"]
    return torch.stack([normal(shape, "noise", i) for i in range(2)])


def conditions(family: UNetFamily, captions: list[str]) -> dict[str, torch.Tensor]:
    encoder = family.build_encoder(torch.device("cpu"))
    parts = [part for part in family.recipes(dict.fromkeys(family.components, ""), 0) if not part.startswith("latents")]
    rows = [
        {part: encoder.encode(part, noise_sample(caption, WIDTH, HEIGHT)) for part in parts} for caption in captions
    ]
    return {part: torch.stack([row[part] for row in rows]) for part in parts}


def theirs(family: UNetFamily, pipe, guidance: float, steps: int = 3) -> np.ndarray:
    return pipe(
        prompt=CAPTIONS,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise(family),
        output_type="np",
    ).images


def ours(family: UNetFamily, network, guidance: float, steps: int = 3) -> np.ndarray:
    cond, bare = conditions(family, CAPTIONS), conditions(family, ["", ""])

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        captioned = family.predict(network, x, t, cond, guidance)
        return (
            family.apply_guidance(captioned, family.predict(network, x, t, bare, guidance), guidance)
            if guidance != 1
            else captioned
        )

    with torch.no_grad():
        latents = family.objective.sample(predict, noise(family), steps, 1.0)
    return family.build_encoder(torch.device("cpu")).decode(latents).permute(0, 2, 3, 1).numpy()


def watch(network, calls: list) -> None:
    """Note every tensor that reaches each forward pass by its name, and the result."""
    forward = network.forward

    def noted(sample, timestep, **arguments):
        result = forward(sample, timestep, **arguments)
        added = arguments.pop("added_cond_kwargs") or {}
        times = torch.as_tensor(timestep).float().expand(len(sample))
        calls.append(
            {
                "sample": sample,
                "timestep": times,
                "prompt": arguments["encoder_hidden_states"],
                **added,
                "result": result[0],
            }
        )
        return result

    network.forward = noted


def test_what_reaches_the_unet_and_what_it_predicts_equal_the_pipelines(family: UNetFamily):
    pipe, network = pipeline(family), family.load_network(torch.float32).eval()
    expected, found = [], []
    watch(pipe.unet, expected)
    watch(network, found)
    np.testing.assert_allclose(ours(family, network, 1.0), theirs(family, pipe, 1.0), atol=1e-5)
    assert len(found) == len(expected) == 3
    for mine, other in zip(found, expected, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], other[name].to(mine[name].dtype), rtol=0, atol=1e-5, msg=name)
        assert mine["result"].abs().mean() > 0.01


def test_a_picture_drawn_with_guidance_equals_the_pipelines(family: UNetFamily):
    pipe, network = pipeline(family), family.load_network(torch.float32).eval()
    drawn = ours(family, network, 7.5)
    np.testing.assert_allclose(drawn, theirs(family, pipe, 7.5), atol=1e-4)
    assert np.abs(drawn - ours(family, network, 1.0)).max() > 0.01


@pytest.mark.parametrize("prediction", list(Prediction))
def test_a_checkpoint_that_predicts_velocity_is_drawn_with_as_the_pipeline_draws(
    family: UNetFamily, prediction: Prediction
):
    family = dataclasses.replace(
        family, objective=Diffusion(prediction=prediction, schedule=Schedule.squaredcos_cap_v2, timesteps=600)
    )
    pipe = pipeline(family)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **family._noise())
    np.testing.assert_allclose(
        ours(family, family.load_network(torch.float32).eval(), 3.0), theirs(family, pipe, 3.0), atol=1e-4
    )


def test_latents_are_those_of_the_vae_and_stay_within_its_posterior(family: UNetFamily):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(family.path, subfolder="vae")
    seen, encoder = noise_sample("a photo", WIDTH, HEIGHT), family.build_encoder(torch.device("cpu"))
    pixels = torch.from_numpy(seen.pixels()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(encoder.encode("latents", seen), posterior.mean[0] * vae.config.scaling_factor)
    torch.testing.assert_close(encoder.encode("latents_std", seen), posterior.std[0] * vae.config.scaling_factor)
    assert "latents_std" in family.shapes(HEIGHT, WIDTH)
    assert "latents_std" not in dataclasses.replace(family, posterior=Posterior.mean).shapes(HEIGHT, WIDTH)


def test_another_vae_is_used_digested_and_exported(family: UNetFamily, tmp_path: Path):
    from trainer.core.digests import Digests

    other = tmp_path / "other"
    shutil.copytree(Path(family.path) / "vae", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"scaling_factor": 1.0}))
    changed = dataclasses.replace(family, vae=str(other))
    seen = noise_sample("a photo", WIDTH, HEIGHT)
    mine, theirs = (each.build_encoder(torch.device("cpu")).encode("latents", seen) for each in (changed, family))
    torch.testing.assert_close(mine, theirs / config["scaling_factor"])
    digests = Digests(tmp_path / "digests")
    before, after = family.component_digests(digests), changed.component_digests(digests)
    assert {name for name in before if before[name] != after[name]} == {"vae"}
    changed.save_pipeline(
        ((name, tensor.detach()) for name, tensor in changed.load_network(torch.float32).state_dict().items()),
        tmp_path / "out",
    )
    assert json.loads((tmp_path / "out" / "vae" / "config.json").read_text())["scaling_factor"] == 1.0


def test_latents_that_overflow_are_refused_with_what_to_type(family: UNetFamily, tmp_path: Path):
    folder = tmp_path / "overflowing"
    shutil.copytree(Path(family.path) / "vae", folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_in.weight"] *= 1e6
    save_file(tensors, weights, {"format": "pt"})
    half = dataclasses.replace(family, vae=str(folder), vae_dtype=Dtype.float16)
    with pytest.raises(DataError, match=r"target.* NaN or infinity in float16; type model.vae_dtype=float32"):
        half.build_encoder(torch.device("cpu")).encode("latents", noise_sample("a photo", WIDTH, HEIGHT))


def test_sizes_of_the_real_picture_train_and_the_size_to_be_drawn_draws(family: UNetFamily):
    if "time_ids" not in family.shapes(HEIGHT, WIDTH):
        pytest.skip("this model is told no sizes")
    seen = noise_sample("a photo", 100, 80)
    cut = TransformedSample(Sample("1", seen.sample.image, "a photo"), WIDTH, HEIGHT)
    sizes = family.build_encoder(torch.device("cpu")).encode("time_ids", cut)
    # 100 x 80 becomes 56 x 45 to cover 56 x 32: 6 or 7 rows are cut above.
    assert sizes.tolist() == [80.0, 100.0, 6.0, 0.0, 32.0, 56.0]
    cond = {"time_ids": sizes[None], "pooled": torch.zeros(1, 16)}
    assert family.added(cond, torch.zeros(1), None)["time_ids"].tolist() == [sizes.tolist()]
    assert family.added(cond, torch.zeros(1), 5.0)["time_ids"].tolist() == [[32.0, 56.0, 0.0, 0.0, 32.0, 56.0]]


LAYERS = [
    "proj_in",
    "proj_out",
    "conv1",
    "conv_shortcut",
    "time_emb_proj",
    "ff.net.0.proj",
    "ff.net.2",
    "conv",
    "fc1",
    "fc2",
]
"""Beside the default targets."""


@pytest.fixture(scope="module", params=[False, True], ids=["unet", "unet and text"])
def adapted(request: pytest.FixtureRequest, family: UNetFamily) -> tuple[Run, torch.nn.Module, np.ndarray]:
    """A run, its network with an adapter that changes much, and what it draws. Alpha is not the rank, and there is dropout in training."""
    family = dataclasses.replace(family, train_text_encoder=request.param)
    network = family.load_network(torch.float32)
    before = ours(family, network, 2.0)
    method = Lora(rank=4, alpha=8.0, dropout=0.5, targets=[*family.target_modules, *LAYERS])
    method.attach(network, family.target_modules, seed=0)
    with torch.no_grad():
        for name, parameter in trainable_parameters(network).items():
            parameter.copy_(0.2 * normal(tuple(parameter.shape), name))
    after = ours(family, network.eval(), 2.0)
    assert np.abs(after - before).max() > 0.01
    return Run(model=family, method=method, precision=Precision(), export=Export()), network, after


def exported(adapted: tuple, format: Format, folder: Path) -> Path:
    run, network, _ = adapted
    run = dataclasses.replace(run, export=Export(formats=[format]))
    return write_exports(run, network, {n: p.detach() for n, p in trainable_parameters(network).items()}, folder)[0]


@pytest.mark.parametrize("format", [Format[name] for name in Lora.formats])
def test_a_fresh_pipeline_draws_with_each_export_what_the_trained_network_draws(
    adapted, format: Format, tmp_path: Path
):
    family, expected, path = adapted[0].model, adapted[2], exported(adapted, format, tmp_path)
    if format is Format.peft:
        # A folder of peft's is for one network, which here may hold the text encoders too.
        again = PeftModel.from_pretrained(family.load_network(torch.float32), str(path)).get_base_model().eval()
        np.testing.assert_allclose(ours(family, again, 2.0), expected, atol=1e-4)
        return
    pipe = pipeline(dataclasses.replace(family, path=str(path)) if format is Format.pipeline else family)
    if format is not Format.pipeline:
        pipe.load_lora_weights(path.parent, weight_name=path.name)
    np.testing.assert_allclose(theirs(family, pipe, 2.0), expected, atol=1e-4)


COMFYUI = (
    r"lora_unet_(?P<unet>\w+)"
    r"|lora_te(?P<text>1|2|)_text_model_encoder_layers_(?P<layer>\d+)_(?P<name>mlp_fc[12]|self_attn_([qkv]|out)_proj)"
)
"""The layers that ComfyUI knows, by diffusers' names with _ in place of the dots (model_lora_keys_unet and _clip in its comfy/lora.py)."""


def test_comfyui_finds_every_layer_and_its_alpha(adapted, tmp_path: Path):
    # Its rule: W += (alpha / rank, or 1 without an alpha) B A, whatever the metadata say.
    run, _, expected = adapted
    family, tensors = run.model, load_file(exported(adapted, Format.comfyui, tmp_path))
    fresh = family.load_network(torch.float32).eval()
    layers = {name.replace(".", "_"): layer for name, layer in fresh.named_modules()}
    for key in [key for key in tensors if key.endswith(".lora_up.weight")]:
        layer = key.removesuffix(".lora_up.weight")
        up, down = tensors.pop(key), tensors.pop(f"{layer}.lora_down.weight")
        scale = tensors.pop(f"{layer}.alpha").item() / len(down) if f"{layer}.alpha" in tensors else 1
        found = re.fullmatch(COMFYUI, layer)
        assert found, layer
        if found["unet"]:
            name = f"unet_{found['unet']}" if family.train_text_encoder else found["unet"]
        else:
            end = {"": "", "1": "", "2": "_2"}[found["text"]]
            name = f"text_encoder{end}_encoder_layers_{found['layer']}_{found['name']}"
            name = (
                name
                if name in layers
                else f"text_encoder{end}_text_model_encoder_layers_{found['layer']}_{found['name']}"
            )
        weight = layers[name].weight
        weight.data += scale * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    assert not tensors
    np.testing.assert_allclose(ours(family, fresh, 2.0), expected, atol=1e-4)


@pytest.mark.parametrize("words", [False, True], ids=["unet", "unet and text"])
def test_a_checkpoint_whose_weights_all_train_is_written_with_its_noise(
    family: UNetFamily, words: bool, tmp_path: Path
):
    objective = Diffusion(prediction=Prediction.v_prediction, timesteps=500)
    family = dataclasses.replace(family, train_text_encoder=words, objective=objective)
    network = family.load_network(torch.float32)
    Full().attach(network, family.target_modules, seed=0)
    with torch.no_grad():
        for name, parameter in trainable_parameters(network).items():
            parameter.add_(0.02 * normal(tuple(parameter.shape), name))
    expected = ours(family, network.eval(), 2.0)
    run = Run(model=family, method=Full(), precision=Precision(), export=Export(formats=[Format.pipeline]))
    weights = {name: parameter.detach() for name, parameter in trainable_parameters(network).items()}
    (path,) = write_exports(run, network, weights, tmp_path)
    np.testing.assert_allclose(
        theirs(family, pipeline(dataclasses.replace(family, path=str(path))), 2.0), expected, atol=1e-4
    )
    assert family.warnings() and "v_prediction" in family.warnings()[0]
    assert dataclasses.replace(family, path=str(path)).warnings() == []


def test_live_text_encoders_predict_what_cached_words_predict_and_get_gradients(family: UNetFamily):
    live = dataclasses.replace(family, train_text_encoder=True)
    frozen_net, live_net = family.load_network(torch.float32).eval(), live.load_network(torch.float32).eval()
    x, t = noise(family), torch.tensor([10.0, 700.0])
    for captions in (CAPTIONS, ["", "make it night"]):
        mine = live.predict(live_net, x, t, conditions(live, captions))
        torch.testing.assert_close(
            mine, family.predict(frozen_net, x, t, conditions(family, captions)), rtol=0, atol=1e-5
        )
    Lora(rank=2, alpha=2.0).attach(live_net, live.target_modules, seed=0)
    live_net.enable_gradient_checkpointing()
    live.predict(live_net.train(), x, t, conditions(live, CAPTIONS)).square().sum().backward()
    gradients = {
        name.partition(".")[0]
        for name, parameter in trainable_parameters(live_net).items()
        if parameter.grad is not None
    }
    assert gradients == {"unet", *(f"text_encoder{suffix}" for suffix in family.text_suffixes)}
