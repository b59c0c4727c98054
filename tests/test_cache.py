from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.cache import LITTER, Cache, Part
from trainer.config.sections import CacheSettings
from trainer.core import files
from trainer.core.digests import Digests
from trainer.core.errors import DataError, StorageError, UsageError
from trainer.dataset import Pairs, Sample, read
from trainer.dataset.view import TransformedSample

PARTS = (
    Part("latents", ("image",), "vae 1, float32"),
    Part("control", ("controls",), "vae 1, float32"),
    Part("prompt", ("caption",), "text encoder 1, template 1"),
)
WITH_PICTURE = Part("prompt", ("caption", "controls"), "an encoder that looks at the control picture too")
COUNT = 6


def encode(part: str, view: TransformedSample) -> torch.Tensor:
    """A pure function of what the part is made from, as an encoder is."""
    if part == "prompt":
        return torch.tensor(
            [float(len(view.caption)), *[float(ord(letter)) for letter in view.caption[:7].ljust(7)]]
        ).to(torch.bfloat16)
    pixels = view.pixels() if part == "latents" else np.stack(view.control_pixels())
    return torch.from_numpy(pixels.astype(np.float32)).sub(128).div(64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_pairs(tmp_path / "set")


def make_pairs(folder: Path, count: int = COUNT) -> Path:
    for part in ("control_images", "training_images"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        save(folder / "control_images" / f"{number}.png", 7 * number)
        save(folder / "training_images" / f"{number}.png", 7 * number + 3)
        (folder / "training_images" / f"{number}.txt").write_text(f"instruction {number}")
    return folder


def save(path: Path, shade: int) -> None:
    Image.new("RGB", (24, 16), (shade, 100, 200 - shade)).save(path)


def views(folder: Path, width: int = 16, height: int = 16, **changes: bool) -> list[TransformedSample]:
    """As a new process sees the folder."""
    samples = read(Pairs(path=str(folder)), Digests(folder.parent / "digests.db"))
    return [TransformedSample(sample, width, height, **changes) for sample in samples]


def fill(
    cache: Cache, seen: list[TransformedSample], encode: Callable[[str, TransformedSample], torch.Tensor]
) -> dict[str, int]:
    return cache.fill(cache.missing(seen), encode)


def made(cache: Path, seen: list[TransformedSample], parts: tuple[Part, ...] = PARTS) -> dict[str, int]:
    """What a new process has to make."""
    found = fill(Cache(cache, parts), seen, encode)
    seen[0].sample.image.digests.flush()
    return found


def entries(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def counts(latents: int = 0, control: int = 0, prompt: int = 0) -> dict[str, int]:
    return {"latents": latents, "control": control, "prompt": prompt}


# what is made again


def test_everything_is_made_once_and_read_back_as_it_was(tmp_path: Path, folder: Path):
    seen = views(folder)
    assert made(tmp_path / "cache", seen) == counts(COUNT, COUNT, COUNT)
    assert made(tmp_path / "cache", views(folder)) == counts()
    again = Cache(tmp_path / "cache", PARTS)
    for view in views(folder):
        row = again.row(view)
        assert list(row) == ["latents", "control", "prompt"]
        for part, value in row.items():
            assert torch.equal(value, encode(part, view))
            assert value.dtype == encode(part, view).dtype
            assert again.row(view)[part] is value
    path = again.path(PARTS[0], seen[0])
    assert path.parent.parent == tmp_path / "cache" / "latents"
    assert path.name == f"{again.key(PARTS[0], seen[0])}.safetensors"
    assert path.name.startswith(path.parent.name)


def test_an_edited_caption_costs_one_prompt_and_no_picture(tmp_path: Path, folder: Path):
    made(tmp_path / "cache", views(folder))
    (folder / "training_images" / "2.txt").write_text("another instruction")
    assert made(tmp_path / "cache", views(folder)) == counts(prompt=1)
    (folder / "training_images" / "2.txt").write_text("instruction 2")
    assert made(tmp_path / "cache", views(folder)) == counts()


def test_a_picture_replaced_under_its_name_size_and_time_is_made_again(tmp_path: Path, folder: Path, monkeypatch):
    monkeypatch.setattr(
        Digests, "_RACY", 0
    )  # else digests of files this young are not remembered, and nothing is shown
    pictures = [*(folder / "control_images").iterdir(), *(folder / "training_images").glob("*.png")]
    for path in pictures:
        path.write_bytes(padded(path))
    time.sleep(0.02)  # a tick of the file system's clock
    made(tmp_path / "cache", views(folder))
    read_whole = []
    real = files.hashlib.file_digest
    monkeypatch.setattr(
        files.hashlib, "file_digest", lambda file, name: read_whole.append(file.name) or real(file, name)
    )
    for name, expected in (("training_images/1.png", counts(latents=1)), ("control_images/4.png", counts(control=1))):
        path = folder / name
        before = path.stat()
        save(tmp_path / "other.png", 250)
        with open(path, "r+b") as file:
            file.write(padded(tmp_path / "other.png"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        after = path.stat()
        assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
        time.sleep(0.02)
        assert made(tmp_path / "cache", views(folder)) == expected
        assert read_whole == [str(path)]
        read_whole.clear()


def padded(path: Path) -> bytes:
    """A PNG at a fixed size: what follows its end is no part of the picture."""
    return path.read_bytes().ljust(400, b"\0")


def test_another_size_or_flip_costs_pictures_and_no_prompt(tmp_path: Path, folder: Path):
    made(tmp_path / "cache", views(folder))
    assert made(tmp_path / "cache", views(folder, 32, 16)) == counts(COUNT, COUNT)
    assert made(tmp_path / "cache", views(folder, 16, 32)) == counts(COUNT, COUNT)
    assert made(tmp_path / "cache", views(folder, flip=True)) == counts(COUNT, COUNT)
    for every in (views(folder), views(folder, 32, 16), views(folder, 16, 32), views(folder, flip=True)):
        assert made(tmp_path / "cache", every) == counts()


def test_a_dropped_caption_costs_one_empty_prompt_for_all_samples(tmp_path: Path, folder: Path):
    cache = Cache(tmp_path / "cache", PARTS)
    assert fill(cache, views(folder) + views(folder, drop_caption=True), encode) == counts(COUNT, COUNT, COUNT + 1)
    assert torch.equal(
        cache.get(PARTS[2], views(folder, drop_caption=True)[3]), encode("prompt", views(folder, drop_caption=True)[0])
    )


def test_an_encoder_that_sees_the_control_has_an_empty_prompt_for_each(tmp_path: Path, folder: Path):
    parts = (*PARTS[:2], WITH_PICTURE)
    assert made(tmp_path / "cache", views(folder) + views(folder, drop_caption=True), parts) == counts(
        COUNT, COUNT, 2 * COUNT
    )
    assert made(tmp_path / "cache", views(folder, 32, 32, drop_caption=True), parts) == counts(COUNT, COUNT, COUNT)


def test_another_encoder_template_or_schema_makes_its_part_again(tmp_path: Path, folder: Path, monkeypatch):
    made(tmp_path / "cache", views(folder))
    for index, expected in enumerate((counts(latents=COUNT), counts(control=COUNT), counts(prompt=COUNT))):
        other = list(PARTS)
        other[index] = replace(PARTS[index], maker="the same in bfloat16")
        assert made(tmp_path / "cache", views(folder), tuple(other)) == expected
    monkeypatch.setattr("trainer.cache.SCHEMA", 999)
    assert made(tmp_path / "cache", views(folder)) == counts(COUNT, COUNT, COUNT)


def test_samples_with_the_same_content_share_entries_whatever_their_names(tmp_path: Path, folder: Path):
    made(tmp_path / "cache", views(folder))
    for part, ending in (("control_images", "png"), ("training_images", "png"), ("training_images", "txt")):
        (folder / part / f"0.{ending}").rename(folder / part / f"renamed.{ending}")
        (folder / part / f"twin.{ending}").write_bytes((folder / part / f"1.{ending}").read_bytes())
    folder.rename(tmp_path / "moved")
    assert made(tmp_path / "cache", views(tmp_path / "moved")) == counts()


def test_what_a_key_is_made_of_does_not_change_between_versions(folder: Path):
    class Fixed:
        name = "anywhere"

        def digest(self) -> str:
            return "d" * 64

    view = TransformedSample(Sample("id", Fixed(), "a caption", (Fixed(),)), 64, 48)
    cache = Cache(folder, PARTS)
    assert [cache.key(part, view)[:12] for part in (*PARTS, WITH_PICTURE)] == KEYS


# A change here makes every user's cache again: it needs a reason.
KEYS = ["1b177a57fffe", "8a4df2cd0405", "9986a5230e7b", "11d53d6d94c2"]


# several processes, killed ones


def in_processes(*targets) -> list[multiprocessing.Process]:
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=target) for target in targets]
    for process in started:
        process.start()
    return started


def test_two_processes_that_fill_one_cache_make_what_one_makes(tmp_path: Path, folder: Path):
    made(tmp_path / "serial", views(folder))

    def fill() -> None:
        made(tmp_path / "cache", views(folder))

    processes = in_processes(fill, fill, fill)
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert entries(tmp_path / "cache") == entries(tmp_path / "serial")


def test_a_killed_writer_leaves_no_torn_entry(tmp_path: Path, folder: Path):
    def large(part: str, view: TransformedSample) -> torch.Tensor:
        return encode(part, view).float().reshape(-1)[:8].repeat(40_000)

    root, seen = tmp_path / "cache", views(folder)
    fill(Cache(tmp_path / "serial", PARTS), seen, large)
    dice = random.Random(5)
    killed = 0
    for _ in range(12):
        (process,) = in_processes(lambda: fill(Cache(root, PARTS), seen, large))
        time.sleep(dice.uniform(0.002, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        killed += process.exitcode == -signal.SIGKILL
        cache = Cache(root, PARTS)
        missing = set(cache.missing(seen))
        for part in PARTS:
            for view in seen:
                if (part, view) not in missing:
                    assert torch.equal(cache.get(part, view), large(part.name, view))
    assert killed
    fill(Cache(root, PARTS), seen, large)
    whole = {name: data for name, data in entries(root).items() if files.PARTIAL_PREFIX not in name}
    assert whole == entries(tmp_path / "serial")


def test_what_a_killed_writer_left_is_swept_once_it_is_old(tmp_path: Path, folder: Path):
    root, seen = tmp_path / "cache", views(folder)
    made(root, seen)
    whole = entries(root)
    entry = next(root.rglob("*.safetensors"))
    old, young = files.temporary_path(entry), files.temporary_path(entry)
    for path in (old, young):
        path.write_bytes(entry.read_bytes()[:50])
    os.utime(old, (time.time() - 2 * LITTER,) * 2)
    (root / ".DS_Store").touch()
    (root / "latents" / ".DS_Store").touch()
    assert made(root, seen) == counts()
    assert young.exists()
    assert not old.exists()
    young.unlink()
    assert {name: data for name, data in entries(root).items() if ".DS_Store" not in name} == whole


# damage


def damage(root: Path, view: TransformedSample, change, part: Part = PARTS[0]) -> Path:
    path = Cache(root, PARTS).path(part, view)
    path.write_bytes(change(path.read_bytes()))
    return path


def test_a_flipped_bit_in_any_byte_is_found_and_the_file_named(tmp_path: Path, folder: Path):
    root, view = tmp_path / "cache", views(folder, 8, 8)[0]
    made(root, [view])
    path = Cache(root, PARTS).path(PARTS[2], view)
    sound = path.read_bytes()
    for place in range(len(sound)):
        flipped = bytearray(sound)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(DataError, match="is damaged") as refusal:
            Cache(root, PARTS).get(PARTS[2], view)
        assert str(path) in str(refusal.value)
        assert "cache.verify=full" in str(refusal.value)
    path.write_bytes(sound)
    Cache(root, PARTS).get(PARTS[2], view)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 200, -1])
def test_a_torn_entry_is_refused(size: int, tmp_path: Path, folder: Path):
    root, seen = tmp_path / "cache", views(folder)
    made(root, seen)
    path = damage(root, seen[0], lambda data: data[:size])
    with pytest.raises(DataError, match=path.name):
        Cache(root, PARTS).row(seen[0])
    Cache(root, PARTS).row(seen[1])


def test_a_nan_planted_in_an_entry_is_refused_though_its_digest_is_right(tmp_path: Path, folder: Path, monkeypatch):
    root, view = tmp_path / "cache", views(folder)[0]
    made(root, [view])
    bad = encode("latents", view)
    bad[0, 0, 0] = torch.nan
    with monkeypatch.context() as patched:
        patched.setattr(torch, "isfinite", lambda value: torch.ones_like(value, dtype=torch.bool))
        Cache(root, PARTS).put(PARTS[0], view, bad)
    with pytest.raises(DataError, match="NaN or infinity") as refusal:
        Cache(root, PARTS).get(PARTS[0], view)
    assert str(Cache(root, PARTS).path(PARTS[0], view)) in str(refusal.value)


def test_an_entry_put_in_anothers_place_is_refused(tmp_path: Path, folder: Path):
    root, seen = tmp_path / "cache", views(folder)
    made(root, seen)
    other = Cache(root, PARTS).path(PARTS[0], seen[1]).read_bytes()
    damage(root, seen[0], lambda data: other)
    with pytest.raises(DataError, match="the entry of another name"):
        Cache(root, PARTS).get(PARTS[0], seen[0])


def test_a_pickle_in_an_entrys_place_is_never_executed(tmp_path: Path, folder: Path):
    root, seen = tmp_path / "cache", views(folder)
    made(root, seen)
    path = Cache(root, PARTS).path(PARTS[0], seen[0])

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save(Payload(), path)
    with pytest.raises(DataError):
        Cache(root, PARTS).get(PARTS[0], seen[0])
    assert not (tmp_path / "executed").exists()


def test_an_absurd_header_is_refused_without_the_memory(tmp_path: Path, folder: Path):
    root, seen = tmp_path / "cache", views(folder)
    made(root, seen)
    table = json.dumps({"value": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for data in (
        (2**62).to_bytes(8, "little"),
        len(table).to_bytes(8, "little") + table,
        (1000).to_bytes(8, "little") + b"[" * 1000,
    ):
        damage(root, seen[0], lambda _, data=data: data)
        with pytest.raises(DataError, match="is damaged"):
            Cache(root, PARTS).get(PARTS[0], seen[0])


def test_full_verification_makes_the_damaged_entries_again(tmp_path: Path, folder: Path, caplog):
    root, seen = tmp_path / "cache", views(folder)
    made(root, seen)
    whole = entries(root)
    damaged = damage(root, seen[2], lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    damage(root, seen[3], lambda data: b"", PARTS[2])
    assert made(root, seen) == counts()
    assert fill(Cache(root, PARTS, verify="full"), seen, encode) == counts(latents=1, prompt=1)
    assert str(damaged) in caplog.text
    assert "made again" in caplog.text
    assert entries(root) == whole


def test_an_entry_is_checked_once_and_held_within_the_memory_given(tmp_path: Path, folder: Path, monkeypatch):
    root, seen = tmp_path / "cache", views(folder)
    made(root, seen)
    reads, checks = Counter(), Counter()
    real_read, real_check = Path.read_bytes, Cache._read.__globals__["_check"]
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.update([self.name]) or real_read(self))
    monkeypatch.setattr(
        "trainer.cache._check", lambda part, key, *rest: checks.update([key]) or real_check(part, key, *rest)
    )
    size = encode("latents", seen[0]).nbytes
    cache = Cache(root, PARTS[:1], memory=4 * size)
    for _ in range(3):
        for view in seen:
            assert torch.equal(cache.get(PARTS[0], view), encode("latents", view))
    latents = {cache.path(PARTS[0], view).name for view in seen}
    assert sorted(reads[name] for name in latents) == [1, 1, 1, 1, 3, 3]
    assert set(checks.values()) == {1}


# faults when encoding


def test_what_an_encoder_makes_of_nothing_is_refused_with_the_sample_named(tmp_path: Path, folder: Path):
    seen = views(folder)
    cache = Cache(tmp_path / "cache", PARTS)
    for value, part, name in ((torch.nan, PARTS[0], "training_images/0.png"), (-torch.inf, PARTS[2], "instruction 0")):
        bad = encode(part.name, seen[0])
        bad[0] = value
        with pytest.raises(DataError, match=f"{name}.*NaN or infinity"):
            cache.put(part, seen[0], bad)
    assert not entries(tmp_path / "cache")


def test_all_pictures_that_cannot_be_decoded_are_named_and_the_others_kept(tmp_path: Path, folder: Path):
    for number in (1, 4):
        path = folder / "training_images" / f"{number}.png"
        Image.fromarray(np.random.Generator(np.random.Philox(number)).integers(0, 256, (64, 64, 3), np.uint8)).save(
            path
        )
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="2 faults") as refusal:
        made(tmp_path / "cache", views(folder))
    assert all(f"training_images/{number}.png" in str(refusal.value) for number in (1, 4))
    for number in (1, 4):
        save(folder / "training_images" / f"{number}.png", 200 + number)
    assert made(tmp_path / "cache", views(folder)) == counts(latents=2)


def test_an_encoder_that_only_fails_is_soon_stopped(tmp_path: Path):
    calls = []

    def fail(part: str, view: TransformedSample) -> torch.Tensor:
        calls.append(part)
        return torch.full((4,), torch.nan)

    with pytest.raises(DataError, match="20 faults"):
        fill(Cache(tmp_path / "cache", PARTS), views(make_pairs(tmp_path / "set", 30)), fail)
    assert len(calls) == 20


def test_an_entry_that_is_gone_or_a_folder_that_cannot_be_written_is_a_matter_of_storage(tmp_path: Path, folder: Path):
    seen = views(folder)
    with pytest.raises(StorageError, match="No such file"):
        Cache(tmp_path / "cache", PARTS).get(PARTS[0], seen[0])
    (tmp_path / "cache").write_text("a file stands here")
    with pytest.raises(StorageError, match="Could not write"):
        fill(Cache(tmp_path / "cache", PARTS), seen, encode)


def test_what_is_missing_among_30000_entries_is_known_at_once(tmp_path: Path):
    class Fixed:
        def __init__(self, number: int):
            self.number = number

        def digest(self) -> str:
            return f"{self.number:064x}"

    seen = [TransformedSample(Sample(str(number), Fixed(number), "text"), 64, 64) for number in range(30_000)]
    cache = Cache(tmp_path / "cache", PARTS[:1])
    for number, view in enumerate(seen):
        if number % 3:
            path = cache.path(PARTS[0], view)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    started = time.perf_counter()
    missing = cache.missing(seen)
    assert time.perf_counter() - started < 5  # 0.5 s where nobody else is at work
    assert {view.sample.id for _, view in missing} == {str(number) for number in range(0, 30_000, 3)}
    keys = [cache.key(part, view) for part, view in missing]
    assert keys == sorted(keys)


def test_the_settings_know_two_ways_to_verify():
    assert CacheSettings(verify="full").verify == "full"
    with pytest.raises(UsageError, match="type quick or full"):
        CacheSettings(verify="fast")
