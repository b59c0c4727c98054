"""Exports of every family: whole or absent, what was trained or refused. What pipelines draw with them is in test_<family>."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from pathlib import Path

import pytest
import torch

from trainer import config, export, model
from trainer.config import Run
from trainer.config.sections import Export, Format
from trainer.core import files, tensor_files
from trainer.core.digests import sha256
from trainer.core.dtypes import Dtype
from trainer.core.errors import DataError, StorageError, UsageError
from trainer.core.rng import normal
from trainer.method import Adapter, Dora, Full, Loha, Lokr, Lora, trained
from trainer.method.adapter import frozen, load_adapter, merged, parts
from trainer.model import Family
from trainer.precision import Compute, Precision
from trainer.precision import Storage as Stored

CPU = torch.device("cpu")
ADAPTERS = [Lora(rank=4, alpha=8.0), Dora(rank=4, alpha=8.0), Loha(rank=4, alpha=8.0), Lokr(rank=2, alpha=8.0)]
EACH_ADAPTER = pytest.mark.parametrize("method", ADAPTERS, ids=lambda method: type(method).__name__)


@pytest.fixture
def family(tiny) -> Family:
    found = tiny.family()
    if "lora" not in found.methods:
        pytest.skip("no layer of it is adapted")
    return found


def run_of(family: Family, *formats: Format, dtype: Dtype | None = None, **rooms) -> Run:
    defaults = {"method": Lora(rank=4, alpha=8.0, dropout=0.5), "precision": Precision()}
    return Run(model=family, export=Export(list(formats) or None, dtype), **defaults | rooms)


def network_of(run: Run, size: float = 0.3) -> torch.nn.Module:
    """The run's network, with what trains moved by normal numbers of this size."""
    network = run.model.network(run.precision.dtype(), CPU, run.precision.stored((), CPU))
    run.method.attach(network, run.model.targets, seed=0)
    with torch.no_grad():
        for name, parameter in trained(network).items():
            change = size * normal(tuple(parameter.shape), name)
            parameter.copy_(change if run.method.is_adapter else parameter + change)
    return network.eval()


def write(run: Run, network: torch.nn.Module, folder: Path) -> list[Path]:
    parameters = trained(network)
    return export.write(
        run, network, parameters, {name: parameter.detach().clone() for name, parameter in parameters.items()}, folder
    )


def prediction(family: Family, network: torch.nn.Module) -> torch.Tensor:
    spec = family.spec(32, 48, [(32, 48)] * min(1, max(family.controls)))
    rows = {name: normal(shape, name)[None] for name, shape in spec.items()}
    with torch.no_grad():
        return family.predict(network, rows.pop("latents"), torch.tensor([0.4]), rows)


def assert_alike(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """That the difference is this small a part of what is predicted."""
    assert (found - expected).norm() <= tolerance * expected.norm()


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


@EACH_ADAPTER
def test_merged_and_peft_exports_predict_what_the_trained_network_predicts(
    family: Family, method: Adapter, tmp_path: Path
):
    run = run_of(family, Format.pipeline, Format.peft, method=method)
    network = network_of(run)
    expected = prediction(family, network)
    whole, beside = write(run, network, tmp_path / "export")
    again = dataclasses.replace(family, path=str(whole))
    assert_alike(prediction(again, again.network(torch.float32).eval()), expected)
    fresh = load_adapter(family.network(torch.float32).eval(), beside)
    assert_alike(prediction(family, fresh), expected)
    assert (prediction(family, family.network(torch.float32).eval()) - expected).abs().max() > 0.01


@EACH_ADAPTER
def test_a_method_that_some_format_cannot_hold_is_refused_with_those_that_can(method: Adapter):
    for format in Format:
        settings = Export([format])
        if format.name in method.formats:
            assert settings.select(method.formats) == [format]
        else:
            with pytest.raises(UsageError, match=re.escape(f"type export.formats=[{','.join(method.formats)}]")):
                settings.select(method.formats)


def as_comfyui_does(weight: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weights of a layer with the LoHa or LoKr of a file in them, by the rules of ComfyUI's loader: a scale only beside a rank."""
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
    ids=["loha", "lokr", "lokr of low rank twice", "lokr with whole factors"],
)
def test_comfyui_makes_of_a_loha_or_lokr_the_weights_that_were_trained(family: Family, method: Adapter, tmp_path: Path):
    run = run_of(family, Format.comfyui, method=method)
    network = network_of(run)
    (path,) = write(run, network, tmp_path)
    tensors, layers = tensor_files.load_tensors(path), parts(network)
    for name in layers:
        start = family.export_name(f"{name}.alpha").removesuffix("alpha")
        own = {key.removeprefix(start): tensors.pop(key) for key in list(tensors) if key.startswith(start)}
        weight = f"{name}.weight"
        torch.testing.assert_close(
            as_comfyui_does(frozen(network, weight), own), merged(network, weight), rtol=0, atol=1e-5
        )
    assert layers and not tensors


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_an_adapter_on_quantised_weights_is_merged_into_what_their_products_saw(
    family: Family, compute: str, tmp_path: Path
):
    precision = Precision(storage=Stored.fp8, compute=type(Precision().compute)[compute])
    run = run_of(family, Format.pipeline, precision=precision)
    network = network_of(run)
    (path,) = write(run, network, tmp_path)
    again = dataclasses.replace(family, path=str(path))
    dtype = getattr(torch, compute)
    assert model.Weights(path / family.denoiser)(next(iter(family.meta_model().state_dict()))).dtype == dtype
    with precision.autocast(CPU):
        expected, found = prediction(family, network), prediction(again, again.network(dtype).eval())
    assert_alike(found, expected, 1e-4 if compute == "float32" else 0.3)


def test_a_large_checkpoint_is_written_in_pieces_that_load_again(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(model, "SHARD", 20_000)
    run = run_of(family, Format.pipeline)
    network = network_of(run)
    (path,) = write(run, network, tmp_path)
    pieces = sorted((path / family.denoiser).glob("*.safetensors"))
    assert len(pieces) > 3 and all(piece.stat().st_size < 80_000 for piece in pieces)
    again = dataclasses.replace(family, path=str(path))
    assert_alike(prediction(again, again.network(torch.float32).eval()), prediction(family, network))


def test_only_weights_configs_and_tokenizers_of_the_source_are_copied(family: Family, tmp_path: Path):
    source = tmp_path / "source"
    files.shutil.copytree(family.folder(), source)
    for name in (f"{family.denoiser}/optimizer.pt", "vae/diffusion_pytorch_model.bin", "vae/.cache"):
        (source / name).write_text("")
    run = run_of(dataclasses.replace(family, path=str(source)), Format.pipeline)
    (path,) = write(run, network_of(run), tmp_path / "export")
    expected = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.suffix in model.KINDS}
    assert {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} == expected


def test_whole_weights_are_exported_as_a_checkpoint(family: Family, tmp_path: Path):
    run = run_of(family, method=Full(), precision=Precision())
    network = network_of(run, 0.01)
    (path,) = write(run, network, tmp_path)
    again = dataclasses.replace(family, path=str(path))
    kept = model.Weights(path / family.denoiser)
    assert all(torch.equal(kept(name), parameter) for name, parameter in trained(network).items())
    assert_alike(prediction(again, again.network(torch.float32).eval()), prediction(family, network))
    assert export.after_training(run, network, trained(network), {}, tmp_path / "none") == []


def test_formats_for_adapters_are_refused_where_there_is_no_adapter():
    with pytest.raises(UsageError, match="type export.formats=\\[pipeline\\]"):
        Export([Format.pipeline, Format.peft]).select(Full.formats)
    assert Export().select(Lora.formats) == [Format.diffusers]
    assert Export().select(Full.formats) == [Format.pipeline]


@EACH_ADAPTER
def test_an_adapter_that_changes_nothing_is_refused(family: Family, method: Adapter, tmp_path: Path):
    precision = Precision(storage=Stored.bf16, compute=Compute.bfloat16)
    run = run_of(family, *(Format[name] for name in method.formats), method=method, precision=precision)
    network = run.model.network(precision.dtype())
    method.attach(network, family.targets, seed=0)
    with pytest.raises(DataError, match="changes nothing"):
        write(run, network, tmp_path)
    assert contents(tmp_path) == {}
    if isinstance(method, Dora):
        # Lengths alone are something to keep.
        network.get_parameter(next(name for name in trained(network) if "magnitude" in name)).data *= 1.01
        assert write(dataclasses.replace(run, export=Export([Format.peft])), network, tmp_path)


def test_whole_weights_that_are_what_they_were_are_refused(family: Family, tmp_path: Path):
    run = run_of(family, method=Full())
    with pytest.raises(DataError, match="nothing has changed"):
        write(run, network_of(run, 0), tmp_path)
    assert contents(tmp_path) == {}


def test_a_change_that_rounding_would_swallow_is_refused_with_what_to_type(family: Family, tmp_path: Path):
    run = run_of(family, Format.pipeline, precision=Precision(storage=Stored.bf16))
    network = network_of(run, 1e-3)
    with pytest.raises(DataError, match="type export.dtype=float32"):
        write(run, network, tmp_path)
    assert contents(tmp_path) == {}
    write(dataclasses.replace(run, export=Export([Format.pipeline], Dtype.float32)), network, tmp_path)


@pytest.mark.parametrize("dtype", list(Dtype))
def test_exports_are_written_in_the_type_asked_for(family: Family, dtype: Dtype, tmp_path: Path):
    run = run_of(family, Format.diffusers, Format.comfyui, Format.peft, Format.pipeline, dtype=dtype)
    write(run, network_of(run), tmp_path)
    found = set()
    for path in [
        *tmp_path.glob("*.safetensors"),
        *(tmp_path / "peft").glob("*.safetensors"),
        *tmp_path.glob(f"pipeline/{family.denoiser}/*.safetensors"),
    ]:
        with files_of(path) as file:
            found |= {file.get_slice(key).get_dtype() for key in set(file.keys()) if not key.endswith(".alpha")}
    assert found == {{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype.value]}


def files_of(path: Path):
    import safetensors

    return safetensors.safe_open(path, "pt")


def forgetful(family: Family, **answers) -> Family:
    """The family, with other answers to some questions."""
    # Zero-argument super() and slots do not go together in a class made here.
    kind = type(f"Forgetful{type(family).__name__}", (type(family),), {"__slots__": (), **answers})
    return kind(**{f.name: getattr(family, f.name) for f in dataclasses.fields(family)})


def confuse_layers(self: Family, key: str) -> str:
    # Of cross attention the two have other shapes.
    other = re.sub(r"(attn1?)\.to_([qk])", lambda found: f"{found[1]}.to_{'k' if found[2] == 'q' else 'q'}", key)
    return type(self).__mro__[1].export_name(self, other)


def swap_two(self: Family, tensors, folder: Path) -> None:
    tensors = dict(tensors)
    first, second = sorted(name for name in tensors if name.endswith("to_q.weight"))[:2]
    tensors[first], tensors[second] = tensors[second], tensors[first]
    type(self).__mro__[1].save_checkpoint(self, tensors.items(), folder)


@pytest.mark.parametrize(
    ("format", "answer"),
    [(Format.comfyui, {"export_name": confuse_layers}), (Format.pipeline, {"save_checkpoint": swap_two})],
)
def test_an_export_that_is_not_what_was_trained_is_refused_and_the_old_one_stays(
    family: Family, format: Format, answer: dict, tmp_path: Path
):
    run = run_of(family, format)
    network = network_of(run)
    write(run, network, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(DataError, match="is not .*what was trained|is not the adapter that was trained"):
        write(dataclasses.replace(run, model=forgetful(family, **answer)), network_of(run, 0.2), tmp_path)
    assert contents(tmp_path) == before


def test_a_second_export_replaces_the_first_and_leaves_nothing_else(family: Family, tmp_path: Path):
    run = run_of(family, *(Format[name] for name in Lora.formats))
    network = network_of(run)
    paths = write(run, network, tmp_path)
    first = contents(tmp_path)
    (tmp_path / "pipeline" / "old.txt").write_text("")
    litter = tmp_path / f"{files.PARTIAL_PREFIX}1-2-peft"
    litter.mkdir()
    os.utime(litter, (time.time() - 1e6,) * 2)
    write(run, network, tmp_path)
    # The order of safetensors' metadata, where there are several, is another each time.
    differing = {name for name, digest in contents(tmp_path).items() if first.get(name) != digest}
    assert differing <= {Format.diffusers.value}
    write(run, network_of(run, 0.2), tmp_path)
    assert contents(tmp_path).keys() == first.keys()
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_an_export_that_fails_midway_leaves_the_old_one(family: Family, tmp_path: Path):
    run = run_of(family, Format.pipeline)
    network = network_of(run)
    write(run, network, tmp_path)
    before = contents(tmp_path)

    def full_disk(self: Family, tensors, folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        write(dataclasses.replace(run, model=forgetful(family, save_checkpoint=full_disk)), network, tmp_path)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_a_pipelines_dropout_is_off_and_alpha_is_what_it_was_in_training(family: Family, tmp_path: Path):
    run = run_of(family, Format.diffusers, Format.peft)
    file, folder = write(run, network_of(run), tmp_path)
    with files_of(file) as opened:
        (metadata,) = (json.loads(value) for key, value in opened.metadata().items() if key != "format")
    settings = {key.rpartition(".")[2]: value for key, value in metadata.items()}
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 8.0, 0.0)
    again = files.read_json(folder / "adapter_config.json")
    assert (again["r"], again["lora_alpha"], again["peft_type"], again["inference_mode"]) == (4, 8.0, "LORA", True)


def test_export_settings_do_not_change_a_runs_identity_and_may_be_typed_beside_a_finished_run():
    assert "export" not in config.DECIDES_WEIGHTS
    assert "export" in config.FREE_IN_POST_TRAINING_STAGES
