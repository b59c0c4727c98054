"""The families with a UNet compared with diffusers' pipelines."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import LORA_FORMATS, TrainedLora, merge_comfyui_lora, train_lora
from peft import PeftModel
from safetensors.torch import load_file, save_file
from synthetic import noise_sample

from trainer.config.groups import GROUPS
from trainer.config.schema import Run
from trainer.config.sections import Export, Format
from trainer.core.batch import Batch
from trainer.core.digests import Digests
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
from trainer.objective import Diffusion, Prediction, Schedule, Spacing
from trainer.precision import Precision

HEIGHT, WIDTH = 32, 56
CAPTIONS = ["make it night", "paint the photo"]
STEPS = 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> UNetFamily:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    kind = GROUPS["model"][request.param]
    kind.save_tiny_checkpoint(folder)
    return kind(path=str(folder))


def load_pipeline(family: UNetFamily) -> Any:
    pipeline = family.pipeline_class().from_pretrained(family.path, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def initial_noise(family: UNetFamily) -> torch.Tensor:
    shape = family.shapes(HEIGHT, WIDTH)["latents"]
    return torch.stack([normal(shape, "noise", i) for i in range(len(CAPTIONS))])


def encode_conditions(family: UNetFamily, captions: list[str]) -> Batch:
    encoder, samples = family.build_encoder(CPU), [noise_sample(caption, WIDTH, HEIGHT) for caption in captions]
    names = [name for name in family.recipes(dict.fromkeys(family.components, ""), 0) if not name.startswith("latents")]
    return {name: torch.stack([encoder.encode(name, sample) for sample in samples]) for name in names}


def pipeline_images(family: UNetFamily, pipeline: Any, guidance: float) -> np.ndarray:
    return pipeline(
        prompt=CAPTIONS,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=initial_noise(family),
        output_type="np",
    ).images


def our_images(family: UNetFamily, network: Any, guidance: float) -> np.ndarray:
    conditions = encode_conditions(family, CAPTIONS)
    unconditional = encode_conditions(family, [""] * len(CAPTIONS))

    def predict(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        prediction = family.predict(network, latents, t, conditions, guidance)
        if guidance == 1:
            return prediction
        without_captions = family.predict(network, latents, t, unconditional, guidance)
        return family.apply_guidance(prediction, without_captions, guidance, t)

    with torch.no_grad():
        latents = family.sample(predict, initial_noise(family), STEPS)
    return family.build_encoder(CPU).decode(latents).permute(0, 2, 3, 1).numpy()


def record_tensors(unet: Any, calls: list[dict[str, torch.Tensor]]) -> None:
    """Appends the tensors that reach each forward pass, by name, and the `result` to `calls`."""
    forward = unet.forward

    def recorded(sample, timestep, **arguments):
        output = forward(sample, timestep, **arguments)
        calls.append(
            {
                "sample": sample,
                "timestep": torch.as_tensor(timestep).float().expand(len(sample)),
                "prompt": arguments["encoder_hidden_states"],
                **(arguments["added_cond_kwargs"] or {}),
                "result": output[0],
            }
        )
        return output

    unet.forward = recorded


def test_unet_inputs_and_predictions_match_the_pipeline(family: UNetFamily):
    pipeline, network = load_pipeline(family), family.load_network(torch.float32).eval()
    expected, found = [], []
    record_tensors(pipeline.unet, expected)
    record_tensors(network, found)
    np.testing.assert_allclose(our_images(family, network, 1.0), pipeline_images(family, pipeline, 1.0), atol=1e-5)
    assert len(found) == len(expected) == STEPS
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name].to(ours[name].dtype), rtol=0, atol=1e-5, msg=name)
        assert ours["result"].abs().mean() > 0.01


def test_images_with_guidance_match_the_pipeline(family: UNetFamily):
    pipeline, network = load_pipeline(family), family.load_network(torch.float32).eval()
    images = our_images(family, network, 7.5)
    np.testing.assert_allclose(images, pipeline_images(family, pipeline, 7.5), atol=1e-4)
    assert np.abs(images - our_images(family, network, 1.0)).max() > 0.01


@pytest.mark.parametrize("prediction", list(Prediction))
def test_images_match_the_pipeline_for_every_prediction_type(family: UNetFamily, prediction: Prediction):
    objective = Diffusion(prediction=prediction, schedule=Schedule.squaredcos_cap_v2, timesteps=600)
    family = dataclasses.replace(family, objective=objective)
    pipeline, network = load_pipeline(family), family.load_network(torch.float32).eval()
    scheduler = pipeline.scheduler
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, **family.scheduler_config())
    np.testing.assert_allclose(our_images(family, network, 3.0), pipeline_images(family, pipeline, 3.0), atol=1e-4)


def test_latents_have_the_mean_and_standard_deviation_of_the_vae(family: UNetFamily):
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(family.path, subfolder="vae")
    sample, encoder = noise_sample("a photo", WIDTH, HEIGHT), family.build_encoder(CPU)
    pixels = torch.from_numpy(sample.pixels()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(encoder.encode("latents", sample), posterior.mean[0] * vae.config.scaling_factor)
    torch.testing.assert_close(encoder.encode("latents_std", sample), posterior.std[0] * vae.config.scaling_factor)
    assert "latents_std" in family.shapes(HEIGHT, WIDTH)
    assert "latents_std" not in dataclasses.replace(family, posterior=Posterior.mean).shapes(HEIGHT, WIDTH)


def test_another_vae_is_used_digested_and_exported(family: UNetFamily, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(Path(family.path) / "vae", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"scaling_factor": 1.0}))
    changed = dataclasses.replace(family, vae=str(other))
    sample = noise_sample("a photo", WIDTH, HEIGHT)
    latents, unscaled = (each.build_encoder(CPU).encode("latents", sample) for each in (family, changed))
    torch.testing.assert_close(unscaled, latents / config["scaling_factor"])
    digests = Digests(tmp_path / "digests")
    before, after = family.component_digests(digests), changed.component_digests(digests)
    assert {name for name in before if before[name] != after[name]} == {"vae"}
    tensors = changed.load_network(torch.float32).state_dict()
    changed.save_pipeline(((name, tensor.detach()) for name, tensor in tensors.items()), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "vae" / "config.json").read_text())["scaling_factor"] == 1.0


def test_vae_overflow_is_refused_with_a_remedy(family: UNetFamily, tmp_path: Path):
    folder = tmp_path / "overflowing"
    shutil.copytree(Path(family.path) / "vae", folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_in.weight"] *= 1e6
    save_file(tensors, weights, {"format": "pt"})
    half = dataclasses.replace(family, vae=str(folder), vae_dtype=Dtype.float16)
    with pytest.raises(DataError, match=r"target.* NaN or infinity in float16; type model.vae_dtype=float32"):
        half.build_encoder(CPU).encode("latents", noise_sample("a photo", WIDTH, HEIGHT))


def test_size_conditions_are_the_crop_in_training_and_the_whole_image_in_sampling(family: UNetFamily):
    if "time_ids" not in family.shapes(HEIGHT, WIDTH):
        pytest.skip("this model reads no sizes")
    image = noise_sample("a photo", 100, 80).sample.image
    cropped = TransformedSample(Sample("1", image, "a photo"), WIDTH, HEIGHT)
    sizes = family.build_encoder(CPU).encode("time_ids", cropped)
    # 100 x 80 is scaled to 56 x 45 to cover 56 x 32: 6 or 7 rows are cropped at the top.
    assert sizes.tolist() == [80.0, 100.0, 6.0, 0.0, 32.0, 56.0]
    conditions = {"time_ids": sizes[None], "pooled": torch.zeros(1, 16)}
    training, sampling = (
        family.added_conditions(conditions, torch.zeros(1), guidance)["time_ids"] for guidance in (None, 5.0)
    )
    assert training.tolist() == [sizes.tolist()]
    assert sampling.tolist() == [[32.0, 56.0, 0.0, 0.0, 32.0, 56.0]]


EXTRA_TARGETS = [
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


@pytest.fixture(scope="module", params=[False, True], ids=["unet", "unet and text encoders"])
def lora(request: pytest.FixtureRequest, family: UNetFamily) -> TrainedLora:
    family = dataclasses.replace(family, train_text_encoder=request.param)
    network = family.load_network(torch.float32)
    return train_lora(family, network, EXTRA_TARGETS, lambda network: our_images(family, network, 2.0), std=0.2)


@pytest.mark.parametrize("format", LORA_FORMATS)
def test_pipeline_with_an_export_generates_the_images_of_the_trained_network(
    lora: TrainedLora, format: Format, tmp_path: Path
):
    family, path = lora.family, lora.export(format, tmp_path)
    if format is Format.peft:
        # A peft folder is for one component of a pipeline.
        network = family.load_network(torch.float32)
        if family.train_text_encoder:
            assert len(list(path.iterdir())) == len(list(network.children()))
            for name, component in list(network.named_children()):
                setattr(network, name, PeftModel.from_pretrained(component, str(path / name)).get_base_model())
        else:
            network = PeftModel.from_pretrained(network, str(path)).get_base_model()
        np.testing.assert_allclose(our_images(family, network.eval(), 2.0), lora.images, atol=1e-4)
        return
    pipeline = load_pipeline(dataclasses.replace(family, path=str(path)) if format is Format.pipeline else family)
    if format is not Format.pipeline:
        pipeline.load_lora_weights(path.parent, weight_name=path.name)
    np.testing.assert_allclose(pipeline_images(family, pipeline, 2.0), lora.images, atol=1e-4)


COMFYUI_LAYERS = (
    r"lora_unet_(?P<unet>\w+)"
    r"|lora_te(?P<text>1|2|)_text_model_encoder_layers_(?P<layer>\d+)_(?P<name>mlp_fc[12]|self_attn_([qkv]|out)_proj)"
)
"""The layers that ComfyUI knows: diffusers' names with _ for dots (model_lora_keys_unet and _clip in comfy/lora.py)."""


def test_comfyui_finds_every_layer_and_its_alpha(lora: TrainedLora, tmp_path: Path):
    family = lora.family
    network = family.load_network(torch.float32).eval()
    layers = {name.replace(".", "_"): layer for name, layer in network.named_modules()}

    def find_layer(key: str) -> torch.nn.Module:
        found = re.fullmatch(COMFYUI_LAYERS, key)
        assert found, key
        if found["unet"]:
            return layers[f"unet_{found['unet']}" if family.train_text_encoder else found["unet"]]
        encoder = "text_encoder_2" if found["text"] == "2" else "text_encoder"
        end = f"encoder_layers_{found['layer']}_{found['name']}"
        return layers.get(f"{encoder}_{end}") or layers[f"{encoder}_text_model_{end}"]

    merge_comfyui_lora(lora.export(Format.comfyui, tmp_path), find_layer, up="lora_up", down="lora_down")
    np.testing.assert_allclose(our_images(family, network, 2.0), lora.images, atol=1e-4)


@pytest.mark.parametrize("text_encoders", [False, True], ids=["unet", "unet and text encoders"])
def test_full_training_is_exported_with_the_settings_of_its_objective(
    family: UNetFamily, text_encoders: bool, tmp_path: Path
):
    objective = Diffusion(prediction=Prediction.v_prediction, timesteps=500)
    family = dataclasses.replace(family, train_text_encoder=text_encoders, objective=objective)
    network = family.load_network(torch.float32)
    Full().attach(network, family.target_modules, seed=0)
    with torch.no_grad():
        for name, parameter in trainable_parameters(network).items():
            parameter.add_(0.02 * normal(tuple(parameter.shape), name))
    expected = our_images(family, network.eval(), 2.0)
    run = Run(model=family, method=Full(), precision=Precision(), export=Export(formats=[Format.pipeline]))
    weights = {name: parameter.detach() for name, parameter in trainable_parameters(network).items()}
    (path,) = write_exports(run, network, weights, tmp_path)
    exported = dataclasses.replace(family, path=str(path))
    np.testing.assert_allclose(pipeline_images(family, load_pipeline(exported), 2.0), expected, atol=1e-4)
    assert "v_prediction" in family.warnings()[0]
    assert exported.warnings() == []


def test_trained_text_encoders_predict_as_cached_captions_do_and_get_gradients(family: UNetFamily):
    training = dataclasses.replace(family, train_text_encoder=True)
    network, training_network = (each.load_network(torch.float32).eval() for each in (family, training))
    latents, t = initial_noise(family), torch.tensor([10.0, 700.0])
    for captions in (CAPTIONS, ["", "make it night"]):
        found = training.predict(training_network, latents, t, encode_conditions(training, captions))
        expected = family.predict(network, latents, t, encode_conditions(family, captions))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    Lora(rank=2, alpha=2.0).attach(training_network, training.target_modules, seed=0)
    training_network.enable_gradient_checkpointing()
    conditions = encode_conditions(training, CAPTIONS)
    training.predict(training_network.train(), latents, t, conditions).square().sum().backward()
    with_gradients = {
        name.partition(".")[0]
        for name, parameter in trainable_parameters(training_network).items()
        if parameter.grad is not None
    }
    assert with_gradients == {"unet", *(f"text_encoder{suffix}" for suffix in family.text_suffixes)}


def test_zero_terminal_snr_is_exported_with_a_scheduler_that_knows_it(family: UNetFamily, tmp_path: Path):
    shutil.copytree(Path(family.path), tmp_path / "base")
    for name, changes in (
        ("scheduler/scheduler_config.json", {"_class_name": "PNDMScheduler", "skip_prk_steps": True}),
        ("model_index.json", {"scheduler": ["diffusers", "PNDMScheduler"]}),
    ):
        path = tmp_path / "base" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    objective = Diffusion(
        prediction=Prediction.v_prediction,
        timesteps=600,
        rescale_betas_zero_snr=True,
        timestep_spacing=Spacing.trailing,
    )
    trained = dataclasses.replace(family, path=str(tmp_path / "base"), objective=objective)
    network = trained.load_network(torch.float32).eval()
    trained.save_pipeline(network.state_dict().items(), tmp_path / "out")
    exported = dataclasses.replace(family, path=str(tmp_path / "out"))
    exported.objective = Diffusion(prediction=Prediction.v_prediction, timesteps=600)
    exported.check_configs()
    assert exported.resolved_objective() == dataclasses.replace(
        trained.resolved_objective(), rescale_betas_zero_snr=None, timestep_spacing=None
    )
    expected = pipeline_images(exported, load_pipeline(exported), 3.0)
    np.testing.assert_allclose(our_images(trained, network, 3.0), expected, atol=1e-3)
