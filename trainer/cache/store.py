"""The cache of encoder outputs: reads and writes entries, and finds those that are missing, damaged or unused."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.cache import entry
from trainer.core import files
from trainer.core.errors import DataError
from trainer.core.lock import Lock
from trainer.dataset.listing import MAX_FAULTS_SHOWN

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.dataset.transform import TransformedSample
    from trainer.model import Recipe

MEMORY = 2**30
"""Number of bytes of entries that are kept in memory by default."""
SETTING = "cache.path"
"""The setting that chooses the folder of the cache."""
FILLING = "filling"
"""Name of the lock of the process that makes entries."""
ABANDONED_AFTER = 3600
"""Seconds after which the writer of an unfinished file must be dead. Writing an entry takes less than one."""
USES, ENTRIES = "uses", "entries.txt"
"""`<root>/uses/<digest>/entries.txt` lists entries; the `.owner` files beside it name the run folders that use them."""

Entry = tuple[str, "TransformedSample"]
"""Identifies a cache entry: the name of a tensor, and the sample it belongs to."""
Outcome = tuple[str, str | None]
"""Name of the tensor that was encoded, and the reason if that failed."""

log = logging.getLogger(__name__)


class Cache:
    """Encoder outputs of samples on disk, one file per tensor: `<root>/<name>/<2 hex digits>/<key>.safetensors`.

    `recipes` describes how each tensor of an example is made. A key is a hash of everything that determines the tensor,
    so entries never become outdated: if a caption or an image changes, so does the key.

    Several processes may share a folder: entries appear complete, and are equal whichever process made them. If a
    file changes while a process runs, only the next process notices.
    """

    __slots__ = ("_in_memory", "_keys", "_memory_left", "_verified", "_verify", "recipes", "root")

    def __init__(self, root: Path, recipes: Mapping[str, Recipe], *, verify: str = "quick", memory: int = MEMORY):
        """`verify`: see `CacheSettings`. Up to `memory` bytes of entries stay in memory, to be read only once."""
        self.root = root
        self.recipes = dict(recipes)
        self._verify = verify
        self._memory_left = memory
        self._in_memory: dict[str, Tensor] = {}
        self._keys: dict[Entry, str] = {}
        self._verified: set[str] = set()

    def key(self, name: str, sample: TransformedSample) -> str:
        """Returns the key of an entry, 64 hex digits."""
        key = self._keys.get((name, sample))
        if key is None:
            key = self._keys[name, sample] = entry.entry_key(name, self.recipes[name], sample)
        return key

    def path(self, name: str, sample: TransformedSample) -> Path:
        """Returns the path of an entry, which need not exist."""
        return self._path(name, self.key(name, sample))

    def missing(self, samples: Iterable[TransformedSample]) -> list[Entry]:
        """Returns the entries of the samples that do not exist, sorted by tensor and key, without duplicates.

        With `verify="full"` it reads all entries and also returns the damaged ones.
        """
        samples = list(samples)
        missing: list[Entry] = []
        for name in self.recipes:
            wanted: dict[str, TransformedSample] = {}
            for sample in samples:
                wanted.setdefault(self.key(name, sample), sample)
            present = self._keys_on_disk(name) & wanted.keys()
            if self._verify == "full":
                present = {key for key in sorted(present) if self._is_intact(name, key)}
            missing += [(name, wanted[key]) for key in sorted(wanted.keys() - present)]
        return missing

    def encode_missing(
        self, missing: Iterable[Entry], encode: Callable[[str, TransformedSample], Tensor]
    ) -> Iterator[Outcome]:
        """Encodes and writes the entries that `missing` returned, and yields the outcome of each.

        `encode(name, sample)` returns a tensor.
        """
        for name, sample in missing:
            try:
                self.put(name, sample, encode(name, sample))
            except DataError as error:
                yield name, str(error)
            else:
                yield name, None

    def put(self, name: str, sample: TransformedSample, tensor: Tensor) -> None:
        """Writes an entry.

        Raises errors.DataError if the tensor is not finite, errors.StorageError if the file cannot be written.
        """
        key, source = self.key(name, sample), entry.describe_source(self.recipes[name], sample)
        self._write(self._path(name, key), entry.serialize(name, key, source, tensor))

    def get(self, name: str, sample: TransformedSample) -> Tensor:
        """Returns a tensor of a sample, on the CPU. It may be shared and must not be modified in place.

        An entry is verified when this process first reads it. Raises errors.DataError if it is damaged and
        errors.StorageError if it cannot be read.
        """
        key = self.key(name, sample)
        value = self._in_memory.get(key)
        if value is None:
            value = self._read(name, key)
            # Entries stay in memory for good: every epoch has a different order, so evicting some would not help.
            if value.nbytes <= self._memory_left:
                self._memory_left -= value.nbytes
                self._in_memory[key] = value
        return value

    def example(self, sample: TransformedSample) -> dict[str, Tensor]:
        """Returns all tensors of a sample by name; see `get`."""
        return {name: self.get(name, sample) for name in self.recipes}

    def lock(self, name: str) -> Lock:
        """Returns a lock in the folder of the cache, for which a process waits."""
        return Lock(self.root / name, wait=True, setting=SETTING)

    def record_use(self, run_folder: Path, samples: Iterable[TransformedSample]) -> None:
        """Records that a run uses the samples' entries. `drop_unused` keeps them while the run's folder exists."""
        text = "\n".join(sorted(self._entry_names(samples)))
        # One list per set of entries, which the runs of a sweep usually share.
        folder = self.root / USES / hashlib.sha256(text.encode()).hexdigest()[:16]
        owner = str(run_folder.absolute())
        with self.lock("uses.lock"):
            files.write(folder / f"{hashlib.sha256(owner.encode()).hexdigest()[:16]}.owner", owner, SETTING)
            if not (folder / ENTRIES).exists():
                files.write(folder / ENTRIES, text, SETTING)

    def drop_unused(self, samples: Iterable[TransformedSample]) -> tuple[int, int]:
        """Deletes the entries that neither these samples nor any run with an existing folder use.

        Returns the number of deleted entries and their bytes.
        """
        used = self._entry_names(samples)
        count = freed = 0
        changing = files.storage_errors("change the list of used entries in", self.root / USES, SETTING)
        with self.lock("uses.lock"), self.lock(FILLING), changing:
            for folder in sorted((self.root / USES).glob("*")):
                owners = [Path(path.read_text()) for path in folder.glob("*.owner")]
                if any(owner.is_dir() for owner in owners):
                    used.update((folder / ENTRIES).read_text().split("\n"))
                else:
                    files.remove(folder)
            for name, path in self._all_entries():
                if f"{name}/{path.stem}" not in used:
                    with files.storage_errors("remove", path, SETTING):
                        freed += path.stat().st_size
                        path.unlink()
                    count += 1
        return count, freed

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Returns the number of entries of each tensor and their bytes, over all runs."""
        sizes: dict[str, tuple[int, int]] = {}
        for name, path in self._all_entries():
            count, size = sizes.get(name, (0, 0))
            sizes[name] = count + 1, size + path.stat().st_size
        return sizes

    def _entry_names(self, samples: Iterable[TransformedSample]) -> set[str]:
        """Returns `<name>/<key>` of all entries of the samples."""
        return {f"{name}/{self.key(name, sample)}" for sample in samples for name in self.recipes}

    def _all_entries(self) -> Iterator[tuple[str, Path]]:
        """Yields the tensor name and the path of every entry in the folder, including those of other models."""
        for path in sorted(self.root.glob("*/[0-9a-f][0-9a-f]/*.safetensors")):
            # What a link leads to is not part of the cache. The folder of the cache itself may be a link.
            is_own = not any(part.is_symlink() for part in (path, *path.parents[:2]))
            if is_own and not path.name.startswith(files.PARTIAL_PREFIX):
                yield path.parent.parent.name, path

    def _path(self, name: str, key: str) -> Path:
        return self.root / name / key[:2] / f"{key}.safetensors"

    def _keys_on_disk(self, name: str) -> set[str]:
        """Returns the keys of a tensor's entries on disk, from the names in the folders alone."""
        keys = set()
        folder = self.root / name
        with files.storage_errors("read", folder):
            for subfolder in (path for path in folder.glob("[0-9a-f][0-9a-f]") if path.is_dir()):
                for file_name in os.listdir(subfolder):
                    if file_name.startswith(files.PARTIAL_PREFIX):
                        _remove_if_abandoned(subfolder / file_name)
                    elif file_name.endswith(".safetensors"):
                        keys.add(file_name.removesuffix(".safetensors"))
        return keys

    def _is_intact(self, name: str, key: str) -> bool:
        if key in self._verified:
            return True
        try:
            self._read(name, key)
        except DataError as error:
            log.warning("%s The entry is encoded again.", error)
            return False
        return True

    def _read(self, name: str, key: str) -> Tensor:
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self._path(name, key)
        with files.storage_errors("read", path):
            data = path.read_bytes()
        try:
            value = load(data)["value"]
            if key not in self._verified:
                entry.verify(name, key, value, data)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"The cache entry {path} is damaged ({error}) and is not used. Type cache.verify=full to check every "
                "entry and encode the damaged ones again, or delete this one."
            ) from error
        self._verified.add(key)
        return value

    def _write(self, path: Path, data: bytes) -> None:
        # Unlike files.write this does not wait for the disk, which would take about 6 ms per entry. If a power failure
        # truncates an entry, its digest does not match.
        temporary = files.temporary_path(path)
        with files.storage_errors("write", path, SETTING):
            files.make_plain_folder(path.parent)
            try:
                temporary.write_bytes(data)
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


def count_outcomes(names: Iterable[str], outcomes: Iterable[Outcome]) -> dict[str, int]:
    """Consumes the outcomes of `Cache.encode_missing` and returns how many entries of each tensor were made.

    Raises one errors.DataError that lists all samples that could not be encoded. It stops early if there are too many.
    """
    counts = dict.fromkeys(names, 0)
    faults: dict[str, None] = {}
    for name, fault in outcomes:
        if fault is None:
            counts[name] += 1
        else:
            faults[fault] = None
            if len(faults) == MAX_FAULTS_SHOWN:
                break
    if faults:
        raise DataError("\n  ".join([f"{len(faults)} faults when encoding. Repair or remove these samples:", *faults]))
    return counts


def _remove_if_abandoned(temporary: Path) -> None:
    """Removes an unfinished entry whose writer must be dead."""
    try:
        if time.time() - temporary.stat().st_mtime > ABANDONED_AFTER:
            temporary.unlink()
    except OSError:
        pass  # Another process removed or finished it.
