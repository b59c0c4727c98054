"""A small data set in each layout, drawn on the spot: `make[layout](folder, count)` writes it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (40, 32)


def drawing(number: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture that tells its number, and is like no other's."""
    rng = np.random.Generator(np.random.Philox(number))
    return Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize(size, Image.Resampling.NEAREST)


def save(path: Path, number: int, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing(number, size).save(path)
    return path


def text(number: int) -> str:
    return f"picture number {number}"


def imagefolder(folder: Path, count: int) -> None:
    rows = []
    for i in range(count):
        save(folder / "images" / f"{i}.jpg", i)
        rows.append({"file_name": f"images/{i}.jpg", "text": text(i)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def captions_json(folder: Path, count: int) -> None:
    for i in range(count):
        save(folder / "images" / f"{i}.png", i)
    (folder / "captions.json").write_text(json.dumps({f"{i}.png": text(i) for i in range(count)}))


def table(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    with open(folder / "all.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        for i in range(count):
            save(folder / f"{i}.png", i)
            writer.writerow([f"{i}.png", f"{text(i)}, with a comma"])


def pairs(folder: Path, count: int, controls: int = 1) -> None:
    for i in range(count):
        save(folder / "control_images" / f"{i}.jpg", 100 + i)
        for number in range(2, controls + 1):
            save(folder / f"control_images_{number}" / f"{i}.jpg", 100 * number + i)
        save(folder / "training_images" / f"{i}.png", i)
        (folder / "training_images" / f"{i}.txt").write_text(text(i))


def arrays(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for name, first in (("train", 0), ("test", 1000)):
        pictures = np.stack([np.asarray(drawing(first + i)) for i in range(count)])
        np.save(folder / f"{name}_images.npy", pictures)
        np.save(folder / f"{name}_descriptions.npy", np.array([text(first + i) for i in range(count)]))


def concepts(folder: Path, count: int) -> None:
    for number, name in enumerate(("clock", "toy")):
        for i in range(count):
            path = save(folder / name / "images" / f"{i}.jpg", 100 * number + i)
            path.with_suffix(".txt").write_text(f"{name} {text(i)}")


def personalized(folder: Path, count: int) -> None:
    items = [{"item_id": f"item_{i}", "caption": text(i), "image_path": f"images/{i}.png"} for i in range(count + 3)]
    for i in range(len(items)):
        save(folder / "images" / f"{i}.png", i)
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


def hub(folder: Path, count: int) -> None:
    """A parquet file whose pictures stand in it, as `push_to_hub` writes them."""
    import datasets

    def png(number: int) -> bytes:
        buffer = io.BytesIO()
        drawing(number).save(buffer, "PNG")
        return buffer.getvalue()

    rows = {"image": [{"bytes": png(i), "path": None} for i in range(count)], "text": [text(i) for i in range(count)]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train-00000.parquet")


make: dict[str, Callable[..., None]] = {
    "arrays": arrays,
    "captions_json": captions_json,
    "concepts": concepts,
    "csv": table,
    "hub": hub,
    "imagefolder": imagefolder,
    "pairs": pairs,
    "personalized": personalized,
}
