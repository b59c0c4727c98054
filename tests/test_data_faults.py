"""Faults in what a user brings, met by the real program: F17, F19 to F24 and F30 of the project's list of faults."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import layouts
import numpy as np
import pytest
from layouts import drawing, save, text
from PIL import Image
from program import Lab, at, only_run, records, start, tree

LITTLE = "steps=2 batch=4 evaluation.every=2 evaluation.samples=2 save.every=2"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "set"


def report(lab: Lab, layout: str, folder: Path, *settings: str) -> tuple[int, str]:
    """Exit code and output of stage=check."""
    ended = lab.run(lab.place(), f"dataset={layout}", f"dataset.path={folder}", "stage=check", *settings)
    return ended.code, ended.text


def made(lab: Lab, folder: Path, cache: Path, *settings: str, layout: str = "pairs", before=None) -> dict[str, int]:
    """What stage=cache has to make."""
    out = lab.place()
    own = [f"dataset={layout}", f"dataset.path={folder}", "dataset.validation_fraction=0", f"cache.path={cache}"]
    ended = lab.run(out, *own, "stage=cache", *settings, before=before)
    assert ended.code == 0, ended
    line = next(line for line in ended.text.splitlines() if line.startswith("cache "))
    return {name: int(count) for count, name in re.findall(r"(\d+) (\w+) made", line)}


def counts(latents: int = 0, prompt: int = 0, pooled: int = 0, control: int = 0) -> dict[str, int]:
    return {"latents": latents, "prompt": prompt, "pooled": pooled, "control": control}


# what users bring


@pytest.mark.parametrize("layout", layouts.make)
def test_every_layout_trains(layout: str, lab: Lab, folder: Path):
    layouts.make[layout](folder, 6)
    extra = ["dataset.validation_fraction=0.4"]
    run = lab.finish(lab.place(), f"dataset={layout}", f"dataset.path={folder}", *extra, *LITTLE.split())
    assert len([r for r in records(run, "metrics") if "train/loss" in r["values"]]) == 2
    assert "val/loss" in {key for r in records(run, "metrics") for key in r["values"]}


def test_shapes_masks_weights_and_repeats_train_together(lab: Lab, folder: Path):
    sizes = [(40, 32), (32, 56), (64, 32), (32, 32)]
    rows = []
    for i in range(8):
        save(folder / "images" / f"{i}.png", i, sizes[i % 4])
        rows.append({"file_name": f"{i}.png", "text": text(i)})
    save(folder / "masks" / "1.png", 50, sizes[1])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = [
        "dataset=imagefolder",
        f"dataset.path={folder}",
        "dataset.buckets=true",
        "dataset.flip=true",
        "dataset.validation_fraction=0.3",
    ]
    run = lab.finish(lab.place(), *settings, *LITTLE.split())
    assert records(run, "checkpoint")
    other = folder / "concepts"
    layouts.concepts(other, 2)
    repeats = [
        f"dataset.path={other}",
        "dataset.repeats={toy: 3}",
        "dataset.weights.clock=0.5",
        "dataset.validation_fraction=0",
    ]
    run = lab.finish(
        lab.place(), "dataset=concepts", *repeats, "steps=null", "epochs=1", "batch=1", "evaluation.images=0"
    )
    assert max(record["step"] for record in records(run, "metrics")) == 2 + 3 * 2


# F21, F22: pictures


def bomb(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def spoil(folder: Path) -> dict[str, str]:
    """Bad pictures in place of good ones, and what is to be said of each."""
    images = folder / "images"
    whole = (images / "2.jpg").read_bytes()
    (images / "0.jpg").write_bytes(b"")
    (images / "1.jpg").write_bytes(b"<!DOCTYPE html><p>404")
    (images / "2.jpg").write_bytes(whole[: len(whole) // 2])
    drawing(3).save(images / "3.jpg", "GIF", save_all=True, append_images=[drawing(4)])
    Image.new("RGB", (1, 1)).save(images / "4.jpg", "PNG")
    Image.new("RGB", (640, 64)).save(images / "5.jpg")
    (images / "6.jpg").write_bytes(bomb(60_000, 60_000))
    (images / "7.jpg").write_bytes(pickle.dumps({"a": 1}))
    return {
        "0.jpg": "the file is empty",
        "1.jpg": "is an HTML page",
        "2.jpg": "cannot be decoded",
        "3.jpg": "holds several pictures",
        "4.jpg": "too few",
        "5.jpg": "too long and thin",
        "6.jpg": "bomb|million",
        "7.jpg": "is not a picture that can be read",
    }


def test_every_bad_picture_is_listed_before_anything_is_loaded(lab: Lab, folder: Path):
    layouts.imagefolder(folder, 12)
    said = spoil(folder)
    before = tree(folder)
    code, output = report(lab, "imagefolder", folder)
    assert code == 65
    for name, reason in said.items():
        assert re.search(rf"{re.escape(name)}: .*({reason})", output), name
    assert "8 faults in 12 samples" in output
    # Training says the same before it loads or makes anything, and leaves no run behind.
    out = lab.place()
    ended = lab.run(out, "dataset=imagefolder", f"dataset.path={folder}", f"cache.path={out / 'cache'}")
    assert ended.code == 65
    for name, reason in said.items():
        assert re.search(rf"{re.escape(name)}: .*({reason})", ended.text), name
    assert not list(out.glob("*/run.json")) and not list(out.rglob("*.safetensors"))
    assert tree(folder) == before


def test_on_request_bad_samples_are_left_out_and_written_down(lab: Lab, folder: Path):
    layouts.imagefolder(folder, 16)
    said = spoil(folder)
    settings = [
        "dataset=imagefolder",
        f"dataset.path={folder}",
        "dataset.on_fault=skip",
        "dataset.validation_fraction=0.3",
    ]
    out = lab.place()
    run = lab.finish(out, *settings, *LITTLE.split())
    (left_out,) = records(run, "left_out")
    assert len(left_out["faults"]) == len(said)
    assert all(any(name in fault for fault in left_out["faults"]) for name in said)
    code, output = report(lab, "imagefolder", folder, "dataset.on_fault=skip", "dataset.validation_fraction=0.3")
    assert code == 0
    assert "8 faults in 16 samples" in output and "left out" in output
    # A picture that is mended makes it another data set: the run does not go on with a mixture.
    drawing(0).save(folder / "images" / "0.jpg")
    refused = lab.run(out, *settings, *LITTLE.split(), "fresh=false")
    assert refused.code in (0, 64) and ("began with other data" in refused.text or "is finished" in refused.text)


def test_odd_pictures_are_read_right(lab: Lab, folder: Path):
    """Each is the same picture; so encoded, all are the same entry or near it."""
    plain = drawing(1, (32, 32))
    images = folder / "images"
    images.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    plain.transpose(Image.Transpose.ROTATE_90).save(images / "turned.png", exif=exif)
    plain.convert("CMYK").save(images / "ink.tif")
    plain.quantize(256).save(images / "palette.png")
    layer = plain.convert("RGBA")
    layer.save(images / "alpha.png")
    plain.save(images / "plain.png")
    grey = np.asarray(plain.convert("L"), np.uint16) * 257
    Image.fromarray(grey).save(images / "deep.png")
    plain.convert("L").save(images / "grey.png")
    names = sorted(path.name for path in images.iterdir())
    (folder / "captions.json").write_text(json.dumps(dict.fromkeys(names, "the same")))
    code, output = report(lab, "captions_json", folder, "dataset.validation_fraction=0", "evaluation.images=0")
    assert code == 0
    assert "images that look alike" in output
    from trainer import dataset
    from trainer.core.digests import Digests

    pixels = {
        s.id: np.asarray(s.image.open(), int)
        for s in dataset.read(dataset.CaptionsJson(path=str(folder)), Digests(folder / "d"))
    }
    for name in ("turned", "alpha"):
        assert np.array_equal(pixels[f"images/{name}"], pixels["images/plain"])
    assert np.abs(pixels["images/palette"] - pixels["images/plain"]).max() <= 8
    assert np.abs(pixels["images/ink"] - pixels["images/plain"]).max() <= 3
    assert np.array_equal(pixels["images/deep"], pixels["images/grey"])


def test_a_bomb_costs_no_memory(lab: Lab, folder: Path, tmp_path: Path):
    layouts.imagefolder(folder, 3)
    (folder / "images" / "1.jpg").write_bytes(bomb(13_378, 13_378))
    peak = tmp_path / "peak"

    def before() -> None:
        import resource

        from trainer.dataset import survey

        first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        real = survey.inspected

        def watched(*arguments):
            facts = real(*arguments)
            peak.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first))
            return facts

        survey.inspected = watched

    ended = lab.run(lab.place(), "dataset=imagefolder", f"dataset.path={folder}", "stage=check", before=before)
    assert ended.code == 65 and re.search(r"1\.jpg: .*million|1\.jpg: .*bomb", ended.text)
    assert int(peak.read_text()) < 200 * 1024


# F23: names


def test_a_name_that_climbs_out_is_refused_and_its_file_never_opened(lab: Lab, folder: Path, tmp_path: Path):
    secret = save(tmp_path / "secret" / "secret.png", 9)
    layouts.imagefolder(folder, 2)
    (folder / "link.png").symlink_to(secret)
    names = ["../secret/secret.png", str(secret), "link.png", "a\0.png", "..\\secret\\secret.png", "C:/secret.png"]
    with open(folder / "metadata.jsonl", "a") as file:
        file.writelines(json.dumps({"file_name": name, "text": "x"}) + "\n" for name in names)
    (folder / "table.csv").write_text("file_name,text\n" + "".join(f"{name},x\n" for name in names if "\0" not in name))
    opened = tmp_path / "opened"

    def before() -> None:
        def hook(event: str, arguments: tuple) -> None:
            if event == "open" and "secret" in str(arguments[0]):
                opened.touch()

        sys.addaudithook(hook)

    for layout, refused in (("imagefolder", len(names)), ("csv", len(names) - 1)):
        ended = lab.run(lab.place(), f"dataset={layout}", f"dataset.path={folder}", "stage=check", before=before)
        assert ended.code == 65
        assert f"{refused} faults" in ended.text
        assert not opened.exists()


# F24: captions and pairs


def test_faulty_captions_and_pairs_are_reported_with_counts(lab: Lab, folder: Path):
    layouts.pairs(folder, 8)
    texts = folder / "training_images"
    (texts / "0.txt").unlink()
    (texts / "1.txt").write_text("  ")
    (texts / "2.txt").write_text("a" * 100_000)
    (folder / "control_images" / "3.jpg").unlink()
    (texts / "4.txt").write_text(text(5))
    for name in ("Case", "case"):
        for part, ending in (("control_images", "jpg"), ("training_images", "png")):
            save(folder / part / f"{name}.{ending}", 9)
        (texts / f"{name}.txt").write_text("x")
    code, output = report(lab, "pairs", folder)
    assert code == 65
    for fault in (
        "0.txt: there is no such instruction",
        "1.txt: the caption is empty",
        "2.txt: the caption has 100000 characters",
        "control_images/3.*: there is no such control picture",
        "differs in case only from",
        "5 faults in 10 samples",
        "2 samples share 1 caption(s)",
    ):
        assert fault in output, fault


def test_the_report_tells_of_doubles_leaks_lengths_and_shows_samples(lab: Lab, folder: Path):
    layouts.imagefolder(folder / "train", 5)
    layouts.imagefolder(folder / "test", 2)
    shutil.copy(folder / "train/images/0.jpg", folder / "train/images/1.jpg")
    for i in range(2):
        shutil.copy(folder / f"train/images/{3 + i}.jpg", folder / f"test/images/{i}.jpg")
    with Image.open(folder / "train/images/4.jpg") as image:
        image.resize((80, 64)).save(folder / "test/images/1.jpg", quality=40)
    rows = [json.dumps({"file_name": f"{i}.jpg", "text": "word " * (40 if i == 2 else 2)}) for i in range(5)]
    (folder / "train/metadata.jsonl").write_text("\n".join(rows))
    code, output = report(lab, "imagefolder", folder, "dataset.resolution=64", "model.text_length=12")
    assert code == 0, output
    for line in (
        "5 for training, 2 held out",
        "64x64 px: 5 for training, 2 held out",
        "original sizes: 40x32 to 80x64 px",
        "6 images are enlarged, up to 2.0 times",
        "3 captions are longer than the 12 tokens that the model reads, and are cut off: train/images/2, test/images/0",
        "the same image is the target of several samples, 2 time(s): {",
        "images that look alike, 1 group(s)",
        "both in training and held out, so that the held-out loss is too low, 2 group(s)",
    ):
        assert line in output, line
    sheet = re.search(r"^sheet +(.+)$", output, re.MULTILINE)[1]
    with Image.open(sheet) as image:
        assert image.width > 400 and len(image.getcolors(2**24)) > 50


# F17: what is not finite


def nan_for(part: str) -> Callable[[], None]:
    def before() -> None:
        from trainer.config.groups import GROUPS

        family = next(iter(GROUPS["model"].values()))
        real = family.build_encoder

        def encoder(self, device):
            made = real(self, device)
            encode = made.encode

            def spoiled(name, view):
                tensor = encode(name, view)
                return tensor * float("nan") if name == part and view.sample.id == "1" else tensor

            made.encode = spoiled
            return made

        family.build_encoder = encoder

    return before


def test_a_nan_from_the_encoder_is_refused_with_its_picture_and_not_kept(lab: Lab, folder: Path, tmp_path: Path):
    layouts.pairs(folder, 4)
    cache = tmp_path / "cache"
    settings = [
        "dataset=pairs",
        f"dataset.path={folder}",
        "dataset.validation_fraction=0",
        f"cache.path={cache}",
        "stage=cache",
    ]
    ended = lab.run(lab.place(), *settings, before=nan_for("latents"))
    assert ended.code == 65
    assert f"{folder}/training_images/1.png: its latents came out of the encoder as NaN or infinity" in ended.text
    # The others are kept, and the one is made once the encoder is sound.
    assert made(lab, folder, cache) == counts(latents=1)


def test_a_nan_planted_in_the_cache_is_refused_with_its_file(lab: Lab, folder: Path, tmp_path: Path):
    from safetensors.torch import load, save

    layouts.pairs(folder, 6)
    cache = tmp_path / "cache"
    settings = [
        "dataset=pairs",
        f"dataset.path={folder}",
        f"cache.path={cache}",
        "dataset.validation_fraction=0.3",
        *LITTLE.split(),
    ]
    made(lab, folder, cache, "dataset.validation_fraction=0.3")
    for entry in (cache / "latents").rglob("*.safetensors"):
        data = entry.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        value = load(data)["value"]
        value[0] = float("nan")
        entry.write_bytes(save({"value": value}, header["__metadata__"]))
    ended = lab.run(lab.place(), *settings)
    assert ended.code == 65
    assert re.search(rf"The cache entry {re.escape(str(cache))}/latents/\w\w/\w+\.safetensors is damaged", ended.text)
    assert lab.run(lab.place(), *settings, "cache.verify=full").code == 0


# F19: exactly what changed is made again


def test_exactly_the_entries_concerned_are_made_again(lab: Lab, folder: Path, tmp_path: Path):
    layouts.pairs(folder, 5)
    cache, targets = tmp_path / "cache", folder / "training_images"
    assert made(lab, folder, cache) == counts(5, 5, 5, 5)
    assert made(lab, folder, cache) == counts()

    (targets / "2.txt").write_text("another instruction")
    assert made(lab, folder, cache) == counts(prompt=1, pooled=1)

    # Other bytes under the same name, size and time.
    path = targets / "3.png"
    status = path.stat()
    other = io.BytesIO()
    drawing(77).save(other, "PNG")
    length = max(status.st_size, len(other.getvalue())) + 8
    path.write_bytes(path.read_bytes().ljust(length, b"\0"))
    assert made(lab, folder, cache) == counts(latents=1)
    status = path.stat()
    for data, expected in ((other.getvalue(), counts(latents=1)), (path.read_bytes(), counts())):
        with open(path, "r+b") as file:
            file.write(data.ljust(length, b"\0"))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino) == (
            length,
            status.st_mtime_ns,
            status.st_ino,
        )
        assert made(lab, folder, cache) == expected

    assert made(lab, folder, cache, "dataset.resolution=48") == counts(latents=5, control=5)
    assert made(lab, folder, cache, "dataset.control_resolution=16") == counts(control=5)
    assert made(lab, folder, cache, "dataset.flip=true") == counts(latents=5, control=5)
    assert made(lab, folder, cache, "dataset.caption_dropout=0.5") == counts(prompt=1, pooled=1)
    assert made(lab, folder, cache, "model.text_length=6") == counts(prompt=5)
    assert made(lab, folder, cache, "model.encoder_dtype=float32") == counts(5, 5, 5, 5)
    assert made(lab, folder, cache) == counts()
    raised = at("trainer.run:execute", 1, lambda: setattr(sys.modules["trainer.cache.entry"], "SCHEMA", 999))
    assert made(lab, folder, cache, before=raised) == counts(5, 5, 5, 5)


def test_other_weights_or_tokenizers_make_their_parts_again(lab: Lab, folder: Path, tmp_path: Path):
    layouts.pairs(folder, 3)
    cache = tmp_path / "cache"
    base = Path(
        next(setting for setting in lab.settings if setting.startswith("model.path=")).removeprefix("model.path=")
    )
    assert made(lab, folder, cache) == counts(3, 3, 3, 3)
    for component, expected in (
        ("vae", counts(latents=3, control=3)),
        ("text_encoder", counts(pooled=3)),
        ("tokenizer", counts(pooled=3)),
        ("text_encoder_2", counts(prompt=3)),
        ("tokenizer_2", counts(prompt=3)),
        ("transformer", counts()),
    ):
        copy = Path(shutil.copytree(base, tmp_path / component))
        config = next(path for path in sorted((copy / component).glob("*.json")) if "config" in path.name)
        config.write_text(config.read_text() + " ")
        assert made(lab, folder, cache, f"model.path={copy}") == expected, component


# F20: writers that die, writers at once


def test_a_killed_writer_and_two_at_once_leave_what_one_makes(lab: Lab, folder: Path, tmp_path: Path):
    layouts.pairs(folder, 4)

    def entries(root: Path) -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("[0-9a-f]*.safetensors")}

    made(lab, folder, tmp_path / "serial")
    serial = entries(tmp_path / "serial")
    assert len(serial) == 16
    cache = tmp_path / "killed"
    own = [
        "dataset=pairs",
        f"dataset.path={folder}",
        "dataset.validation_fraction=0",
        f"cache.path={cache}",
        f"out={tmp_path / 'out'}",
    ]
    settings = [*lab.settings, *own, "stage=cache"]
    dies = at("trainer.cache.store:os.replace", 8, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert start(settings, tmp_path / "text", dies).wait().code == -signal.SIGKILL
    there = entries(cache)
    assert 0 < len(there) < 16 and there.items() <= serial.items()
    both = [start(settings, tmp_path / f"text-{i}") for i in range(2)]
    assert [process.wait().code for process in both] == [0, 0]
    assert entries(cache) == serial


@pytest.mark.slow  # the processes import what this one has imported already
def test_several_processes_encode_the_same_entries(lab: Lab, folder: Path, tmp_path: Path):
    layouts.pairs(folder, 4)
    save(folder / "masks" / "1.png", 5)
    one = made(lab, folder, tmp_path / "one")
    assert made(lab, folder, tmp_path / "two", "cache.workers=2") == one
    trees = [
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*.safetensors")}
        for root in (tmp_path / "one", tmp_path / "two")
    ]
    assert trees[0] == trees[1] and len(trees[0]) == sum(one.values()) > 16


def test_what_no_run_uses_is_dropped_on_request_only(lab: Lab, folder: Path, tmp_path: Path):
    layouts.pairs(folder, 6)
    cache, out = tmp_path / "cache", lab.place()
    settings = ["dataset=pairs", f"dataset.path={folder}", f"cache.path={cache}", "dataset.validation_fraction=0.3"]
    run = lab.finish(out, *settings, *LITTLE.split())
    used = set(cache.rglob("*.safetensors"))
    made(lab, folder, cache, "dataset.resolution=16")
    more = set(cache.rglob("*.safetensors"))
    assert more > used

    def drop() -> str:
        ended = lab.run(lab.place(), *settings, "dataset.resolution=48", "stage=cache", "cache.drop_unused=true")
        assert ended.code == 0, ended
        return ended.text

    assert f"dropped {len(more - used)} entries that no run uses" in drop()
    assert set(cache.rglob("*.safetensors")) >= used
    assert lab.run(out, *settings, *LITTLE.split()).code == 0
    shutil.rmtree(run)
    shown = drop()
    assert "dropped 0 entries" not in shown
    rest = set(cache.rglob("*.safetensors"))
    assert not rest & {path for path in used if path.parts[-3] in ("latents", "control")}
    assert f"total       {len(rest)} entries" in shown


def test_no_encoder_is_left_when_the_denoiser_loads(lab: Lab, folder: Path, tmp_path: Path):
    def look() -> None:
        import gc

        import torch

        modules = [thing for thing in gc.get_objects() if isinstance(thing, torch.nn.Module)]
        left = {type(module).__name__ for module in modules if next(module.parameters(), None) is not None}
        (tmp_path / "left").write_text(" ".join(sorted(left)))

    layouts.pairs(folder, 3)
    settings = [
        "dataset=pairs",
        f"dataset.path={folder}",
        "dataset.validation_fraction=0",
        "evaluation.images=0",
        f"cache.path={tmp_path / 'c'}",
    ]
    lab.finish(lab.place(), *settings, "steps=1", before=at("trainer.training.build:build_network", 1, look))
    assert list((tmp_path / "c").rglob("*.safetensors"))
    assert (tmp_path / "left").read_text() == ""


# F30: pickles


class Bomb:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_pickles_are_never_executed_wherever_they_lie(lab: Lab, folder: Path, tmp_path: Path):
    marker = tmp_path / "executed"
    payload = pickle.dumps(Bomb(marker))
    layouts.arrays(folder / "arrays", 3)
    np.save(folder / "arrays" / "train_descriptions.npy", np.array([Bomb(marker)] * 3, object), allow_pickle=True)
    code, output = report(lab, "arrays", folder / "arrays")
    assert code == 65 and "holds Python objects" in output and "np.save(" in output
    (folder / "arrays" / "train_descriptions.npy").write_bytes(payload)
    assert report(lab, "arrays", folder / "arrays")[0] == 65
    layouts.imagefolder(folder / "pictures", 3)
    (folder / "pictures" / "images" / "1.jpg").write_bytes(payload)
    assert report(lab, "imagefolder", folder / "pictures")[0] == 65
    (folder / "hub").mkdir()
    (folder / "hub" / "train.pkl").write_bytes(payload)
    assert report(lab, "hub", folder / "hub")[0] == 65
    layouts.pairs(folder / "pairs", 3)
    cache = tmp_path / "cache"
    made(lab, folder / "pairs", cache)
    for entry in cache.rglob("*.safetensors"):
        entry.write_bytes(payload)
    settings = [
        "dataset=pairs",
        f"dataset.path={folder / 'pairs'}",
        f"cache.path={cache}",
        "dataset.validation_fraction=0",
    ]
    ended = lab.run(lab.place(), *settings, *LITTLE.split())
    assert ended.code == 65 and "is damaged" in ended.text
    assert not marker.exists()


def test_the_limit_is_for_each_split(lab: Lab, folder: Path):
    layouts.arrays(folder, 6)
    out = lab.place()
    lab.finish(out, "dataset=arrays", f"dataset.path={folder}", "dataset.limit=2", *LITTLE.split())
    (attempt,) = records(only_run(out), "attempt")
    assert "2 samples, 2 held out" in attempt["counts"]
