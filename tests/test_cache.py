"""The cache: which changes make an entry again, damaged entries, several processes, and encoding faults."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.cache import entry
from trainer.cache.store import ABANDONED_AFTER, Cache, count_outcomes
from trainer.config.sections import CacheSettings
from trainer.core import digests, files
from trainer.core.digests import Digests
from trainer.core.errors import DataError, StorageError, UsageError
from trainer.dataset.pairs import Pairs
from trainer.dataset.sample import Sample
from trainer.dataset.transform import TransformedSample
from trainer.model import Recipe

RECIPES = {
    "latents": Recipe(("image",), "vae 1, float32"),
    "control": Recipe(("controls",), "vae 1, float32"),
    "prompt": Recipe(("caption",), "text encoder 1, template 1"),
}
LATENTS = {"latents": RECIPES["latents"]}
PROMPT_OF_CONTROL = Recipe(("caption", "controls"), "an encoder that looks at the control picture too")
"""The prompt of an encoder that also sees the control images."""
COUNT = 6
"""Samples in the dataset."""


def encode(name: str, sample: TransformedSample) -> torch.Tensor:
    """A pure function of the fields of a recipe, like an encoder."""
    if name == "prompt":
        letters = [float(ord(letter)) for letter in sample.caption[:7].ljust(7)]
        return torch.tensor([float(len(sample.caption)), *letters]).to(torch.bfloat16)
    pixels = sample.pixels() if name == "latents" else np.stack(sample.control_pixels())
    return torch.from_numpy(pixels.astype(np.float32)).sub(128).div(64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_pairs(tmp_path / "set")


def make_pairs(folder: Path, count: int = COUNT) -> Path:
    for name in ("control_images", "training_images"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        save_image(folder / "control_images" / f"{number}.png", 7 * number)
        save_image(folder / "training_images" / f"{number}.png", 7 * number + 3)
        (folder / "training_images" / f"{number}.txt").write_text(f"instruction {number}")
    return folder


def save_image(path: Path, shade: int) -> None:
    Image.new("RGB", (24, 16), (shade, 100, 200 - shade)).save(path)


def read_samples(folder: Path, width: int = 16, height: int = 16, **changes: bool) -> list[TransformedSample]:
    """Reads the dataset as a new process does."""
    samples = Pairs(path=str(folder)).read(Digests(folder.parent / "digests.db")).samples
    return [TransformedSample(sample, width, height, **changes) for sample in samples]


def fill(
    cache: Cache, samples: list[TransformedSample], encode: Callable[[str, TransformedSample], torch.Tensor]
) -> dict[str, int]:
    return count_outcomes(cache.recipes, cache.encode_missing(cache.missing(samples), encode))


def fill_anew(root: Path, samples: list[TransformedSample], recipes: Mapping[str, Recipe] = RECIPES) -> dict[str, int]:
    """Fills the cache as a new process does. Returns how many entries of each tensor it had to make."""
    counts = fill(Cache(root, recipes), samples, encode)
    samples[0].sample.image.digests.flush()
    return counts


def read_files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def counts(latents: int = 0, control: int = 0, prompt: int = 0) -> dict[str, int]:
    return {"latents": latents, "control": control, "prompt": prompt}


# Which entries are made again


def test_entries_are_made_once_and_read_back_unchanged(tmp_path: Path, folder: Path):
    samples = read_samples(folder)
    assert fill_anew(tmp_path / "cache", samples) == counts(COUNT, COUNT, COUNT)
    assert fill_anew(tmp_path / "cache", read_samples(folder)) == counts()
    cache = Cache(tmp_path / "cache", RECIPES)
    for sample in read_samples(folder):
        example = cache.example(sample)
        assert list(example) == ["latents", "control", "prompt"]
        for name, value in example.items():
            assert torch.equal(value, encode(name, sample))
            assert value.dtype == encode(name, sample).dtype
            assert cache.example(sample)[name] is value
    path = cache.path("latents", samples[0])
    assert path.parent.parent == tmp_path / "cache" / "latents"
    assert path.name == f"{cache.key('latents', samples[0])}.safetensors"
    assert path.name.startswith(path.parent.name)


def test_an_edited_caption_makes_one_prompt_again_and_no_image(tmp_path: Path, folder: Path):
    fill_anew(tmp_path / "cache", read_samples(folder))
    (folder / "training_images" / "2.txt").write_text("another instruction")
    assert fill_anew(tmp_path / "cache", read_samples(folder)) == counts(prompt=1)
    (folder / "training_images" / "2.txt").write_text("instruction 2")
    assert fill_anew(tmp_path / "cache", read_samples(folder)) == counts()


def test_a_replaced_image_of_equal_name_size_and_mtime_is_encoded_again(tmp_path: Path, folder: Path, monkeypatch):
    # Otherwise the digests of files this young are not remembered, and the test shows nothing.
    monkeypatch.setattr(Digests, "_RACY", 0)
    images = [*(folder / "control_images").iterdir(), *(folder / "training_images").glob("*.png")]
    for path in images:
        path.write_bytes(padded(path))
    time.sleep(0.02)  # A tick of the file system's clock.
    fill_anew(tmp_path / "cache", read_samples(folder))
    hashed = []
    file_digest = digests.hashlib.file_digest
    monkeypatch.setattr(
        digests.hashlib, "file_digest", lambda file, name: hashed.append(file.name) or file_digest(file, name)
    )
    for name, expected in (("training_images/1.png", counts(latents=1)), ("control_images/4.png", counts(control=1))):
        path = folder / name
        before = path.stat()
        save_image(tmp_path / "other.png", 250)
        with open(path, "r+b") as file:
            file.write(padded(tmp_path / "other.png"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        after = path.stat()
        assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
        time.sleep(0.02)
        assert fill_anew(tmp_path / "cache", read_samples(folder)) == expected
        assert hashed == [str(path)]
        hashed.clear()


def padded(path: Path) -> bytes:
    """Returns a PNG padded to a fixed size. Bytes after its end are ignored."""
    return path.read_bytes().ljust(400, b"\0")


def test_another_size_or_flip_makes_images_again_but_no_prompt(tmp_path: Path, folder: Path):
    fill_anew(tmp_path / "cache", read_samples(folder))
    assert fill_anew(tmp_path / "cache", read_samples(folder, 32, 16)) == counts(COUNT, COUNT)
    assert fill_anew(tmp_path / "cache", read_samples(folder, 16, 32)) == counts(COUNT, COUNT)
    assert fill_anew(tmp_path / "cache", read_samples(folder, flip=True)) == counts(COUNT, COUNT)
    for samples in (
        read_samples(folder),
        read_samples(folder, 32, 16),
        read_samples(folder, 16, 32),
        read_samples(folder, flip=True),
    ):
        assert fill_anew(tmp_path / "cache", samples) == counts()


def test_dropped_captions_share_one_empty_prompt(tmp_path: Path, folder: Path):
    cache = Cache(tmp_path / "cache", RECIPES)
    dropped = read_samples(folder, drop_caption=True)
    assert fill(cache, read_samples(folder) + dropped, encode) == counts(COUNT, COUNT, COUNT + 1)
    assert torch.equal(cache.get("prompt", dropped[3]), encode("prompt", dropped[0]))


def test_a_prompt_of_control_images_has_an_empty_one_for_each_sample(tmp_path: Path, folder: Path):
    recipes = RECIPES | {"prompt": PROMPT_OF_CONTROL}
    samples = read_samples(folder) + read_samples(folder, drop_caption=True)
    assert fill_anew(tmp_path / "cache", samples, recipes) == counts(COUNT, COUNT, 2 * COUNT)
    larger = read_samples(folder, 32, 32, drop_caption=True)
    assert fill_anew(tmp_path / "cache", larger, recipes) == counts(COUNT, COUNT, COUNT)


def test_another_encoder_template_or_schema_makes_its_tensor_again(tmp_path: Path, folder: Path, monkeypatch):
    fill_anew(tmp_path / "cache", read_samples(folder))
    for name in RECIPES:
        other = RECIPES | {name: replace(RECIPES[name], digest="the same in bfloat16")}
        assert fill_anew(tmp_path / "cache", read_samples(folder), other) == counts(**{name: COUNT})
    monkeypatch.setattr(entry, "SCHEMA", 999)
    assert fill_anew(tmp_path / "cache", read_samples(folder)) == counts(COUNT, COUNT, COUNT)


def test_samples_with_equal_content_share_entries_whatever_their_names(tmp_path: Path, folder: Path):
    fill_anew(tmp_path / "cache", read_samples(folder))
    for name, ending in (("control_images", "png"), ("training_images", "png"), ("training_images", "txt")):
        (folder / name / f"0.{ending}").rename(folder / name / f"renamed.{ending}")
        (folder / name / f"twin.{ending}").write_bytes((folder / name / f"1.{ending}").read_bytes())
    folder.rename(tmp_path / "moved")
    assert fill_anew(tmp_path / "cache", read_samples(tmp_path / "moved")) == counts()


def test_keys_do_not_change_between_versions(folder: Path):
    class FixedSource:
        name = "anywhere"

        def digest(self) -> str:
            return "d" * 64

    sample = TransformedSample(Sample("id", FixedSource(), "a caption", (FixedSource(),)), 64, 48)
    keys = [Cache(folder, RECIPES).key(name, sample) for name in RECIPES]
    keys.append(Cache(folder, {"prompt": PROMPT_OF_CONTROL}).key("prompt", sample))
    assert [key[:12] for key in keys] == KEYS


# A change here makes all entries of every user again: it needs a reason.
KEYS = ["1b177a57fffe", "8a4df2cd0405", "9986a5230e7b", "11d53d6d94c2"]


# Several processes, and processes that are killed


def fork(*targets: Callable[[], object]) -> list[multiprocessing.Process]:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target) for target in targets]
    for process in processes:
        process.start()
    return processes


def test_processes_that_fill_one_cache_make_the_entries_of_a_single_one(tmp_path: Path, folder: Path):
    fill_anew(tmp_path / "serial", read_samples(folder))

    def fill_shared() -> None:
        fill_anew(tmp_path / "cache", read_samples(folder))

    processes = fork(fill_shared, fill_shared, fill_shared)
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert read_files(tmp_path / "cache") == read_files(tmp_path / "serial")


def test_a_killed_writer_leaves_no_truncated_entry(tmp_path: Path, folder: Path):
    def encode_large(name: str, sample: TransformedSample) -> torch.Tensor:
        return encode(name, sample).float().reshape(-1)[:8].repeat(40_000)

    root, samples = tmp_path / "cache", read_samples(folder)
    fill(Cache(tmp_path / "serial", RECIPES), samples, encode_large)
    dice = random.Random(5)
    killed = 0
    for _ in range(12):
        (process,) = fork(lambda: fill(Cache(root, RECIPES), samples, encode_large))
        time.sleep(dice.uniform(0.002, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        killed += process.exitcode == -signal.SIGKILL
        cache = Cache(root, RECIPES)
        missing = set(cache.missing(samples))
        for name in RECIPES:
            for sample in samples:
                if (name, sample) not in missing:
                    assert torch.equal(cache.get(name, sample), encode_large(name, sample))
    assert killed
    fill(Cache(root, RECIPES), samples, encode_large)
    complete = {name: data for name, data in read_files(root).items() if files.PARTIAL_PREFIX not in name}
    assert complete == read_files(tmp_path / "serial")


def test_unfinished_entries_are_removed_once_they_are_old(tmp_path: Path, folder: Path):
    root, samples = tmp_path / "cache", read_samples(folder)
    fill_anew(root, samples)
    before = read_files(root)
    path = next(root.rglob("*.safetensors"))
    old, young = files.temporary_path(path), files.temporary_path(path)
    for unfinished in (old, young):
        unfinished.write_bytes(path.read_bytes()[:50])
    os.utime(old, (time.time() - 2 * ABANDONED_AFTER,) * 2)
    (root / ".DS_Store").touch()
    (root / "latents" / ".DS_Store").touch()
    assert fill_anew(root, samples) == counts()
    assert young.exists()
    assert not old.exists()
    young.unlink()
    assert {name: data for name, data in read_files(root).items() if ".DS_Store" not in name} == before


# Damaged entries


def damage(root: Path, sample: TransformedSample, change: Callable[[bytes], bytes], name: str = "latents") -> Path:
    path = Cache(root, RECIPES).path(name, sample)
    path.write_bytes(change(path.read_bytes()))
    return path


def test_a_flipped_bit_in_any_byte_is_found_and_the_file_named(tmp_path: Path, folder: Path):
    root, sample = tmp_path / "cache", read_samples(folder, 8, 8)[0]
    fill_anew(root, [sample])
    path = Cache(root, RECIPES).path("prompt", sample)
    intact = path.read_bytes()
    for position in range(len(intact)):
        flipped = bytearray(intact)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(DataError, match="is damaged") as refusal:
            Cache(root, RECIPES).get("prompt", sample)
        assert str(path) in str(refusal.value)
        assert "cache.verify=full" in str(refusal.value)
    path.write_bytes(intact)
    Cache(root, RECIPES).get("prompt", sample)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 200, -1])
def test_a_truncated_entry_is_refused(size: int, tmp_path: Path, folder: Path):
    root, samples = tmp_path / "cache", read_samples(folder)
    fill_anew(root, samples)
    path = damage(root, samples[0], lambda data: data[:size])
    with pytest.raises(DataError, match=path.name):
        Cache(root, RECIPES).example(samples[0])
    Cache(root, RECIPES).example(samples[1])


def test_a_nan_in_an_entry_is_refused_even_if_its_digest_is_right(tmp_path: Path, folder: Path, monkeypatch):
    root, sample = tmp_path / "cache", read_samples(folder)[0]
    fill_anew(root, [sample])
    bad = encode("latents", sample)
    bad[0, 0, 0] = torch.nan
    with monkeypatch.context() as patched:
        patched.setattr(torch, "isfinite", lambda value: torch.ones_like(value, dtype=torch.bool))
        Cache(root, RECIPES).put("latents", sample, bad)
    with pytest.raises(DataError, match="NaN or infinity") as refusal:
        Cache(root, RECIPES).get("latents", sample)
    assert str(Cache(root, RECIPES).path("latents", sample)) in str(refusal.value)


def test_the_file_of_another_entry_is_refused(tmp_path: Path, folder: Path):
    root, samples = tmp_path / "cache", read_samples(folder)
    fill_anew(root, samples)
    other = Cache(root, RECIPES).path("latents", samples[1]).read_bytes()
    damage(root, samples[0], lambda data: other)
    with pytest.raises(DataError, match="belongs to a different entry"):
        Cache(root, RECIPES).get("latents", samples[0])


def test_a_pickle_in_place_of_an_entry_is_never_executed(tmp_path: Path, folder: Path):
    root, samples = tmp_path / "cache", read_samples(folder)
    fill_anew(root, samples)
    path = Cache(root, RECIPES).path("latents", samples[0])

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save(Payload(), path)
    with pytest.raises(DataError):
        Cache(root, RECIPES).get("latents", samples[0])
    assert not (tmp_path / "executed").exists()


def test_an_absurd_header_is_refused_without_allocating_memory(tmp_path: Path, folder: Path):
    root, samples = tmp_path / "cache", read_samples(folder)
    fill_anew(root, samples)
    table = json.dumps({"value": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for data in (
        (2**62).to_bytes(8, "little"),
        len(table).to_bytes(8, "little") + table,
        (1000).to_bytes(8, "little") + b"[" * 1000,
    ):
        damage(root, samples[0], lambda _, data=data: data)
        with pytest.raises(DataError, match="is damaged"):
            Cache(root, RECIPES).get("latents", samples[0])


def test_full_verification_makes_damaged_entries_again(tmp_path: Path, folder: Path, caplog):
    root, samples = tmp_path / "cache", read_samples(folder)
    fill_anew(root, samples)
    before = read_files(root)
    damaged = damage(root, samples[2], lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    damage(root, samples[3], lambda data: b"", "prompt")
    assert fill_anew(root, samples) == counts()
    assert fill(Cache(root, RECIPES, verify="full"), samples, encode) == counts(latents=1, prompt=1)
    assert str(damaged) in caplog.text
    assert "encoded again" in caplog.text
    assert read_files(root) == before


def test_entries_are_verified_once_and_kept_within_the_memory_limit(tmp_path: Path, folder: Path, monkeypatch):
    root, samples = tmp_path / "cache", read_samples(folder)
    fill_anew(root, samples)
    reads, checks = Counter(), Counter()
    read_bytes, verify = Path.read_bytes, entry.verify
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.update([self.name]) or read_bytes(self))
    monkeypatch.setattr(entry, "verify", lambda name, key, *rest: checks.update([key]) or verify(name, key, *rest))
    size = encode("latents", samples[0]).nbytes
    cache = Cache(root, LATENTS, memory=4 * size)
    for _ in range(3):
        for sample in samples:
            assert torch.equal(cache.get("latents", sample), encode("latents", sample))
    paths = {cache.path("latents", sample).name for sample in samples}
    assert sorted(reads[name] for name in paths) == [1, 1, 1, 1, 3, 3]
    assert set(checks.values()) == {1}


# Faults while encoding


def test_non_finite_encoder_output_is_refused_and_the_sample_named(tmp_path: Path, folder: Path):
    sample = read_samples(folder)[0]
    cache = Cache(tmp_path / "cache", RECIPES)
    for value, name, source in (
        (torch.nan, "latents", "training_images/0.png"),
        (-torch.inf, "prompt", "instruction 0"),
    ):
        bad = encode(name, sample)
        bad[0] = value
        with pytest.raises(DataError, match=f"{source}.*NaN or infinity"):
            cache.put(name, sample, bad)
    assert not read_files(tmp_path / "cache")


def test_all_undecodable_images_are_named_and_the_other_entries_kept(tmp_path: Path, folder: Path):
    for number in (1, 4):
        path = folder / "training_images" / f"{number}.png"
        noise = np.random.Generator(np.random.Philox(number)).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="2 faults") as refusal:
        fill_anew(tmp_path / "cache", read_samples(folder))
    assert all(f"training_images/{number}.png" in str(refusal.value) for number in (1, 4))
    for number in (1, 4):
        save_image(folder / "training_images" / f"{number}.png", 200 + number)
    assert fill_anew(tmp_path / "cache", read_samples(folder)) == counts(latents=2)


def test_an_encoder_that_always_fails_is_stopped_early(tmp_path: Path):
    calls = []

    def fail(name: str, sample: TransformedSample) -> torch.Tensor:
        calls.append(name)
        return torch.full((4,), torch.nan)

    with pytest.raises(DataError, match="20 faults"):
        fill(Cache(tmp_path / "cache", RECIPES), read_samples(make_pairs(tmp_path / "set", 30)), fail)
    assert len(calls) == 20


def test_an_absent_entry_and_an_unwritable_folder_are_storage_errors(tmp_path: Path, folder: Path):
    samples = read_samples(folder)
    with pytest.raises(StorageError, match="No such file"):
        Cache(tmp_path / "cache", RECIPES).get("latents", samples[0])
    (tmp_path / "cache").write_text("a file stands here")
    cache = Cache(tmp_path / "cache", RECIPES)
    with pytest.raises(StorageError, match="Could not write .* another folder with cache.path=<folder>"):
        fill(cache, samples, encode)
    with pytest.raises(StorageError, match="another folder with cache.path=<folder>"):
        cache.record_use(tmp_path, samples)


def test_missing_entries_among_30000_are_found_quickly(tmp_path: Path):
    class NumberedSource:
        def __init__(self, number: int):
            self.number = number

        def digest(self) -> str:
            return f"{self.number:064x}"

    samples = [
        TransformedSample(Sample(str(number), NumberedSource(number), "text"), 64, 64) for number in range(30_000)
    ]
    cache = Cache(tmp_path / "cache", LATENTS)
    for number, sample in enumerate(samples):
        if number % 3:
            path = cache.path("latents", sample)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    start = time.perf_counter()
    missing = cache.missing(samples)
    assert time.perf_counter() - start < 5  # 0.5 s on an idle machine.
    assert {sample.sample.id for _, sample in missing} == {str(number) for number in range(0, 30_000, 3)}
    keys = [cache.key(name, sample) for name, sample in missing]
    assert keys == sorted(keys)


def test_cache_verify_is_quick_or_full():
    assert CacheSettings(verify="full").verify == "full"
    with pytest.raises(UsageError, match="type quick or full"):
        CacheSettings(verify="fast")
