"""The layout personalized: train.json, val.json and test.json, each a list of what a user liked (history), in which style, and the item to draw next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core.errors import DataError
from trainer.core.files import Digests, read_json
from trainer.dataset.picture import FileSource
from trainer.dataset.reading import VALIDATION, Listing, Reading, roles
from trainer.dataset.sample import Sample, caption, inside, relative
from trainer.dataset.template import load_weights

if TYPE_CHECKING:
    from trainer.dataset import Personalized


def read(settings: Personalized, digests: Digests) -> Listing:
    """One sample a record, whose caption is `settings.template` filled in. Raises errors.DataError where there is no train.json."""
    reading = Reading(settings.folder(), digests)
    there = [name for name in ("train", *VALIDATION) if (reading.root / f"{name}.json").is_file()]
    if "train" not in there:
        raise DataError(
            f"dataset.path={settings.path}: there is no train.json in it, a list of records with history_items_info and target_item_info."
        )
    styles = _styles(reading)
    for name, split in roles(reading, there).items():
        path = reading.root / f"{name}.json"
        records = read_json(path)
        if not isinstance(records, list):
            raise DataError(f"{path} is no list of records. Mend it.")
        for number, record in enumerate(records):
            reading.found += 1
            _Record(reading, settings, record, f"{name}.json record {number}", styles).read(name, split)
    return reading.listing()


def _styles(reading: Reading) -> dict[str, str]:
    """What user_styles.json says of users, for records that do not say it themselves."""
    path = reading.root / "user_styles.json"
    entries = read_json(path) if path.is_file() else []
    if isinstance(entries, dict):
        return entries
    return {
        entry["user"]: entry["style"]
        for entry in entries
        if isinstance(entry, dict) and {"user", "style"} <= entry.keys()
    }


class _Record:
    def __init__(self, reading: Reading, settings: Personalized, record: Any, place: str, styles: dict[str, str]):
        self.reading, self.settings, self.place, self.styles = reading, settings, place, styles
        self.record = record if isinstance(record, dict) else {}

    def read(self, name: str, split: str | None) -> None:
        reading, record = self.reading, self.record
        before = len(reading.faults)
        if not record:
            reading.fault(f"{self.place}: is no record with history_items_info and target_item_info")
            return
        history = self._history()
        target = self._item(record.get("target_item_info"), record.get("target_item_id", "target"))
        user = str(record.get("user_id", ""))
        style = record.get("user_style") or self.styles.get(user)
        if style is None and "{style}" in self.settings.template:
            reading.fault(
                f"{self.place}: has no user_style, and user_styles.json says none of {user!r}; dataset.template can do without {{style}}"
            )
        if len(reading.faults) > before:
            return
        values = {
            "history": self.settings.separator.join(text for text, _ in history),
            "style": style or "",
            "target": target[0],
            "user": user,
        }
        text = reading.tried(self.place, lambda: caption(load_weights(self.settings.template, values)))
        # A window of the same history may come with several targets, and a target with several histories.
        id = f"{name}/{user or 'user'}/{record.get('window_position', self.place.rpartition(' ')[2])}/{record.get('target_item_id', 'target')}"
        if reading.acquire(id, self.place) and text:
            reading.add(Sample(id, target[1], text, split=split), self.place)

    def _history(self) -> list[tuple[str, FileSource]]:
        items = self.record.get("history_items_info")
        if not isinstance(items, list) or not items:
            self.reading.fault(f"{self.place}: its history_items_info is empty")
            return []
        ids = {item.get("item_id") for item in items if isinstance(item, dict)}
        for id in self.record.get("history_item_ids") or []:
            if id not in ids:
                self.reading.fault(f"{self.place}: history item {id!r} is missing from history_items_info")
        return [self._item(item, f"history item {number}") for number, item in enumerate(items)]

    def _item(self, item: Any, name: str) -> tuple[str, FileSource] | None:
        """Caption and picture of an item, each of which must be there."""
        if not isinstance(item, dict):
            self.reading.fault(f"{self.place}: {name} is missing")
            return None
        place = f"{self.place}, item {item.get('item_id', name)!r}"
        text = self.reading.tried(place, lambda: caption(item.get(self.settings.caption_column)))
        image = self.reading.tried(place, lambda: self._picture(item.get(self.settings.image_column)))
        return text, image

    def _picture(self, name: object) -> FileSource:
        path = self.reading.root / Path(relative(name))
        if not inside(self.reading.root, path):
            raise ValueError(f"{name!r} is a link out of the data set's folder; put the file itself there")
        if not os.path.isfile(path):
            raise ValueError(f"there is no file {name!r}")
        return self.reading.picture(path)
