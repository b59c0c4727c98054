"""The layout pairs: control_images/NAME.jpg, the target training_images/NAME.png, and its instruction training_images/NAME.txt.

Further control pictures of a sample are control_images_2/NAME.jpg, control_images_3/..., or control_images/NAME_control_1.jpg,
NAME_control_2.jpg ...; an edit mask is masks/NAME.png, or NAME_mask.png beside either picture.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core.errors import DataError
from trainer.core.files import Digests
from trainer.dataset.picture import SUFFIXES, FileSource
from trainer.dataset.reading import Listing, Reading, by_name, sides, text_of
from trainer.dataset.sample import Sample, identify

if TYPE_CHECKING:
    from trainer.dataset import Pairs

CONTROLS = "control_images"
TARGETS = "training_images"
MASKS = "masks"


def read(settings: Pairs, digests: Digests) -> Listing:
    """One sample a name; FOLDER itself, or FOLDER/train and FOLDER/validation. Raises errors.DataError where a folder is missing."""
    reading = Reading(settings.folder(), digests)
    parts = sides(reading, lambda folder: (folder / CONTROLS).is_dir() and (folder / TARGETS).is_dir())
    if not parts:
        missing = [f"{name}/" for name in (CONTROLS, TARGETS) if not (reading.root / name).is_dir()]
        raise DataError(
            f"dataset.path={settings.path}: there is no {' and no '.join(missing)} in it. Control pictures belong in {CONTROLS}/, "
            f"pictures of the same names and their .txt in {TARGETS}/."
        )
    for folder, split in parts:
        _Part(reading, folder).read(split)
    return reading.listing()


class _Part:
    """One folder with controls and targets: what is in it, by the name it belongs to."""

    def __init__(self, reading: Reading, folder: Path):
        self.reading, self.folder = reading, folder
        self.captions = by_name(reading, folder / TARGETS, (".txt",), _name)
        pictures = by_name(reading, folder / TARGETS, SUFFIXES, _name)
        self.masks = by_name(reading, folder / MASKS, SUFFIXES, _name) if (folder / MASKS).is_dir() else {}
        # A name that is a sample's own is never another's mask or control.
        own = {*self.captions, *(name for name in pictures if not _base(name, "mask", {*pictures}))}
        self.targets = self._without_masks(pictures, own)
        self.controls = [self._without_masks(by_name(reading, folder / CONTROLS, SUFFIXES, _name), own)]
        self._take_further(own)
        number = 2
        while (further := folder / f"{CONTROLS}_{number}").is_dir():
            self.controls.append(by_name(reading, further, SUFFIXES, _name))
            number += 1
        self.where = [f"{CONTROLS}/NAME.*", *(f"{CONTROLS}_{i}/NAME.*" for i in range(2, number))]
        if len(self.controls) > len(self.where):
            self.where[1:] = [f"{CONTROLS}/NAME_control_{i}.*" for i in range(1, len(self.controls))]

    def read(self, split: str | None) -> None:
        reading = self.reading
        names = sorted({*self.targets, *self.captions, *self.masks}.union(*self.controls))
        prefix = "" if self.folder == reading.root else f"{self.folder.name}/"
        for name in names:
            reading.found += 1
            before = len(reading.faults)
            controls = [
                self._only(found.get(name), f"{where.replace('NAME', name)}: there is no such control picture")
                for found, where in zip(self.controls, self.where, strict=True)
            ]
            target = self._only(self.targets.get(name), f"{TARGETS}/{name}.*: there is no such target picture")
            text = reading.tried(f"{self._shown(TARGETS)}/{name}.txt", lambda name=name: _text(self.captions.get(name)))
            mask = self._only(self.masks[name], "") if name in self.masks else None
            for found in (self.targets, *self.controls, self.masks):
                for path in found.get(name, [])[1:]:
                    reading.fault(f"{reading.name(path)}: is the same sample as {reading.name(found[name][0])}")
            if not reading.acquire(
                prefix + name, reading.name(self.targets[name][0]) if name in self.targets else name
            ):
                continue
            if len(reading.faults) == before:
                reading.add(Sample(prefix + name, target, text, tuple(controls), split, mask), f"{TARGETS}/{name}")

    def _only(self, paths: list[Path] | None, absent: str) -> FileSource | None:
        if not paths:
            self.reading.fault(self._shown("") + absent)
            return None
        return self.reading.tried("", lambda: self.reading.picture(paths[0]))

    def _shown(self, part: str) -> str:
        return part if self.folder == self.reading.root else f"{self.folder.name}/{part}"

    def _without_masks(self, pictures: dict[str, list[Path]], own: set[str]) -> dict[str, list[Path]]:
        """The pictures that are no NAME_mask, which go to the masks."""
        rest = {}
        for name, paths in pictures.items():
            base = None if name in own else _base(name, "mask", own)
            if base is None:
                rest[name] = paths
            else:
                self.masks.setdefault(base, []).extend(paths)
        return rest

    def _take_further(self, own: set[str]) -> None:
        """Move NAME_control_1, NAME_control_2 ... out of the first controls into further ones."""
        first = self.controls[0]
        for name in sorted(first):
            found = re.fullmatch(r"(.+)_control_(\d{1,2})", name)
            if not found or name in own or found[1] not in own or int(found[2]) < 1:
                continue
            while len(self.controls) <= int(found[2]):
                self.controls.append({})
            self.controls[int(found[2])][found[1]] = first.pop(name)


def _name(path: Path) -> str:
    return identify(Path(path.name))


def _base(name: str, suffix: str, names: set[str]) -> str | None:
    base = name.removesuffix(f"_{suffix}")
    return base if base != name and base in names else None


def _text(paths: list[Path] | None) -> str:
    if not paths:
        raise ValueError("there is no such instruction")
    return text_of(paths[0])
