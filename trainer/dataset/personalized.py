"""Layout `personalized`: the items that users liked, and for each history an item to generate next.

train.json, val.json and test.json are lists of records.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.core.digests import Digests
from trainer.core.documents import expect, read_json
from trainer.core.errors import DataError, UsageError
from trainer.core.settings import added
from trainer.dataset import Dataset
from trainer.dataset.collector import SampleCollector
from trainer.dataset.listing import Listing, plural
from trainer.dataset.sample import Sample, check_caption
from trainer.dataset.source import FileSource
from trainer.dataset.splitting import VALIDATION_NAMES, assign_splits

USER_KEYS = ("user_id", "worker_id")
STYLE_KEYS = ("user_style", "worker_style")
"""Names of a user and a style in records; some data sets call users workers."""
STYLE_FILE_KEYS = ("user", "worker")
"""Names of a user in user_styles.json."""
MAX_EXAMPLES = 3
"""Number of records that a note names."""
TEMPLATE_FIELDS = ("history", "style", "target", "user")


@dataclass(slots=True)
class Personalized(Dataset):
    """The items that users liked, and an item to generate next.

    A caption is `template` with these fields: {history} (the captions of the items, joined by `separator`), {style},
    {target} and {user}.
    """

    caption_column: str = "caption"
    image_column: str = "image_path"
    template: str = "The user liked: {history}. Their style: {style}."
    separator: str = "; "
    numbered: bool = added(False)
    """Whether the captions of the history are numbered: "1. a cat", "2. a dog"."""
    target_prompt: str | None = added(None)
    """What a language model is asked for keywords of the item to generate; fields as in `template`."""
    preference_prompt: str | None = added(None)
    """What it is asked for keywords of the user's preference."""
    history_items: int | None = added(None)
    """How many items of a history are read, the last ones; null: all."""

    def __post_init__(self) -> None:
        Dataset.__post_init__(self)
        for name in ("template", *self.text_fields):
            _check_template(name, getattr(self, name))
        if self.history_items is not None and self.history_items < 1:
            raise UsageError(
                f"dataset.history_items={self.history_items} leaves no history; type 1 or more, or null for all"
            )

    @property
    def text_fields(self) -> tuple[str, ...]:
        return tuple(name for name in ("target_prompt", "preference_prompt") if getattr(self, name) is not None)

    def read(self, digests: Digests, ignored: Iterable[Path] = ()) -> Listing:
        """Reads one sample per record; see `Dataset.read`."""
        collector = SampleCollector(self.require_folder(), digests, ignored)
        names = [name for name in ("train", *VALIDATION_NAMES) if (collector.root / f"{name}.json").is_file()]
        if "train" not in names:
            raise DataError(
                f"dataset.path={self.path}: there is no train.json in it, "
                "a list of records with history_items_info and target_item_info."
            )
        shared = _Shared(_read_styles(collector))
        for name, split in assign_splits(collector, names).items():
            path = collector.root / f"{name}.json"
            collector.mark_used(path)
            for number, record in enumerate(expect(read_json(path), list, f"{path}")):
                collector.found += 1
                _RecordReader(collector, self, record, name, number, shared).collect(split)
        collector.notes += shared.describe_left_out(self.history_items)
        return collector.to_listing()


def _check_template(setting: str, template: str) -> None:
    """Raises errors.UsageError if a template has a field that samples do not have."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageError(
            f"dataset.{setting}={template!r}: {error}; type text with {{history}} and {{style}} in it"
        ) from None
    known = ", ".join(f"{{{name}}}" for name in TEMPLATE_FIELDS)
    for _, name, form, conversion in parts:
        if name is not None and (name not in TEMPLATE_FIELDS or form or conversion):
            raise UsageError(f"dataset.{setting} has {{{name}}}, but a sample only has {known}")


def _read_styles(collector: SampleCollector) -> dict[str, str]:
    """Returns user -> style from user_styles.json, for records that do not contain the style.

    Raises errors.DataError if the file contains anything but an object or a list; faulty entries are faults.
    """
    path = collector.root / "user_styles.json"
    if not path.is_file():
        return {}
    collector.mark_used(path)
    content = read_json(path)
    if isinstance(content, dict):
        entries = [(f"{path.name} {user!r:.80}", {"user": user, "style": style}) for user, style in content.items()]
    elif isinstance(content, list):
        entries = [(f"{path.name} entry {number}", entry) for number, entry in enumerate(content)]
    else:
        raise DataError(
            f"{path} contains {content!r:.40}, neither an object (user -> style) nor a list of objects with user and "
            "style. Fix the file."
        )
    styles: dict[str, str] = {}
    for location, entry in entries:
        if not isinstance(entry, dict):
            collector.add_fault(f"{location}: is {entry!r:.40}, not an object with user and style")
        elif "style" in entry and not entry.keys().isdisjoint(STYLE_FILE_KEYS):
            users = [collector.attempt(location, _read_label, entry, key) for key in STYLE_FILE_KEYS if key in entry]
            style = collector.attempt(location, _read_label, entry, "style")
            for user in dict.fromkeys(users):
                if user is not None and style is not None and styles.setdefault(user, style) != style:
                    collector.add_fault(f"{location}: {user!r:.80} has another style in an entry before it")
    return styles


def _read_label(record: dict[str, Any], key: str, default: str | None = None) -> str | None:
    """Returns a name, an id or a style as text; `default` if there is none. Raises ValueError for any other type."""
    value = record.get(key)
    if value is None:
        return default
    # In Python, True and False are numbers too.
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(f"its {key} is {value!r:.40}, neither text nor a number")
    return str(value)


@dataclass(slots=True)
class _Shared:
    """What the records of a dataset have in common."""

    styles: dict[str, str]
    """User -> style in user_styles.json."""
    seen: dict[str, object] = field(default_factory=dict)
    """Case-folded id -> what the sample was made from."""
    left_out: list[tuple[str, list[str]]] = field(default_factory=list)
    """Location of a record, and the names of the items that `history_items` leaves out of its history."""

    def describe_left_out(self, limit: int | None) -> list[str]:
        """Returns a line about the items that are left out, if there are any."""
        if not self.left_out:
            return []
        count = sum(len(names) for _, names in self.left_out)
        examples = [f"{location} ({', '.join(names)})" for location, names in self.left_out[:MAX_EXAMPLES]]
        more = ", ..." if len(self.left_out) > MAX_EXAMPLES else ""
        return [
            f"dataset.history_items={limit} leaves out {plural(count, 'item')} at the start of the history of "
            f"{plural(len(self.left_out), 'record')}: {', '.join(examples)}{more}"
        ]


class _RecordReader:
    """Reads one record. `name` is that of its file without the suffix, `number` its position in it."""

    def __init__(
        self,
        collector: SampleCollector,
        settings: Personalized,
        record: Any,
        name: str,
        number: int,
        shared: _Shared,
    ):
        self.collector, self.settings, self.name, self.number, self.shared = collector, settings, name, number, shared
        self.record: dict[str, Any] = record if isinstance(record, dict) else {}
        self.location = f"{name}.json record {number}"

    def collect(self, split: str | None) -> None:
        collector, record, settings = self.collector, self.record, self.settings
        templates = {name: getattr(settings, name) for name in ("template", *settings.text_fields)}
        faults_before = len(collector.faults)
        if not record:
            collector.add_fault(f"{self.location}: is not a record with history_items_info and target_item_info")
            return
        items = self._read_history()
        history = [caption for caption, _ in items]
        target_id = self._label("target_item_id", "target")
        target_caption, image = self._read_item(record.get("target_item_info"), target_id)
        user = self._first_label(USER_KEYS)
        # A window of the same history may come with several targets, and a target with several histories.
        window = self._label("window_position", str(self.number))
        style = self._first_label(STYLE_KEYS) or self.shared.styles.get(user)
        if style is None and any("{style}" in template for template in templates.values()):
            collector.add_fault(
                f"{self.location}: has no user_style or worker_style, and user_styles.json has none for {user!r}; "
                "dataset.template need not contain {style}"
            )
        if image is None or target_caption is None or len(collector.faults) > faults_before:
            return
        values = {
            "history": self.settings.separator.join(
                f"{number}. {caption}" if self.settings.numbered else caption
                for number, caption in enumerate(history, 1)
            ),
            "style": style or "",
            "target": target_caption,
            "user": user,
        }
        texts = {
            name: collector.attempt(self.location, check_caption, template.format_map(values))
            for name, template in templates.items()
        }
        id = f"{self.name}/{user or 'user'}/{window}/{target_id}"
        # Two users may have one name, or names that differ in case or slashes only.
        content = (user, window, target_id, history, style, target_caption)
        if self.shared.seen.setdefault(id.casefold(), content) != content:
            id = f"{id}/{self.number}"
        found = {name: text for name, text in texts.items() if text}
        if collector.register_id(id, self.location) and len(found) == len(texts):
            caption = found.pop("template")
            liked = tuple(image for _, image in items)
            sample = Sample(id, image, caption, split=split, texts=tuple(found.items()), history=liked)
            collector.add(sample, self.location)

    def _first_label(self, keys: tuple[str, ...]) -> str:
        """Returns the text of a label that has several names. Two different texts are a fault."""
        texts = [text for text in (self._label(key) for key in keys) if text]
        if len(set(texts)) > 1:
            self.collector.add_fault(f"{self.location}: its {' and '.join(keys)} differ")
        return texts[0] if texts else ""

    def _label(self, key: str, default: str = "") -> str:
        """Returns the text of a label of the record. If it has another type, adds a fault and returns the default."""
        return self.collector.attempt(self.location, _read_label, self.record, key, default) or default

    def _read_history(self) -> list[tuple[str, FileSource]]:
        """Returns the captions and images of the items that the user liked."""
        items = self.record.get("history_items_info")
        if not isinstance(items, list) or not items:
            self.collector.add_fault(f"{self.location}: its history_items_info is empty")
            return []
        expected = self.record.get("history_item_ids") or []
        if not isinstance(expected, list):
            self.collector.add_fault(f"{self.location}: its history_item_ids is {expected!r:.40}, not a list")
            return []
        # A list, because ids need not be hashable.
        ids = [item.get("item_id") for item in items if isinstance(item, dict)]
        for id in expected:
            if id not in ids:
                self.collector.add_fault(f"{self.location}: history item {id!r:.40} is missing from history_items_info")
        found = [self._read_item(item, f"history item {number}") for number, item in enumerate(items)]
        dropped = items[: -self.settings.history_items] if self.settings.history_items else []
        if dropped:
            names = [str(item.get("item_id", number)) for number, item in enumerate(dropped) if isinstance(item, dict)]
            self.shared.left_out.append((self.location, names))
        return [
            (caption, image) for caption, image in found[len(dropped) :] if caption is not None and image is not None
        ]

    def _read_item(self, item: Any, name: str) -> tuple[str | None, FileSource | None]:
        """Returns the caption and the image of an item. Each is None if it has a fault."""
        if not isinstance(item, dict):
            self.collector.add_fault(f"{self.location}: {name} is missing")
            return None, None
        location = f"{self.location}, item {item.get('item_id', name)!r:.40}"
        self.collector.attempt(location, _read_label, item, "item_id")
        caption = self.collector.attempt(location, check_caption, item.get(self.settings.caption_column))
        image = self.collector.attempt(location, self._image_source, item.get(self.settings.image_column))
        return caption, image

    def _image_source(self, name: object) -> FileSource:
        path = self.collector.find_file(name, self.collector.root)
        if path is None:
            raise ValueError(f"there is no file {name!r}")
        return self.collector.image_source(path)
