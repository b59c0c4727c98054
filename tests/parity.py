"""Helpers for tests that compare networks and exports with diffusers' pipelines."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import Case, Request
from peft import PeftModel
from safetensors.torch import load_file
from synthetic import DEVICE, normal

from trainer.config.schema import Run
from trainer.config.sections import Export, Format, Sampling
from trainer.core.batch import Example
from trainer.dataset.transform import TransformedSample
from trainer.evaluation.sampling import generate_images
from trainer.export.write import write_exports
from trainer.method.lora import Lora
from trainer.method.trainable import trainable_parameters
from trainer.model import Encoder, Family
from trainer.precision import Precision
from trainer.training.data import unconditional_samples

# tests/test_single_file.py is about the last one.
LORA_FORMATS = [Format[name] for name in Lora.formats if name != Format.single_file.name]

# Pictures of the program


class FloatImages:
    """An encoder that keeps the images it decodes, which `generate_images` rounds."""

    def __init__(self, encoder: Encoder):
        self.encoder, self.images = encoder, []

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.images.append(self.encoder.decode(latents))
        return self.images[-1]


def our_pictures(request: Request, network: torch.nn.Module) -> np.ndarray:
    """Returns the pictures (B, H, W, 3) that the program generates, in [0, 1]."""
    family, pictures = request.family, request.pictures
    encoder = family.build_encoder(DEVICE)
    names = family.recipes(dict.fromkeys(family.components, ""), len(pictures.control_sizes))

    def encode(samples: Sequence[TransformedSample]) -> list[Example]:
        return [{name: encoder.encode(name, sample) for name in names} for sample in samples]

    run = Run(model=family, sample=Sampling(guidance=pictures.guidance))
    floats: Any = FloatImages(encoder)
    images = generate_images(
        family,
        partial(family.predict, network),
        floats,
        encode(request.samples),
        encode(unconditional_samples(run, request.samples)) or None,
        list(range(len(request.captions))),
        steps=pictures.steps,
        guidance=pictures.guidance,
        device=DEVICE,
        batch_size=len(request.captions),
    )
    assert [index for index, _ in images] == list(range(len(request.captions)))
    return torch.cat(floats.images).permute(0, 2, 3, 1).cpu().numpy()


# What reaches the denoiser


def denoiser_of(family: Family, network: Any) -> torch.nn.Module:
    """Returns the denoiser of a pipeline, or of a network that may hold other components too."""
    return getattr(network, family.denoiser, network)


def record_calls(module: torch.nn.Module) -> list[dict[str, Any]]:
    """Returns a list that gets the arguments by name and the `result` of each forward pass from now on."""
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(module.forward)

    def record(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.append(_copy({**signature.bind(*args, **kwargs).arguments, "result": output[0]}))

    module.register_forward_hook(record, with_kwargs=True)
    return calls


def _copy(value: Any) -> Any:
    """Copies tensors, because samplers may change them."""
    if torch.is_tensor(value):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def passes(case: Case, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what `case` compares of each call and each sample in it."""
    return [case.denoiser_inputs(one) for call in calls for one in _split(call)]


def _split(call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the arguments for each sample of a batch. Arguments without a batch dimension are those of all samples."""
    size = len(call["result"])

    def of_sample(value: Any, i: int) -> Any:
        if torch.is_tensor(value):
            return value[i] if value.dim() and len(value) == size else value
        return value[i] if isinstance(value, list) and len(value) == size else value

    for i in range(size):
        found: dict[str, Any] = {}
        for name, value in call.items():
            # UNets take some of their inputs in a dictionary.
            found |= value if isinstance(value, dict) else {name: value}
        yield {name: of_sample(value, i) for name, value in found.items()}


def assert_same_passes(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], tolerance: float) -> None:
    """Asserts that there is one of ours for each of theirs, in any order: some pipelines predict with and without
    caption in one batch, others take one sample at a time.
    """
    left = list(ours)
    for number, expected in enumerate(theirs):
        differences = [_differences(found, expected, tolerance) for found in left]
        nearest = min(range(len(left)), key=lambda i: (len(differences[i]), sum(differences[i].values())), default=None)
        assert nearest is not None, (
            f"the pipeline calls the denoiser {len(theirs)} times, the program {len(ours)} times"
        )
        assert not differences[nearest], (
            f"forward pass {number} of the pipeline differs from all of the program. In the most similar one, "
            + ", ".join(f"{name} is off by {difference:.3g}" for name, difference in differences[nearest].items())
            + " (inf: of another shape, or only one side has it; see Case.denoiser_inputs)"
        )
        del left[nearest]
    assert not left, f"the program calls the denoiser for {len(left)} samples more than the pipeline"


def _differences(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> dict[str, float]:
    """Returns name -> largest difference, where it is above the tolerance."""
    found, expected = ({name: x for name, x in each.items() if _has_tensors(x)} for each in (found, expected))
    distances = {name: _distance(found.get(name), expected.get(name)) for name in found.keys() | expected.keys()}
    return {name: distance for name, distance in sorted(distances.items()) if not distance <= tolerance}


def _has_tensors(value: Any) -> bool:
    return torch.is_tensor(value) or (isinstance(value, list) and any(map(_has_tensors, value)))


def _distance(found: Any, expected: Any) -> float:
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        return max(map(_distance, found, expected))
    if not (torch.is_tensor(found) and torch.is_tensor(expected)) or found.shape != expected.shape:
        return float("inf")
    return (found.double() - expected.double()).abs().max().item() if found.numel() else 0.0


# LoRA exports


@dataclasses.dataclass
class TrainedLora:
    """A network with a LoRA that changes its pictures much, and the pictures."""

    case: Case
    request: Request
    network: torch.nn.Module
    pictures: np.ndarray

    @property
    def family(self) -> Family:
        return self.request.family

    def export(self, format: Format, folder: Path) -> Path:
        """Writes the LoRA in one format and returns the path."""
        run = Run(model=self.family, method=_lora(self.case, self.family), precision=Precision())
        run.export = Export(formats=[format])
        weights = {name: parameter.detach() for name, parameter in trainable_parameters(self.network).items()}
        (path,) = write_exports(run, self.network, weights, folder)
        return path


def _lora(case: Case, family: Family) -> Lora:
    """Its alpha is not its rank, and it has dropout in training."""
    return Lora(rank=4, alpha=8.0, dropout=0.5, targets=[*family.target_modules, *case.extra_targets])


def train_lora(case: Case, request: Request) -> TrainedLora:
    """Attaches a LoRA with random weights."""
    family = request.family
    network = family.load_network(torch.float32, DEVICE)
    _lora(case, family).attach(network, family.target_modules, seed=0)
    before = our_pictures(request, network.eval())
    with torch.no_grad():
        for name, parameter in trainable_parameters(network).items():
            parameter.copy_(case.lora_std * normal(tuple(parameter.shape), name))
    after = our_pictures(request, network)
    assert np.abs(after - before).max() > 0.01
    return TrainedLora(case, request, network, after)


def load_peft_export(family: Family, pipeline: Any, folder: Path) -> None:
    """Loads a peft folder into a pipeline. With several trained components, there is a subfolder for each."""
    components = [path.name for path in folder.iterdir() if path.is_dir()]
    for name in components or [family.denoiser]:
        adapter = str(folder / name if components else folder)
        setattr(pipeline, name, PeftModel.from_pretrained(getattr(pipeline, name), adapter).get_base_model())


def merge_comfyui_lora(path: Path, find_layer: Callable[[str], Any], factors: tuple[str, str]) -> None:
    """Merges a LoRA file into layers as ComfyUI does, which reads no metadata.

    W += (alpha / rank, or 1 without an alpha) B A. `find_layer` returns the layer of a name in the file; `factors` are
    the names of B and A.
    """
    tensors, (up, down) = load_file(path), factors
    for key in [key for key in tensors if key.endswith(f".{up}.weight")]:
        name = key.removesuffix(f".{up}.weight")
        b, a = tensors.pop(key), tensors.pop(f"{name}.{down}.weight")
        scale = tensors.pop(f"{name}.alpha").item() / len(a) if f"{name}.alpha" in tensors else 1
        weight = find_layer(name).weight
        weight.data += (scale * b.flatten(1) @ a.flatten(1)).view(weight.shape).to(weight.device)
    assert not tensors
