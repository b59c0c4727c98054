"""Sources: where the pixels of one image come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

    from trainer.core.digests import Digests
    from trainer.dataset.buckets import Size


class Source(Protocol):
    """One image in a file, in a table or generated. Sources are hashable; equal sources are the same image."""

    @property
    def name(self) -> str:
        """Name of the image for messages: a path or, for example, "demo train 17 night target"."""

    def digest(self) -> str:
        """Returns the hex SHA-256 of the content, which does not depend on the name."""

    def memoize(self, key: str, compute: Callable[[], str]) -> str:
        """Returns `compute()`, a function of the content, from a persistent cache unless the content has changed."""

    def size(self) -> Size:
        """Returns (width, height) of the image that `open` returns, read from the header. Raises errors.DataError."""

    def open(self) -> Image:
        """Decodes the image: 8-bit sRGB, upright, alpha composited over white. Raises errors.DataError."""


@dataclass(slots=True, frozen=True)
class FileSource:
    """An image in a file; see `Source`."""

    path: Path
    digests: Digests = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return str(self.path)

    def digest(self) -> str:
        return self.digests.sha256(self.path)

    def memoize(self, key: str, compute: Callable[[], str]) -> str:
        return self.digests.get_or_compute(self.path, key, compute)

    def size(self) -> Size:
        """See `Source.size`; a PNG with its EXIF block after the pixels is assumed to be upright."""
        from trainer.dataset.image import open_image, upright_size

        with open_image(self.path, self.name) as image:
            return upright_size(image)

    def open(self) -> Image:
        from trainer.dataset.image import decode, open_image

        with open_image(self.path, self.name) as image:
            return decode(image)
