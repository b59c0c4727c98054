"""Datasets with faults and the real program: images, file names, captions and pickles (F21 to F24, F30)."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from images import decompression_bomb, random_image, save_image
from layouts import WRITERS, caption, read_samples, write_arrays, write_concepts, write_imagefolder, write_pairs
from PIL import Image
from program import Harness, Result, records, single_run, snapshot

from trainer.core.digests import Digests
from trainer.dataset.captions_json import CaptionsJson

SHORT = ["steps=2", "batch=4", "evaluation.every=2", "evaluation.samples=2", "save.every=2"]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(tmp_path_factory.mktemp("harness"))


def check(harness: Harness, layout: str, folder: Path, *settings: str, setup=None) -> Result:
    """Runs stage=check."""
    own = [f"dataset={layout}", f"dataset.path={folder}", "stage=check"]
    return harness.run(harness.new_folder(), *own, *settings, setup=setup)


# Good datasets


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_trains(layout: str, harness: Harness, folder: Path):
    WRITERS[layout](folder, 6)
    settings = [f"dataset={layout}", f"dataset.path={folder}", "dataset.validation_fraction=0.4"]
    run = harness.finish(harness.new_folder(), *settings, *SHORT)
    metrics = [record["values"] for record in records(run, "metrics")]
    assert len([values for values in metrics if "train/loss" in values]) == 2
    assert any("val/loss" in values for values in metrics)


def test_buckets_masks_and_flips_train_together(harness: Harness, folder: Path):
    sizes = [(40, 32), (32, 56), (64, 32), (32, 32)]
    rows = []
    for i in range(8):
        save_image(folder / "images" / f"{i}.png", i, sizes[i % 4])
        rows.append({"file_name": f"{i}.png", "text": caption(i)})
    save_image(folder / "masks" / "1.png", 50, sizes[1])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = ["dataset=imagefolder", f"dataset.path={folder}", "dataset.validation_fraction=0.3"]
    run = harness.finish(harness.new_folder(), *settings, "dataset.buckets=true", "dataset.flip=true", *SHORT)
    assert records(run, "checkpoint")


def test_an_epoch_visits_samples_as_often_as_their_repeats(harness: Harness, folder: Path):
    write_concepts(folder, 2)
    settings = [f"dataset.path={folder}", "dataset.repeats={toy: 3}", "dataset.weights.clock=0.5"]
    length = ["dataset.validation_fraction=0", "evaluation.images=0", "steps=null", "epochs=1", "batch=1"]
    run = harness.finish(harness.new_folder(), "dataset=concepts", *settings, *length)
    assert max(record["step"] for record in records(run, "metrics")) == 2 + 3 * 2


def test_limit_applies_to_training_and_validation(harness: Harness, folder: Path):
    write_arrays(folder, 6)
    out = harness.new_folder()
    harness.finish(out, "dataset=arrays", f"dataset.path={folder}", "dataset.limit=2", *SHORT)
    (attempt,) = records(single_run(out), "attempt")
    assert "2 samples, 2 held out" in attempt["counts"]


# F21, F22: images


def damage_images(folder: Path) -> dict[str, str]:
    """Replaces good images by bad ones. Returns name -> pattern of the fault."""
    images = folder / "images"
    whole = (images / "2.jpg").read_bytes()
    (images / "0.jpg").write_bytes(b"")
    (images / "1.jpg").write_bytes(b"<!DOCTYPE html><p>404")
    (images / "2.jpg").write_bytes(whole[: len(whole) // 2])
    random_image(3).save(images / "3.jpg", "GIF", save_all=True, append_images=[random_image(4)])
    Image.new("RGB", (1, 1)).save(images / "4.jpg", "PNG")
    Image.new("RGB", (640, 64)).save(images / "5.jpg")
    (images / "6.jpg").write_bytes(decompression_bomb(60_000, 60_000))
    (images / "7.jpg").write_bytes(pickle.dumps({"a": 1}))
    return {
        "0.jpg": "the file is empty",
        "1.jpg": "is an HTML page",
        "2.jpg": "cannot be decoded",
        "3.jpg": "contains several images",
        "4.jpg": "too few",
        "5.jpg": "too long and thin",
        "6.jpg": "bomb|million",
        "7.jpg": "is not an image that can be read",
    }


def test_bad_images_are_listed_before_anything_is_loaded(harness: Harness, folder: Path):
    write_imagefolder(folder, 12)
    faults = damage_images(folder)
    before = snapshot(folder)
    out = harness.new_folder()
    checked = check(harness, "imagefolder", folder)
    trained = harness.run(out, "dataset=imagefolder", f"dataset.path={folder}", f"cache.path={out / 'cache'}")
    for result in (checked, trained):
        assert result.code == 65
        for name, reason in faults.items():
            assert re.search(rf"{re.escape(name)}: .*({reason})", result.output), name
    assert "8 faults in 12 samples" in checked.output
    assert not list(out.glob("*/run.json")) and not list(out.rglob("*.safetensors"))
    assert snapshot(folder) == before


def test_on_fault_skip_leaves_bad_samples_out_and_records_them(harness: Harness, folder: Path):
    write_imagefolder(folder, 16)
    faults = damage_images(folder)
    skip = ["dataset.on_fault=skip", "dataset.validation_fraction=0.3"]
    settings = ["dataset=imagefolder", f"dataset.path={folder}", *skip, *SHORT]
    out = harness.new_folder()
    run = harness.finish(out, *settings)
    (left_out,) = records(run, "left_out")
    assert len(left_out["faults"]) == len(faults)
    assert all(any(name in fault for fault in left_out["faults"]) for name in faults)
    checked = check(harness, "imagefolder", folder, *skip)
    assert checked.code == 0
    assert "8 faults in 16 samples" in checked.output and "left out" in checked.output
    # With a repaired image it is a different dataset, so the run does not continue.
    random_image(0).save(folder / "images" / "0.jpg")
    refused = harness.run(out, *settings, "fresh=false")
    assert refused.code == 64 and "started with different data" in refused.output


def test_one_image_in_several_formats_is_read_alike(harness: Harness, folder: Path):
    plain = random_image(1, (32, 32))
    images = folder / "images"
    images.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    plain.transpose(Image.Transpose.ROTATE_90).save(images / "turned.png", exif=exif)
    plain.convert("CMYK").save(images / "ink.tif")
    plain.quantize(256).save(images / "palette.png")
    plain.convert("RGBA").save(images / "alpha.png")
    plain.save(images / "plain.png")
    Image.fromarray(np.asarray(plain.convert("L"), np.uint16) * 257).save(images / "deep.png")
    plain.convert("L").save(images / "gray.png")
    names = sorted(path.name for path in images.iterdir())
    (folder / "captions.json").write_text(json.dumps(dict.fromkeys(names, "the same")))
    checked = check(harness, "captions_json", folder, "dataset.validation_fraction=0", "evaluation.images=0")
    assert checked.code == 0
    assert "images that look alike" in checked.output
    samples = read_samples(CaptionsJson(path=str(folder)), Digests(folder / "digests"))
    pixels = {sample.id.removeprefix("images/"): np.asarray(sample.image.open(), int) for sample in samples}
    for name in ("turned", "alpha"):
        assert np.array_equal(pixels[name], pixels["plain"])
    assert np.abs(pixels["palette"] - pixels["plain"]).max() <= 8
    assert np.abs(pixels["ink"] - pixels["plain"]).max() <= 3
    assert np.array_equal(pixels["deep"], pixels["gray"])


def test_decompression_bomb_takes_no_memory(harness: Harness, folder: Path, tmp_path: Path):
    write_imagefolder(folder, 3)
    (folder / "images" / "1.jpg").write_bytes(decompression_bomb(13_378, 13_378))
    growth = tmp_path / "growth"

    def setup() -> None:
        import resource

        from trainer.dataset import image_facts

        first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        inspect_images = image_facts.inspect_images

        def measured(*arguments):
            facts = inspect_images(*arguments)
            growth.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first))
            return facts

        image_facts.inspect_images = measured

    result = check(harness, "imagefolder", folder, setup=setup)
    assert result.code == 65 and re.search(r"1\.jpg: .*(million|bomb)", result.output)
    assert int(growth.read_text()) < 200 * 1024


# F23: file names


def test_file_names_that_lead_outside_are_refused_and_not_opened(harness: Harness, folder: Path, tmp_path: Path):
    secret = save_image(tmp_path / "secret" / "secret.png", 9)
    write_imagefolder(folder, 2)
    (folder / "link.png").symlink_to(secret)
    names = ["../secret/secret.png", str(secret), "link.png", "a\0.png", "..\\secret\\secret.png", "C:/secret.png"]
    with open(folder / "metadata.jsonl", "a") as file:
        file.writelines(json.dumps({"file_name": name, "text": "x"}) + "\n" for name in names)
    (folder / "table.csv").write_text("file_name,text\n" + "".join(f"{name},x\n" for name in names if "\0" not in name))
    opened = tmp_path / "opened"

    def setup() -> None:
        def hook(event: str, arguments: tuple) -> None:
            if event == "open" and "secret" in str(arguments[0]):
                opened.touch()

        sys.addaudithook(hook)

    for layout, count in (("imagefolder", len(names)), ("csv", len(names) - 1)):
        result = check(harness, layout, folder, setup=setup)
        assert result.code == 65
        assert f"{count} faults" in result.output
        assert not opened.exists()


# F24: captions and pairs


def test_bad_captions_and_pairs_are_reported_with_counts(harness: Harness, folder: Path):
    write_pairs(folder, 8)
    targets = folder / "training_images"
    (targets / "0.txt").unlink()
    (targets / "1.txt").write_text("  ")
    (targets / "2.txt").write_text("a" * 100_000)
    (folder / "control_images" / "3.jpg").unlink()
    (targets / "4.txt").write_text(caption(5))
    for name in ("Case", "case"):
        save_image(folder / "control_images" / f"{name}.jpg", 9)
        save_image(targets / f"{name}.png", 9)
        (targets / f"{name}.txt").write_text("x")
    result = check(harness, "pairs", folder)
    assert result.code == 65
    for line in (
        "0.txt: there is no such instruction",
        "1.txt: the caption is empty",
        "2.txt: the caption has 100000 characters",
        "control_images/3.*: there is no such control image",
        "differs in case only from",
        "5 faults in 10 samples",
        "2 samples share 1 caption(s)",
    ):
        assert line in result.output, line


def test_check_reports_duplicates_leaks_and_lengths_and_shows_samples(harness: Harness, folder: Path):
    write_imagefolder(folder / "train", 5)
    write_imagefolder(folder / "test", 2)
    shutil.copy(folder / "train/images/0.jpg", folder / "train/images/1.jpg")
    for i in range(2):
        shutil.copy(folder / f"train/images/{3 + i}.jpg", folder / f"test/images/{i}.jpg")
    with Image.open(folder / "train/images/4.jpg") as image:
        image.resize((80, 64)).save(folder / "test/images/1.jpg", quality=40)
    rows = [json.dumps({"file_name": f"{i}.jpg", "text": "word " * (40 if i == 2 else 2)}) for i in range(5)]
    (folder / "train/metadata.jsonl").write_text("\n".join(rows))
    result = check(harness, "imagefolder", folder, "dataset.resolution=64", "model.text_length=12")
    assert result.code == 0, result.output
    for line in (
        "5 for training, 2 held out",
        "64x64 px: 5 for training, 2 held out",
        "original sizes: 40x32 to 80x64 px",
        "tokens (tokenizer_2): ",
        "6 images are enlarged, up to 2.0 times",
        "3 captions are longer than the 12 tokens that the model reads (tokenizer_2), and are cut off: train/images/2",
        "the same image is the target of several samples, 2 time(s): {",
        "images that look alike, 1 group(s)",
        "both in training and held out, so that the held-out loss is too low, 2 group(s)",
    ):
        assert line in result.output, line
    path = re.search(r"^sheet +(.+)$", result.output, re.MULTILINE)[1]
    with Image.open(path) as image:
        assert image.width > 400 and len(image.getcolors(2**24)) > 50


# F30: pickles


class Payload:
    """Creates the folder `marker` when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_pickles_are_never_executed(harness: Harness, folder: Path, tmp_path: Path):
    marker = tmp_path / "executed"
    payload = pickle.dumps(Payload(marker))
    arrays, images, hub, pairs = (folder / name for name in ("arrays", "images", "hub", "pairs"))
    write_arrays(arrays, 3)
    descriptions = arrays / "train_descriptions.npy"
    np.save(descriptions, np.array([Payload(marker)] * 3, object), allow_pickle=True)
    result = check(harness, "arrays", arrays)
    assert result.code == 65 and "contains Python objects" in result.output and "np.save(" in result.output
    descriptions.write_bytes(payload)
    assert check(harness, "arrays", arrays).code == 65
    write_imagefolder(images, 3)
    (images / "images" / "1.jpg").write_bytes(payload)
    assert check(harness, "imagefolder", images).code == 65
    hub.mkdir()
    (hub / "train.pkl").write_bytes(payload)
    assert check(harness, "hub", hub).code == 65
    write_pairs(pairs, 3)
    cache = tmp_path / "cache"
    settings = ["dataset=pairs", f"dataset.path={pairs}", f"cache.path={cache}", "dataset.validation_fraction=0"]
    assert harness.run(harness.new_folder(), *settings, "stage=cache").code == 0
    for entry in cache.rglob("*.safetensors"):
        entry.write_bytes(payload)
    result = harness.run(harness.new_folder(), *settings, *SHORT)
    assert result.code == 65 and "is damaged" in result.output
    assert not marker.exists()
