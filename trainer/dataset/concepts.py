"""Layout `concepts`: one folder per concept, with images/NAME.jpg and images/NAME.txt, or with both directly in it."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from trainer.core.digests import Digests
from trainer.core.errors import DataError, UsageError
from trainer.dataset import Dataset
from trainer.dataset.collector import SampleCollector, group_captions, read_caption
from trainer.dataset.image_formats import IMAGE_SUFFIXES, UNREAD_SUFFIXES, describe_unread
from trainer.dataset.listing import Listing
from trainer.dataset.paths import FOLDER_LINK_OUTSIDE, is_hidden, is_inside
from trainer.dataset.sample import Sample, check_caption, sample_id
from trainer.dataset.unused import MASKS


@dataclass(slots=True)
class Concepts(Dataset):
    """One folder per concept.

    The keys of the settings are names of concepts. `triggers` are put in front of the captions that do not contain
    them, `weights` multiply the loss of the samples, and `repeats` are visits to each sample per epoch.
    """

    triggers: dict[str, str] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Dataset.__post_init__(self)
        for name, trigger in self.triggers.items():
            if not trigger.strip():
                raise UsageError(f"dataset.triggers: the trigger of {name} is empty; leave it out to keep the captions")
        for name, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise UsageError(
                    f"dataset.weights: {weight:g} for {name} is not a weight of a loss; type a number above 0"
                )
        for name, count in self.repeats.items():
            if count < 1:
                raise UsageError(f"dataset.repeats: {count} for {name} leaves out its samples; type 1 or more")

    def for_regularization(self) -> Self:
        return replace(Dataset.for_regularization(self), triggers={}, weights={}, repeats={})

    def read(self, digests: Digests, ignored: Iterable[Path] = ()) -> Listing:
        """Reads one sample per image; see `Dataset.read`.

        Raises errors.UsageError for settings of a concept that does not exist.
        """
        collector = SampleCollector(self.require_folder(), digests, ignored)
        folders = [path for path in sorted(collector.root.iterdir()) if path.is_dir() and not is_hidden(path.name)]
        # macOS decomposes the names of folders.
        concepts = {_normalize(path.name): path for path in folders if is_inside(collector.root, path)}
        for path in folders:
            if path not in concepts.values():
                collector.add_fault(f"{path.name}: {FOLDER_LINK_OUTSIDE}")
        if not concepts:
            raise DataError(
                f"dataset.path={self.path}: there is no folder in it. "
                "Each concept is one: NAME/images/*.jpg, with a .txt beside each."
            )
        for key in ("triggers", "weights", "repeats"):
            unknown = [name for name in getattr(self, key) if _normalize(name) not in concepts]
            if unknown:
                raise UsageError(
                    f"dataset.{key} names {', '.join(unknown)}; the concepts in {self.path} are {', '.join(concepts)}"
                )
        normalized = replace(
            self,
            triggers={_normalize(name): trigger for name, trigger in self.triggers.items()},
            weights={_normalize(name): weight for name, weight in self.weights.items()},
            repeats={_normalize(name): count for name, count in self.repeats.items()},
        )
        for name, folder in concepts.items():
            _collect_concept(collector, normalized, name, folder)
        return collector.to_listing()


def _normalize(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _collect_concept(collector: SampleCollector, settings: Concepts, concept: str, folder: Path) -> None:
    def id_of(path: Path) -> str:
        return sample_id(path.relative_to(collector.root))

    image_folder = folder / "images" if (folder / "images").is_dir() else folder
    images = collector.group_files(image_folder, IMAGE_SUFFIXES, id_of)
    captions = group_captions(collector, image_folder, id_of)
    unread = collector.group_files(image_folder, UNREAD_SUFFIXES, id_of)
    if not images:
        collector.add_fault(f"{concept}: there is no image in it, nor in {concept}/images")
    if images and not captions:
        word = settings.triggers.get(concept, concept)
        collector.notes.append(
            f"{concept}: no image has a .txt, so the caption of all is {word!r} "
            f"(dataset.triggers={{{concept}: WORD}} sets another)"
        )
    for id in sorted({*images, *captions, *unread}):
        collector.found += 1
        faults_before = len(collector.faults)
        if id not in images:
            files = unread.get(id) or captions[id]
            reason = describe_unread(files[0]) if id in unread else "there is no such image"
            collector.add_fault(f"{collector.relative_name(files[0])}: {reason}")
            continue
        first, *others = images[id]
        location = collector.relative_name(first)
        for path in others:
            collector.add_fault(f"{collector.relative_name(path)}: is the same sample as {location}")
        collector.register_id(id, location)
        image = collector.attempt("", collector.image_source, first)
        caption = collector.attempt(f"{id}.txt", _read_caption, settings, concept, captions, id)
        mask = collector.attempt(location, collector.find_mask, folder / MASKS / first.stem)
        if image is not None and caption is not None and len(collector.faults) == faults_before:
            weight, repeats = settings.weights.get(concept, 1.0), settings.repeats.get(concept, 1)
            collector.add(Sample(id, image, caption, mask=mask, weight=weight, repeats=repeats), location)


def _read_caption(settings: Concepts, concept: str, captions: dict[str, list[Path]], id: str) -> str:
    """Returns the caption of a sample, with the trigger of its concept in front unless the caption contains it."""
    trigger = settings.triggers.get(concept)
    if not captions:
        return check_caption(trigger or concept)
    if id not in captions:
        raise ValueError("there is no such caption, and other images of the concept have theirs")
    caption = read_caption(captions[id][0])
    if trigger is None or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return check_caption(f"{trigger}, {caption}")
