"""Tar archives of images and captions: an index of their members, which are read in place and never extracted.

Everything in an archive comes from outside, so that names, sizes and headers are checked before anything is read.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from trainer.core.digests import Digests
from trainer.core.errors import DataError
from trainer.core.files import storage_errors

if TYPE_CHECKING:
    from PIL.Image import Image

    from trainer.dataset.buckets import Size

MAX_EXTENDED_HEADER = 2**16
"""In bytes. Extended headers contain long names, of at most 4096 bytes in a file system, and times."""
MAX_IMAGE = 2**30
"""In bytes. A larger member is not read as an image: the largest images that are accepted have half a GiB of pixels."""
MAX_TEXT = 2**20
"""In bytes. A larger member is not read as a caption."""
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""First bytes of gzip, bzip2, xz and zstd files, in which no position can be read directly."""
EMPTY_BLOCK = bytes(tarfile.BLOCKSIZE)
WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


@dataclass(slots=True, frozen=True)
class Member:
    """A file in an archive: its name as stored, unchecked, and where its bytes are."""

    name: str
    offset: int
    size: int


@dataclass(slots=True, frozen=True)
class TarSource:
    """An image in an archive; see `trainer.dataset.source.Source`. `path` is the archive."""

    path: Path
    member: Member
    digests: Digests = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return f"{self.path}/{self.member.name}"

    def digest(self) -> str:
        return self.memoize("", lambda: hashlib.sha256(self._bytes()).hexdigest())

    def memoize(self, key: str, compute: Callable[[], str]) -> str:
        return self.digests.get_or_compute(self.path, f"[{self.member.offset}+{self.member.size}]{key}", compute)

    def size(self) -> Size:
        # Remembered, because the header of an image cannot be read without the rest of the member.
        width, _, height = self.memoize("size", self._read_size).partition("x")
        return int(width), int(height)

    def open(self) -> Image:
        from trainer.dataset.image import decode, open_image

        with open_image(io.BytesIO(self._bytes()), self.name) as image:
            return decode(image)

    def _read_size(self) -> str:
        from trainer.dataset.image import open_image, upright_size

        with open_image(io.BytesIO(self._bytes()), self.name) as image:
            width, height = upright_size(image)
        return f"{width}x{height}"

    def _bytes(self) -> bytes:
        try:
            return read_member(self.path, self.member, MAX_IMAGE)
        except ValueError as error:
            raise DataError(f"{self.name}: {error}") from None


def read_member(path: Path, member: Member, limit: int) -> bytes:
    """Returns the bytes of a member of the archive `path`.

    Raises ValueError if it has more than `limit` bytes, or the archive has become shorter; errors.StorageError.
    """
    if member.size > limit:
        raise ValueError(f"has {member.size} bytes, more than {limit}")
    with storage_errors("read", path), open(path, "rb") as file:
        file.seek(member.offset)
        data = file.read(member.size)
    if len(data) < member.size:
        raise ValueError("is cut off; the archive has changed since it was indexed")
    return data


def read_members(path: Path) -> Iterator[Member | ValueError]:
    """Yields the files in an archive, and a ValueError for everything that is wrong with it.

    Reads the headers only. Folders are left out. Raises errors.StorageError.
    """
    with storage_errors("read", path), open(path, "rb") as file:
        if file.read(8).startswith(COMPRESSED):
            yield ValueError("is compressed, so that no image in it can be read directly; unpack it to a plain .tar")
            return
        yield from _Archive(file).members()


class _Archive:
    """Reads the headers of an open archive one after the other."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.end = os.fstat(file.fileno()).st_size
        self.position = 0
        """Of the next header, in bytes."""

    def members(self) -> Iterator[Member | ValueError]:
        extended: dict[str, str] = {}
        while True:
            try:
                header = self._read_header(extended)
                if header is None:
                    return
                data, size = header.offset_data, header.size
                if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                    text = self._read_extended(header).rstrip(b"\0").decode("utf-8", "surrogateescape")
                    extended |= {"path": text} if header.type == tarfile.GNUTYPE_LONGNAME else {}
                    continue
                if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                    extended |= _parse_records(self._read_extended(header))
                    continue
                if header.type == tarfile.XGLTYPE:
                    _check_global(_parse_records(self._read_extended(header)))
                    continue
            except ValueError as error:
                yield ValueError(f"{error}; nothing behind it is read")
                return
            name, extended = extended.get("path", header.name), {}
            if header.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
                yield Member(name, data, size)
            elif header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
                yield ValueError(f"its member {name!r:.80} is a link; store the file itself")
            elif header.type != tarfile.DIRTYPE:
                yield ValueError(f"its member {name!r:.80} is neither a file nor a folder")

    def _read_header(self, extended: dict[str, str]) -> tarfile.TarInfo | None:
        """Returns the next header, with its position in the archive, or None at the end; moves on to the one behind it.

        Raises ValueError if there is neither a header nor the end.
        """
        start = self.position
        self.file.seek(start)
        block = self.file.read(tarfile.BLOCKSIZE)
        if block == EMPTY_BLOCK:
            self._check_rest()
            return None
        if len(block) < tarfile.BLOCKSIZE:
            raise ValueError(f"is cut off, or not written completely: it has no end mark at byte {start}")
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ValueError(f"is not a tar archive, or damaged: no header at byte {start} ({error})") from None
        if header.type in (tarfile.GNUTYPE_SPARSE,) or any(key.startswith("GNU.sparse") for key in extended):
            raise ValueError(f"its member {header.name!r:.80} is stored with gaps (sparse); create it without")
        if "size" in extended:
            header.size = _parse_size(extended["size"])
        header.offset_data = start + tarfile.BLOCKSIZE
        size = 0 if header.type in WITHOUT_DATA else header.size
        if size < 0 or header.offset_data + size > self.end:
            raise ValueError(
                f"is cut off: its member {header.name!r:.80} has {size} bytes from byte {header.offset_data}, "
                f"and the archive has {self.end}"
            )
        self.position = header.offset_data + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return header

    def _check_rest(self) -> None:
        """Raises ValueError if there is anything but zeros behind the end mark."""
        while block := self.file.read(2**20):
            if block.strip(b"\0"):
                raise ValueError("has more behind its end mark (archives that were joined?); make one of its files")

    def _read_extended(self, header: tarfile.TarInfo) -> bytes:
        if header.size > MAX_EXTENDED_HEADER:
            raise ValueError(f"has a header of {header.size} bytes, more than {MAX_EXTENDED_HEADER}")
        self.file.seek(header.offset_data)
        return self.file.read(header.size)


def _parse_records(data: bytes) -> dict[str, str]:
    """Parses the records `LENGTH KEY=VALUE\\n` of a pax header. Raises ValueError."""
    records = {}
    while data.strip(b"\0"):
        match = re.match(rb"([0-9]{1,6}) ([^=\n]+)=", data)
        length = int(match[1]) if match else 0
        if not match or not match.end() < length <= len(data) or data[length - 1 : length] != b"\n":
            raise ValueError("has a header whose records cannot be read")
        records[match[2].decode("utf-8", "replace")] = data[match.end() : length - 1].decode("utf-8", "surrogateescape")
        data = data[length:]
    return records


def _check_global(records: dict[str, str]) -> None:
    """Raises ValueError if a header for all members renames or resizes them, which no ordinary program does."""
    if records.keys() & {"path", "size"}:
        raise ValueError("has a header that gives all members the same name or size")


def _parse_size(text: str) -> int:
    if not re.fullmatch("[0-9]{1,19}", text):
        raise ValueError(f"has a header with the size {text!r:.40}")
    return int(text)
