"""Exports of each model family are complete or absent, and hold the trained weights.

The tests of a family compare the images that pipelines generate with its exports.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config.groups import GROUPS, option_name
from trainer.config.schema import DECIDES_WEIGHTS, FREE_IN_POST_TRAINING_STAGES, Run
from trainer.config.sections import Export, Format
from trainer.core import documents, files, tensor_files
from trainer.core.digests import sha256
from trainer.core.dtypes import Dtype
from trainer.core.errors import DataError, StorageError, UsageError
from trainer.core.rng import normal
from trainer.export.write import export_after_training, write_exports
from trainer.method.adapter import Adapter
from trainer.method.adapter_formats import load_peft
from trainer.method.adapter_layers import frozen_tensor, layer_adapters, merged_tensor
from trainer.method.dora import Dora
from trainer.method.full import Full
from trainer.method.loha import Loha
from trainer.method.lokr import Lokr
from trainer.method.lora import Lora
from trainer.method.trainable import trainable_parameters
from trainer.model import Family, weights
from trainer.model.checkpoint_files import SUFFIXES
from trainer.model.weights import ComponentWeights
from trainer.precision import Precision
from trainer.precision import Storage as Stored

CPU = torch.device("cpu")
ADAPTERS = [kind(rank=4, alpha=8.0) for kind in GROUPS["method"].values() if kind.is_adapter]
EACH_ADAPTER = pytest.mark.parametrize("method", ADAPTERS, ids=lambda method: type(method).__name__)


@pytest.fixture
def family(tiny) -> Family:
    """Each family in turn, for tests of what a family decides."""
    return tiny.family()


@pytest.fixture
def flux(tiny_checkpoint) -> Family:
    """One family, for tests of what is the same for all."""
    return tiny_checkpoint("flux_kontext").family()


def run_of(family: Family, *formats: Format, dtype: Dtype | None = None, **settings) -> Run:
    """Returns a run with those of the formats that the family has. Skips the test if there are none."""
    run = Run(model=family, **{"method": Lora(rank=4, alpha=8.0, dropout=0.5), "precision": Precision()} | settings)
    if option_name(run.method) not in family.methods:
        pytest.skip("the family does not support this method")
    available = [format for format in formats if format.name not in family.unsupported_formats]
    if formats and not available:
        pytest.skip(family.unsupported_formats[formats[-1].name])
    run.export = Export(available or None, dtype)
    return run


def network_of(run: Run, size: float = 0.3) -> torch.nn.Module:
    """Returns the network of the run, its trainable parameters changed by normal numbers times `size`."""
    network = run.model.load_network(run.precision.dtype(), CPU, run.precision.quantizer((), CPU))
    run.method.attach(network, run.model.target_modules, seed=0)
    with torch.no_grad():
        for name, parameter in trainable_parameters(network).items():
            change = size * normal(tuple(parameter.shape), name)
            parameter.copy_(change if run.method.is_adapter else parameter + change)
    return network.eval()


def write(run: Run, network: torch.nn.Module, folder: Path) -> list[Path]:
    weights = {name: parameter.detach().clone() for name, parameter in trainable_parameters(network).items()}
    return write_exports(run, network, weights, folder)


def prediction(family: Family, network: torch.nn.Module) -> torch.Tensor:
    spec = family.shapes(32, 48, [(32, 48)] * min(1, max(family.control_counts)))
    rows = {name: normal(shape, name)[None] for name, shape in spec.items()}
    with torch.no_grad():
        return family.predict(network, rows.pop("latents"), torch.tensor([0.4]), rows)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Asserts that two predictions differ by at most `tolerance` of their norm."""
    assert (found - expected).norm() <= tolerance * expected.norm()


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


@EACH_ADAPTER
def test_pipeline_and_peft_exports_predict_like_the_trained_network(family: Family, method: Adapter, tmp_path: Path):
    run = run_of(family, Format.pipeline, Format.peft, method=method)
    network = network_of(run)
    expected = prediction(family, network)
    pipeline, peft_folder = write(run, network, tmp_path / "export")
    again = dataclasses.replace(family, path=str(pipeline))
    assert_close(prediction(again, again.load_network(torch.float32).eval()), expected)
    with_adapter = load_peft(family.load_network(torch.float32).eval(), peft_folder)
    assert_close(prediction(family, with_adapter), expected)
    assert (prediction(family, family.load_network(torch.float32).eval()) - expected).abs().max() > 0.01


@EACH_ADAPTER
def test_unsupported_formats_are_refused_and_the_supported_ones_named(method: Adapter):
    for format in Format:
        settings = Export([format])
        if format.name in method.formats:
            assert settings.select(method.formats, {}) == [format]
        else:
            with pytest.raises(UsageError, match=re.escape(f"type export.formats=[{','.join(method.formats)}]")):
                settings.select(method.formats, {})


def comfyui_merge(weight: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Merges a layer's LoHa or LoKr into its weight as ComfyUI's loader does, which scales only if there is a rank."""
    alpha = tensors.get("alpha")
    if "hada_w1_a" in tensors:
        rank = len(tensors["hada_w1_b"])
        update = (tensors["hada_w1_a"] @ tensors["hada_w1_b"]) * (tensors["hada_w2_a"] @ tensors["hada_w2_b"])
    else:
        first, second = (tensors.get(f"lokr_w{i}") for i in (1, 2))
        rank = next((len(tensors[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in tensors), None)
        first = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"] if first is None else first
        second = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"] if second is None else second
        update = torch.kron(first, second)
    return weight + update * (float(alpha) / rank if alpha is not None and rank is not None else 1.0)


@pytest.mark.parametrize(
    "method",
    [
        Loha(rank=3, alpha=2.0),
        Lokr(rank=1, alpha=0.5),
        Lokr(rank=1, alpha=0.5, decompose_both=True),
        Lokr(rank=64, alpha=16.0),
    ],
    ids=["loha", "lokr", "lokr with two low-rank factors", "lokr with full factors"],
)
def test_comfyui_restores_the_trained_weights_from_loha_and_lokr(family: Family, method: Adapter, tmp_path: Path):
    run = run_of(family, Format.comfyui, method=method)
    network = network_of(run)
    (path,) = write(run, network, tmp_path)
    tensors, layers = tensor_files.load_tensors(path), layer_adapters(network)
    for name in layers:
        start = family.comfyui_key(f"{name}.alpha").removesuffix("alpha")
        own = {key.removeprefix(start): tensors.pop(key) for key in list(tensors) if key.startswith(start)}
        weight = f"{name}.weight"
        torch.testing.assert_close(
            comfyui_merge(frozen_tensor(network, weight), own), merged_tensor(network, weight), rtol=0, atol=1e-5
        )
    assert layers and not tensors


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_adapters_are_merged_into_the_dequantized_weights(family: Family, compute: str, tmp_path: Path):
    precision = Precision(storage=Stored.fp8, compute=type(Precision().compute)[compute])
    run = run_of(family, Format.pipeline, precision=precision)
    network = network_of(run)
    (path,) = write(run, network, tmp_path)
    again = dataclasses.replace(family, path=str(path))
    dtype = getattr(torch, compute)
    assert ComponentWeights(path / family.denoiser).read(next(iter(family.meta_model().state_dict()))).dtype == dtype
    with precision.autocast(CPU):
        expected, found = prediction(family, network), prediction(again, again.load_network(dtype).eval())
    assert_close(found, expected, 1e-4 if compute == "float32" else 0.3)


def test_large_checkpoints_are_split_into_shards_that_load(
    flux: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 20_000)
    run = run_of(flux, Format.pipeline)
    network = network_of(run)
    (path,) = write(run, network, tmp_path)
    pieces = sorted((path / flux.denoiser).glob("*.safetensors"))
    assert len(pieces) > 3 and all(piece.stat().st_size < 80_000 for piece in pieces)
    again = dataclasses.replace(flux, path=str(path))
    assert_close(prediction(again, again.load_network(torch.float32).eval()), prediction(flux, network))


def test_pipeline_export_copies_only_weights_configs_and_tokenizers(flux: Family, tmp_path: Path):
    source = tmp_path / "source"
    files.shutil.copytree(flux.folder(), source)
    for name in (f"{flux.denoiser}/optimizer.pt", "vae/diffusion_pytorch_model.bin", "vae/.cache"):
        (source / name).write_text("")
    run = run_of(dataclasses.replace(flux, path=str(source)), Format.pipeline)
    (path,) = write(run, network_of(run), tmp_path / "export")
    expected = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.suffix in SUFFIXES}
    assert {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} == expected


def test_full_training_is_exported_as_a_checkpoint(family: Family, tmp_path: Path):
    run = run_of(family, Format.pipeline, Format.single_file, method=Full(), precision=Precision())
    network = network_of(run, 0.01)
    path, *single_file = write(run, network, tmp_path)
    again = dataclasses.replace(family, path=str(path))
    bases = [again, *(dataclasses.replace(family, **{family.denoiser: str(file)}) for file in single_file)]
    for base in bases:
        found = base.load_network(torch.float32).state_dict()
        assert [name for name, tensor in network.state_dict().items() if not torch.equal(found[name], tensor)] == []
    assert_close(prediction(again, again.load_network(torch.float32).eval()), prediction(family, network))
    weights = {name: parameter.detach().clone() for name, parameter in trainable_parameters(network).items()}
    without = dataclasses.replace(run, export=Export([]))
    assert export_after_training(without, network, weights, tmp_path / "none") == []
    assert export_after_training(dataclasses.replace(run, export=Export()), network, weights, tmp_path) == [
        tmp_path / "pipeline"
    ]


def test_adapter_formats_are_refused_for_full_training():
    with pytest.raises(UsageError, match="type export.formats=\\[pipeline,single_file\\]"):
        Export([Format.pipeline, Format.peft]).select(Full.formats, {})
    assert Export().select(Lora.formats, {}) == [Format.diffusers]
    assert Export().select(Full.formats, {}) == [Format.pipeline]


@EACH_ADAPTER
def test_an_adapter_that_changes_nothing_is_refused(flux: Family, method: Adapter, tmp_path: Path):
    precision = Precision(storage=Stored.bf16, compute=Dtype.bfloat16)
    run = run_of(flux, *(Format[name] for name in method.formats), method=method, precision=precision)
    network = run.model.load_network(precision.dtype())
    method.attach(network, flux.target_modules, seed=0)
    with pytest.raises(DataError, match="changes nothing"):
        write(run, network, tmp_path)
    assert contents(tmp_path) == {}
    if isinstance(method, Dora):
        # A change of the magnitudes alone is a change.
        network.get_parameter(next(name for name in trainable_parameters(network) if "magnitude" in name)).data *= 1.01
        assert write(dataclasses.replace(run, export=Export([Format.peft])), network, tmp_path)


def test_unchanged_weights_of_full_training_are_refused(flux: Family, tmp_path: Path):
    run = run_of(flux, method=Full())
    with pytest.raises(DataError, match="nothing has changed"):
        write(run, network_of(run, 0), tmp_path)
    assert contents(tmp_path) == {}


def test_a_change_that_is_lost_in_rounding_is_refused_with_a_remedy(flux: Family, tmp_path: Path):
    run = run_of(flux, Format.pipeline, precision=Precision(storage=Stored.bf16))
    network = network_of(run, 1e-3)
    with pytest.raises(DataError, match="type export.dtype=float32"):
        write(run, network, tmp_path)
    assert contents(tmp_path) == {}
    write(dataclasses.replace(run, export=Export([Format.pipeline], Dtype.float32)), network, tmp_path)


@pytest.mark.parametrize("dtype", list(Dtype))
def test_exports_have_the_selected_dtype(flux: Family, dtype: Dtype, tmp_path: Path):
    run = run_of(flux, Format.diffusers, Format.comfyui, Format.peft, Format.pipeline, dtype=dtype)
    write(run, network_of(run), tmp_path)
    found = set()
    for path in [
        *tmp_path.glob("*.safetensors"),
        *(tmp_path / "peft").glob("*.safetensors"),
        *tmp_path.glob(f"pipeline/{flux.denoiser}/*.safetensors"),
    ]:
        with open_tensors(path) as file:
            found |= {file.get_slice(key).get_dtype() for key in set(file.keys()) if not key.endswith(".alpha")}
    assert found == {{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype.value]}


def open_tensors(path: Path):
    import safetensors

    return safetensors.safe_open(path, "pt")


def with_methods(family: Family, **methods) -> Family:
    """Returns the family with some of its methods replaced."""
    # The methods do not use zero-argument super(), which fails in a class with slots that is created here.
    kind = type(f"Changed{type(family).__name__}", (type(family),), {"__slots__": (), **methods})
    return kind(**{f.name: getattr(family, f.name) for f in dataclasses.fields(family)})


def swapped(names: Iterable[str], shape_of: Callable[[str], tuple[int, ...]]) -> dict[str, str]:
    """Returns two of the names that belong to tensors of equal shapes, each with the other."""
    found: dict[tuple[int, ...], str] = {}
    for name in names:
        first = found.setdefault(shape_of(name), name)
        if first != name:
            return {first: name, name: first}
    raise AssertionError("all shapes differ")


def wrong_comfyui_names(family: Family) -> dict[str, Any]:
    network = family.meta_model()
    layers = [name for name, _ in network.named_modules() if name.endswith(family.target_modules)]
    others = swapped(layers, lambda name: network.get_submodule(name).weight.shape)

    def comfyui_key(self: Family, key: str) -> str:
        layer = key.removesuffix(".alpha").partition(".lora_")[0]
        return family.comfyui_key(others.get(layer, layer) + key.removeprefix(layer))

    return {"comfyui_key": comfyui_key}


def swapped_weights(family: Family) -> dict[str, str]:
    tensors = family.meta_model().state_dict()
    return swapped((name for name in tensors if tensors[name].dim() > 1), lambda name: tensors[name].shape)


def wrong_checkpoint(family: Family) -> dict[str, Any]:
    others = swapped_weights(family)

    def save_pipeline(self: Family, tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
        weights = dict(tensors)
        family.save_pipeline(((name, weights[others.get(name, name)]) for name in weights), folder)

    return {"save_pipeline": save_pipeline}


def wrong_single_file(family: Family) -> dict[str, Any]:
    others = swapped_weights(family)

    def save_single_file(self: Family, read: Callable, dtype: torch.dtype, path: Path) -> None:
        family.save_single_file(lambda name: read(others.get(name, name)), dtype, path)

    return {"save_single_file": save_single_file}


@pytest.mark.parametrize(
    ("format", "mistake"),
    [
        (Format.comfyui, wrong_comfyui_names),
        (Format.pipeline, wrong_checkpoint),
        (Format.single_file, wrong_single_file),
    ],
)
def test_a_wrong_export_is_refused_and_the_earlier_one_stays(
    family: Family, format: Format, mistake: Callable[[Family], dict[str, Any]], tmp_path: Path
):
    run = run_of(family, format)
    network = network_of(run)
    write(run, network, tmp_path)
    before = contents(tmp_path)
    wrong = with_methods(family, **mistake(family))
    with pytest.raises(DataError, match="differs from the trained (adapter|weights)"):
        write(dataclasses.replace(run, model=wrong), network_of(run, 0.2), tmp_path)
    assert contents(tmp_path) == before


def test_a_second_export_replaces_the_first_and_leaves_no_other_files(flux: Family, tmp_path: Path):
    run = run_of(flux, Format.diffusers, Format.peft, Format.pipeline)
    network = network_of(run)
    paths = write(run, network, tmp_path)
    first = contents(tmp_path)
    (tmp_path / "pipeline" / "old.txt").write_text("")
    unfinished = tmp_path / f"{files.PARTIAL_PREFIX}1-2-peft"
    unfinished.mkdir()
    os.utime(unfinished, (time.time() - 1e6,) * 2)
    write(run, network, tmp_path)
    assert contents(tmp_path) == first
    write(run, network_of(run, 0.2), tmp_path)
    assert contents(tmp_path).keys() == first.keys()
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_an_export_that_fails_leaves_the_earlier_one(flux: Family, tmp_path: Path):
    run = run_of(flux, Format.pipeline)
    network = network_of(run)
    write(run, network, tmp_path)
    before = contents(tmp_path)

    def full_disk(self: Family, tensors, folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        write(dataclasses.replace(run, model=with_methods(flux, save_pipeline=full_disk)), network, tmp_path)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_exported_configs_keep_alpha_and_have_no_dropout(family: Family, tmp_path: Path):
    if Format.diffusers.name in family.unsupported_formats:
        pytest.skip(family.unsupported_formats[Format.diffusers.name])
    run = run_of(family, Format.diffusers, Format.peft)
    file, folder = write(run, network_of(run), tmp_path)
    with open_tensors(file) as opened:
        (metadata,) = (json.loads(value) for key, value in opened.metadata().items() if key != "format")
    settings = {key.rpartition(".")[2]: value for key, value in metadata.items()}
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 8.0, 0.0)
    again = documents.read_json(folder / "adapter_config.json")
    assert (again["r"], again["lora_alpha"], again["peft_type"], again["inference_mode"]) == (4, 8.0, "LORA", True)


def test_export_settings_are_not_part_of_the_identity():
    assert "export" not in DECIDES_WEIGHTS
    assert "export" in FREE_IN_POST_TRAINING_STAGES
