"""A small world of scenes and edits, drawn on the spot: control picture, instruction, target picture.

A scene is one to three things (of different shapes, so that "the circle" names one) before one of five backgrounds. An
edit turns a scene's picture into another by instruction; for models that draw from words alone a scene is described instead. Scenes are drawn in unit coordinates, so the same world exists
at 64 px and at 1024 px, and every sample is a pure function of (kind of edit, split, index).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from trainer.core.rng import generator
from trainer.dataset.sample import Sample, Task

if TYPE_CHECKING:
    from trainer.dataset import Demo

COLOURS = {
    "red": (214, 50, 48),
    "blue": (45, 91, 210),
    "yellow": (246, 206, 50),
    "purple": (138, 66, 174),
    "orange": (240, 138, 36),
    "pink": (244, 128, 178),
}
SHAPES = ("circle", "square", "triangle", "house", "star")
BACKGROUNDS = {  # sky, ground
    "meadow": ((148, 204, 240), (112, 178, 84)),
    "beach": ((120, 206, 232), (232, 208, 150)),
    "desert": ((250, 190, 130), (206, 140, 84)),
    "snow": ((196, 214, 232), (236, 240, 246)),
    "sea": ((196, 226, 246), (44, 120, 170)),
}
HORIZON = 0.56
SUPERSAMPLING = 2


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: `x`, `y` its centre and `size` its half-width, in units of the picture's side."""

    shape: str
    colour: str
    x: float
    y: float
    size: float


@dataclass(frozen=True, slots=True)
class Scene:
    background: str
    things: tuple[Thing, ...]


def scene(rng: np.random.Generator) -> Scene:
    """A random scene; things stand side by side, so that none hides another."""
    count = int(rng.integers(1, 4))
    shapes = rng.permutation(SHAPES)[:count]
    width = 1 / count
    things = []
    for column, shape in enumerate(shapes):
        size = float(rng.uniform(0.11, min(0.2, 0.42 * width)))
        x = float(rng.uniform(column * width + size, (column + 1) * width - size))
        things.append(Thing(str(shape), str(rng.choice(list(COLOURS))), x, float(rng.uniform(0.34, 0.92 - size)), size))
    return Scene(str(rng.choice(list(BACKGROUNDS))), tuple(things))


def draw(picture: Scene, side: int) -> Image.Image:
    """The scene as an RGB picture of `side` x `side` pixels, antialiased."""
    scale = side * SUPERSAMPLING
    sky, ground = BACKGROUNDS[picture.background]
    image = Image.new("RGB", (scale, scale), sky)
    pen = ImageDraw.Draw(image)
    pen.rectangle([0, HORIZON * scale, scale, scale], fill=ground)
    for thing in picture.things:
        _draw_thing(pen, thing, scale)
    return image.reduce(SUPERSAMPLING)


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, scale: int) -> None:
    colour = COLOURS[thing.colour]
    x, y, r = thing.x * scale, thing.y * scale, thing.size * scale

    def at(*points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x + r * dx, y + r * dy) for dx, dy in points]

    if thing.shape == "circle":
        pen.ellipse(at((-1, -1), (1, 1)), fill=colour)
    elif thing.shape == "square":
        pen.rectangle(at((-0.9, -0.9), (0.9, 0.9)), fill=colour)
    elif thing.shape == "triangle":
        pen.polygon(at((0, -1), (1, 0.9), (-1, 0.9)), fill=colour)
    elif thing.shape == "star":
        angles = -np.pi / 2 + np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, 1.1, 0.5)
        pen.polygon(at(*zip(radii * np.cos(angles), radii * np.sin(angles), strict=True)), fill=colour)
    else:
        pen.rectangle(at((-0.8, -0.1), (0.8, 0.9)), fill=colour)
        pen.polygon(at((0, -1), (1, -0.1), (-1, -0.1)), fill=(110, 62, 44))
        pen.rectangle(at((-0.2, 0.3), (0.2, 0.9)), fill=(70, 44, 36))


# Edits of the scene: (scene, random numbers) -> instruction, edited scene. Edits of the picture: picture -> picture.


def _some(rng: np.random.Generator, options) -> str:
    return str(rng.choice(sorted(options)))


def _recolour(before: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    which = int(rng.integers(len(before.things)))
    colour = _some(rng, set(COLOURS) - {before.things[which].colour})
    return f"paint the {before.things[which].shape} {colour}", _with(before, which, colour=colour)


def _remove(before: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    which = int(rng.integers(len(before.things)))
    rest = before.things[:which] + before.things[which + 1 :]
    return f"remove the {before.things[which].shape}", replace(before, things=rest)


def _enlarge(before: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    which = int(rng.integers(len(before.things)))
    return f"enlarge the {before.things[which].shape}", _with(before, which, size=1.5 * before.things[which].size)


def _background(before: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    background = _some(rng, set(BACKGROUNDS) - {before.background})
    return f"move to the {background}", replace(before, background=background)


def _with(picture: Scene, which: int, **changes) -> Scene:
    things = list(picture.things)
    things[which] = replace(things[which], **changes)
    return replace(picture, things=tuple(things))


def _sketch(image: Image.Image) -> Image.Image:
    grey = image.convert("L").filter(ImageFilter.GaussianBlur(image.width / 128))
    edges = grey.filter(ImageFilter.FIND_EDGES).crop((1, 1, image.width - 1, image.height - 1)).resize(image.size)
    return ImageOps.invert(edges.point(lambda value: min(255, 4 * value))).convert("RGB")


def _night(image: Image.Image) -> Image.Image:
    """Dark and bluish. No moon: to put one in its place is beyond an adapter of a model that places things relative to each other."""
    dark = np.asarray(image, np.float32) * np.array([0.22, 0.28, 0.5], np.float32) + np.array([4, 6, 22], np.float32)
    return Image.fromarray(dark.round().astype(np.uint8))


def _outline(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image, np.int16)
    edge = np.zeros(pixels.shape[:2], bool)
    for axis in (0, 1):
        jump = np.abs(np.diff(pixels, axis=axis)).sum(-1) > 60
        edge |= np.pad(jump, [(0, 1) if other == axis else (0, 0) for other in (0, 1)])
    width = max(1, image.width // 64)
    if width > 1:
        edge = np.asarray(Image.fromarray(edge).convert("L").filter(ImageFilter.MaxFilter(width // 2 * 2 + 1))) > 0
    return Image.fromarray(np.where(edge[..., None], 16, pixels).astype(np.uint8))


def _pixelate(image: Image.Image) -> Image.Image:
    return image.resize((8, 8), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


SCENE_EDITS = {"recolour": _recolour, "remove": _remove, "enlarge": _enlarge, "background": _background}
PICTURE_EDITS = {
    "mirror": ("mirror the picture", ImageOps.mirror),
    "sketch": ("draw a pencil sketch", _sketch),
    "night": ("make it night", _night),
    "outline": ("outline every shape", _outline),
    "pixelate": ("make it pixel art", _pixelate),
    "invert": ("invert all colours", ImageOps.invert),
}
EDITS = (*SCENE_EDITS, *PICTURE_EDITS)
# What the shipped mini model was trained on; the other kinds are left for a LoRA to learn.
BASE_EDITS = ("recolour", "remove", "enlarge", "background", "mirror", "sketch")


DESCRIBE = "describe"
"""In place of an edit: the instruction is what the scene shows."""


def described(picture: Scene) -> str:
    """`a red circle and a blue house, beach`"""
    return " and ".join(f"a {thing.colour} {thing.shape}" for thing in picture.things) + f", {picture.background}"


@lru_cache(maxsize=64)
def pair(kind: str, split: str, index: int, side: int) -> tuple[Image.Image, str, Image.Image]:
    """Control picture, instruction and target picture of one sample. The scene does not depend on the kind of edit."""
    before = scene(generator("demo scene", split, index))
    control = draw(before, side)
    if kind == DESCRIBE:
        return control, described(before), control
    if kind in PICTURE_EDITS:
        instruction, edit = PICTURE_EDITS[kind]
        return control, instruction, edit(control)
    instruction, after = SCENE_EDITS[kind](before, generator("demo edit", kind, split, index))
    return control, instruction, draw(after, side)


@dataclass(frozen=True, slots=True)
class Drawing:
    """One picture of the demo world as a source; see `trainer.dataset.sample.Source`."""

    kind: str
    split: str
    index: int
    side: int
    target: bool

    @property
    def name(self) -> str:
        return f"demo {self.split} {self.index} {self.kind} {'target' if self.target else 'control'}"

    def open(self) -> Image.Image:
        return pair(self.kind, self.split, self.index, self.side)[2 if self.target else 0]

    def digest(self) -> str:
        return hashlib.sha256(self.open().tobytes()).hexdigest()

    def remember(self, what: str, make: Callable[[], str]) -> str:
        return make()

    def size(self) -> tuple[int, int]:
        return self.side, self.side


def read(settings: Demo, side: int) -> list[Sample]:
    """`settings.pairs` training and `settings.held_out` validation samples, the kinds of edit taken in turn."""
    describe = settings.task is Task.describe
    kinds = [DESCRIBE] if describe else settings.edits
    samples = []
    for split, count in (("train", settings.pairs), ("validation", settings.held_out)):
        for index in range(count):
            kind = kinds[index % len(kinds)]
            samples.append(
                Sample(
                    id=f"{split}-{index:06d}-{kind}",
                    image=Drawing(kind, split, index, side, target=True),
                    controls=() if describe else (Drawing(kind, split, index, side, target=False),),
                    caption=pair(kind, split, index, side)[1],
                    split=split,
                )
            )
    return samples
