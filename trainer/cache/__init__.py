"""What encoders make of samples, kept on disk part by part, each entry named by a hash of everything that made it.

An entry is `<root>/<part>/<2 hex>/<key>.safetensors` with one tensor `value`. Whatever an entry is made from is in its key, so
nothing is ever out of date: an edited caption or a replaced picture simply has another key, and variants lie side by side.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core import files
from trainer.core.errors import DataError
from trainer.core.lock import Lock
from trainer.dataset.sample import FAULTS_LISTED
from trainer.dataset.view import TransformedSample

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
"""To be raised when pictures are decoded or fitted, or entries are laid out, in another way: all entries are then made again."""
MEMORY = 2**30
USES, ENTRIES = "uses", "entries.txt"
LITTER = 3600
"""Seconds after which an unfinished file belongs to a writer that was killed; an entry is written in less than one."""

log = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class Part:
    """One tensor that a family wants cached.

    `fields` of a sample it is made from (see `View.content`). `maker`: a digest of all on the family's side that shapes it: encoder weights,
    tokenizer, template, dtype.
    """

    name: str
    fields: tuple[str, ...]
    maker: str


Outcome = tuple[str, str | None]
"""Of one entry: its part's name, and why it could not be made."""


def counted(parts: Sequence[Part], outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many entries of each part were made.

    Raises one errors.DataError for all samples that could not be encoded, after the others are made; but soon where nothing works.
    """
    made = {part.name: 0 for part in parts}
    faults: dict[str, None] = {}
    for part, fault in outcomes:
        if fault is None:
            made[part] += 1
        else:
            faults[fault] = None
            if len(faults) == FAULTS_LISTED:
                break
    if faults:
        raise DataError("\n  ".join([f"{len(faults)} faults when encoding. Mend or remove these samples:", *faults]))
    return made


class Cache:
    """The cached parts of views. Several processes may share a folder: entries appear whole, and equal whoever made them.

    The content of a sample counts as fixed once its key was asked for: a file that changes under a running process is seen by the next.
    """

    __slots__ = ("_held", "_keys", "_room", "_sound", "_verify", "parts", "root")

    def __init__(self, root: Path, parts: Sequence[Part], *, verify: str = "quick", memory: int = MEMORY):
        """`verify` as in CacheSettings; up to `memory` bytes of entries are held, so that later epochs do not read them again."""
        self.root = root
        self.parts = tuple(parts)
        self._verify = verify
        self._room = memory
        self._held: dict[str, Tensor] = {}
        self._keys: dict[tuple[Part, TransformedSample], str] = {}
        self._sound: set[str] = set()

    def key(self, part: Part, view: TransformedSample) -> str:
        """64 hex digits that stand for everything this entry is made from."""
        key = self._keys.get((part, view))
        if key is None:
            made_of = [SCHEMA, part.name, part.maker, {field: view.content(field) for field in part.fields}]
            key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
            self._keys[part, view] = key
        return key

    def path(self, part: Part, view: TransformedSample) -> Path:
        return self._path(part, self.key(part, view))

    def missing(self, views: Iterable[TransformedSample]) -> list[tuple[Part, TransformedSample]]:
        """What has to be made: each entry once, part by part, in the order of the keys. With verify="full" also what is damaged."""
        views = list(views)
        found = []
        for part in self.parts:
            wanted: dict[str, TransformedSample] = {}
            for view in views:
                wanted.setdefault(self.key(part, view), view)
            present = self._present(part) & wanted.keys()
            if self._verify == "full":
                present = {key for key in sorted(present) if self._is_sound(part, key)}
            found += [(part, wanted[key]) for key in sorted(wanted.keys() - present)]
        return found

    def fill(
        self, missing: Iterable[tuple[Part, TransformedSample]], encode: Callable[[str, TransformedSample], Tensor]
    ) -> dict[str, int]:
        """Make what `missing` found; returns how many entries of each part were made. `encode(part_name, view)` gives one entry's tensor.

        Raises one errors.DataError as `counted` does.
        """
        return counted(self.parts, self.made(missing, encode))

    def made(
        self, missing: Iterable[tuple[Part, TransformedSample]], encode: Callable[[str, TransformedSample], Tensor]
    ) -> Iterator[Outcome]:
        """Make entries one after the other, and tell of each how it went."""
        for part, view in missing:
            try:
                self.put(part, view, encode(part.name, view))
            except DataError as error:
                yield part.name, str(error)
            else:
                yield part.name, None

    def keep_for(self, owner: Path, views: Iterable[TransformedSample]) -> None:
        """Note that the run in the folder `owner` uses these views' entries, so that `drop_unused` leaves them as long as the folder is there."""
        entries = sorted({f"{part.name}/{self.key(part, view)}" for view in views for part in self.parts})
        text = "\n".join(entries)
        # A list each set of entries: the members of a sweep share one.
        folder = self.root / USES / hashlib.sha256(text.encode()).hexdigest()[:16]
        name = str(owner.absolute())
        with Lock(self.root / "uses.lock", wait=True):
            files.write(folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.owner", name)
            if not (folder / ENTRIES).exists():
                files.write(folder / ENTRIES, text)

    def drop_unused(self, views: Iterable[TransformedSample]) -> tuple[int, int]:
        """Delete the entries that neither these views nor any run whose folder is there uses; how many, and their bytes."""
        used = {f"{part.name}/{self.key(part, view)}" for view in views for part in self.parts}
        count = freed = 0
        with Lock(self.root / "uses.lock", wait=True), Lock(self.root / "filling", wait=True):
            for folder in sorted((self.root / USES).glob("*")):
                owners = [Path(path.read_text()) for path in folder.glob("*.owner")]
                if any(owner.is_dir() for owner in owners):
                    used.update((folder / ENTRIES).read_text().split("\n"))
                else:
                    files.remove(folder)
            for part, path in self._entries():
                if f"{part}/{path.stem}" not in used:
                    with files.storage_errors("remove", path):
                        freed += path.stat().st_size
                        path.unlink()
                    count += 1
        return count, freed

    def sizes(self) -> dict[str, tuple[int, int]]:
        """By part: how many entries there are of all runs, and their bytes."""
        found: dict[str, tuple[int, int]] = {}
        for part, path in self._entries():
            count, space = found.get(part, (0, 0))
            found[part] = count + 1, space + path.stat().st_size
        return found

    def _entries(self) -> Iterator[tuple[str, Path]]:
        """The part and the file of every entry, also of other models' parts."""
        for path in sorted(self.root.glob("*/[0-9a-f][0-9a-f]/*.safetensors")):
            if not path.name.startswith(files.PARTIAL_PREFIX):
                yield path.parent.parent.name, path

    def put(self, part: Part, view: TransformedSample, tensor: Tensor) -> None:
        """Write one entry. Raises errors.DataError where the tensor is not finite, errors.StorageError where it cannot be written."""
        import torch
        from safetensors.torch import save

        value = tensor.detach().to("cpu").contiguous()
        source = _describe(part, view)
        if not torch.isfinite(value).all():
            raise DataError(f"{source}: its {part.name} came out of the encoder as NaN or infinity")
        key = self.key(part, view)
        entry = {"part": part.name, "key": key, "source": source}
        entry["sha256"] = _digest(entry, value)
        # One metadata value, for safetensors writes several in random order, and the same entry shall be the same bytes.
        self._write(self._path(part, key), save({"value": value}, {"entry": json.dumps(entry, sort_keys=True)}))

    def get(self, part: Part, view: TransformedSample) -> Tensor:
        """One entry, on the CPU; shared, so not to be changed in place. It is checked when this process first reads it.

        Raises errors.DataError where it is damaged, errors.StorageError where it cannot be read.
        """
        key = self.key(part, view)
        value = self._held.get(key)
        if value is None:
            value = self._read(part, key)
            # What is held stays: an epoch comes by in another order each time, and evicting would only lose what comes next.
            if value.nbytes <= self._room:
                self._room -= value.nbytes
                self._held[key] = value
        return value

    def row(self, view: TransformedSample) -> dict[str, Tensor]:
        """All parts of one view by name; see `get`."""
        return {part.name: self.get(part, view) for part in self.parts}

    def _path(self, part: Part, key: str) -> Path:
        return self.root / part.name / key[:2] / f"{key}.safetensors"

    def _present(self, part: Part) -> set[str]:
        """The keys on disk, by listing folders: no look at each file."""
        present = set()
        folder = self.root / part.name
        with files.storage_errors("read", folder):
            for shard in (path for path in folder.glob("[0-9a-f][0-9a-f]") if path.is_dir()):
                for name in os.listdir(shard):
                    if name.startswith(files.PARTIAL_PREFIX):
                        _sweep(shard / name)
                    elif name.endswith(".safetensors"):
                        present.add(name.removesuffix(".safetensors"))
        return present

    def _is_sound(self, part: Part, key: str) -> bool:
        if key in self._sound:
            return True
        try:
            self._read(part, key)
        except DataError as error:
            log.warning("%s It is made again.", error)
            return False
        return True

    def _read(self, part: Part, key: str) -> Tensor:
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self._path(part, key)
        with files.storage_errors("read", path):
            data = path.read_bytes()
        try:
            value = load(data)["value"]
            if key not in self._sound:
                _check(part, key, value, data)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"The cache entry {path} is damaged ({error}). It is not used: type cache.verify=full to have every entry checked and the "
                "damaged ones made again, or delete it."
            ) from error
        self._sound.add(key)
        return value

    def _write(self, path: Path, data: bytes) -> None:
        # Not files.write: it waits for the disk, some 6 ms an entry. An entry torn by a power cut is found by its digest.
        temporary = files.temporary_path(path)
        with files.storage_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(data)
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


def _describe(part: Part, view: TransformedSample) -> str:
    """For people: what an entry is made from."""
    return ", ".join(text for field in part.fields for text in view.describe(field))


def _digest(entry: dict[str, str], value: Tensor) -> str:
    """Hex sha256 of an entry's description, dtype, shape and bytes."""
    import torch

    described = [entry["part"], entry["key"], entry["source"], str(value.dtype), list(value.shape)]
    digest = hashlib.sha256(json.dumps(described).encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check(part: Part, key: str, value: Tensor, data: bytes) -> None:
    """Raise ValueError or KeyError unless an entry's bytes are what `put` wrote under this name."""
    import torch

    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    entry = json.loads(header["__metadata__"]["entry"])
    if (entry["part"], entry["key"]) != (part.name, key):
        raise ValueError("it is the entry of another name")
    if entry["sha256"] != _digest(entry, value):
        raise ValueError("its digest does not match its content")
    if not torch.isfinite(value).all():
        raise ValueError("it holds NaN or infinity")


def _sweep(partial: Path) -> None:
    """Remove an unfinished entry whose writer must be dead."""
    try:
        if time.time() - partial.stat().st_mtime > LITTER:
            partial.unlink()
    except OSError:
        pass  # another process swept it, or finished it
