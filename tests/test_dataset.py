from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import unicodedata
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from trainer import dataset
from trainer.core.digests import Digests
from trainer.core.errors import DataError, UsageError
from trainer.dataset.demo import Demo, Task
from trainer.dataset.imagefolder import ImageFolder
from trainer.dataset.pairs import Pairs
from trainer.dataset.sample import Sample
from trainer.dataset.image import fit
from trainer.dataset.source import FileSource
from trainer.dataset.listing import Listing

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def digests(tmp_path: Path) -> Digests:
    return Digests(tmp_path / "digests.db")


def drawing(number: int = 0, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A picture that differs with its number."""
    return Image.new("RGB", size, (number * 40 % 256, 80, 255 - number * 25 % 256))


def make_pairs(folder: Path, names: list[str]) -> Path:
    for part in ("control_images", "training_images"):
        (folder / part).mkdir(parents=True)
    for number, name in enumerate(names):
        drawing(number).save(folder / "control_images" / f"{name}.jpg")
        drawing(number + 1).save(folder / "training_images" / f"{name}.png")
        (folder / "training_images" / f"{name}.txt").write_text(f"instruction {number}\n", encoding="utf-8")
    return folder


def make_imagefolder(folder: Path, rows: list[dict], pictures: list[str]) -> Path:
    for number, name in enumerate(pictures):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        drawing(number).save(folder / name)
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def row(name: object, text: object = "a thing") -> dict:
    return {"file_name": name, "text": text}


def faults_of(settings: dataset.Dataset, digests: Digests) -> str:
    with pytest.raises(DataError) as refusal:
        dataset.read(settings, digests)
    assert refusal.value.code == 65
    return str(refusal.value)


# settings


def test_a_resolution_is_a_side_or_width_by_height():
    assert ImageFolder().size() is None
    assert ImageFolder(resolution=1024).size() == (1024, 1024)
    assert ImageFolder(resolution="832x576").size() == (832, 576)
    for wrong in ("832*576", "0", "x64", -64, "64x0", "big"):
        with pytest.raises(UsageError, match=r"dataset\.resolution"):
            ImageFolder(resolution=wrong)


def test_settings_that_make_no_sense_are_refused_when_the_command_line_is_read():
    for wrong in (
        {"validation_fraction": 1.0},
        {"validation_fraction": -0.1},
        {"caption_dropout": 1.5},
        {"limit": 0},
        {"resolution": "1x"},
    ):
        with pytest.raises(UsageError, match=f"dataset.{next(iter(wrong))}"):
            OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Pairs), wrong))
    typed = OmegaConf.merge(OmegaConf.structured(Pairs), OmegaConf.from_dotlist(["resolution=832x576", "limit=3"]))
    assert OmegaConf.to_object(typed) == Pairs(resolution="832x576", limit=3)


@pytest.mark.parametrize("option", dataset.OPTIONS)
def test_the_shipped_values_are_those_of_the_settings_class(option: str):
    values = OmegaConf.load(Path(__file__).parents[1] / "conf" / "dataset" / f"{option}.yaml")
    values.pop("defaults")
    known = dataset.OPTIONS[option]
    assert OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(known), values)) == known()


@pytest.mark.parametrize("layout", [ImageFolder, Pairs])
def test_no_path_is_a_matter_of_usage_and_an_absent_folder_one_of_data(layout, tmp_path: Path, digests: Digests):
    with pytest.raises(UsageError, match="type dataset.path=FOLDER"):
        dataset.read(layout(), digests)
    assert "there is no such folder" in faults_of(layout(path=str(tmp_path / "absent")), digests)
    (tmp_path / "empty").mkdir()
    assert "there is no" in faults_of(layout(path=str(tmp_path / "empty")), digests)


def test_composing_needs_neither_torch_nor_pil():
    code = "import sys, trainer.dataset, trainer.cache.store; assert not {'torch', 'PIL', 'safetensors'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# layouts


def test_pairs_are_read_by_name(tmp_path: Path, digests: Digests):
    folder = make_pairs(tmp_path / "set", ["b", "a.1", "c"])
    (folder / "training_images" / ".hidden.png").write_bytes(b"")
    (folder / "training_images" / "notes.md").write_text("not a sample")
    samples = dataset.read(Pairs(path=str(folder)), digests)
    assert [sample.id for sample in samples] == ["a.1", "b", "c"]
    first = samples[0]
    assert first.caption == "instruction 1"
    assert first.split is None
    assert [Path(source.name).name for source in (first.image, *first.controls)] == ["a.1.png", "a.1.jpg"]
    assert first.image.size() == (24, 16)
    assert first.image.open().getpixel((0, 0)) == drawing(2).getpixel((0, 0))


def test_every_fault_of_pairs_is_listed_at_once(tmp_path: Path, digests: Digests):
    folder = make_pairs(
        tmp_path / "set",
        ["good", "no_control", "no_target", "no_text", "empty", "latin", "long", "Case", "case", "twice"],
    )
    controls, targets = folder / "control_images", folder / "training_images"
    (controls / "no_control.jpg").unlink()
    (targets / "no_target.png").unlink()
    (targets / "no_text.txt").unlink()
    (targets / "empty.txt").write_text(" \n")
    (targets / "latin.txt").write_bytes("café".encode("latin-1"))
    (targets / "long.txt").write_text("a" * 100_000)
    drawing().save(targets / "twice.webp")
    (controls / "stray.jpg").write_bytes(b"<!DOCTYPE html><title>404</title>")
    message = faults_of(Pairs(path=str(folder)), digests)
    for fault in (
        "control_images/no_control.*: there is no such control picture",
        "training_images/no_target.*: there is no such target picture",
        "training_images/no_text.txt: there is no such instruction",
        "training_images/empty.txt: the caption is empty",
        "training_images/latin.txt: 'utf-8' codec can't decode",
        "training_images/long.txt: the caption has 100000 characters",
        "training_images/case.png: differs in case only from training_images/Case.png",
        "training_images/twice.webp: is the same sample as training_images/twice.png",
        "stray.jpg: is an HTML page, not a picture",
        "training_images/stray.*: there is no such target picture",
        "training_images/stray.txt: there is no such instruction",
    ):
        assert fault in message
    assert "11 faults in 11 samples" in message
    assert "good" not in message


def test_names_are_paired_and_split_alike_however_unicode_was_written(tmp_path: Path, digests: Digests):
    folder = make_pairs(tmp_path / "set", [unicodedata.normalize("NFC", "café")])
    decomposed = unicodedata.normalize("NFD", "café")
    (folder / "control_images" / "café.jpg").rename(folder / "control_images" / f"{decomposed}.jpg")
    assert [sample.id for sample in dataset.read(Pairs(path=str(folder)), digests)] == ["café"]


def test_file_names_may_or_may_not_name_the_images_folder(tmp_path: Path, digests: Digests):
    rows = [row("images/a.png", " padded "), row("b.png"), row("c.png"), row("deep/d.jpg")]
    folder = make_imagefolder(tmp_path / "set", rows, ["images/a.png", "images/b.png", "c.png", "deep/d.jpg"])
    samples = dataset.read(ImageFolder(path=str(folder)), digests)
    assert [sample.id for sample in samples] == ["c", "deep/d", "images/a", "images/b"]
    assert samples[2].caption == "padded"
    assert samples[2].controls == ()


def test_columns_may_have_other_names_and_a_byte_order_mark_is_no_fault(tmp_path: Path, digests: Digests):
    folder = make_imagefolder(tmp_path / "set", [], ["a.png"])
    (folder / "metadata.jsonl").write_bytes(
        b'\xef\xbb\xbf{"picture": "a.png", "prompt": "line\xe2\x80\xa8separator"}\r\n\n'
    )
    settings = ImageFolder(path=str(folder), image_column="picture", caption_column="prompt")
    assert [sample.caption for sample in dataset.read(settings, digests)] == ["line\u2028separator"]
    assert "has no column 'text' (its columns: picture, prompt); type dataset.caption_column=NAME" in faults_of(
        ImageFolder(path=str(folder), image_column="picture"), digests
    )


def test_every_fault_of_an_imagefolder_is_listed_with_its_line(tmp_path: Path, digests: Digests):
    pictures = ["a.png", "b.png", "B.png", "a.jpg", "bad.png", "c.png"]
    folder = make_imagefolder(tmp_path / "set", [], pictures)
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
    message = faults_of(ImageFolder(path=str(folder)), digests)
    for fault in (
        "line 2: Expecting property name",
        "line 3: is no JSON object",
        "line 4: has no column 'text' (its columns: file_name)",
        "line 5: there is no file 'absent.png', here or in images/",
        "line 6 (a.png): is the same sample as metadata.jsonl line 1 (a.png)",
        "line 7 (a.jpg): is the same sample as metadata.jsonl line 1 (a.png)",
        "line 9 (B.png): differs in case only from metadata.jsonl line 8 (b.png)",
        "bad.png: the file is empty",
        "line 10: the caption is empty",
        "line 11: the caption is 7, not text",
        "line 12: has the same column twice",
        "line 13: 'utf-8' codec can't decode",
    ):
        assert fault in message
    assert "in 13 samples" in message


def test_of_many_faults_the_first_are_shown_and_all_are_counted(tmp_path: Path, digests: Digests):
    folder = make_imagefolder(tmp_path / "set", [row(f"{number}.png") for number in range(30)], [])
    message = faults_of(ImageFolder(path=str(folder)), digests)
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
def test_a_file_name_that_climbs_out_is_refused_and_the_outside_file_never_opened(
    name, tmp_path: Path, digests: Digests, monkeypatch
):
    folder = make_imagefolder(tmp_path / "set", [row("a.png"), row(name)], ["a.png", "images/a.png"])
    secret = tmp_path / "secret.png"
    drawing().save(secret)
    (folder / "link.png").symlink_to(secret)
    (folder / "images" / "link.png").symlink_to("../../secret.png")
    (folder / "folder").symlink_to(tmp_path)
    (folder / "loop.png").symlink_to("loop.png")
    opened = []
    real = Image.open
    monkeypatch.setattr(
        Image, "open", lambda path, **options: opened.append(Path(os.path.realpath(path))) or real(path, **options)
    )
    message = faults_of(ImageFolder(path=str(folder)), digests)
    assert "line 2" in message
    assert "1 fault in 2 samples" in message
    assert opened == [folder / "a.png"]


def test_a_pair_that_links_out_of_its_folder_is_refused_and_a_link_inside_is_not(tmp_path: Path, digests: Digests):
    folder = make_pairs(tmp_path / "set", ["a"])
    (folder / "control_images" / "b.jpg").symlink_to("a.jpg")
    drawing().save(folder / "training_images" / "b.png")
    (folder / "training_images" / "b.txt").write_text("inside")
    (tmp_path / "link").symlink_to(folder)
    assert len(dataset.read(Pairs(path=str(tmp_path / "link")), digests)) == 2
    (tmp_path / "secret.txt").write_text("password")
    (folder / "training_images" / "b.txt").unlink()
    (folder / "training_images" / "b.txt").symlink_to(tmp_path / "secret.txt")
    message = faults_of(Pairs(path=str(folder)), digests)
    assert "training_images/b.txt: is a link out of the data set's folder" in message
    assert "password" not in message


def test_a_pipe_with_a_pictures_name_hangs_nobody(tmp_path: Path, digests: Digests):
    folder = make_pairs(tmp_path / "set", ["a"])
    os.mkfifo(folder / "control_images" / "b.jpg")
    assert "b.jpg: is not a file" in faults_of(Pairs(path=str(folder)), digests)


def test_the_limit_keeps_the_first_samples_by_id(tmp_path: Path, digests: Digests):
    folder = make_pairs(tmp_path / "set", ["d", "b", "c", "a"])
    assert [sample.id for sample in dataset.read(Pairs(path=str(folder), limit=3), digests)] == ["a", "b", "c"]


def test_the_limit_counts_for_each_split_that_the_layout_has_itself(digests: Digests):
    @dataclass(slots=True)
    class Layout(dataset.Dataset):
        def read(self, digests: Digests) -> Listing:
            return Listing(
                [sample(f"{split}-{number}", split) for split in ("validation", "train") for number in range(5)]
            )

    assert [found.id for found in dataset.read(Layout(limit=2), digests)] == [
        "train-0",
        "train-1",
        "validation-0",
        "validation-1",
    ]


# split


def sample(id: str, split: str | None = None) -> Sample:
    return Sample(id, FileSource(Path(id), None), "text", split=split)


def test_added_samples_move_no_other_sample_to_another_side():
    few = dataset.split([sample(f"s{number}") for number in range(0, 400, 2)], 0.15, where="it")
    many = dataset.split([sample(f"s{number}") for number in reversed(range(400))], 0.15, where="it")
    assert set(few.train) < set(many.train)
    assert set(few.validation) < set(many.validation)
    assert 40 <= len(many.validation) <= 80
    # The same on every machine and in every version: a run's identity rests on it.
    assert [found.id for found in few.validation][:5] == ["s24", "s32", "s34", "s48", "s66"]


def test_a_split_that_the_layout_has_itself_wins():
    samples = [sample(f"t{number}", "train") for number in range(50)] + [sample("v", "validation")]
    sides = dataset.split(samples, 0.5, where="it")
    assert len(sides.train) == 50
    assert [found.id for found in sides.validation] == ["v"]
    assert len(dataset.split(samples, 0.0, where="it").validation) == 1


def test_of_few_samples_one_is_held_out_and_one_trained_on():
    for count in range(2, 8):
        samples = [sample(f"few {number}") for number in range(count)]
        least, most = (dataset.split(samples, fraction, where="it") for fraction in (1e-9, 1 - 1e-9))
        assert (len(least.train), len(least.validation)) == (count - 1, 1)
        assert (len(most.train), len(most.validation)) == (1, count - 1)
        assert [found.id for found in least.train] == [found.id for found in samples if found not in least.validation]
    assert len(dataset.split(samples, 0.0, where="it").validation) == 0


def test_an_empty_side_is_refused_with_counts_and_what_to_type():
    with pytest.raises(
        DataError,
        match=r"it: of 1 samples 1 are for training and 0 for validation.*type dataset\.validation_fraction=0",
    ):
        dataset.split([sample("only")], 0.15, where="it")
    assert len(dataset.split([sample("only")], 0.0, where="it").train) == 1
    with pytest.raises(
        DataError, match=r"0 are for training and 3 for validation.*smaller dataset\.validation_fraction"
    ):
        dataset.split([sample(f"v{number}", "validation") for number in range(3)], 0.15, where="it")
    with pytest.raises(DataError, match="of 0 samples"):
        dataset.split([], 0.15, where="it")


# pictures


def open_file(path: Path, digests: Digests) -> Image.Image:
    source = FileSource(path, digests)
    image = source.open()
    assert image.mode == "RGB"
    assert image.size == source.size()
    return image


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(at) for at in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


def quarters(size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Red, green / blue, white."""
    image = Image.new("RGB", (2, 2))
    image.putdata([RED, GREEN, BLUE, WHITE])
    return image.resize(size, Image.Resampling.NEAREST)


@pytest.mark.parametrize("ending", ["png", "webp", "tif", "bmp", "gif", "jpg", "avif"])
def test_every_known_format_is_read(ending: str, tmp_path: Path, digests: Digests):
    path = tmp_path / f"picture.{ending}"
    quarters().save(
        path, **({"lossless": True} if ending == "webp" else {"quality": 100} if ending in ("jpg", "avif") else {})
    )
    np.testing.assert_allclose(corners(open_file(path, digests)), [RED, GREEN, BLUE, WHITE], atol=12)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(ending: str, orientation: int, tmp_path: Path, digests: Digests):
    undo = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }
    stored = quarters() if orientation == 1 else quarters().transpose(Image.Transpose[undo[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"picture.{ending}"
    stored.save(
        path,
        exif=exif,
        **({"quality": 100, "subsampling": 0} if ending == "jpg" else {"lossless": True} if ending == "webp" else {}),
    )
    image = open_file(path, digests)
    assert image.size == (24, 16)
    np.testing.assert_allclose(corners(image), [RED, GREEN, BLUE, WHITE], atol=12)


def test_cmyk_is_read_as_ink(tmp_path: Path, digests: Digests):
    for ending in ("jpg", "tif"):
        path = tmp_path / f"ink.{ending}"
        Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path)
        np.testing.assert_allclose(corners(open_file(path, digests))[0], RED, atol=6)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path, digests: Digests):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(32, 0)
    for ending in ("png", "tif"):
        path = tmp_path / f"ramp.{ending}"
        Image.fromarray(ramp).save(path)
        assert [open_file(path, digests).getpixel((x, 5)) for x in range(256)] == [(x, x, x) for x in range(256)]


def test_sixteen_bits_with_a_transparent_grey_lie_over_white(tmp_path: Path, digests: Digests):
    path = tmp_path / "holes.png"
    Image.fromarray(np.full((16, 16), 1000, np.uint16)).save(path)
    data = path.read_bytes()
    at = data.index(b"IDAT") - 4
    body = b"tRNS" + struct.pack(">H", 1000)
    path.write_bytes(data[:at] + struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body)) + data[at:])
    assert corners(open_file(path, digests)) == [WHITE] * 4


def test_samples_of_32_bits_are_refused_for_their_white_is_unknown(tmp_path: Path, digests: Digests):
    for kind in (np.float32, np.int32):
        path = tmp_path / "deep.tif"
        Image.fromarray(np.ones((16, 16), kind)).save(path)
        with pytest.raises(DataError, match="32-bit samples"):
            FileSource(path, digests).open()


def test_alpha_lies_over_white(tmp_path: Path, digests: Digests):
    half = Image.new("RGBA", (16, 16), (*RED, 0))
    half.paste((*BLUE, 255), (8, 0, 16, 16))
    palette = half.quantize(4)
    grey = Image.new("LA", (16, 16), (0, 0))
    grey.paste((29, 255), (8, 0, 16, 16))
    for name, image in {
        "rgba.png": half,
        "rgba.webp": half,
        "palette.png": palette,
        "palette.gif": half,
        "grey.png": grey,
    }.items():
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        left, right, *_ = corners(open_file(tmp_path / name, digests))
        assert left == WHITE, name
        assert right == ((29, 29, 29) if name == "grey.png" else BLUE), name


def test_grey_and_black_and_white_are_read(tmp_path: Path, digests: Digests):
    for mode, value, expected in (("L", 77, (77, 77, 77)), ("1", 1, WHITE), ("P", 0, (0, 0, 0))):
        path = tmp_path / f"{mode}.png"
        Image.new(mode, (16, 16), value).save(path)
        assert corners(open_file(path, digests)) == [expected] * 4


def test_an_embedded_profile_is_brought_to_srgb_and_a_broken_one_ignored(tmp_path: Path, digests: Digests):
    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # The same profile with the red and the blue primary exchanged, under another name: what it calls red is blue.
    swapped = (
        srgb.replace(b"rXYZ", b"tmp_")
        .replace(b"bXYZ", b"rXYZ")
        .replace(b"tmp_", b"bXYZ")
        .replace("sRGB".encode("utf-16-be"), bytes(8))
    )
    for name, profile, expected in (
        ("srgb", srgb, RED),
        ("swapped", swapped, BLUE),
        ("broken", b"nonsense", RED),
        ("none", None, RED),
    ):
        path = tmp_path / f"{name}.png"
        Image.new("RGB", (16, 16), RED).save(path, icc_profile=profile)
        np.testing.assert_allclose(corners(open_file(path, digests))[0], expected, atol=2, err_msg=name)


@pytest.mark.parametrize(
    ("size", "reason"),
    [((1, 1), "too few"), ((500, 7), "too few"), ((900, 100), "too long and thin"), ((8, 80), "too long and thin")],
)
def test_pictures_too_small_or_too_thin_are_refused(size, reason: str, tmp_path: Path, digests: Digests):
    Image.new("RGB", size).save(tmp_path / "picture.png")
    for action in (FileSource.size, FileSource.open):
        with pytest.raises(DataError, match=f"picture.png: {size[0]} x {size[1]} pixels are {reason}"):
            action(FileSource(tmp_path / "picture.png", digests))


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif", "avif"])
def test_an_animation_is_refused_for_it_is_several_pictures(ending: str, tmp_path: Path, digests: Digests):
    path = tmp_path / f"moving.{ending}"
    drawing(1).save(path, save_all=True, append_images=[drawing(2), drawing(3)])
    with pytest.raises(DataError, match="several pictures"):
        FileSource(path, digests).size()


def test_a_phones_picture_with_a_preview_behind_it_is_the_photograph(tmp_path: Path, digests: Digests):
    path = tmp_path / "phone.jpg"
    quarters().save(path, format="MPO", save_all=True, append_images=[drawing(2, (8, 8))], quality=100)
    image = open_file(path, digests)
    assert image.size == (24, 16)
    np.testing.assert_allclose(corners(image), [RED, GREEN, BLUE, WHITE], atol=20)


def test_files_that_are_no_pictures_say_what_they_are(tmp_path: Path, digests: Digests):
    path = tmp_path / "picture.jpg"
    for data, reason in (
        (b"", "the file is empty"),
        (b"\n<!DOCTYPE html><p>404", "is an HTML page"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "is not a picture that can be read"),
        (b"\x80\x04\x95 a pickle", "is not a picture that can be read"),
        (b"\xff\xd8\xff", "."),
        (b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR", "."),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"picture.jpg: .*{reason}"):
            FileSource(path, digests).size()
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        FileSource(path, digests).open()


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "gif", "bmp"])
def test_a_truncated_picture_is_refused_when_it_is_decoded_and_never_half_grey(
    ending: str, tmp_path: Path, digests: Digests
):
    path = tmp_path / f"picture.{ending}"
    noise = np.random.Generator(np.random.Philox(1)).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=f"picture.{ending}: "):
        FileSource(path, digests).open()


def bomb(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes whose header claims this size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(60_000, 60_000), (13_378, 13_378)])
@pytest.mark.parametrize("limit_of_pillow", [Image.MAX_IMAGE_PIXELS, None])
def test_a_decompression_bomb_is_refused_from_its_header(
    size, limit_of_pillow, tmp_path: Path, digests: Digests, monkeypatch
):
    # Some formats draw when they are imported.
    Image.init()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit_of_pillow)
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(*size))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    for action in (FileSource.size, FileSource.open):
        with warnings.catch_warnings(), pytest.raises(DataError, match=r"bomb.png: .*(179 million|178956970)"):
            warnings.simplefilter("ignore")
            action(FileSource(path, digests))


def test_listing_reads_headers_only(tmp_path: Path, digests: Digests, monkeypatch):
    folder = make_pairs(tmp_path / "set", ["a", "b"])
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    monkeypatch.setattr(Digests, "sha256", lambda self, path: pytest.fail("bytes were hashed"))
    assert len(dataset.read(Pairs(path=str(folder)), digests)) == 2


def test_the_digest_is_of_the_bytes_and_not_of_the_name(tmp_path: Path, digests: Digests):
    drawing(1).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    drawing(2).save(tmp_path / "c.png")
    a, b, c = (FileSource(tmp_path / f"{name}.png", digests).digest() for name in "abc")
    assert a == b != c
    assert len(a) == 64


def test_fitting_covers_the_size_and_cuts_at_the_centre():
    wide = Image.new("RGB", (40, 10), GREEN)
    wide.paste(RED, (0, 0, 10, 10))
    wide.paste(BLUE, (30, 0, 40, 10))
    pixels = fit(wide, 16, 16)
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert (pixels == GREEN).all()
    pixels = fit(wide, 80, 20)
    assert tuple(pixels[10, 0]) == RED
    assert tuple(pixels[10, 79]) == BLUE
    np.testing.assert_array_equal(fit(wide, 80, 20, flip=True), pixels[:, ::-1])
    np.testing.assert_array_equal(fit(wide, 40, 10), np.asarray(wide))


def test_described_scenes_have_no_control_and_say_what_they_show(digests: Digests):
    samples = dataset.read(Demo(resolution="64", task=Task.describe, pairs=8, held_out=2), digests)
    assert {len(sample.controls) for sample in samples} == {0} and len({sample.caption for sample in samples}) == 10
    assert all(re.fullmatch(r"a \w+ \w+( and a \w+ \w+)*, \w+", sample.caption) for sample in samples)
