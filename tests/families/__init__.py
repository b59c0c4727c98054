"""What the tests need to know about each model family: one file `tests/families/NAME.py` for `trainer/model/NAME.py`.

To add a family, write this file. It defines `CASE`, an object of a subclass of `Case` with

1. `pictures` and `generate`: what is generated with the tiny checkpoint by the program and by diffusers' pipeline, and
   how this pipeline is called. Pictures, latents and all that reaches the denoiser are then compared.
2. `extra_targets` and, unless `Family.unsupported_formats` names it, how ComfyUI names its layers.
3. `published`: how many parameters the networks of the published sizes have.
4. `golden`: losses of a short training, as `python -m tests.test_golden NAME` prints them.

`left_out` names those of these parts that make no sense for the family, and says why. Tests of what only this family
does stand in the same file; the fixture `family` is the family with its tiny checkpoint. No other file changes:
tests/test_parity.py, test_families.py, test_export.py, test_golden.py and test_real_sizes.py find the families by the
options of `conf/model`.

`tests/families/flux_kontext.py` is an example with control images, `tests/families/sdxl.py` one with classifier-free
guidance.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from synthetic import DEVICE, NoiseSource

from trainer.config.groups import GROUPS
from trainer.core.rng import normal
from trainer.dataset.sample import Sample
from trainer.dataset.transform import TransformedSample
from trainer.method import Method
from trainer.method.lora import Lora
from trainer.model import Family

FAMILIES = sorted(GROUPS["model"])
"""Names of all families."""
PARTS = ("pictures", "published")
"""What `Case.left_out` may name."""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Two pictures that the program and diffusers' pipeline generate, with the two `Case.captions`."""

    guidance: float = 1.0
    steps: int = 3
    size: tuple[int, int] = (48, 32)
    """(width, height)"""
    control_sizes: tuple[tuple[int, int], ...] = ()
    """(width, height) of each control image of a sample."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the family."""
    lora: bool = True
    """Whether a LoRA is trained with these settings, and its exports generate the same pictures."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Pictures to generate, as arguments for a pipeline."""

    family: Family
    pictures: Pictures
    captions: tuple[str, ...]
    noise: torch.Tensor
    """Noisy latents to start from, (B, C, h, w)."""

    @property
    def width(self) -> int:
        return self.pictures.size[0]

    @property
    def height(self) -> int:
        return self.pictures.size[1]

    @property
    def samples(self) -> list[TransformedSample]:
        """The samples with their captions and control images."""
        target, sizes = NoiseSource("target", self.width, self.height), self.pictures.control_sizes
        return [
            TransformedSample(
                Sample(
                    caption,
                    target,
                    caption,
                    tuple(NoiseSource(f"control {i} {caption}", *size) for i, size in enumerate(sizes)),
                ),
                self.width,
                self.height,
                control_sizes=sizes,
            )
            for caption in self.captions
        ]

    @property
    def controls(self) -> list[list[Image.Image]]:
        """The control images of each sample."""
        return [[source.open() for source in sample.sample.controls] for sample in self.samples]

    def split(self) -> list[Request]:
        """Returns a request for each sample, for pipelines that take one at a time."""
        return [
            dataclasses.replace(self, captions=(caption,), noise=self.noise[i : i + 1])
            for i, caption in enumerate(self.captions)
        ]


@dataclasses.dataclass(frozen=True)
class Published:
    """A published network, and its trainable parameters with a LoRA of rank 8 on the default targets."""

    path: str
    """Hub id. Its configs are those that come with the program (`trainer/model/published`) or `configs`."""
    parameters: int
    trainable: int
    layers: int
    """Number of layers with a LoRA."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the family."""
    configs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Component -> its config.json; values that are left out are the defaults of the class."""
    components: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Component -> number of its parameters, for encoders that the family can build."""


class Case:
    """What is particular to one family; see the docstring of this module."""

    captions: ClassVar[tuple[str, str]] = ("make it night", "paint the photo")
    settings: ClassVar[Mapping[str, Any]] = {}
    """Settings of the family in all tests of pictures, besides those that `save_tiny_checkpoint` returns."""
    pictures: ClassVar[Mapping[str, Pictures]] = {}
    """Name -> pictures to compare: with and without guidance, with every number of control images, ..."""
    tolerance: ClassVar[float] = 1e-5
    """Largest difference of pixels (in [0, 1]), of inputs of the denoiser, and of its predictions."""
    extra_targets: ClassVar[tuple[str, ...]] = ()
    """Layers that get a LoRA besides the default targets: some of every kind that the export formats know."""
    lora_std: ClassVar[float] = 0.3
    """Standard deviation of the LoRA's weights."""
    comfyui_prefix: ClassVar[str] = "diffusion_model."
    """What ComfyUI's names of layers start with."""
    comfyui_layers: ClassVar[str] = ""
    """Pattern of diffusers' names of the layers that ComfyUI knows after this prefix; say where in ComfyUI."""
    comfyui_factors: ClassVar[tuple[str, str]] = ("lora_B", "lora_A")
    """Names in a file for ComfyUI of the matrices B and A; W + (alpha / rank) B A is the trained weight."""
    unread: ClassVar[Mapping[str, str]] = {}
    """Patterns (as of fnmatch) of tensors of the denoiser that change no prediction -> why."""
    published: ClassVar[Mapping[str, Published]] = {}
    golden: ClassVar[Mapping[str, Sequence[float]]] = {}
    """Machine -> loss and gradient norm of each of five steps; see tests/test_golden.py."""
    left_out: ClassVar[Mapping[str, str]] = {}
    """Part of this contract (`PARTS`) that does not apply to the family -> why, in one line."""

    def generate(self, pipeline: Any, request: Request) -> np.ndarray:
        """Returns the pictures (B, H, W, 3) of diffusers' pipeline, in [0, 1].

        The call must say everything that decides them: prompts, sizes, steps, guidance, `latents=request.noise` in
        the pipeline's layout, control images, and output_type="np".
        """
        raise NotImplementedError

    def load_pipeline(self, family: Family, **options: Any) -> Any:
        """Returns diffusers' pipeline with the checkpoint of the family, in float32.

        `options` are further arguments of `from_pretrained`.
        """
        pipeline = family.pipeline_class().from_pretrained(family.path, dtype=torch.float32, **options).to(DEVICE)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def denoiser_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Returns what must be equal of all that reaches the denoiser for one sample, and its `result`.

        `inputs` are the arguments of the forward pass by name, without the batch dimension. By default all are
        compared that are tensors, or lists of them. Override this where one side pads and the other does not.
        """
        return inputs

    def latents(self, pipeline: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Returns the latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1], as pipelines encode images."""
        config = pipeline.vae.config
        latents = pipeline.vae.encode(pixels).latent_dist.mode()
        return (latents - (getattr(config, "shift_factor", None) or 0)) * config.scaling_factor

    def find_comfyui_layer(self, network: torch.nn.Module, name: str) -> torch.nn.Module:
        """Returns the layer of the network that ComfyUI finds under this name of a LoRA file."""
        assert self.comfyui_layers, (
            f"set comfyui_layers in {path_of(self.name)} to a pattern of the layers that ComfyUI knows"
        )
        assert name.startswith(self.comfyui_prefix), name
        layer = name.removeprefix(self.comfyui_prefix)
        assert re.fullmatch(self.comfyui_layers, layer), f"ComfyUI knows no layer {layer}"
        return network.get_submodule(layer)

    # Not to be overridden

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    def need(self, part: str) -> None:
        """Skips the test if this part is left out."""
        if part in self.left_out:
            pytest.skip(self.left_out[part])

    def family(self, tiny: Tiny) -> Family:
        return dataclasses.replace(tiny.family(), **self.settings)

    def published_family(self, size: str, folder: Path) -> Family:
        """Returns the family with the configs of a published size; `folder` is empty and gets those of the case."""
        published, kind = self.published[size], GROUPS["model"][self.name]
        if not published.configs:
            return kind(path=published.path, **published.settings).with_published_configs()
        for component, config in published.configs.items():
            file = "scheduler_config.json" if component == "scheduler" else "config.json"
            path = folder / component / file
            path.parent.mkdir()
            path.write_text(json.dumps(config))
        return kind(path=str(folder), **published.settings)

    def request(self, family: Family, pictures: Pictures) -> Request:
        family = dataclasses.replace(family, **pictures.settings)
        shape = family.shapes(*reversed(pictures.size), [size[::-1] for size in pictures.control_sizes])["latents"]
        noise = torch.stack([normal(shape, "sample", seed) for seed in range(len(self.captions))])
        return Request(family, pictures, self.captions, noise.to(DEVICE))


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A tiny checkpoint of a model family."""

    name: str
    """Name of the family in the config group `model`."""
    settings: list[str]
    """Overrides (key=value) that select the checkpoint."""

    @classmethod
    def save(cls, name: str, folder: Path) -> Tiny:
        return cls(name, GROUPS["model"][name].save_tiny_checkpoint(folder))

    def family(self) -> Family:
        """Returns the family with its own settings; those of other groups are left out."""
        own = [text.removeprefix("model.") for text in self.settings if text.startswith("model.")]
        settings = OmegaConf.merge(OmegaConf.structured(GROUPS["model"][self.name]), OmegaConf.from_dotlist(own))
        return OmegaConf.to_object(settings)


def usual_method(family: Family, **settings: Any) -> Method:
    """Returns LoRA with these settings, or the only method of a family without LoRA."""
    if "lora" in family.methods:
        return Lora(**settings)
    (name,) = family.methods
    return GROUPS["method"][name]()


def path_of(name: str) -> str:
    return f"tests/families/{name}.py"


def has_case(name: str) -> bool:
    return find_spec(f"families.{name}") is not None


def case_of(name: str) -> Case:
    """Returns the case of a family. Fails the test that asks for it if it is not written."""
    if not has_case(name):
        pytest.fail(f"{path_of(name)} is missing; write it as tests/families/__init__.py says", pytrace=False)
    case = getattr(importlib.import_module(f"families.{name}"), "CASE", None)
    if not isinstance(case, Case):
        pytest.fail(f"{path_of(name)} lacks CASE, an object of a subclass of families.Case", pytrace=False)
    return case


def each_pictures(condition: Callable[[Family, Pictures], bool] = lambda *_: True) -> list[Any]:
    """Returns (name of a family, name of its pictures) for `parametrize`, for all that meet the condition."""
    return [
        pytest.param(name, key, id=f"{name}-{key}")
        for name in FAMILIES
        if has_case(name)
        for key, pictures in case_of(name).pictures.items()
        if condition(GROUPS["model"][name], pictures)
    ]
