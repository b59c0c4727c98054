"""Samples, faults and notes of images with a caption file beside each (dataset=imagefolder without a table), and the
files that a dataset does not use.
"""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from images import save_image
from layouts import (
    WRITERS,
    assert_faults,
    caption,
    read_faults,
    read_samples,
    write_captioned,
    write_concepts,
    write_imagefolder,
)

from trainer.config.groups import GROUPS
from trainer.core.digests import Digests
from trainer.core.errors import DataError
from trainer.dataset.imagefolder import ImageFolder
from trainer.dataset.sample import Sample


def by_id(folder: Path, digests: Digests) -> dict[str, Sample]:
    return {sample.id: sample for sample in read_samples(ImageFolder(path=str(folder)), digests)}


def notes(folder: Path, digests: Digests) -> list[str]:
    return ImageFolder(path=str(folder)).read(digests).notes


def captioned(path: Path, seed: int, text: str = "a thing", ending: str = ".txt") -> None:
    """Writes an image and its caption."""
    save_image(path, seed)
    path.with_suffix(ending).write_text(text)


def test_endings_names_and_byte_order_marks_of_all_tools_are_read(folder: Path, digests: Digests):
    captioned(folder / "a.v1.final.jpg", 0, "dots")
    captioned(folder / "b.PNG", 1, "capitals", ".TXT")
    captioned(folder / "c.jpeg", 2, "caption file", ".caption")
    captioned(folder / "d.jfif", 3, "jfif")
    captioned(folder / "deep" / "er" / "e.webp", 4, "\ufeffmark\r\n")
    captioned(folder / f"{unicodedata.normalize('NFD', 'é')}.png", 5, "accent")
    (folder / f"{unicodedata.normalize('NFD', 'é')}.txt").rename(folder / f"{unicodedata.normalize('NFC', 'é')}.txt")
    for name in (".DS_Store", "._a.v1.final.jpg", "Thumbs.db", ".hidden/x.jpg", "__MACOSX/y.jpg", "deep/@eaDir/z.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0")
    samples = by_id(folder, digests)
    assert {id: sample.caption for id, sample in samples.items()} == {
        "a.v1.final": "dots",
        "b": "capitals",
        "c": "caption file",
        "d": "jfif",
        "deep/er/e": "mark",
        "é": "accent",
    }
    assert notes(folder, digests) == []


def test_number_in_front_of_a_folder_is_the_visits_per_epoch(folder: Path, digests: Digests):
    save_image(folder / "10_sks dog" / "a.jpg", 0)
    captioned(folder / "10_sks dog" / "b.jpg", 1, "own caption")
    save_image(folder / "10_sks dog" / "near" / "c.jpg", 2)
    save_image(folder / "10_sks dog" / "02_face" / "d.jpg", 3)
    captioned(folder / "2024_summer" / "e.jpg", 4, "a year")
    captioned(folder / "plain" / "f.jpg", 5, "plain")
    save_image(folder / "0_off" / "g.jpg", 6)
    found = {id: (sample.caption, sample.repeats) for id, sample in by_id(folder, digests).items()}
    assert found == {
        "10_sks dog/a": ("sks dog", 10),
        "10_sks dog/b": ("own caption", 10),
        "10_sks dog/near/c": ("sks dog", 10),
        "10_sks dog/02_face/d": ("face", 2),
        "2024_summer/e": ("a year", 1),
        "plain/f": ("plain", 1),
    }
    assert notes(folder, digests) == [
        "2024_summer: is read once per epoch; a number of visits in front of a name is at most 999",
        "0_off: is left out, as 0 says",
        "10_sks dog: 10 visits per epoch to each of its 3 images; 2 without a caption file have the caption 'sks dog'",
        "10_sks dog/02_face: 2 visits per epoch to each of its 1 image; "
        "1 without a caption file have the caption 'face'",
        "1 image is not used (1 .jpg): 0_off/g.jpg",
    ]


def test_every_fault_of_captioned_images_is_listed(folder: Path, digests: Digests, tmp_path: Path):
    write_captioned(folder, 2)
    save_image(folder / "sub" / "bare.png", 2)
    save_image(folder / "10_" / "bare.png", 3)
    (folder / "alone.caption").write_text("no image")
    captioned(folder / "latin.jpg", 4)
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    captioned(folder / "wide.jpg", 5)
    (folder / "wide.txt").write_text("wide", encoding="utf-16-le")
    captioned(folder / "blank.jpg", 6, " \n")
    captioned(folder / "twice.jpg", 7)
    save_image(folder / "twice.png", 8)
    (folder / "phone.DNG").write_bytes(b"heic")
    (folder / "phone.txt").write_text("from a phone")
    (folder / "0.psd").write_bytes(b"the source of 0.jpg")
    captioned(folder / "page.jpg", 9)
    (folder / "page.jpg").write_text("<html>")
    save_image(tmp_path / "elsewhere" / "secret.jpg", 1)
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe.jpg")
    message = assert_faults(
        ImageFolder(path=str(folder)),
        digests,
        "sub/bare.png: has no caption; there is no bare.txt beside it",
        "10_/bare.png: has no caption; there is no bare.txt beside it",
        "alone.caption: there is no image of this name",
        "latin.txt: it is not UTF-8 text (byte 4: unexpected end of data); save it as UTF-8",
        "wide.txt: is UTF-16 without a byte order mark, or not text; save it as UTF-8",
        "blank.txt: the caption is empty",
        "twice.png: is the same sample as twice.jpg",
        "phone.DNG: is in a format that is not read; save it as .jpg or .png",
        "page.jpg: is an HTML page",
        "link: is a link out of the dataset's folder; put the folder itself there",
        "pipe.jpg: is not a file",
    )
    assert "11 faults in 11 samples" in message
    assert notes(folder, digests)[-1].startswith("1 image is in a format that is not read (1 .psd): 0.psd")


def test_images_without_any_caption_are_refused_with_what_to_write(folder: Path, digests: Digests):
    for i in range(30):
        save_image(folder / "images" / f"{i}.jpg", i)
    message = read_faults(ImageFolder(path=str(folder)), digests)
    assert "none of its 30 images has a caption. Write what NAME.jpg shows into NAME.txt beside it" in message
    write_imagefolder(folder, 3)
    message = read_faults(ImageFolder(path=str(folder / "images")), digests)
    assert f"Type dataset.path={folder} for those in {folder}/metadata.jsonl" in message


def test_masks_lie_in_masks_or_beside_their_images(folder: Path, digests: Digests):
    write_captioned(folder, 6)
    captioned(folder / "sub" / "a.jpg", 6)
    captioned(folder / "sub" / "b.jpg", 7)
    captioned(folder / "3_mask.jpg", 8, "a mask on a face, not the mask of 3")
    masks = {
        "0": "masks/0.PNG",
        "1": "1_mask.png",
        "2": "2-masklabel.png",
        "sub/a": "masks/sub/a.png",
        "sub/b": "sub/masks/b.png",
    }
    for number, name in enumerate(masks.values()):
        save_image(folder / name, 20 + number)
    save_image(folder / "masks" / "nobody.png", 30)
    found = {id: sample.mask.name for id, sample in by_id(folder, digests).items() if sample.mask}
    assert found == {id: str(folder / name) for id, name in masks.items()}
    assert notes(folder, digests) == ["1 mask fits no image (1 .png): masks/nobody.png"]
    save_image(folder / "masks" / "1.png", 31)
    fault = "1.jpg: has several masks: 1_mask.png, masks/1.png"
    assert_faults(ImageFolder(path=str(folder)), digests, fault)


def test_caption_files_beside_a_table_or_another_caption_file_are_noted(folder: Path, digests: Digests):
    write_captioned(folder, 2)
    (folder / "0.caption").write_text("another one")
    (folder / "1.txt").write_text("one\ntwo")
    assert by_id(folder, digests)["0"].caption == caption(0)
    assert notes(folder, digests) == [
        "of 1 sample with both, the .txt is used and the .caption is not",
        "captions of several lines, read as one text: 1",
    ]
    before = folder.with_name("before")
    write_imagefolder(before, 2)
    for path in folder.glob("*.txt"):
        shutil.copy(path, before / "images")
    shutil.copy(folder / "0.jpg", before / "stray.jpg")
    assert [sample.caption for sample in by_id(before, digests).values()] == [caption(0), caption(1)]
    assert notes(before, digests) == [
        "1 image is not used, because metadata.jsonl does not name it (1 .jpg): stray.jpg",
        "2 caption files are not used, because metadata.jsonl has the captions (2 .txt): images/0.txt, images/1.txt",
    ]


@pytest.mark.parametrize(
    ("places", "refusal"),
    [
        (("train", "."), "there are images in train/ and 2 beside it (0.jpg). Move those for training into train/"),
        (("val", "."), "there are images in val/ and 2 beside it (0.jpg). Move those for training into train/"),
        (("test", "3_dog"), "there are images in test/ and 2 beside it (3_dog/0.jpg)"),
        (("val",), "there are images in val/, but none for training. Put these into train/"),
    ],
)
def test_folders_from_which_no_split_follows_are_refused(
    places: tuple[str, ...], refusal: str, folder: Path, digests: Digests
):
    for place in places:
        write_captioned(folder / place, 2)
    assert refusal in read_faults(ImageFolder(path=str(folder)), digests)


def test_settings_of_columns_need_a_table(folder: Path, digests: Digests):
    write_captioned(folder, 2)
    settings = ImageFolder(path=str(folder), control_columns=["sketch"])
    assert "there is no metadata.jsonl in it" in read_faults(settings, digests)


def test_folders_that_the_program_writes_to_are_no_part_of_a_dataset(folder: Path, digests: Digests):
    write_captioned(folder, 2)
    save_image(folder / "runs" / "check" / "samples.png", 9)
    settings = ImageFolder(path=str(folder))
    listing = settings.read(digests, ignored=[folder / "runs", folder])
    assert (len(listing.samples), listing.faults, listing.unused) == (2, [], [])
    with pytest.raises(DataError, match="samples.png: has no caption"):
        settings.read(digests).raise_on_faults("it")


# Files that are not used


@pytest.mark.parametrize("layout", sorted({*WRITERS} - {"imagefolder"}))
def test_every_layout_names_what_it_does_not_use(layout: str, folder: Path, digests: Digests):
    WRITERS[layout](folder, 3)
    settings = GROUPS["dataset"][layout](path=str(folder))
    used = settings.read(digests)
    # The first items of a history are nobody's target, but they are in captions.
    assert (used.unused, used.faults) == ([], [])
    place = "clock/" if layout == "concepts" else ""
    for name in ("phone.dng", "new.psd", "other/masks/nobody.PNG", "notes.md", ".DS_Store"):
        path = folder / place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"?")
    listing = settings.read(digests)
    assert listing.unused == [
        f"{place}{name}" for name in ("new.psd", "notes.md", "phone.dng", "other/masks/nobody.PNG")
    ]
    assert listing.notes[-3:] == [
        f"1 mask fits no image (1 .png): {place}other/masks/nobody.PNG",
        f"2 images are in formats that are not read (1 .psd, 1 .dng): {place}new.psd, {place}phone.dng; "
        "save them as .jpg or .png",
        f"1 other file is not used (1 .md): {place}notes.md",
    ]


@pytest.mark.parametrize("write", [write_imagefolder, write_captioned, write_concepts])
def test_endings_of_masks_may_be_in_capitals(write: Callable[..., None], folder: Path, digests: Digests):
    write(folder, 2)
    layout, place = ("concepts", folder / "toy") if write is write_concepts else ("imagefolder", folder)
    path = save_image(place / "masks" / "1.PNG", 7)
    samples = read_samples(GROUPS["dataset"][layout](path=str(folder)), digests)
    assert [sample.mask.name for sample in samples if sample.mask] == [str(path)]
