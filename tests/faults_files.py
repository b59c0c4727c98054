"""Trials with damaged files: thousands of mutations of each kind of file that somebody else may have written."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fault_table import fault
from fuzz import Trial, find_failures, mutate, mutate_json
from layouts import WRITERS, image_bytes
from program import Harness

from trainer.cache import entry
from trainer.config.groups import GROUPS
from trainer.core import documents
from trainer.core.digests import Digests
from trainer.dataset import hub_loading  # noqa: F401 (imported once for all children)
from trainer.dataset.survey import survey_dataset
from trainer.dataset.transform import build_transform
from trainer.sweep.members import Member
from trainer.tracking import mlflow_note
from trainer.tracking.journal import Journal
from trainer.training.run_folder import RunSummary, read_manifest
from trainer.training.tracked_run import last_attempt

Mutate = Callable[[bytes, int], bytes]
HEADER = 700
"""Bytes at the start of an image or an array that are damaged: its header."""


def mutate_header(data: bytes, number: int) -> bytes:
    return mutate(data[:HEADER], number) + data[HEADER:]


def mutate_document(data: bytes, number: int) -> bytes:
    return mutate_json(json.loads(data), number)


def mutate_lines(data: bytes, number: int) -> bytes:
    """Damages the first line of a JSON lines file, or every fourth time any bytes of it."""
    first, _, rest = data.partition(b"\n")
    return mutate(data, number) if number % 4 == 3 else mutate_document(first, number) + b"\n" + rest


def write_hub_json(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    images = [{"bytes": base64.b64encode(image_bytes(i)).decode(), "path": None} for i in range(count)]
    rows = [{"image": image, "text": "a"} for image in images]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_photographs(folder: Path, count: int, suffix: str) -> None:
    format = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix]
    for i in range(count):
        for name in (f"{i}", f"masks/{i}"):
            path = folder / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(i, format=format))
        (folder / f"{i}.txt").write_text("a")


DATA_FILES: list[tuple[str, str, str, Mutate]] = [
    ("imagefolder", "metadata.jsonl", "", mutate_lines),
    ("csv", "all.csv", "", mutate),
    ("captions_json", "captions.json", "", mutate_document),
    ("personalized", "train.json", "", mutate_document),
    ("hub", "train-00000.parquet", "", mutate),
    ("webdataset", "000000.tar", "", mutate),
    ("arrays", "train_images.npy", "", mutate_header),
    ("arrays", "train_descriptions.npy", "", mutate),
    ("imagefolder", "0.png", "png", mutate_header),
    ("imagefolder", "0.jpg", "jpg", mutate_header),
    ("imagefolder", "0.webp", "webp", mutate_header),
    ("imagefolder", "masks/0.png", "png", mutate_header),
    ("imagefolder", "0.txt", "png", mutate),
]
"""Layout, file, suffix of its images if the layout is one of photographs, and what damages the file."""


def dataset_trial(folder: Path, layout: str, name: str, suffix: str, change: Mutate) -> Trial:
    """Returns a trial that reads a dataset and decodes its images. Good samples beside the damaged one remain."""
    data = folder / "data"
    if suffix:
        write_photographs(data, 3, suffix)
    else:
        WRITERS[layout](data, 3)
    original = (data / name).read_bytes()
    settings = GROUPS["dataset"][layout](path=str(data), resolution="32", on_fault="skip")

    def trial(number: int) -> None:
        (data / name).write_bytes(change(original, number))
        survey_dataset(settings, Digests(folder / "cache" / "digests"), build_transform(settings, 8), iter)

    return trial


def hub_json_trial(folder: Path) -> Trial:
    write_hub_json(folder / "data", 3)
    settings = GROUPS["dataset"]["hub"](path=str(folder / "data"), resolution="32")
    original = (folder / "data" / "train.jsonl").read_bytes()

    def trial(number: int) -> None:
        (folder / "data" / "train.jsonl").write_bytes(mutate_lines(original, number))
        settings.read(Digests(folder / "cache" / "digests"))

    return trial


def digests_trial(folder: Path) -> Trial:
    """A damaged database must not change what is read."""
    path = folder / "digests.sqlite"
    WRITERS["imagefolder"](folder / "data", 3)
    settings = GROUPS["dataset"]["imagefolder"](path=str(folder / "data"), resolution="32")

    class Remembering(Digests):
        _RACY = -(10**12)  # So that new files are remembered.

    def read() -> Any:
        digests = Remembering(path)
        listing = survey_dataset(settings, digests, build_transform(settings, 8), iter)
        return [(sample.image.digest(), listing.facts[sample.image]) for sample in listing.samples]

    expected = read()
    original = path.read_bytes()

    def trial(number: int) -> None:
        path.write_bytes(mutate(original, number))
        assert read() == expected

    return trial


def entry_trial(folder: Path) -> Trial:
    """A damaged cache entry is refused, or is the one that was written."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    value = torch.arange(6.0)
    original = entry.serialize("latents", "0" * 64, "a.png", value)

    def trial(number: int) -> None:
        data = mutate(original, number)
        try:
            read = load(data)["value"]
            entry.verify("latents", "0" * 64, read, data)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
            return  # What the cache turns into an error that names the entry.
        assert torch.equal(read, value)

    return trial


def run_folder_trial(folder: Path, name: str, change: Mutate) -> Trial:
    """Returns a trial that reads a file of a finished run as a later command does."""
    original = (folder / name).read_bytes()

    def read_journal() -> None:
        with Journal(folder) as journal:
            last_attempt(journal)

    readers: dict[str, Callable[[], object]] = {
        "run.json": lambda: read_manifest(folder),
        "summary.json": lambda: RunSummary.read(folder),
        "journal.jsonl": read_journal,
        "tracking.json": lambda: mlflow_note.is_complete(folder),
    }

    def trial(number: int) -> None:
        (folder / name).write_bytes(change(original, number))
        readers[name]()

    return trial


def member_trial(number: int) -> None:
    fields = {"number": 1, "overrides": ["a=1"], "varied": {"a": "1"}, "status": "finished", "code": 0, "reason": ""}
    fields |= {"log": "x", "folder": None, "best_loss": 0.5, "last_loss": 0.5, "psnr": None, "minutes": 1}
    try:
        value = documents.parse_json(mutate_json(fields, number))
    except ValueError:
        return
    if isinstance(value, dict):
        Member.from_json(value)


def check(trial: Trial, count: int) -> None:
    failures = find_failures(count, trial)
    assert failures == [], f"{len(failures)} of {count}:\n" + "\n".join(failures[:5])


LONG, SHORT = 1000, 10
"""Mutations of each kind of file: in `make faults`, and of the first trial, which `make test` runs."""


@fault("F41", "damaged files of a dataset", 1 + len(DATA_FILES), in_make_test=[0])
def damaged_data_files(harness: Harness, out: Path, trial: int) -> None:
    chosen, count = (DATA_FILES, SHORT) if trial == 0 else (DATA_FILES[trial - 1 :][:1], LONG)
    for number, (layout, name, suffix, change) in enumerate(chosen):
        check(dataset_trial(out / str(number), layout, name, suffix, change), count)


@fault("F41", "damaged JSON of a hub dataset, which crashes its parser", 1, in_make_test=[])
def damaged_hub_json(harness: Harness, out: Path, trial: int) -> None:
    """Fewer mutations: each needs a process that imports the library."""
    check(hub_json_trial(out), LONG // 10)


@fault("F41", "damaged remembered facts, cache entries and members of a sweep", 2, in_make_test=[0])
def damaged_cache(harness: Harness, out: Path, trial: int) -> None:
    count = LONG if trial else SHORT
    check(digests_trial(out), count)
    check(entry_trial(out), count)
    check(member_trial, count)


@fault("F41", "damaged JSON in a run folder", 2, in_make_test=[0])
def damaged_run_folder(harness: Harness, out: Path, trial: int) -> None:
    count = LONG if trial else SHORT
    reference = harness.reference()
    for name, change in (
        ("run.json", mutate_document),
        ("summary.json", mutate_document),
        ("journal.jsonl", mutate_lines),
        ("tracking.json", mutate_document),
    ):
        folder = Path(shutil.copytree(reference, out / name))
        if name == "tracking.json":
            note = {"uri": "sqlite:///x", "experiment_id": "1", "run_id": "a", "status": "FINISHED", "sent": 100}
            (folder / name).write_text(json.dumps(note))
        check(run_folder_trial(folder, name, change), count)
