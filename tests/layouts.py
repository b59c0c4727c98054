"""Writes and reads a small dataset in each layout: `WRITERS[layout](folder, count)`."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from images import SIZE, random_image, save_image

from trainer.core.digests import Digests
from trainer.core.errors import DataError
from trainer.dataset import Dataset
from trainer.dataset.sample import Sample
from trainer.dataset.splitting import limit_samples


def read_samples(settings: Dataset, digests: Digests) -> list[Sample]:
    """Returns the samples of a dataset without faults, sorted and limited as for a run."""
    listing = settings.read(digests)
    listing.raise_on_faults(settings.describe())
    return limit_samples(listing.samples, settings.limit)


def read_faults(settings: Dataset, digests: Digests) -> str:
    """Returns the message that refuses a dataset."""
    with pytest.raises(DataError) as refusal:
        read_samples(settings, digests)
    assert refusal.value.code == 65
    return str(refusal.value)


def assert_faults(settings: Dataset, digests: Digests, *faults: str) -> str:
    """Asserts that a dataset is refused for these faults, and returns the message."""
    message = read_faults(settings, digests)
    assert [fault for fault in faults if fault not in message] == [], message
    return message


def caption(number: int) -> str:
    return f"image number {number}"


def write_imagefolder(folder: Path, count: int) -> None:
    rows = []
    for i in range(count):
        save_image(folder / "images" / f"{i}.jpg", i)
        rows.append({"file_name": f"images/{i}.jpg", "text": caption(i)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_captioned(folder: Path, count: int) -> None:
    """Writes images with a caption file beside each, which the layout imagefolder reads too."""
    for i in range(count):
        save_image(folder / f"{i}.jpg", i).with_suffix(".txt").write_text(caption(i))


def write_captions_json(folder: Path, count: int) -> None:
    for i in range(count):
        save_image(folder / "images" / f"{i}.png", i)
    (folder / "captions.json").write_text(json.dumps({f"{i}.png": caption(i) for i in range(count)}))


def write_csv(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    with open(folder / "all.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        for i in range(count):
            save_image(folder / f"{i}.png", i)
            writer.writerow([f"{i}.png", f"{caption(i)}, with a comma"])


def write_pairs(folder: Path, count: int, controls: int = 1) -> None:
    for i in range(count):
        save_image(folder / "control_images" / f"{i}.jpg", 100 + i)
        for number in range(2, controls + 1):
            save_image(folder / f"control_images_{number}" / f"{i}.jpg", 100 * number + i)
        save_image(folder / "training_images" / f"{i}.png", i)
        (folder / "training_images" / f"{i}.txt").write_text(caption(i))


def write_arrays(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for name, first in (("train", 0), ("test", 1000)):
        images = np.stack([np.asarray(random_image(first + i)) for i in range(count)])
        np.save(folder / f"{name}_images.npy", images)
        np.save(folder / f"{name}_descriptions.npy", np.array([caption(first + i) for i in range(count)]))


def write_concepts(folder: Path, count: int) -> None:
    for number, name in enumerate(("clock", "toy")):
        for i in range(count):
            path = save_image(folder / name / "images" / f"{i}.jpg", 100 * number + i)
            path.with_suffix(".txt").write_text(f"{name} {caption(i)}")


def write_personalized(folder: Path, count: int) -> None:
    items = [{"item_id": f"item_{i}", "caption": caption(i), "image_path": f"images/{i}.png"} for i in range(count + 3)]
    for i in range(len(items)):
        save_image(folder / "images" / f"{i}.png", i)
    for name in ("train", "val", "test"):
        records = [
            {
                "user_id": f"{name}_user",
                "history_item_ids": [item["item_id"] for item in items[i : i + 3]],
                "history_items_info": items[i : i + 3],
                "target_item_id": items[i + 3]["item_id"],
                "target_item_info": items[i + 3],
                "user_style": "bright",
                "window_position": i,
            }
            for i in range(count)
        ]
        (folder / f"{name}.json").write_text(json.dumps(records))


def write_hub(folder: Path, count: int, caption: Callable[[int], str] = caption) -> None:
    """Writes a Parquet file that contains its images, as `push_to_hub` does."""
    import datasets

    numbers = range(count)
    rows = {"image": [{"bytes": image_bytes(i), "path": None} for i in numbers], "text": [caption(i) for i in numbers]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train-00000.parquet")


def image_bytes(seed: int, size: tuple[int, int] = SIZE, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    random_image(seed, size).save(buffer, format)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes | str], format: int = tarfile.PAX_FORMAT) -> None:
    """Writes an archive of files with these names and contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))


def write_webdataset(folder: Path, count: int) -> None:
    """Writes an archive for each two samples."""
    for first in range(0, count, 2):
        members: dict[str, bytes | str] = {}
        for i in range(first, min(first + 2, count)):
            members |= {f"{i:06d}.png": image_bytes(i), f"{i:06d}.txt": caption(i)}
        write_tar(folder / f"{first:06d}.tar", members)


WRITERS: dict[str, Callable[..., None]] = {
    "arrays": write_arrays,
    "captions_json": write_captions_json,
    "concepts": write_concepts,
    "csv": write_csv,
    "hub": write_hub,
    "imagefolder": write_imagefolder,
    "pairs": write_pairs,
    "personalized": write_personalized,
    "webdataset": write_webdataset,
}
