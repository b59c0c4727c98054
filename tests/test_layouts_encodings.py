"""Datasets from other machines: names in two Unicode forms, encodings, delimiters, cells of bytes, damaged tables."""

from __future__ import annotations

import json
import sqlite3
import unicodedata
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from images import save_image
from layouts import (
    assert_faults,
    image_bytes,
    read_faults,
    read_samples,
    write_captioned,
    write_personalized,
    write_tar,
)

from trainer.core.digests import Digests
from trainer.dataset import Dataset, image_facts
from trainer.dataset.arrays import Arrays
from trainer.dataset.captions_json import CaptionsJson
from trainer.dataset.concepts import Concepts
from trainer.dataset.csv import Csv
from trainer.dataset.hub import Hub
from trainer.dataset.imagefolder import ImageFolder
from trainer.dataset.personalized import Personalized
from trainer.dataset.webdataset import WebDataset

COMPOSED = "caf\u00e9"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


def write_table(folder: Path, layout: type[Dataset], image: str) -> Dataset:
    """Writes a dataset of one image, which the table calls `image`, and a second with an ASCII name."""
    names = [f"{image}/{image}.png", "plain.png"]
    if layout is ImageFolder:
        lines = [json.dumps({"file_name": name, "text": "a"}, ensure_ascii=False) for name in names]
        (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    elif layout is CaptionsJson:
        (folder / "captions.json").write_text(json.dumps(dict.fromkeys(names, "a"), ensure_ascii=False), "utf-8")
    elif layout is Csv:
        (folder / "all.csv").write_text("\n".join(["file_name,text", *(f"{name},a" for name in names)]), "utf-8")
    elif layout is Personalized:
        items = [{"item_id": i, "caption": "a", "image_path": name} for i, name in enumerate(names)]
        records = [{"history_items_info": items, "target_item_info": item, "user_style": "s"} for item in items]
        (folder / "train.json").write_text(json.dumps(records), "utf-8")
    return layout(path=str(folder))


@pytest.mark.parametrize("layout", [ImageFolder, CaptionsJson, Csv, Personalized])
def test_a_table_finds_files_whose_names_have_the_other_unicode_form(
    layout: type[Dataset], folder: Path, digests: Digests
):
    save_image(folder / DECOMPOSED / f"{DECOMPOSED}.png", 1)
    save_image(folder / "plain.png", 2)
    if layout is not Personalized:
        save_image(folder / "masks" / COMPOSED / f"{DECOMPOSED}.PNG", 3)
    samples = read_samples(write_table(folder, layout, COMPOSED), digests)
    assert len(samples) == 2
    assert sum(sample.mask is not None for sample in samples) == (layout is not Personalized)


def test_members_of_an_archive_belong_together_in_any_unicode_form(folder: Path, digests: Digests):
    write_tar(folder / "x.tar", {f"{DECOMPOSED}.png": image_bytes(1), f"{COMPOSED}.txt": "a"})
    assert [sample.id for sample in read_samples(WebDataset(path=str(folder)), digests)] == [f"x/{COMPOSED}"]


def test_settings_of_a_concept_apply_in_any_unicode_form(folder: Path, digests: Digests):
    save_image(folder / DECOMPOSED / "images" / "0.png", 1)
    settings = Concepts(path=str(folder), triggers={COMPOSED: "sks"})
    assert [sample.caption for sample in read_samples(settings, digests)] == ["sks"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_tables_and_captions_with_a_byte_order_mark_are_read(encoding: str, folder: Path, digests: Digests):
    for name in ("lines", "json", "table", "text"):
        save_image(folder / name / "a.png", 1)
    row = {"file_name": "a.png", "text": "\u00fcber"}
    (folder / "lines" / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding)
    (folder / "json" / "captions.json").write_text(json.dumps({"a.png": row["text"]}, ensure_ascii=False), encoding)
    (folder / "table" / "all.csv").write_text(f"file_name,text\na.png,{row['text']}\n", encoding)
    (folder / "text" / "a.txt").write_text(row["text"], encoding)
    for layout, name in ((ImageFolder, "lines"), (CaptionsJson, "json"), (Csv, "table"), (ImageFolder, "text")):
        samples = read_samples(layout(path=str(folder / name)), digests)
        assert [sample.caption for sample in samples] == [row["text"]], name


@pytest.mark.parametrize("text", ["file_name;text\n{}", '\ufeff"text"\t"file_name"\n{}', "sep=;\nfile_name;text\n{}"])
def test_the_header_line_of_a_table_says_what_separates_its_columns(text: str, folder: Path, digests: Digests):
    save_image(folder / "a.png", 1)
    row = "one, two\ta.png\n" if "\t" in text else 'a.png;"one, two"\n'
    (folder / "all.csv").write_text(text.format(row), "utf-8")
    assert [sample.caption for sample in read_samples(Csv(path=str(folder)), digests)] == ["one, two"]


@pytest.mark.parametrize("kind", ["bytes", "struct"])
def test_parquet_may_hold_the_bytes_of_images_alone(kind: str, folder: Path, digests: Digests):
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    images = [image_bytes(i) if kind == "bytes" else {"bytes": image_bytes(i)} for i in range(2)]
    parquet.write_table(pyarrow.table({"image": images, "text": ["a", "b"]}), folder / "train.parquet")
    samples = read_samples(Hub(path=str(folder)), digests)
    assert [sample.image.open().size for sample in samples] == [(40, 32)] * 2


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ({"image": {"bytes": "aGVsbG8=", "path": None}, "text": "a"}, "train row 0: its image has text for the bytes"),
        (None, "train.jsonl line 1: is not a JSON object"),
    ],
)
def test_json_that_the_library_cannot_read_is_refused_by_name(line: object, fault: str, folder: Path, digests: Digests):
    """The second line crashes the library's parser."""
    folder.mkdir()
    second = {"image": {"bytes": "aGVsbG8=", "path": None}, "text": "b"}
    (folder / "train.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(second) + "\n")
    assert fault in read_faults(Hub(path=str(folder)), digests)


def test_a_header_of_an_array_that_is_no_literal_is_refused(folder: Path, digests: Digests):
    folder.mkdir()
    header = b"(" * 2000
    (folder / "train_images.npy").write_bytes(b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header)
    np.save(folder / "train_descriptions.npy", np.array(["a"]))
    assert_faults(Arrays(path=str(folder)), digests, "train_images.npy cannot be read")


@pytest.mark.parametrize("value", ["garbage", "[null, 1, 'ff']", None, b"\xff", 7])
def test_damaged_rows_of_remembered_facts_are_ignored(
    value: object, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Digests, "_RACY", -(10**12))  # So that a new file is remembered.
    path = tmp_path / "digests.sqlite"
    write_captioned(folder, 1)
    (sample,) = read_samples(ImageFolder(path=str(folder)), Digests(path))
    digests = Digests(path)
    source = type(sample.image)(folder / "0.jpg", digests)
    facts, digest = image_facts.inspect_image(source), source.digest()
    digests.flush()
    with closing(sqlite3.connect(path)) as database, database:
        assert database.execute("UPDATE digests SET sha256 = ?", (value,)).rowcount == 2
    spoilt = type(source)(source.path, Digests(path))
    assert (image_facts.inspect_image(spoilt), spoilt.digest()) == (facts, digest)


def test_the_history_of_a_record_must_be_a_list(folder: Path, digests: Digests):
    write_personalized(folder, 1)
    (folder / "train.json").write_text('{"a": 1}')
    assert "train.json must be a list" in read_faults(Personalized(path=str(folder)), digests)
