"""`sweep.json`: the members of a sweep as its attempts have left them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainer.core import documents, files
from trainer.core.errors import TrainerError
from trainer.sweep.members import Member

FILE_NAME = "sweep.json"


@dataclass(slots=True)
class SweepRecord:
    """What is stored about a sweep."""

    members: list[Member] = field(default_factory=list)
    folder_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Distinguishes folders of the same sweep on several machines."""
    complete: bool = False
    """Whether nothing is left to do about the members, and the tracker has everything."""

    @classmethod
    def read(cls, folder: Path) -> SweepRecord:
        """Reads the record of the sweep in `folder`; a new one if there is none or if it is damaged."""
        try:
            path = folder / FILE_NAME
            record = documents.expect(documents.read_json(path), dict, f"{path}")
            members = documents.entry(record, "members", list[dict], f"{path}")
            folder_id = documents.expect(record.get("folder_id"), str | None, f"{path}: folder_id")
            loaded = cls([Member.from_json(fields) for fields in members], complete=bool(record.get("complete")))
        except TrainerError:
            return cls()
        loaded.folder_id = folder_id or loaded.folder_id
        return loaded

    def write(self, folder: Path, members: Sequence[Member], complete: bool) -> None:
        """Writes the record with these members. Raises errors.StorageError."""
        fields = {"id": folder.name, "folder_id": self.folder_id, "complete": complete}
        files.write_json(folder / FILE_NAME, fields | {"members": [asdict(member) for member in members]})
