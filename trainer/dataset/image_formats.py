"""The formats of images that are read, by the endings of files, and the plugins of Pillow that add others."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import PurePath

PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
"""Ending -> the package that adds its format to Pillow, if it is installed."""
PLUGIN_MODULES = {"pillow-heif": "pillow_heif", "pillow-jxl-plugin": "pillow_jxl"}


def _is_read(suffix: str) -> bool:
    return find_spec(PLUGIN_MODULES[PLUGINS[suffix]]) is not None


IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif"),
    *filter(_is_read, PLUGINS),
)
UNREAD_SUFFIXES = (
    *(suffix for suffix in PLUGINS if not _is_read(suffix)),
    *(".jp2", ".j2k", ".jxr", ".svg", ".psd", ".xcf", ".kra", ".tga", ".exr", ".hdr", ".qoi", ".ppm", ".pgm", ".ico"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"),
)
"""Images in formats that are not read."""


def describe_unread(path: PurePath) -> str:
    """Returns why an image with one of the UNREAD_SUFFIXES is not read, and what to do."""
    plugin = PLUGINS.get(path.suffix.lower())
    install = f"type pip install {plugin}, or " if plugin else ""
    return f"is in a format that is not read; {install}save it as .jpg or .png"
