"""What was trained, in the forms that other programs read, each read again before it takes its name.

An adapter's file is loaded by the library it is meant for (diffusers' or peft's own loader) into a network without weights, which costs no
second model. A merged checkpoint is read tensor by tensor. Where anything is not what was trained, nothing is left behind.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.sections import Format
from trainer.core import files, tensor_files
from trainer.core.dtypes import Dtype
from trainer.core.errors import DataError

if TYPE_CHECKING:
    import torch

    from trainer.config import Run


LITTER = 24 * 3600
"""Seconds after which what an export left unfinished belongs to a dead process."""
ROUNDING = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
"""Largest difference between an adapter's effect on a layer before and after writing, over that effect's norm."""
KEPT = {"float32": 0.99, "bfloat16": 0.9, "float16": 0.9}
"""The least part of what was trained that must be found in a merged checkpoint: <written - before, trained - before> / |trained - before|^2.

In bfloat16, a change below a 512th of a weight is rounded away.
"""


def after_training(
    run: Run,
    network: torch.nn.Module,
    parameters: dict[str, torch.nn.Parameter],
    weights: dict[str, torch.Tensor],
    folder: Path,
) -> list[Path]:
    """The export at the end of a run, by itself only of what is small."""
    if run.export.formats is None and not run.method.freezes:
        return []
    return write(run, network, parameters, weights, folder)


def write(
    run: Run,
    network: torch.nn.Module,
    parameters: dict[str, torch.nn.Parameter],
    weights: dict[str, torch.Tensor],
    folder: Path,
) -> list[Path]:
    """Write `weights` (of `parameters`, by name) to `folder` in every format asked for, check them, and return where they are.

    What is there of another export in the same format is replaced. Raises errors.DataError where what was written is not what was trained, or
    where that changes nothing; errors.StorageError where the disk does not take it.
    """
    import torch

    from trainer.method import swapped
    from trainer.method.adapter import is_noop

    chosen = run.export.select(run.method.formats)
    _clean(folder)
    network.eval()
    with (
        torch.no_grad(),
        swapped(network, {name: weights[name].to(parameter.device) for name, parameter in parameters.items()}),
    ):
        if run.method.is_adapter and is_noop(network):
            raise DataError(
                f"The adapter that would go to {folder} changes nothing: training has moved none of its weights. "
                "Look at train/grad_norm and train/lr in the run's metrics.csv, and type another optimizer.lr"
            )
        for format in chosen:
            if format is Format.pipeline:
                _write_pipeline(run, network, folder / format.value)
            elif format is Format.soft_prompt:
                _write_soft_prompt(run, network, folder / format.value)
            else:
                _write_adapter(run, network, format, folder / format.value)
    return [folder / format.value for format in chosen]


def _clean(folder: Path) -> None:
    """Delete what dead processes left unfinished."""
    with files.storage_errors("clean", folder):
        for path in folder.glob(f"{files.PARTIAL_PREFIX}*"):
            if time.time() - path.stat().st_mtime > LITTER:
                files.remove(path)


def _write_adapter(run: Run, network: torch.nn.Module, format: Format, path: Path) -> None:
    import torch

    from trainer.method import adapter
    from trainer.model import empty_model

    family, dtype = run.model, run.export.dtype or Dtype.float32

    def written(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().to(getattr(torch, dtype.value)).contiguous() for name, tensor in tensors.items()}

    weights, configuration = adapter.adapter(network)
    replacing = files.replace_folder if format is Format.peft else files.replace_file
    with replacing(path) as unfinished:
        if format is Format.peft:
            adapter.save_adapter(written(weights), configuration, unfinished)
            again = adapter.load_adapter(empty_model(family.meta_model()), unfinished)
        elif format is Format.diffusers:
            family.save_adapter(written(weights), configuration, unfinished)
            again = family.load_adapter(unfinished)
        else:
            tensors = adapter.to_comfyui(adapter.parts(network), family.export_name)
            alphas = {name: tensor for name, tensor in tensors.items() if name.endswith(".alpha")}
            tensor_files.save_tensors(unfinished, written(tensors) | alphas, {"format": "pt"})
            again = _spelled_again(run, unfinished)
        _compare(adapter.probe_outputs(network), adapter.probe_outputs(again), ROUNDING[dtype.value], path)


def _write_soft_prompt(run: Run, network: torch.nn.Module, path: Path) -> None:
    import torch

    from trainer import config
    from trainer.method import trained

    weights = {name: parameter.detach().cpu() for name, parameter in trained(network).items()}
    begun = {
        f"soft_prompt.{name}": tensor.cpu() for name, tensor in run.method.begun(network, run.seed).state_dict().items()
    }
    if all(torch.equal(tensor, begun[name]) for name, tensor in weights.items()):
        raise DataError(
            f"The soft prompt that would go to {path} is the one that training began with; type another optimizer.lr"
        )
    dtype = getattr(torch, (run.export.dtype or Dtype.float32).value)
    written = {name: tensor.to(dtype) for name, tensor in weights.items()}
    with files.replace_file(path) as unfinished:
        tensor_files.save_tensors(unfinished, written, {"format": "pt", "method": json.dumps(config.plain(run.method))})
        again = tensor_files.load_tensors(unfinished)
        if again.keys() != written.keys() or not all(
            torch.equal(again[name], tensor) for name, tensor in written.items()
        ):
            raise DataError(
                f"{path} was written and read again, and is not the soft prompt that was trained. It was not kept"
            )


def _spelled_again(run: Run, path: Path) -> torch.nn.Module:
    """The network without weights, and in it the adapter of a file for ComfyUI."""
    from trainer.method import adapter
    from trainer.model import empty_model
    from trainer.training.build import adapter_in

    if "diffusers" in run.method.formats:
        return run.model.load_adapter(path)
    network = empty_model(run.model.meta_model())
    run.method.attach(network, run.model.targets, run.seed)
    adapter.put(adapter_in(path, run.model), network, path)
    return network


def _compare(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], tolerance: float, path: Path) -> None:
    wrong = sorted(expected.keys() ^ found.keys())
    for layer in expected.keys() & found.keys():
        error = (found[layer] - expected[layer].cpu()).norm()
        # Not ">": a NaN is to be found too.
        if not error <= tolerance * expected[layer].norm().cpu():
            wrong.append(layer)
    if wrong:
        raise DataError(
            f"{path} was written and read again, and is not the adapter that was trained: {len(wrong)} of {len(expected)} layers differ "
            f"({', '.join(wrong[:3])}). It was not kept; try export.dtype=float32, and please report this"
        )


def _write_pipeline(run: Run, network: torch.nn.Module, path: Path) -> None:
    import torch

    from trainer.core.console import print_line
    from trainer.method.adapter import merged

    dtype = run.export.dtype.value if run.export.dtype else str(run.precision.dtype()).removeprefix("torch.")
    shapes = {name: tensor.shape for name, tensor in run.model.meta_model().state_dict().items()}
    with files.replace_folder(path) as unfinished:
        run.model.save_checkpoint(
            ((name, merged(network, name).to(getattr(torch, dtype))) for name in shapes), unfinished
        )
        kept = _kept(run.model.weights(unfinished), _changes(run, network, shapes), shapes, dtype, path)
    if kept < KEPT["float32"]:
        print_line(f"{path}: in {dtype} {kept:.0%} of what was trained is left; export.dtype=float32 keeps all")


def _changes(
    run: Run, network: torch.nn.Module, names: Iterable[str]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each tensor of the network by name, before training and after it (one and the same where it was not trained)."""
    from trainer.method.adapter import frozen, merged

    begun = None if run.method.is_adapter else run.model.weights()
    for name in names:
        after = merged(network, name)
        # Weights that train in bfloat16 were rounded when they were read, which is no training.
        before = (
            frozen(network, name) if begun is None else begun(name).to(after.device, network.get_parameter(name).dtype)
        )
        yield name, before.float(), after.float()


def _kept(
    read: Callable[[str], torch.Tensor],
    changes: Iterable[tuple],
    shapes: dict[str, tuple[int, ...]],
    dtype: str,
    path: Path,
) -> float:
    """The part of the `changes` that is left in the weights that were written, which are to become those of `path`. Raises errors.DataError where
    it is less than KEPT, and where any tensor is not what it was meant to be."""
    import torch

    limits = torch.finfo(getattr(torch, dtype))
    wrong, whole, left = [], 0.0, 0.0
    for name, before, after in changes:
        written = read(name)
        if written.shape != shapes[name] or str(written.dtype) != f"torch.{dtype}":
            wrong.append(name)
            continue
        written = written.to(after.device).float()
        atol = max(limits.tiny, 1e-6 * after.abs().max().item())
        if not torch.allclose(written, after, rtol=max(limits.eps, 1e-5), atol=atol):
            wrong.append(name)
        change = after - before
        whole += change.square().sum().item()
        left += (change * (written - before)).sum().item()
    if wrong:
        raise DataError(
            f"{path} was written and read again, and is not what was trained: {len(wrong)} of {len(shapes)} tensors differ "
            f"({', '.join(wrong[:3])}). It was not kept; try export.dtype=float32, and please report this"
        )
    if not whole:
        raise DataError(
            f"{path} would be the checkpoint that training began with: nothing has changed. It was not kept"
        )
    if not left >= KEPT[dtype] * whole:
        raise DataError(
            f"{path}: in {dtype} only {max(0.0, left / whole):.0%} of what was trained would be left, the rest is lost in rounding. "
            "It was not kept; type export.dtype=float32"
        )
    return left / whole
