"""Base models in single files of the original layout, compared with diffusers' reader of such files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import noise_sample

from trainer.config.groups import GROUPS
from trainer.config.schema import Run
from trainer.config.sections import Export, Format
from trainer.core.digests import Digests
from trainer.core.errors import UsageError, WeightsError
from trainer.core.rng import normal
from trainer.core.tensor_files import save_tensors
from trainer.export.write import write_exports
from trainer.method.lora import Lora
from trainer.method.trainable import trainable_parameters
from trainer.model import Family
from trainer.model.flux_kontext import FluxKontext
from trainer.model.llm_unet.tiny import save_tiny_llm
from trainer.model.pmg import PMG
from trainer.model.tiny_components import WORDS, clip_config, save_clip_tokenizer
from trainer.model.unet.family import UNetFamily
from trainer.precision import Precision, Storage
from trainer.precision.checkpoint_types import quantized_layers

CPU = torch.device("cpu")
ATTENTION, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
LEVELS = {"sd15": (ATTENTION, ATTENTION, PLAIN), "sdxl": (PLAIN, ATTENTION, ATTENTION)}
"""As in the published models, where attention is on opposite sides."""
CLIP = {"sd15": "cond_stage_model.transformer", "sdxl": "conditioner.embedders.0.transformer"}


def save_checkpoint(name: str, folder: Path) -> UNetFamily:
    """Writes a tiny checkpoint with every kind of layer of the published ones: attention in the VAE and, in both UNets,
    two resnets per level and resampling with and without attention.

    diffusers tells the text encoders of a single file apart by their widths, so these differ.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    kind = GROUPS["model"][name]
    kind.save_tiny_checkpoint(folder)
    torch.manual_seed(1)
    width = 16
    if name == "sdxl":
        width += 24
        vocabulary = save_clip_tokenizer(folder / "tokenizer_2", WORDS, 8)
        config = clip_config(vocabulary, 8, 24, intermediate_size=32, num_attention_heads=2)
        kind.text_encoder_class("_2")(config).save_pretrained(folder / "text_encoder_2")
    config = json.loads((folder / "unet" / "config.json").read_text())
    config |= {
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "cross_attention_dim": width,
        "down_block_types": [down for down, _ in LEVELS[name]],
        "up_block_types": [up for _, up in reversed(LEVELS[name])],
    }
    if name == "sdxl":
        config["projection_class_embeddings_input_dim"] = 24 + 6 * config["addition_time_embed_dim"]
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    config = json.loads((folder / "vae" / "config.json").read_text())
    config |= {"mid_block_add_attention": True, "block_out_channels": (4, 8, 8, 8)}
    AutoencoderKL.from_config(config).save_pretrained(folder / "vae")
    return kind(path=str(folder))


def save_single_file(family: Family, path: Path) -> Path:
    tensors = family.load_network(torch.float32).state_dict()
    family.save_single_file(lambda name: tensors[name], torch.float32, path)
    return path


def edit(path: Path, changes: dict[str, torch.Tensor | None], target: Path) -> Path:
    """Copies a file with other tensors; None removes one."""
    tensors: dict[str, Any] = load_file(path) | changes
    save_tensors(target, {key: tensor for key, tensor in tensors.items() if tensor is not None})
    return target


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def folder_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> UNetFamily:
    """A family whose base is a diffusers folder."""
    torch.set_num_threads(1)
    return save_checkpoint(request.param, tmp_path_factory.mktemp(request.param) / "folder")


@pytest.fixture(scope="module")
def single(folder_family: UNetFamily) -> UNetFamily:
    """The same with the weights in one file."""
    assert folder_family.path
    path = save_single_file(folder_family, Path(folder_family.path).parent / "base.safetensors")
    return dataclasses.replace(folder_family, path=str(path), config=folder_family.path)


def states(pipeline: Any) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: component.state_dict()
        for name, component in pipeline.components.items()
        if isinstance(component, torch.nn.Module)
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_diffusers_reads_the_file_as_it_reads_the_folder(folder_family: UNetFamily, single: UNetFamily):
    kind = folder_family.pipeline_class()
    expected = states(kind.from_pretrained(folder_family.path, dtype=torch.float32))
    found = states(kind.from_single_file(single.path, config=folder_family.path, local_files_only=True))
    assert found.keys() == expected.keys() and len(found) == 2 + len(folder_family.text_suffixes)
    for component in expected:
        assert_same(found[component], expected[component])


def test_network_and_encoders_equal_those_of_the_folder(folder_family: UNetFamily, single: UNetFamily):
    assert_same(single.load_network(torch.float32).state_dict(), folder_family.load_network(torch.float32).state_dict())
    both = [dataclasses.replace(family, train_text_encoder=True) for family in (single, folder_family)]
    assert_same(*(family.load_network(torch.float32).state_dict() for family in both))
    sample = noise_sample("make it night", 32, 32)
    for name in folder_family.recipes(dict.fromkeys(folder_family.components, ""), 0):
        found, expected = (family.build_encoder(CPU).encode(name, sample) for family in (single, folder_family))
        assert torch.equal(found, expected), name
    latents = normal((1, 4, 4, 4), "latents")
    assert torch.equal(single.build_encoder(CPU).decode(latents), folder_family.build_encoder(CPU).decode(latents))


def test_a_file_that_diffusers_did_not_name_like_itself_is_read(single: UNetFamily, tmp_path: Path):
    """The denoiser and the VAE also come from files of their own, in either layout and with any usual prefix."""
    assert single.path and single.config
    tensors = load_file(single.path)
    expected = single.load_network(torch.float32).state_dict()
    for number, (prefix, new) in enumerate(
        [("model.diffusion_model.", ""), ("model.diffusion_model.", "diffusion_model."), (None, None)]
    ):
        path = tmp_path / f"{number}.safetensors"
        if prefix is None:
            path = Path(single.config) / "unet" / "diffusion_pytorch_model.safetensors"
        else:
            part = {new + key.removeprefix(prefix): tensor for key, tensor in tensors.items() if prefix in key}
            save_file(part, path)
        family = dataclasses.replace(single, path=single.config, config=None, unet=str(path))
        assert_same(family.load_network(torch.float32).state_dict(), expected)
        assert family.not_read() == {path: set()}
    projection = "conditioner.embedders.1.model.text_projection"
    if projection in tensors:
        other_name = {projection: None, f"{projection}.weight": tensors[projection].T}
        path = edit(Path(single.path), other_name, tmp_path / "projection.safetensors")
        family = dataclasses.replace(single, path=str(path), train_text_encoder=True)
        expected = dataclasses.replace(single, train_text_encoder=True).load_network(torch.float32).state_dict()
        assert_same(family.load_network(torch.float32).state_dict(), expected)
    vae = {key.partition(".")[2]: 2 * tensor for key, tensor in tensors.items() if key.startswith("first_stage")}
    save_file(vae, tmp_path / "vae.safetensors")
    family = dataclasses.replace(single, vae=str(tmp_path / "vae.safetensors"))
    weight = family.load_vae(torch.float32, CPU).encoder.conv_in.weight
    assert torch.equal(weight, 2 * single.load_vae(torch.float32, CPU).encoder.conv_in.weight)
    digests = Digests(tmp_path / "digests")
    before, after = single.component_digests(digests), family.component_digests(digests)
    assert {name for name in before if before[name] != after[name]} == {"vae"}


@pytest.mark.parametrize("train_text_encoder", [False, True], ids=["unet", "unet and text encoders"])
@pytest.mark.parametrize("base", ["folder", "file"])
def test_diffusers_reads_an_export_with_the_trained_weights(
    folder_family: UNetFamily, single: UNetFamily, base: str, train_text_encoder: bool, tmp_path: Path
):
    family = folder_family if base == "folder" else single
    family = dataclasses.replace(family, train_text_encoder=train_text_encoder)
    run = Run(
        model=family,
        method=Lora(rank=2, alpha=2.0),
        precision=Precision(),
        export=Export([Format.single_file, Format.pipeline]),
    )
    network = family.load_network(torch.float32)
    run.method.attach(network, family.target_modules, seed=0)
    trained = {name: normal(tuple(weight.shape), name) for name, weight in trainable_parameters(network).items()}
    path, folder = write_exports(run, network, trained, tmp_path)
    config = family.config or family.path
    found = states(family.pipeline_class().from_single_file(str(path), config=config, local_files_only=True))
    expected = states(family.pipeline_class().from_pretrained(folder, dtype=torch.float32))
    base_pipeline = states(family.pipeline_class().from_pretrained(config, dtype=torch.float32))
    changed = set()
    for component in expected:
        assert_same(found[component], expected[component])
        if any(not torch.equal(base_pipeline[component][name], tensor) for name, tensor in found[component].items()):
            changed.add(component)
    assert changed == ({"unet", *family.text_encoder_names} if train_text_encoder else {"unet"})


def test_other_tensors_are_named_or_refused(single: UNetFamily, tmp_path: Path):
    assert single.path
    one = torch.ones(1)
    extra = {f"model_ema.diffusion_model{i}": one for i in range(3)} | {"alphas_cumprod": one, "v_pred": torch.zeros(0)}
    path = edit(Path(single.path), extra, tmp_path / "more.safetensors")
    family = dataclasses.replace(single, path=str(path))
    assert_same(family.load_network(torch.float32).state_dict(), single.load_network(torch.float32).state_dict())
    said = " ".join(family.warnings())
    assert "more.safetensors: 1 (alphas_cumprod)" in said and "3 (model_ema.diffusion_model0" in said
    assert "prediction_type=v_prediction (not epsilon)" in said
    written = load_file(save_single_file(family, tmp_path / "written.safetensors"))
    assert "alphas_cumprod" in written and not any(key.startswith(("model_ema", "v_pred")) for key in written)
    path = edit(Path(single.path), {"model.diffusion_model.control.weight": one}, tmp_path / "unknown.safetensors")
    with pytest.raises(WeightsError, match=r"unknown.safetensors holds 1 tensors .*model.diffusion_model.control"):
        dataclasses.replace(single, path=str(path)).component_digests(Digests(tmp_path / "digests"))


def other_files(single: UNetFamily, folder: Path) -> dict[str, Path]:
    """Writes files that are no base of this model; returns what messages must say -> file."""
    base = Path(single.path or "")
    conv = load_file(base)["model.diffusion_model.input_blocks.0.0.weight"]
    wide = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(len(conv), 9, *conv.shape[2:])}
    vae = {f"{half}.conv_in.weight": torch.zeros(1) for half in ("encoder", "decoder")}
    other = {"sd15": "sdxl", "sdxl": "sd15"}["sdxl" if len(single.text_suffixes) > 1 else "sd15"]
    other_folder = save_checkpoint(other, folder / "other")
    files = {
        "a LoRA": {"lora_unet_x.lora_down.weight": torch.zeros(1)},
        "a VAE": vae,
        "unknown kind": {"weight": torch.zeros(1)},
        "it lacks": None,
        "inpainting": wide,
    }
    paths = {}
    for number, (words, tensors) in enumerate(files.items()):
        paths[words] = folder / f"{number}.safetensors"
        if tensors is wide:
            edit(base, wide, paths[words])
        elif tensors is None:
            save_single_file(other_folder, paths[words])
        else:
            save_file(tensors, paths[words])
    return paths


def test_files_of_another_kind_are_refused_in_words(single: UNetFamily, tmp_path: Path):
    for words, path in other_files(single, tmp_path).items():
        with pytest.raises(WeightsError, match=rf"seems to hold .*{words}|{words}") as error:
            dataclasses.replace(single, path=str(path)).component_digests(Digests(tmp_path / "digests"))
        assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": "a.ckpt"}, "no such file"),
        ({"path": "pickle.ckpt"}, "save_file"),
        ({"path": "x.gguf"}, "made from"),
        ({"path": "base.safetensors", "config": "no/where/at/all"}, "there is no such folder"),
        ({"path": "base.safetensors", "config": "owner/name"}, "cannot be read .* type model.config=FOLDER, any diff"),
    ],
)
def test_what_cannot_be_read_says_what_to_type(
    settings: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("pickle.ckpt", "x.gguf", "base.safetensors"):
        Path(name).write_bytes(b"x")
    with pytest.raises(WeightsError, match=words):
        GROUPS["model"]["sdxl"](**settings).folder()


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="leave model.config out"):
        GROUPS["model"]["sdxl"](path="owner/name", config="owner/name")
    path = tmp_path / "flux.safetensors"
    path.touch()
    with pytest.raises(WeightsError, match=r"type model.transformer=.*flux.safetensors"):
        FluxKontext(path=str(path)).folder()


def test_layout_of_flux_is_that_of_diffusers():
    """On the width of the published model, which diffusers' converter expects, with one value per row."""
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    from trainer.model.weights import on_meta_device

    with on_meta_device():
        network = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    expected = {name: normal((tensor.shape[0],), name) for name, tensor in network.state_dict().items()}
    layout = FluxKontext(path="unused").original_layout("transformer")
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in expected.items():
        pieces = layout(name).pieces
        rows = len(tensor) // sum(piece.last - piece.first for piece in pieces)
        for piece in pieces:
            part, tensor = tensor.split(
                [rows * (piece.last - piece.first), len(tensor) - rows * (piece.last - piece.first)]
            )
            parts.setdefault(piece.key, {})[piece.first] = part
    original = {key: torch.cat([found[first] for first in sorted(found)]) for key, found in parts.items()}
    assert_same(convert_flux_transformer_checkpoint_to_diffusers(original), expected)


@pytest.mark.parametrize("scaled", [False, True])
def test_float8_file_is_read_as_it_is(scaled: bool, tmp_path: Path):
    """As in ComfyUI's files, the tensors that several of diffusers' layers share have one scale."""
    family = FluxKontext(path=str(tmp_path / "folder"), text_length=8)
    FluxKontext.save_tiny_checkpoint(tmp_path / "folder")
    path = save_single_file(family, tmp_path / "flux.safetensors")
    tensors = {}
    for key, tensor in load_file(path).items():
        scale = tensor.abs().max() / 448 if scaled and tensor.ndim == 2 else torch.tensor(1.0)
        tensors[f"model.diffusion_model.{key}"] = (tensor / scale).to(torch.float8_e4m3fn)
        if scaled and tensor.ndim == 2:
            tensors[f"model.diffusion_model.{key.removesuffix('weight')}scale_weight"] = scale
    save_tensors(path, tensors | {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)})
    family = dataclasses.replace(family, transformer=str(path))
    assert family.not_read() == {path: {"scaled_fp8"}}
    dtypes = family.weights().dtypes()
    assert quantized_layers(dtypes) == {
        name: "fp8" for name, layer in family.meta_model().named_modules() if getattr(layer, "weight", None) is not None
    }
    quantizer = Precision(Storage.native).quantizer((), CPU, dtypes)
    network, plain = family.load_network(torch.float32, quantize=quantizer), load_plain(tmp_path / "folder")
    for name, layer in plain.named_modules():
        if isinstance(layer, torch.nn.Linear):
            error = (network.get_submodule(name).weight - layer.weight).norm() / layer.weight.norm()
            assert error < 0.05, name


def load_plain(folder: Path) -> torch.nn.Module:
    return FluxKontext(path=str(folder), text_length=8).load_network(torch.float32)


def test_a_family_that_uses_a_part_of_a_file_reads_that_part(tmp_path: Path):
    sd15 = save_checkpoint("sd15", tmp_path / "folder")
    path = save_single_file(sd15, tmp_path / "base.safetensors")
    llm = tmp_path / "llm"
    save_tiny_llm(llm)
    family = PMG(path=str(path), config=sd15.path, llm=str(llm))
    assert all(key.startswith("cond_stage_model.") for key in family.not_read()[path])
    assert family.component_digests(Digests(tmp_path / "digests")).keys() == {*family.components}
    unet = family.load_network(torch.float32).unet.state_dict()
    assert_same(unet, sd15.load_network(torch.float32).state_dict())
