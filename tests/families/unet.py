"""Families with a UNet: what their cases have in common, and what other families lack."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import our_pictures
from safetensors.torch import load_file, save_file
from synthetic import noise_sample

from families import Case, Pictures, Request, Tiny, case_of
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
from trainer.model.published.__main__ import clip_vocabulary
from trainer.model.unet.family import Posterior, UNetFamily
from trainer.objective import Diffusion, Prediction, Schedule, Spacing
from trainer.precision import Precision


class UNetCase(Case):
    pictures = {
        "without guidance": Pictures(size=(56, 32), lora=False),
        "guidance": Pictures(guidance=7.5, size=(56, 32)),
        "text encoders too": Pictures(guidance=2.0, size=(56, 32), settings={"train_text_encoder": True}),
    }
    tolerance = 1e-4
    extra_targets = (
        *("proj_in", "proj_out", "conv1", "conv_shortcut", "time_emb_proj", "ff.net.0.proj", "ff.net.2", "conv"),
        *("fc1", "fc2"),
    )
    lora_std = 0.2
    # diffusers' names with _ for dots: model_lora_keys_unet and _clip in comfy/lora.py
    comfyui_layers = (
        r"lora_unet_(?P<unet>\w+)"
        r"|lora_te(?P<text>1|2|)_text_model_encoder_layers_(?P<layer>\d+)_(?P<name>mlp_fc[12]|self_attn_([qkv]|out)_proj)"
    )
    comfyui_factors = ("lora_up", "lora_down")

    def generate(self, pipeline: Any, request: Request) -> np.ndarray:
        return pipeline(
            prompt=list(request.captions),
            height=request.height,
            width=request.width,
            num_inference_steps=request.pictures.steps,
            guidance_scale=request.pictures.guidance,
            latents=request.noise,
            output_type="np",
        ).images

    def find_comfyui_layer(self, network: torch.nn.Module, name: str) -> torch.nn.Module:
        layers = {name.replace(".", "_"): layer for name, layer in network.named_modules()}
        found = re.fullmatch(self.comfyui_layers, name)
        assert found, f"ComfyUI knows no layer {name}"
        if found["unet"]:
            return layers.get(f"unet_{found['unet']}") or layers[found["unet"]]
        encoder = "text_encoder_2" if found["text"] == "2" else "text_encoder"
        end = f"encoder_layers_{found['layer']}_{found['name']}"
        return layers.get(f"{encoder}_{end}") or layers[f"{encoder}_text_model_{end}"]


CASE = UNetCase()
WIDTH, HEIGHT = 56, 32
CPU = torch.device("cpu")
UNETS = [name for name, kind in GROUPS["model"].items() if issubclass(kind, UNetFamily) and "lora" in kind.methods]


@pytest.fixture(scope="module", params=UNETS)
def name(request: pytest.FixtureRequest) -> str:
    """Each family with a UNet in turn."""
    return request.param


@pytest.fixture(scope="module")
def family(name: str, tiny_checkpoint: Callable[[str], Tiny]) -> UNetFamily:
    return tiny_checkpoint(name).family()


def request_with(family: UNetFamily, guidance: float) -> Request:
    return CASE.request(family, Pictures(guidance=guidance, size=(WIDTH, HEIGHT)))


def assert_same_pictures(
    family: UNetFamily, network: torch.nn.Module, pipeline: Any, guidance: float, tolerance: float = 1e-4
) -> None:
    request = request_with(family, guidance)
    found, expected = our_pictures(request, network), CASE.generate(pipeline, request)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def encode_conditions(family: UNetFamily, captions: Sequence[str]) -> Batch:
    encoder, samples = family.build_encoder(CPU), [noise_sample(caption, WIDTH, HEIGHT) for caption in captions]
    names = [name for name in family.recipes(dict.fromkeys(family.components, ""), 0) if not name.startswith("latents")]
    return {name: torch.stack([encoder.encode(name, sample) for sample in samples]) for name in names}


@pytest.mark.parametrize("prediction", list(Prediction))
def test_images_match_the_pipeline_for_every_prediction_type(family: UNetFamily, prediction: Prediction):
    objective = Diffusion(prediction=prediction, schedule=Schedule.squaredcos_cap_v2, timesteps=600)
    family = dataclasses.replace(family, objective=objective)
    pipeline, network = CASE.load_pipeline(family), family.load_network(torch.float32)
    scheduler = pipeline.scheduler
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, **family.scheduler_config())
    assert_same_pictures(family, network, pipeline, 3.0)


def test_standard_deviation_of_latents_is_that_of_the_vae(family: UNetFamily):
    """tests/test_parity.py compares the mean."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(family.path, subfolder="vae")
    sample = noise_sample("a photo", WIDTH, HEIGHT)
    pixels = torch.from_numpy(sample.pixels()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.std[0] * vae.config.scaling_factor
    torch.testing.assert_close(family.build_encoder(CPU).encode("latents_std", sample), expected)
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
    run = Run(model=family, method=Full(), precision=Precision(), export=Export(formats=[Format.pipeline]))
    weights = {name: parameter.detach() for name, parameter in trainable_parameters(network).items()}
    (path,) = write_exports(run, network, weights, tmp_path)
    exported = dataclasses.replace(family, path=str(path))
    assert_same_pictures(family, network.eval(), CASE.load_pipeline(exported), 2.0)
    assert "v_prediction" in family.warnings()[0]
    assert exported.warnings() == []


def test_trained_text_encoders_predict_as_cached_captions_do_and_get_gradients(family: UNetFamily):
    training = dataclasses.replace(family, train_text_encoder=True)
    network, training_network = (each.load_network(torch.float32).eval() for each in (family, training))
    latents, t = request_with(family, 1.0).noise, torch.tensor([10.0, 700.0])
    for captions in (CASE.captions, ["", "make it night"]):
        found = training.predict(training_network, latents, t, encode_conditions(training, captions))
        expected = family.predict(network, latents, t, encode_conditions(family, captions))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    Lora(rank=2, alpha=2.0).attach(training_network, training.target_modules, seed=0)
    training_network.enable_gradient_checkpointing()
    conditions = encode_conditions(training, CASE.captions)
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
    assert_same_pictures(trained, network, CASE.load_pipeline(exported), 3.0, tolerance=1e-3)


def test_single_file_needs_no_other_file(name: str, tmp_path: Path):
    """The configs and tokenizers are those of the published model."""
    path = tmp_path / "base.safetensors"
    path.touch()
    family = GROUPS["model"][name](path=str(path))
    (size,) = case_of(name).published
    assert family.folder() == case_of(name).published_family(size, tmp_path).folder()
    text = [320, 1125, 539, 320, 2368]
    for suffix, padding in zip(family.text_suffixes, (49407, 0), strict=False):
        assert family.tokenize(f"tokens{suffix}", "A photo  of a cat").tolist() == [
            49406,
            *text,
            49407,
            *[padding] * 70,
        ]
    # As OpenAI's own tokenizer says.
    assert family.tokenize("tokens", "l'été 12 🙂").tolist()[1:8] == [331, 262, 3459, 39694, 272, 273, 14860]


def test_vocabulary_of_clip_follows_from_its_merges(name: str, tmp_path: Path):
    (size,) = case_of(name).published
    for folder in case_of(name).published_family(size, tmp_path).folder().glob("tokenizer*"):
        _, *merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        assert json.loads((folder / "vocab.json").read_text(encoding="utf-8")) == clip_vocabulary(merges)
    assert "MIT License" in (resources.files("trainer.model.published") / "LICENSE.CLIP").read_text()
