"""Samples and faults of all layouts, and of the tables imagefolder, captions_json and csv."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from images import SIZE, random_image, save_image
from layouts import (
    WRITERS,
    assert_faults,
    caption,
    read_faults,
    read_samples,
    write_captioned,
    write_captions_json,
    write_csv,
    write_imagefolder,
    write_pairs,
    write_webdataset,
)
from PIL import Image

from trainer.config.groups import GROUPS
from trainer.core.digests import Digests
from trainer.dataset.captions_json import CaptionsJson
from trainer.dataset.csv import Csv
from trainer.dataset.imagefolder import ImageFolder
from trainer.dataset.source import Source


def test_every_layout_has_a_writer():
    assert {*WRITERS} == {*GROUPS["dataset"]} - {"demo"}


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_reads_each_image_with_its_caption(layout: str, folder: Path, digests: Digests):
    WRITERS[layout](folder, 4)
    settings = GROUPS["dataset"][layout](path=str(folder))
    listing = settings.read(digests)
    assert listing.faults == []
    assert len({sample.id for sample in listing.samples}) == len(listing.samples) >= 4
    assert listing.found == len(listing.samples)
    for sample in listing.samples:
        assert sample.image.size() == SIZE
        assert sample.image.open().size == SIZE
        assert len(sample.image.digest()) == 64
        assert "image number" in sample.caption
    digests_of = [sample.image.digest() for sample in listing.samples if sample.split in (None, "train")]
    assert len(set(digests_of)) == len(digests_of)
    assert read_samples(settings, digests) == sorted(listing.samples, key=lambda sample: sample.id)


@pytest.mark.parametrize(
    ("layout", "write"),
    [
        ("imagefolder", write_imagefolder),
        ("imagefolder", write_captioned),
        ("captions_json", write_captions_json),
        ("pairs", write_pairs),
        ("webdataset", write_webdataset),
    ],
)
def test_folders_named_train_and_validation_are_the_split(
    layout: str, write: Callable[..., None], folder: Path, digests: Digests
):
    settings = GROUPS["dataset"][layout](path=str(folder))

    def splits() -> list[str | None]:
        return sorted(sample.split for sample in read_samples(settings, digests))

    write(folder / "train", 3)
    assert [sample.split for sample in read_samples(settings, digests)] == [None] * 3
    write(folder / "test", 2)
    assert splits() == ["train"] * 3 + ["validation"] * 2
    write(folder / "val", 1)
    assert splits() == ["test"] * 2 + ["train"] * 3 + ["validation"]
    write(folder / "validation", 1)
    assert splits() == ["test"] * 2 + ["train"] * 3 + ["validation"]
    notes = settings.read(digests).notes
    assert notes == ["val is ignored, because validation is used for validation"]


# imagefolder


def write_rows(folder: Path, rows: list[dict], images: list[str]) -> ImageFolder:
    for number, name in enumerate(images):
        save_image(folder / name, number)
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ImageFolder(path=str(folder))


def row(name: object, text: object = "a thing") -> dict:
    return {"file_name": name, "text": text}


def test_file_names_may_omit_the_images_folder(folder: Path, digests: Digests):
    rows = [row("images/a.png", " padded "), row("b.png"), row("c.png"), row("deep/d.jpg")]
    settings = write_rows(folder, rows, ["images/a.png", "images/b.png", "c.png", "deep/d.jpg"])
    samples = read_samples(settings, digests)
    assert [sample.id for sample in samples] == ["c", "deep/d", "images/a", "images/b"]
    assert samples[2].caption == "padded"
    assert samples[2].controls == ()


def test_columns_are_configurable_and_a_byte_order_mark_is_ignored(folder: Path, digests: Digests):
    settings = write_rows(folder, [], ["a.png"])
    line = b'{"picture": "a.png", "prompt": "line\xe2\x80\xa8separator"}'
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\n")
    settings = replace(settings, image_column="picture")
    fault = "has no column 'text' (its columns: picture, prompt); type dataset.caption_column=NAME"
    assert fault in read_faults(settings, digests)
    (sample,) = read_samples(replace(settings, caption_column="prompt"), digests)
    assert sample.caption == "line\u2028separator"


def test_every_fault_of_an_imagefolder_is_listed_with_its_line(folder: Path, digests: Digests):
    settings = write_rows(folder, [], ["a.png", "b.png", "B.png", "a.jpg", "bad.png", "c.png"])
    (folder / "bad.png").write_bytes(b"")
    lines = [
        json.dumps(row("a.png")),
        "{broken",
        json.dumps(["a.png"]),
        json.dumps({"file_name": "c.png"}),
        json.dumps(row("absent.png")),
        json.dumps(row("./a.png")),
        json.dumps(row("a.jpg")),
        json.dumps(row("b.png")),
        json.dumps(row("B.png")),
        json.dumps(row("bad.png", "")),
        json.dumps(row("c.png", 7)),
        '{"file_name": "c.png", "text": "one", "text": "two"}',
        '{"file_name": "c.png", "text": "caf\xe9"}',
    ]
    (folder / "metadata.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    message = assert_faults(
        settings,
        digests,
        "line 2: Expecting property name",
        "line 3: is not a JSON object",
        "line 4: has no column 'text' (its columns: file_name)",
        "line 5: there is no file 'absent.png', here or in images/",
        "line 6 (a.png): is the same sample as metadata.jsonl line 1 (a.png)",
        "line 7 (a.jpg): is the same sample as metadata.jsonl line 1 (a.png)",
        "line 9 (B.png): differs in case only from metadata.jsonl line 8 (b.png)",
        "bad.png: the file is empty",
        "line 10: the caption is empty",
        "line 11: the caption is 7, not text",
        "line 12: has the same column twice",
        "line 13: it is not UTF-8 text",
    )
    assert "in 13 samples" in message


def test_message_shows_the_first_faults_and_counts_all(folder: Path, digests: Digests):
    message = read_faults(write_rows(folder, [row(f"{number}.png") for number in range(30)], []), digests)
    assert "30 faults in 30 samples" in message
    assert message.count("there is no file") == 20
    assert message.endswith("... and 10 more (stage=check lists all)")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "images/../../secret.png",
        "/etc/passwd",
        "C:/secret.png",
        "c:secret.png",
        "..\\secret.png",
        "images\\a.png",
        "a.png\0.jpg",
        "link.png",
        "images/link.png",
        "folder/secret.png",
        "\ud800.png",
        "",
        None,
        ["a.png"],
        "x" * 5000,
        "loop.png",
        "images",
    ],
)
def test_file_name_that_leads_outside_is_refused_and_not_opened(
    name: object, tmp_path: Path, folder: Path, digests: Digests, monkeypatch: pytest.MonkeyPatch
):
    settings = write_rows(folder, [row("a.png"), row(name)], ["a.png", "images/a.png"])
    secret = save_image(tmp_path / "secret.png", 0)
    (folder / "link.png").symlink_to(secret)
    (folder / "images" / "link.png").symlink_to("../../secret.png")
    (folder / "folder").symlink_to(tmp_path)
    (folder / "loop.png").symlink_to("loop.png")
    opened, real_open = [], Image.open

    def record_open(path, **options):
        opened.append(Path(os.path.realpath(path)))
        return real_open(path, **options)

    monkeypatch.setattr(Image, "open", record_open)
    message = read_faults(settings, digests)
    assert "line 2" in message
    assert "1 fault in 2 samples" in message
    assert opened == [folder / "a.png"]


def test_mask_of_the_same_name_must_have_the_shape_of_its_image(folder: Path, digests: Digests):
    write_imagefolder(folder, 3)
    settings = ImageFolder(path=str(folder))
    save_image(folder / "masks" / "1.png", 7, (20, 16))
    masks = [sample.mask and sample.mask.size() for sample in read_samples(settings, digests)]
    assert masks == [None, (20, 16), None]
    save_image(folder / "masks" / "2.png", 7, (32, 40))
    mismatch = "2.png is 32 x 40 pixels, which is not the shape of the image (40 x 32)"
    assert_faults(settings, digests, "its mask", mismatch)
    save_image(folder / "masks" / "2.jpg", 7)
    assert_faults(settings, digests, "has several masks: masks/2.jpg, masks/2.png")


# csv


def shows(source: Source, seed: int) -> bool:
    """Whether a source is the image of a seed."""
    return bool(np.array_equal(np.asarray(source.open()), np.asarray(random_image(seed))))


def test_columns_name_images_captions_controls_and_masks(folder: Path, digests: Digests):
    for number, name in enumerate(("target/a", "one/a", "two/a", "mask/a")):
        save_image(folder / f"{name}.png", number)
    header = "goal\tprompt\tfirst\tsecond\twhere"
    (folder / "all.tsv").write_text(f"{header}\ntarget/a.png\tdo it\tone/a.png\ttwo/a.png\tmask/a.png\n")
    settings = Csv(
        path=str(folder),
        image_column="goal",
        caption_column="prompt",
        control_columns=["first", "second"],
        mask_column="where",
    )
    (sample,) = read_samples(settings, digests)
    assert sample.caption == "do it"
    sources = (sample.image, *sample.controls, sample.mask)
    assert [shows(source, number) for number, source in enumerate(sources)] == [True] * 4
    assert read_samples(replace(settings, path=str(folder / "all.tsv")), digests) == [sample]
    for key, column in (
        ("image_column", "x"),
        ("caption_column", "x"),
        ("control_columns", ["x"]),
        ("mask_column", "x"),
    ):
        fault = f"has no column 'x' (its columns: goal, prompt, first, second, where); type dataset.{key}=NAME"
        assert_faults(replace(settings, **{key: column}), digests, fault)


def test_malformed_lines_of_a_csv_are_listed(folder: Path, digests: Digests):
    write_csv(folder, 3)
    path = folder / "all.csv"
    settings = Csv(path=str(folder))
    path.write_text(path.read_text() + '\n0.png,two,cells\n1.png,"never closed\n')
    assert_faults(
        settings,
        digests,
        "all.csv line 6: has 3 cells, and the header line has 2; put cells that contain a ',' in quotes",
        "all.csv line 7: unexpected end of data; the lines after it were not read",
    )
    path.write_text("text,text\n")
    assert "has the same column twice" in read_faults(settings, digests)
    shutil.copy(path, folder / "other.csv")
    assert "several tables (all.csv, other.csv); type dataset.path=" in read_faults(settings, digests)
    path.write_bytes("file_name;text\n0.png;café\n".encode())
    (sample,) = read_samples(Csv(path=str(path), delimiter=";"), digests)
    assert sample.caption == "café"


def test_tables_named_train_and_val_are_the_split(folder: Path, digests: Digests):
    write_csv(folder, 4)
    header, *rows = (folder / "all.csv").read_text().splitlines(keepends=True)
    (folder / "all.csv").unlink()
    (folder / "train.csv").write_text("".join([header, *rows[:3]]))
    (folder / "val.csv").write_text("".join([header, *rows[3:]]))
    samples = read_samples(Csv(path=str(folder)), digests)
    assert [sample.split for sample in samples] == ["train"] * 3 + ["validation"]


# captions_json


def test_captions_may_be_objects_or_a_list_of_them(folder: Path, digests: Digests):
    write_captions_json(folder, 2)
    settings = CaptionsJson(path=str(folder), caption_column="caption")
    plain = read_samples(CaptionsJson(path=str(folder)), digests)
    for entries in (
        {f"{i}.png": {"caption": caption(i), "tags": ["a"]} for i in range(2)},
        [{"file_name": f"{i}.png", "caption": caption(i)} for i in range(2)],
    ):
        (folder / "captions.json").write_text(json.dumps(entries))
        assert read_samples(settings, digests) == plain


def test_every_fault_of_captions_json_is_listed(folder: Path, digests: Digests):
    write_captions_json(folder, 4)
    settings = CaptionsJson(path=str(folder))
    (folder / "images" / "2.png").write_bytes(b"<html>")
    (folder / "captions.json").write_text(
        '{"0.png": "a", "0.png": "b", "1.png": "", "2.png": "c", "9.png": "d", "../x": "e", "3.png": ["f"]}'
    )
    assert_faults(
        settings,
        digests,
        "captions.json '0.png' (images/0.png): is the same sample as captions.json '0.png' (images/0.png)",
        "captions.json '1.png': the caption is empty",
        "2.png: is an HTML page",
        "captions.json '9.png': there is no file '9.png', here or in images/",
        "captions.json '../x': '../x' may lead out of the dataset's folder",
        "captions.json '3.png': the caption is ['f'], not text",
    )


def test_images_without_an_entry_in_captions_json_are_noted(folder: Path, digests: Digests):
    write_captions_json(folder, 4)
    (folder / "captions.json").write_text('{"0.png": "a"}')
    listing = CaptionsJson(path=str(folder)).read(digests)
    assert listing.faults == []
    unused = [f"images/{i}.png" for i in (1, 2, 3)]
    assert listing.unused == unused
    names = ", ".join(unused)
    assert listing.notes == [f"3 images are not used, because captions.json does not name them (3 .png): {names}"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [("[1", "is not the JSON file"), ("7", "contains neither an object"), ("[7]", "entry 1: is not a JSON object")],
)
def test_captions_json_of_another_form_is_refused(content: str, reason: str, folder: Path, digests: Digests):
    folder.mkdir()
    (folder / "captions.json").write_text(content)
    assert reason in read_faults(CaptionsJson(path=str(folder)), digests)
