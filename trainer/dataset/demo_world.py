"""The demo world: scenes and edits, rendered on the fly as control image, instruction and target image.

A scene is one to three objects in front of one of five backgrounds. The objects have different shapes, so that "the
circle" names one of them. An edit turns the image of a scene into another by instruction. For models without control
images, captions describe the scene instead. Scenes have unit coordinates, so the same world exists at 64 px and at 1024
px, and every sample is a pure function of (kind of edit, split, index).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from trainer.core.rng import generator

COLORS = {
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
class SceneObject:
    """`x` and `y` are the center, `size` is half the width; one unit is the side of the image."""

    shape: str
    color: str
    x: float
    y: float
    size: float


@dataclass(frozen=True, slots=True)
class Scene:
    background: str
    objects: tuple[SceneObject, ...]


def random_scene(rng: np.random.Generator) -> Scene:
    """Returns a random scene. Objects are side by side, so that none hides another."""
    count = int(rng.integers(1, 4))
    shapes = rng.permutation(SHAPES)[:count]
    width = 1 / count
    objects = []
    for column, shape in enumerate(shapes):
        size = float(rng.uniform(0.11, min(0.2, 0.42 * width)))
        x = float(rng.uniform(column * width + size, (column + 1) * width - size))
        color = str(rng.choice(list(COLORS)))
        y = float(rng.uniform(0.34, 0.92 - size))
        objects.append(SceneObject(str(shape), color, x, y, size))
    return Scene(str(rng.choice(list(BACKGROUNDS))), tuple(objects))


def render(scene: Scene, side: int) -> Image.Image:
    """Returns the scene as an antialiased RGB image of `side` x `side` pixels."""
    scale = side * SUPERSAMPLING
    sky, ground = BACKGROUNDS[scene.background]
    image = Image.new("RGB", (scale, scale), sky)
    pen = ImageDraw.Draw(image)
    pen.rectangle([0, HORIZON * scale, scale, scale], fill=ground)
    for item in scene.objects:
        _draw_object(pen, item, scale)
    return image.reduce(SUPERSAMPLING)


def _draw_object(pen: ImageDraw.ImageDraw, item: SceneObject, scale: int) -> None:
    color = COLORS[item.color]
    x, y, r = item.x * scale, item.y * scale, item.size * scale

    def at(*points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x + r * dx, y + r * dy) for dx, dy in points]

    if item.shape == "circle":
        pen.ellipse(at((-1, -1), (1, 1)), fill=color)
    elif item.shape == "square":
        pen.rectangle(at((-0.9, -0.9), (0.9, 0.9)), fill=color)
    elif item.shape == "triangle":
        pen.polygon(at((0, -1), (1, 0.9), (-1, 0.9)), fill=color)
    elif item.shape == "star":
        angles = -np.pi / 2 + np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, 1.1, 0.5)
        pen.polygon(at(*zip(radii * np.cos(angles), radii * np.sin(angles), strict=True)), fill=color)
    else:
        pen.rectangle(at((-0.8, -0.1), (0.8, 0.9)), fill=color)
        pen.polygon(at((0, -1), (1, -0.1), (-1, -0.1)), fill=(110, 62, 44))
        pen.rectangle(at((-0.2, 0.3), (0.2, 0.9)), fill=(70, 44, 36))


# Edits of a scene: (scene, random numbers) -> instruction, edited scene


def _recolor(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    index = int(rng.integers(len(scene.objects)))
    color = _choose(rng, set(COLORS) - {scene.objects[index].color})
    return f"paint the {scene.objects[index].shape} {color}", _replace_object(scene, index, color=color)


def _remove(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    index = int(rng.integers(len(scene.objects)))
    others = scene.objects[:index] + scene.objects[index + 1 :]
    return f"remove the {scene.objects[index].shape}", replace(scene, objects=others)


def _enlarge(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    index = int(rng.integers(len(scene.objects)))
    larger = _replace_object(scene, index, size=1.5 * scene.objects[index].size)
    return f"enlarge the {scene.objects[index].shape}", larger


def _change_background(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    background = _choose(rng, set(BACKGROUNDS) - {scene.background})
    return f"move to the {background}", replace(scene, background=background)


def _choose(rng: np.random.Generator, options: Iterable[str]) -> str:
    return str(rng.choice(sorted(options)))


def _replace_object(scene: Scene, index: int, **changes: Any) -> Scene:
    objects = list(scene.objects)
    objects[index] = replace(objects[index], **changes)
    return replace(scene, objects=tuple(objects))


# Edits of an image: image -> image


def _sketch(image: Image.Image) -> Image.Image:
    gray = image.convert("L").filter(ImageFilter.GaussianBlur(image.width / 128))
    edges = gray.filter(ImageFilter.FIND_EDGES).crop((1, 1, image.width - 1, image.height - 1)).resize(image.size)
    return ImageOps.invert(edges.point(lambda value: min(255, 4 * value))).convert("RGB")


def _night(image: Image.Image) -> Image.Image:
    """Makes the image dark and bluish, without a moon.

    A moon would have a fixed position, which an adapter cannot teach to a model that places objects only relative to
    each other.
    """
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


# The instructions are training data, and the names are values of dataset.edits.
SCENE_EDITS = {"recolour": _recolor, "remove": _remove, "enlarge": _enlarge, "background": _change_background}
IMAGE_EDITS = {
    "mirror": ("mirror the picture", ImageOps.mirror),
    "sketch": ("draw a pencil sketch", _sketch),
    "night": ("make it night", _night),
    "outline": ("outline every shape", _outline),
    "pixelate": ("make it pixel art", _pixelate),
    "invert": ("invert all colours", ImageOps.invert),
}
EDITS = (*SCENE_EDITS, *IMAGE_EDITS)
BASE_EDITS = ("recolour", "remove", "enlarge", "background", "mirror", "sketch")
"""The edits that the mini model was trained on. The others are left for a LoRA to learn."""
DESCRIBE = "describe"
"""In place of an edit: the caption describes the scene."""


def describe_scene(scene: Scene) -> str:
    """Returns a caption: `a red circle and a blue house, beach`."""
    return " and ".join(f"a {item.color} {item.shape}" for item in scene.objects) + f", {scene.background}"


@lru_cache(maxsize=64)
def render_pair(kind: str, split: str, index: int, side: int) -> tuple[Image.Image, str, Image.Image]:
    """Returns control image, instruction and target image of one sample.

    The scene does not depend on the kind of edit.
    """
    scene = random_scene(generator("demo scene", split, index))
    control = render(scene, side)
    if kind == DESCRIBE:
        return control, describe_scene(scene), control
    if kind in IMAGE_EDITS:
        instruction, edit = IMAGE_EDITS[kind]
        return control, instruction, edit(control)
    instruction, edited = SCENE_EDITS[kind](scene, generator("demo edit", kind, split, index))
    return control, instruction, render(edited, side)
