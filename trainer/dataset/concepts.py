"""The layout concepts: a folder a concept, with images/NAME.jpg and images/NAME.txt, or both directly in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core.errors import DataError, UsageError
from trainer.core.files import Digests
from trainer.dataset.picture import SUFFIXES
from trainer.dataset.reading import Listing, Reading, beside, by_name, text_of
from trainer.dataset.sample import Sample, caption, identify, inside

if TYPE_CHECKING:
    from trainer.dataset import Concepts


def read(settings: Concepts, digests: Digests) -> Listing:
    """One sample a picture. Raises errors.UsageError where a setting names a concept that is not there, errors.DataError where there is none."""
    reading = Reading(settings.folder(), digests)
    folders = [path for path in sorted(reading.root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    concepts = {path.name: path for path in folders if inside(reading.root, path)}
    for path in folders:
        if path.name not in concepts:
            reading.fault(f"{path.name}: is a link out of the data set's folder; put the folder itself there")
    if not concepts:
        raise DataError(
            f"dataset.path={settings.path}: there is no folder in it. Each concept is one: NAME/images/*.jpg, with a .txt beside each."
        )
    for key in ("triggers", "weights", "repeats"):
        unknown = [name for name in getattr(settings, key) if name not in concepts]
        if unknown:
            raise UsageError(
                f"dataset.{key} names {', '.join(unknown)}; the concepts in {settings.path} are {', '.join(concepts)}"
            )
    for name, folder in concepts.items():
        _concept(reading, settings, name, folder)
    return reading.listing()


def _concept(reading: Reading, settings: Concepts, concept: str, folder: Path) -> None:
    images = folder / "images" if (folder / "images").is_dir() else folder
    pictures = by_name(reading, images, SUFFIXES, lambda path: identify(path.relative_to(reading.root)))
    texts = by_name(reading, images, (".txt",), lambda path: identify(path.relative_to(reading.root)))
    if not pictures:
        reading.fault(f"{concept}: there is no picture in it, nor in {concept}/images")
    if pictures and not texts:
        word = settings.triggers.get(concept, concept)
        reading.notes.append(
            f"{concept}: no picture has a .txt, so the caption of all is {word!r} (dataset.triggers={{{concept}: WORD}} sets another)"
        )
    for id in sorted({*pictures, *texts}):
        reading.found += 1
        before = len(reading.faults)
        paths = pictures.get(id, [])
        if not paths:
            reading.fault(f"{id}.txt: there is no such picture")
            continue
        place = reading.name(paths[0])
        for path in paths[1:]:
            reading.fault(f"{reading.name(path)}: is the same sample as {place}")
        reading.acquire(id, place)
        image = reading.tried("", lambda paths=paths: reading.picture(paths[0]))
        text = reading.tried(f"{id}.txt", lambda id=id: _caption(settings, concept, texts, id))
        mask = reading.tried(place, lambda paths=paths: beside(reading, folder / "masks", paths[0].stem))
        if len(reading.faults) == before:
            weight, repeats = settings.weights.get(concept, 1.0), settings.repeats.get(concept, 1)
            reading.add(Sample(id, image, text, mask=mask, weight=weight, repeats=repeats), place)


def _caption(settings: Concepts, concept: str, texts: dict[str, list[Path]], id: str) -> str:
    """The caption with the concept's trigger in front, where one was set and the caption does not hold it."""
    trigger = settings.triggers.get(concept)
    if not texts:
        return caption(trigger or concept)
    if id not in texts:
        raise ValueError("there is no such caption, and other pictures of the concept have theirs")
    text = text_of(texts[id][0])
    if trigger is None or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.IGNORECASE):
        return text
    return caption(f"{trigger}, {text}")
