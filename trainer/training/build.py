"""Builds the network that a run trains, and loads weights into its trainable parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.compose import read_run
from trainer.config.groups import option_name
from trainer.config.schema import Run
from trainer.core import tensor_files
from trainer.core.errors import UsageError
from trainer.distributed.sharding import shard_like
from trainer.export.read import adapters_of, check_adapter, is_adapter_path, read_adapter
from trainer.method.adapter import Adapter
from trainer.training.checkpoint import load_best_weights
from trainer.training.checkpoint_format import is_checkpoint
from trainer.training.run_folder import find_run_folder

if TYPE_CHECKING:
    import torch


def build_network(
    run: Run, device: torch.device, shard: Callable[[torch.nn.Module], None] | None = None
) -> torch.nn.Module:
    """Returns the network with frozen and trainable parameters.

    The order of the steps matters: frozen weights get their storage type before float32 adapters are attached. `shard`
    moves the shard of this process to the device; without it, the whole network must fit there.
    """
    import torch

    first_device = torch.device("cpu") if shard else device
    dtypes = run.model.weights().dtypes()
    run.precision.check_checkpoint(dtypes)
    quantize = run.precision.quantizer(run.model.unquantized_modules, first_device, dtypes)
    network = run.model.load_network(run.method.dtype(run.precision.dtype()), first_device, quantize)
    run.method.attach(network, run.model.target_modules, run.seed)
    apply_hardware(run, network)
    if shard:
        shard(network)
    return network


def apply_hardware(run: Run, network: torch.nn.Module) -> None:
    """Applies `hardware.gradient_checkpointing` and `compile`. Raises errors.UsageError if the network cannot."""
    methods = {"gradient_checkpointing": "enable_gradient_checkpointing", "compile": "compile_repeated_blocks"}
    for setting, method in methods.items():
        if not getattr(run.hardware, setting):
            continue
        try:
            getattr(network, method)()
        except (AttributeError, ValueError) as error:
            # diffusers raises ValueError for a class without `_supports_gradient_checkpointing` or `_repeated_blocks`.
            reason = f"{error}".strip(" .")
            raise UsageError(
                f"hardware.{setting}=true: {type(network).__name__}, the network of this model, does not support it "
                f"({reason}); type hardware.{setting}=false"
            ) from error


def check_buildable(run: Run, is_new: bool = True) -> None:
    """Raises the errors.UsageError of `build_network`, `load_initial_weights` and the optimizer early, if file headers
    and the network without weights suffice to know.

    `is_new`: whether the run has no checkpoint yet, so that it needs initial weights.
    """
    run.precision.check_checkpoint(run.model.weights().dtypes())
    run.optimizer.check()
    if run.hardware.gradient_checkpointing or run.hardware.compile:
        apply_hardware(run, run.model.meta_model())
    init_from = run.method.init_from
    if not is_new or init_from is None:
        return
    path = Path(init_from).expanduser()
    if not is_adapter_path(path):
        find_run_folder(init_from, run.out)
    elif run.method.is_adapter:
        check_adapter(path, run.model)


def load_initial_weights(run: Run, network: torch.nn.Module) -> None:
    """Loads the weights that `method.init_from` names into the trainable parameters.

    They come from a run, or from a file or folder that this program, diffusers, peft, ComfyUI or kohya's scripts wrote.
    The new adapter starts with the same effect as the old one, even if their alphas differ. Raises errors.UsageError if
    the weights do not fit.
    """
    from trainer.method.adapter_loading import load_into
    from trainer.method.trainable import trainable_parameters

    method = run.method
    assert method.init_from is not None
    path = Path(method.init_from).expanduser()
    if not isinstance(method, Adapter):
        if path.is_file():
            weights = tensor_files.load_tensors(path)
        else:
            _, weights = load_best_weights(find_run_folder(method.init_from, run.out))
        copy_weights(trainable_parameters(network), weights, path)
        return
    if is_adapter_path(path):
        adapters = read_adapter(path, run.model, _scale_of_checkpoint(path))
    else:
        folder = find_run_folder(method.init_from, run.out)
        source = read_run(folder / "config.yaml").method
        if not isinstance(source, Adapter):
            name = option_name(source)
            raise UsageError(f"method.init_from={method.init_from} is a run with method={name}; type method={name}")
        adapters = adapters_of(load_best_weights(folder)[1], run.model, method.init_from, scale=_scale(source))
    load_into(adapters, network, method)


def _scale_of_checkpoint(path: Path) -> float | None:
    """Returns the factor of the adapter's update in a file of a run's checkpoint; None for other files.

    The tensors of a checkpoint do not say it, and those of other programs may have the same names.
    """
    config = path.absolute().parents[2] / "config.yaml" if len(path.absolute().parents) > 2 else path
    if not is_checkpoint(path.absolute().parent) or not config.is_file():
        return None
    method = read_run(config).method
    return _scale(method) if isinstance(method, Adapter) else None


def _scale(method: Adapter) -> float:
    """Returns the factor of an adapter's update, alpha / rank."""
    assert method.alpha is not None
    return method.alpha / method.rank


def copy_weights(parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor], source: Path) -> None:
    """Copies weights into parameters. Raises errors.UsageError unless all names and shapes are equal."""
    import torch

    wrong = [f"{name} is missing" for name in parameters if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in parameters]
    for name in parameters.keys() & weights.keys():
        if weights[name].shape != parameters[name].shape:
            wrong.append(f"{name} has shape {tuple(weights[name].shape)}, not {tuple(parameters[name].shape)}")
    if wrong:
        raise UsageError(
            f"the weights in {source} do not fit ({len(wrong)} tensors: {'; '.join(sorted(wrong)[:3])}); "
            "type the method they were trained with"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shard_like(weights[name], parameter))


def describe_precision(run: Run) -> str:
    """Returns the name of the precision, and the types of the weights and of the matrix products."""
    storage, compute = run.precision.storage, run.precision.compute
    is_default = storage.name == run.model.suggested.precision and storage.value == compute.value
    name = f"{storage.name}, the model's default" if is_default else storage.name
    products = f"matrix products in {compute.value}"
    if run.precision.float8_products:
        products += ", those of quantized layers in float8 in the forward pass"
    if run.method.freezes:
        return f"{name}: frozen weights {storage.value}, trainable parameters float32, {products}"
    weights = str(run.method.dtype(run.precision.dtype())).removeprefix("torch.")
    return f"{name}: all weights are trained, in {weights}; {products}"
