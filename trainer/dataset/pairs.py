"""Layout `pairs`: control images, target images and instructions, paired by name.

A sample is control_images/NAME.jpg, training_images/NAME.png and training_images/NAME.txt. Further control images are
control_images_2/NAME.jpg, control_images_3/NAME.jpg, ..., or control_images/NAME_control_1.jpg, NAME_control_2.jpg, ...
An edit mask is masks/NAME.png, or NAME_mask.png beside either image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.core.digests import Digests
from trainer.core.errors import DataError
from trainer.dataset import Dataset
from trainer.dataset.collector import SampleCollector, group_captions, read_caption
from trainer.dataset.image_formats import IMAGE_SUFFIXES, UNREAD_SUFFIXES, describe_unread
from trainer.dataset.listing import Listing
from trainer.dataset.sample import Sample, sample_id
from trainer.dataset.source import FileSource
from trainer.dataset.splitting import find_split_folders
from trainer.dataset.unused import MASKS

CONTROLS = "control_images"
TARGETS = "training_images"

Groups = dict[str, list[Path]]
"""Name of a sample -> files; more than one is a fault."""


@dataclass(slots=True)
class Pairs(Dataset):
    """Control images and target images, paired by name, with an instruction for each pair."""

    def read(self, digests: Digests, ignored: Iterable[Path] = ()) -> Listing:
        """Reads one sample per name, see `Dataset.read`; from FOLDER, or FOLDER/train and FOLDER/validation."""
        collector = SampleCollector(self.require_folder(), digests, ignored)
        parts = find_split_folders(
            collector, lambda folder: (folder / CONTROLS).is_dir() and (folder / TARGETS).is_dir()
        )
        if not parts:
            missing = [f"{name}/" for name in (CONTROLS, TARGETS) if not (collector.root / name).is_dir()]
            raise DataError(
                f"dataset.path={self.path}: there is no {' and no '.join(missing)} in it. "
                f"Control images belong in {CONTROLS}/, images of the same names and their .txt in {TARGETS}/."
            )
        for folder, split in parts:
            _PairsFolder(collector, folder).collect(split)
        return collector.to_listing()


class _PairsFolder:
    """The files of one folder with controls and targets, grouped by the sample that they belong to."""

    def __init__(self, collector: SampleCollector, folder: Path):
        self.collector, self.folder = collector, folder
        self.captions = group_captions(collector, folder / TARGETS, _id)
        self.unread = self._group(TARGETS, UNREAD_SUFFIXES)
        targets = self._group(TARGETS)
        self.masks = self._group(MASKS) if (folder / MASKS).is_dir() else {}
        # The name of a sample is never the mask or a control of another sample.
        own = {*self.captions, *(name for name in targets if not _base_name(name, {*targets}))}
        self.targets = self._take_masks(targets, own)
        self.controls = [self._take_masks(self._group(CONTROLS), own)]
        """One group of files for each control image of a sample."""
        self._take_numbered_controls(own)
        number = 2
        while (folder / f"{CONTROLS}_{number}").is_dir():
            self.controls.append(self._group(f"{CONTROLS}_{number}"))
            number += 1
        self.control_patterns = [f"{CONTROLS}/NAME.*", *(f"{CONTROLS}_{i}/NAME.*" for i in range(2, number))]
        if len(self.controls) > len(self.control_patterns):
            self.control_patterns[1:] = [f"{CONTROLS}/NAME_control_{i}.*" for i in range(1, len(self.controls))]

    def collect(self, split: str | None) -> None:
        for name in sorted({*self.targets, *self.captions, *self.masks, *self.unread}.union(*self.controls)):
            self.collector.found += 1
            self._collect_sample(name, split)

    def _collect_sample(self, name: str, split: str | None) -> None:
        collector = self.collector
        faults_before = len(collector.faults)
        controls = []
        for group, pattern in zip(self.controls, self.control_patterns, strict=True):
            fault = f"{pattern.replace('NAME', name)}: there is no such control image"
            if (control := self._find_image(group, name, fault)) is not None:
                controls.append(control)
        fault = f"{TARGETS}/{name}.*: there is no such target image"
        if unread := self.unread.get(name):
            fault = f"{TARGETS}/{unread[0].name}: {describe_unread(unread[0])}"
        target = self._find_image(self.targets, name, fault)
        caption = collector.attempt(f"{self._shown(TARGETS)}/{name}.txt", _read_instruction, self.captions.get(name))
        mask = self._find_image(self.masks, name, "") if name in self.masks else None
        for group in (self.targets, *self.controls, self.masks):
            for path in group.get(name, [])[1:]:
                first = collector.relative_name(group[name][0])
                collector.add_fault(f"{collector.relative_name(path)}: is the same sample as {first}")
        id = name if self.folder == collector.root else f"{self.folder.name}/{name}"
        location = collector.relative_name(self.targets[name][0]) if name in self.targets else name
        is_new = collector.register_id(id, location)
        if is_new and target is not None and caption is not None and len(collector.faults) == faults_before:
            collector.add(Sample(id, target, caption, tuple(controls), split, mask), f"{TARGETS}/{name}")

    def _group(self, name: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Groups:
        return self.collector.group_files(self.folder / name, suffixes, _id)

    def _find_image(self, group: Groups, name: str, fault: str) -> FileSource | None:
        """Returns the first image of a sample in a group; adds a fault if there is none."""
        paths = group.get(name)
        if not paths:
            self.collector.add_fault(self._shown("") + fault)
            return None
        return self.collector.attempt("", self.collector.image_source, paths[0])

    def _shown(self, name: str) -> str:
        """Returns the name of a file or folder for messages."""
        return name if self.folder == self.collector.root else f"{self.folder.name}/{name}"

    def _take_masks(self, images: Groups, own: set[str]) -> Groups:
        """Moves NAME_mask to the masks, and returns the other images."""
        others = {}
        for name, paths in images.items():
            base = None if name in own else _base_name(name, own)
            if base is None:
                others[name] = paths
            else:
                self.masks.setdefault(base, []).extend(paths)
        return others

    def _take_numbered_controls(self, own: set[str]) -> None:
        """Moves NAME_control_1, NAME_control_2, ... out of the first controls into groups of their own."""
        first = self.controls[0]
        for name in sorted(first):
            match = re.fullmatch(r"(.+)_control_(\d{1,2})", name)
            if not match or name in own or match[1] not in own or int(match[2]) < 1:
                continue
            while len(self.controls) <= int(match[2]):
                self.controls.append({})
            self.controls[int(match[2])][match[1]] = first.pop(name)


def _id(path: Path) -> str:
    return sample_id(Path(path.name))


def _base_name(name: str, names: set[str]) -> str | None:
    """Returns NAME for NAME_mask, if it is one of `names`."""
    base = name.removesuffix("_mask")
    return base if base != name and base in names else None


def _read_instruction(paths: list[Path] | None) -> str:
    if not paths:
        raise ValueError("there is no such instruction")
    return read_caption(paths[0])
