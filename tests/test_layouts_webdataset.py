"""Samples and faults of the layout webdataset: tar archives, also damaged and hostile ones."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from images import SIZE, decompression_bomb, random_image
from layouts import (
    assert_faults,
    caption,
    image_bytes,
    read_faults,
    read_samples,
    write_captioned,
    write_tar,
    write_webdataset,
)

from trainer.core.digests import Digests
from trainer.core.errors import DataError
from trainer.dataset.imagefolder import ImageFolder
from trainer.dataset.webdataset import WebDataset


def shows(source, seed: int) -> bool:
    """Whether a source is the image of a seed."""
    return bool(np.array_equal(np.asarray(source.open()), np.asarray(random_image(seed))))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_a_key_are_a_sample(format: int, folder: Path, digests: Digests):
    long_name = "/".join([*["deep" * 10] * (2 if format == tarfile.USTAR_FORMAT else 7), "é"])
    members = {
        "./a.PNG": image_bytes(0),
        "a.txt": "\ufeffa text\n",
        "a.json": json.dumps({"caption": "not this one", "extra": [1]}),
        "a.cls": "7",
        "a.mask.png": image_bytes(1),
        f"{long_name}.webp": image_bytes(2, format="WEBP"),
        f"{long_name}.json": json.dumps({"caption": "from JSON", "recaption": "another"}),
        "._a.png": "a Mac was here",
        "__MACOSX/a.png": "too",
        "b.jpg": image_bytes(3, format="JPEG"),
        "b.caption": "a caption file",
        "b.input.jpg": image_bytes(4, format="JPEG"),
        "info.json": "{}",
    }
    write_tar(folder / "x.tar", members, format)
    settings = WebDataset(path=str(folder))
    samples = {sample.id: sample for sample in read_samples(settings, digests)}
    assert {id: sample.caption for id, sample in samples.items()} == {
        "x/a": "a text",
        "x/b": "a caption file",
        f"x/{long_name}": "from JSON",
    }
    assert shows(samples["x/a"].image, 0) and shows(samples["x/a"].mask, 1)
    assert samples["x/b"].image.size() == SIZE and samples["x/b"].mask is None
    listing = settings.read(digests)
    assert listing.unused == ["x.tar/a.json", "x.tar/a.cls", "x.tar/b.input.jpg", "x.tar/info.json"]
    assert read_samples(WebDataset(path=str(folder / "x.tar")), digests) == [*samples.values()]
    chosen = WebDataset(path=str(folder), caption_column="recaption")
    message = assert_faults(
        chosen,
        digests,
        "x.tar/a: its .json: has no column 'recaption' (its columns: caption, extra); type dataset.caption_column=NAME",
        "x.tar/b: has no caption; there is no .json of this name",
    )
    assert "2 faults in 3 samples" in message
    assert [sample.caption for sample in chosen.read(digests).samples] == ["another"]


def test_digests_are_those_of_the_members(folder: Path, digests: Digests):
    """So the cache has entries for the same images in another archive, in another order, or in files."""
    files = folder / "files"
    write_captioned(files, 3)
    for path in files.glob("*.jpg"):
        write_tar(folder / "one" / f"{path.stem}.tar", {"k.jpg": path.read_bytes(), "k.txt": "x"})
    members = {path.name: path.read_bytes() for path in sorted(files.iterdir(), reverse=True)}
    write_tar(folder / "two" / "all.tar", members)
    expected = sorted(sample.image.digest() for sample in read_samples(ImageFolder(path=str(files)), digests))
    for name in ("one", "two"):
        samples = read_samples(WebDataset(path=str(folder / name)), digests)
        assert sorted(sample.image.digest() for sample in samples) == expected


def test_archive_that_changes_but_keeps_size_and_time_is_read_again(folder: Path, digests: Digests):
    path = folder / "x.tar"
    before = image_bytes(0)
    after = image_bytes(1).ljust(len(before), b"\0")[: len(before)]
    write_tar(path, {"a.png": before, "a.txt": "x"})
    (sample,) = read_samples(WebDataset(path=str(folder)), digests)
    digest, status = sample.image.digest(), path.stat()
    path.write_bytes(path.read_bytes().replace(before, after))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert sample.image.digest() != digest


def test_control_images_are_numbered(folder: Path, digests: Digests):
    members: dict[str, bytes | str] = {}
    for i in range(3):
        names = ["png", "control.png", "control_2.png"]
        members |= {f"{i}.{name}": image_bytes(10 * i + n) for n, name in enumerate(names)} | {f"{i}.txt": caption(i)}
    write_tar(folder / "x.tar", members)
    settings = WebDataset(path=str(folder))
    for i, sample in enumerate(read_samples(settings, digests)):
        assert [shows(source, 10 * i + n + 1) for n, source in enumerate(sample.controls)] == [True, True]
    del members["0.control.png"], members["1.control_2.png"]
    write_tar(folder / "x.tar", members)
    assert_faults(
        settings,
        digests,
        "x.tar/0: has control_2, but control images are named control, control_2, ...",
        "has 1 control image, but most samples have 2",
    )


@pytest.mark.parametrize(
    ("names", "refusal"),
    [
        (("train-0", "train-1", "Validation_0"), None),
        (("train", "val"), None),
        (("train-0", "other"), "it is not clear which archives are for training"),
        (("test-0", "training-0"), "it is not clear which archives are for training"),
        (("val-0",), "it is not clear which archives are for training (val-0.tar). Name all of these train-*.tar"),
    ],
)
def test_names_of_archives_are_the_split(names: tuple[str, ...], refusal: str | None, folder: Path, digests: Digests):
    for name in names:
        write_tar(folder / f"{name}.tar", {f"{name}.png": image_bytes(0), f"{name}.txt": "x"})
    settings = WebDataset(path=str(folder))
    if refusal:
        assert refusal in read_faults(settings, digests)
    else:
        splits = {sample.id.partition("/")[0]: sample.split for sample in read_samples(settings, digests)}
        assert splits == {name: "train" if name.startswith("train") else "validation" for name in names}


def test_every_fault_of_an_archive_is_listed(folder: Path, digests: Digests):
    good = image_bytes(0)
    members = {
        "bare.png": good,
        "alone.txt": "no image",
        "page.jpg": "<html>",
        "page.txt": "x",
        "bomb.png": decompression_bomb(60_000, 60_000),
        "bomb.txt": "x",
        "twice.png": good,
        "twice.jpg": good,
        "twice.txt": "x",
        "latin.png": good,
        "latin.txt": "café".encode("latin-1"),
        "list.png": good,
        "list.json": "[1]",
        "deep.png": good,
        "deep.json": '{"caption":' * 50_000,
        "number.png": good,
        "number.json": '{"caption": ' + "1" * 5000 + "}",
        "long.png": good,
        "long.txt": "x" * 2**21,
        "phone.dng": "?",
        "phone.txt": "x",
        "photo.v2.jpg": good,
        "photo.v2.txt": "x",
        "pickle.png": pickle.dumps({}),
        "pickle.txt": "x",
        "good.png": good,
        "good.txt": "x",
    }
    write_tar(folder / "x.tar", members)
    message = assert_faults(
        WebDataset(path=str(folder)),
        digests,
        "x.tar/bare: has no caption; there is no .txt or .caption or .json of this name",
        "x.tar/alone: has no image (.txt)",
        f"{folder}/x.tar/page.jpg: is an HTML page",
        "x.tar/bomb.png: cannot be decoded (Image size (3600000000 pixels) exceeds limit",
        "x.tar/twice.png: is the same sample as x.tar/twice.jpg",
        "x.tar/latin: its .txt: it is not UTF-8 text",
        "x.tar/list: its .json: is not a JSON object",
        "x.tar/deep: its .json: ",
        "x.tar/number: its .json: ",
        "x.tar/long: its .txt: has 2097152 bytes, more than 1048576",
        "x.tar/phone: its image is in a format that is not read; save it as .jpg or .png",
        "x.tar/photo: has no image (.v2.jpg, .v2.txt); .v2.jpg is not it, because names are split at their first dot",
        "x.tar/pickle.png: is not an image that can be read",
    )
    assert "13 faults in 14 samples" in message


def add_links(archive: tarfile.TarFile) -> None:
    for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)):
        header = tarfile.TarInfo(f"{number}.png")
        header.type, header.linkname = kind, "/etc/passwd"
        archive.addfile(header)


def test_members_that_lead_outside_are_refused_and_nothing_is_written(folder: Path, digests: Digests, tmp_path: Path):
    names = ["../out.png", "/abs.png", "sub/../../out.png", "C:/x.png", "a\\b.png", "line\nbreak.png"]
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
        add_links(archive)
    secret = tmp_path / "secret.tar"
    write_tar(secret, {"a.png": image_bytes(0), "a.txt": "x"})
    (folder / "link.tar").symlink_to(secret)
    os.mkfifo(folder / "pipe.tar")
    before = sorted(tmp_path.rglob("*"))
    message = assert_faults(
        WebDataset(path=str(folder)),
        digests,
        *(f"x.tar: its member: {name!r}" for name in names),
        "x.tar: its member '0.png' is a link; store the file itself",
        "x.tar: its member '1.png' is a link; store the file itself",
        "x.tar: its member '2.png' is neither a file nor a folder",
        "x.tar: its member '3.png' is neither a file nor a folder",
        "link.tar: is a link out of the dataset's folder",
        "pipe.tar: is not a file",
    )
    assert "12 faults in 0 samples" in message
    assert sorted(tmp_path.rglob("*")) == before


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def records(text: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return header("pax", len(text), kind) + text.ljust(-(-len(text) // 512) * 512, b"\0")


END = bytes(1024)
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "has no end mark at byte 0"),
    "no end mark": (lambda data: data.rstrip(b"\0").ljust(2048, b"\0")[:2048], "it has no end mark at byte 2048"),
    "half": (lambda data: data[:700], "is cut off: its member 'a.png' has"),
    "gzip": (gzip.compress, "is compressed, so that no image in it can be read directly"),
    "pickle": (lambda data: pickle.dumps([1] * 1000), "is not a tar archive, or damaged: no header at byte 0"),
    "bad checksum": (lambda data: b"b" + data[1:], "no header at byte 0 (bad checksum)"),
    "joined": (lambda data: data + data, "has more behind its end mark"),
    "huge size": (lambda data: header("a.png", 2**62) + END, "has 4611686018427387904 bytes from byte 512"),
    "negative size": (lambda data: header("a.png", -512) + END, "has -512 bytes from byte 512"),
    "pax size": (lambda data: records(b"26 size=99999999999999999\n") + data, "has 99999999999999999 bytes"),
    "pax text size": (lambda data: records(b"11 size=-1\n") + data, "has a header with the size '-1'"),
    "pax loop": (lambda data: records(b"0 path=x\n") + data, "records cannot be read"),
    "pax length": (lambda data: records(b"99 path=x\n") + data, "records cannot be read"),
    "pax for all": (lambda data: records(b"10 path=x\n", tarfile.XGLTYPE) + data, "gives all members the same name"),
    "sparse": (lambda data: header("a.png", 0, tarfile.GNUTYPE_SPARSE) + END, "is stored with gaps (sparse)"),
    "huge header": (lambda data: records(bytes(2**24)) + data, "has a header of 16777216 bytes, more than 65536"),
    "long name": (lambda data: header("n", 9, tarfile.GNUTYPE_LONGNAME), "is cut off: its member 'n' has 9 bytes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_archive_is_one_fault(damage: str, folder: Path, digests: Digests):
    change, reason = DAMAGES[damage]
    path = folder / "x.tar"
    write_tar(path, {"a.png": image_bytes(0), "a.txt": "x"})
    path.write_bytes(change(path.read_bytes()))
    tracemalloc.start()
    message = assert_faults(WebDataset(path=str(folder)), digests, "x.tar: ", reason)
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()
    assert "1 fault in" in message


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_archives_raise_nothing_but_faults(count: int, folder: Path, digests: Digests):
    write_webdataset(folder, 2)
    (path,) = folder.iterdir()
    data = path.read_bytes()
    generator = random.Random(0)
    headers = [offset for offset in range(0, len(data), 512) if data[offset + 257 : offset + 262] == b"ustar"]
    outcomes = set()
    for _ in range(count):
        mutated = bytearray(data)
        start = generator.choice(headers)
        for _ in range(generator.randint(1, 8)):
            mutated[start + generator.randrange(512)] = generator.randrange(256)
        if generator.random() < 0.8:
            # With a valid checksum, so that the fields behind it are read.
            block = mutated[start : start + 512]
            block[148:156] = b" " * 8
            mutated[start + 148 : start + 156] = b"%06o\0 " % sum(block)
        if generator.random() < 0.2:
            del mutated[generator.randrange(len(mutated)) :]
        path.write_bytes(mutated)
        try:
            listing = WebDataset(path=str(folder)).read(digests)
        except DataError as error:
            assert "there is no member NAME.jpg" in str(error)
        else:
            outcomes.add(len(listing.samples))
            assert len(listing.samples) == 2 or listing.faults or listing.unused
    assert outcomes == {0, 1, 2}


def test_folder_without_archives_is_refused(folder: Path, digests: Digests):
    write_captioned(folder, 2)
    settings = WebDataset(path=str(folder))
    assert "there is no .tar in it" in read_faults(settings, digests)
    assert "Type dataset=imagefolder" in read_faults(settings, digests)
    write_tar(folder / "x.tar", {"readme.md": "x"})
    assert "there is no member NAME.jpg in its archives" in read_faults(settings, digests)


def test_tar_file_of_an_operating_system_is_read(folder: Path, digests: Digests):
    """Archives of `tar` have folders and other headers than those of Python."""
    write_captioned(folder / "files", 2)
    assert os.system(f"tar --create --file {folder}/x.tar --directory {folder} files") == 0
    samples = read_samples(WebDataset(path=str(folder / "x.tar")), digests)
    assert [sample.id for sample in samples] == ["x/files/0", "x/files/1"]
