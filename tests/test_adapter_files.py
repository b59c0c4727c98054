"""Adapters in files of other programs: each tensor is read as its program means it, or the file is refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import adapter_mutations
import fuzz
import pytest
import torch
from synthetic import normal

from trainer.config.schema import Run
from trainer.config.sections import Export, Format
from trainer.core import files, tensor_files
from trainer.core.errors import DataError, StorageError, TrainerError, UsageError
from trainer.export.read import check_adapter, read_adapter
from trainer.export.write import write_exports
from trainer.method.adapter import Adapter
from trainer.method.adapter_layers import layer_adapters
from trainer.method.adapter_loading import load_into
from trainer.method.adapter_probe import probe_outputs
from trainer.method.dora import Dora
from trainer.method.lokr import Lokr
from trainer.method.lora import Lora
from trainer.method.trainable import trainable_parameters
from trainer.model import Family
from trainer.model.flux_kontext import FluxKontext
from trainer.model.sdxl import SDXL
from trainer.precision import Precision

Tensors = dict[str, torch.Tensor]
LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("flux")
    FluxKontext.save_tiny_checkpoint(folder)
    return FluxKontext(path=str(folder), text_length=8)


@pytest.fixture(scope="module")
def unet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    SDXL.save_tiny_checkpoint(folder)
    return folder


def attached(family: Family, method: Adapter, deviation: float = 0.3) -> torch.nn.Module:
    """Returns the network with the adapter of `method`, and normal numbers as its weights."""
    network = family.load_network(torch.float32)
    method.resolve(family.target_modules).attach(network, family.target_modules, seed=0)
    with torch.no_grad():
        for name, parameter in trainable_parameters(network).items():
            parameter.add_(deviation * normal(tuple(parameter.shape), name))
    return network.eval()


def export(family: Family, method: Adapter, network: torch.nn.Module, format: Format, folder: Path) -> Path:
    run = Run(model=family, method=method, export=Export([format]), precision=Precision())
    weights = {name: parameter.detach().clone() for name, parameter in trainable_parameters(network).items()}
    (path,) = write_exports(run, network, weights, folder)
    return path


def lora(name: str, *, out: int = 32, width: int = 32, rank: int = 2, a: str = "lora_A", b: str = "lora_B") -> Tensors:
    """Returns the factors of one layer."""
    return {
        f"{name}.{a}.weight": normal((rank, width), name, "a").cpu(),
        f"{name}.{b}.weight": normal((out, rank), name, "b").cpu(),
    }


def saved(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    tensor_files.save_tensors(path / "adapter.safetensors", tensors, metadata)
    return path / "adapter.safetensors"


# Names and scales


@pytest.mark.parametrize(
    "prefix", ["", "transformer.", "diffusion_model.", "base_model.model.", "lora_unet_", "lora_transformer_"]
)
def test_without_alpha_alpha_is_the_rank_under_every_name(family: Family, prefix: str, tmp_path: Path):
    name = prefix + (LAYER.replace(".", "_") if prefix.startswith("lora") else LAYER)
    tensors = lora(name)
    (adapter,) = read_adapter(saved(tmp_path, tensors), family).items()
    assert adapter[0] == LAYER and adapter[1].scale == 1
    assert torch.equal(adapter[1].tensors["lora_A.weight"], tensors[f"{name}.lora_A.weight"])


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
@pytest.mark.parametrize("block_diagonal", [False, True])
def test_fused_layers_of_the_original_program_are_taken_apart(
    family: Family, prefix: str, block_diagonal: bool, tmp_path: Path
):
    name = "single_blocks.0.linear1"
    name = prefix + (name.replace(".", "_") if prefix == "lora_unet_" else name)
    tensors = lora(name, out=7 * 32, rank=8, a="lora_down", b="lora_up") | {f"{name}.alpha": torch.tensor(4.0)}
    rows = {"attn.to_q": (0, 32), "attn.to_k": (32, 64), "attn.to_v": (64, 96), "proj_mlp": (96, 224)}
    up = tensors[f"{name}.lora_up.weight"]
    if block_diagonal:
        for number, (first, last) in enumerate(rows.values()):
            up[first:last, : 2 * number] = up[first:last, 2 * number + 2 :] = 0
    found = read_adapter(saved(tmp_path, tensors), family)
    update = 0.5 * up @ tensors[f"{name}.lora_down.weight"]
    assert found.keys() == {f"single_transformer_blocks.0.{layer}" for layer in rows}
    for layer, (first, last) in rows.items():
        adapter = found[f"single_transformer_blocks.0.{layer}"]
        assert adapter.rank() == (2 if block_diagonal else 8)
        product = adapter.scale * adapter.tensors["lora_B.weight"] @ adapter.tensors["lora_A.weight"]
        torch.testing.assert_close(product, update[first:last])


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora",
    ],
)
def test_older_names_of_a_unet_are_read(unet_folder: Path, name: str, tmp_path: Path):
    kohya = name.startswith("lora")
    tensors = lora(name, a="lora_down" if kohya else "down", b="lora_up" if kohya else "up")
    found = read_adapter(saved(tmp_path, tensors), SDXL(path=str(unet_folder)))
    assert list(found) == ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]


def test_factors_are_converted_to_float32_before_they_are_multiplied(family: Family, tmp_path: Path):
    tensors = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in lora(f"transformer.{LAYER}").items()}
    tensors[f"transformer.{LAYER}.alpha"] = torch.tensor(0.3, dtype=torch.bfloat16)
    adapter = read_adapter(saved(tmp_path, tensors), family)[LAYER]
    assert {tensor.dtype for tensor in adapter.tensors.values()} == {torch.float32}
    assert adapter.scale == float(torch.tensor(0.3, dtype=torch.bfloat16)) / 2


def test_only_a_checkpoint_in_its_run_folder_takes_alpha_from_the_run(family: Family, tmp_path: Path):
    # Names with ".default." are also those of any network of peft.
    path = saved(tmp_path, {key.replace("lora_A", "lora_A.default"): value for key, value in lora(LAYER).items()})
    assert read_adapter(path, family)[LAYER].scale == 1
    assert read_adapter(path, family, scale=0.25)[LAYER].scale == 0.25


@pytest.mark.parametrize(
    ("extra", "scale"), [({}, 4.0), ({"use_rslora": True}, 8 / 2**0.5), ({"alpha_pattern": {"to_q": 1.0}}, 0.5)]
)
def test_the_configuration_of_a_peft_folder_gives_the_scale(family: Family, extra: dict, scale: float, tmp_path: Path):
    folder = peft_folder(tmp_path, lora(f"base_model.model.{LAYER}"), {"lora_alpha": 8, **extra})
    assert read_adapter(folder, family)[LAYER].scale == pytest.approx(scale)


def peft_folder(folder: Path, tensors: Tensors, config: dict) -> Path:
    tensor_files.save_tensors(folder / "adapter_model.safetensors", tensors)
    files.write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config)
    return folder


# Refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modules_to_save": ["proj_out"]}, "modules_to_save=.*proj_out"),
        ({"bias": "all"}, "bias=all"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"setting_of_2030": True}, "setting_of_2030"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4, which also changed the base weights"),
        ({"init_lora_weights": "olora"}, "changed the base weights"),
        ({"peft_type": "OFT"}, "type OFT, which is not read"),
        ({"peft_type": "IA3"}, "type IA3, which is not read"),
        ({"r": 4}, "the rank 4, but its tensors have 2"),
        ({"lora_alpha": 0}, "an alpha of 0"),
        ({"alpha_pattern": {"(a+)+": 1}}, "pattern"),
    ],
)
def test_a_peft_folder_that_means_more_is_refused(family: Family, config: dict, message: str, tmp_path: Path):
    folder = peft_folder(tmp_path, lora(f"base_model.model.{LAYER}"), config)
    with pytest.raises(TrainerError, match=message):
        read_adapter(folder, family)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lora("lora_te1_text_model_encoder_layers_0_self_attn_q_proj"), "lora_te1_.*text encoders are not trained"),
        ({"base_model.model.proj_out.weight": torch.ones(2, 2)}, "base_model.model.proj_out.weight"),
        ({f"{LAYER}.lora_B.bias": torch.ones(32)}, "lora_B.bias"),
        ({f"{LAYER}.diff_b": torch.ones(32)}, "diff_b"),
        ({f"{LAYER}.alpha": torch.tensor(float("nan"))}, "alpha is not finite"),
        ({f"{LAYER}.alpha": torch.tensor(0.0)}, "alpha of 0"),
        ({f"{LAYER}.dora_scale": torch.ones(1, 32)}, "one magnitude for each column"),
        ({f"{LAYER}.hada_w1_a": torch.ones(32, 2)}, "no complete adapter"),
        (lora(f"transformer.{LAYER}"), "twice"),
        (lora("transformer_blocks.99.attn.to_q"), "transformer_blocks.99"),
    ],
)
def test_a_file_that_would_be_read_in_part_is_refused(family: Family, extra: Tensors, message: str, tmp_path: Path):
    path = saved(tmp_path, lora(LAYER) | extra)
    with pytest.raises((UsageError, DataError), match=message):
        read_adapter(path, family)


def test_text_encoder_layers_name_the_setting_that_trains_them(unet_folder: Path, tmp_path: Path):
    both = SDXL(path=str(unet_folder), train_text_encoder=True)
    network = attached(both, Lora(rank=2, alpha=2.0))
    path = export(both, Lora(rank=2, alpha=2.0), network, Format.diffusers, tmp_path)
    with pytest.raises(UsageError, match="Type model.train_text_encoder=true"):
        check_adapter(path, SDXL(path=str(unet_folder)))
    assert read_adapter(path, both).keys() == layer_adapters(network).keys()


def test_whole_factors_of_a_lokr_name_the_settings_that_fit(family: Family, tmp_path: Path):
    network = attached(family, Lokr(rank=64, alpha=64.0, decompose_factor=2))
    path = export(family, Lokr(rank=64, alpha=64.0, decompose_factor=2), network, Format.comfyui, tmp_path)
    method = Lokr(rank=4, alpha=4.0, init_from=str(path))
    with pytest.raises(UsageError, match=r"whole factors.*type method.decompose_factor=2 method.rank=\d+"):
        load_into(read_adapter(path, family), attached(family, method), method)


# Exports


@pytest.mark.parametrize("format", [Format.diffusers, Format.peft])
def test_dora_of_text_encoders_is_exported_and_read_back(unet_folder: Path, format: Format, tmp_path: Path):
    both = SDXL(path=str(unet_folder), train_text_encoder=True)
    method = Dora(rank=2, alpha=4.0)
    network = attached(both, method, 0.1)
    path = export(both, method, network, format, tmp_path)
    again = attached(both, method, 0.0)
    load_into(read_adapter(path, both), again, method, path)
    found = probe_outputs(again)
    for name, output in probe_outputs(network).items():
        torch.testing.assert_close(found[name], output, rtol=1e-5, atol=1e-5)
    if format is Format.peft:
        from peft import PeftModel

        unet = SDXL(path=str(unet_folder)).load_network(torch.float32)
        alone = layer_adapters(PeftModel.from_pretrained(unet, str(path / "unet")).get_base_model())
        trained = layer_adapters(network)
        for name, adapter in alone.items():
            assert all(
                torch.equal(adapter.tensors[leaf], tensor) for leaf, tensor in trained[f"unet.{name}"].tensors.items()
            )


def test_equal_weights_give_equal_bytes(family: Family, tmp_path: Path):
    network = attached(family, Lora(rank=2, alpha=2.0))
    exported = {
        export(family, Lora(rank=2, alpha=2.0), network, Format.diffusers, tmp_path / str(number)).read_bytes()
        for number in range(8)
    }
    assert len(exported) == 1
    metadata = {f"key {number}": 'ü\n\x7f\u2028"\\' for number in range(9)}
    path = saved(tmp_path, {"x": torch.ones(3)}, metadata)
    assert tensor_files.read_header(path)[0] == metadata
    assert torch.equal(tensor_files.load_tensors(path)["x"], torch.ones(3))


def test_a_full_disk_is_found_before_a_checkpoint_is_written(family: Family, tmp_path: Path):
    base = shutil.copytree(family.folder(), tmp_path / "base")
    with open(base / "vae" / "large.safetensors", "wb") as file:
        file.truncate(2**42)  # Without content, it takes no space here.
    large, method = FluxKontext(path=str(base), text_length=8), Lora(rank=2, alpha=2.0)
    with pytest.raises(StorageError, match=r"takes 4096.0 GiB.*export.formats=\[\]"):
        export(large, method, attached(family, method), Format.pipeline, tmp_path / "export")
    assert not list((tmp_path / "export").iterdir())


# Damaged files


@pytest.mark.parametrize("kind", adapter_mutations.KINDS)
def test_damaged_adapters_are_read_or_refused(kind: str, family: Family, tmp_path: Path):
    trial = adapter_mutations.trial(kind, family, tmp_path)
    assert fuzz.find_failures(25, trial) == []
