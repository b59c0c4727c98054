"""The cache and the real program: NaN, outdated entries, killed and concurrent writers (F17, F19, F20)."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from images import random_image, save_image
from layouts import write_pairs
from program import FAMILY, Action, Harness, at_call, start

SHORT = ["steps=2", "batch=4", "evaluation.every=2", "evaluation.samples=2", "save.every=2"]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(tmp_path_factory.mktemp("harness"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def pairs_settings(folder: Path, cache: Path, validation_fraction: float = 0) -> list[str]:
    fraction = f"dataset.validation_fraction={validation_fraction}"
    return ["dataset=pairs", f"dataset.path={folder}", fraction, f"cache.path={cache}"]


def fill(harness: Harness, folder: Path, cache: Path, *settings: str, setup: Action | None = None) -> dict[str, int]:
    """Runs stage=cache, and returns how many entries of each name it makes."""
    result = harness.run(harness.new_folder(), *pairs_settings(folder, cache), "stage=cache", *settings, setup=setup)
    assert result.code == 0, result
    line = next(line for line in result.output.splitlines() if line.startswith("cache "))
    return {name: int(count) for count, name in re.findall(r"(\d+) (\w+) made", line)}


def made(latents: int = 0, prompt: int = 0, pooled: int = 0, control: int = 0) -> dict[str, int]:
    return {"latents": latents, "prompt": prompt, "pooled": pooled, "control": control}


def read_entries(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("[0-9a-f]*.safetensors")}


# F17: NaN


def encode_nan(name: str, sample_id: str) -> Callable[[], None]:
    """Makes the encoder return NaN for one tensor of one sample."""

    def setup() -> None:
        from trainer.config.groups import GROUPS

        family = GROUPS["model"][FAMILY]
        build_encoder = family.build_encoder

        def build(self, device):
            encoder = build_encoder(self, device)
            encode = encoder.encode

            def encode_or_nan(part, sample):
                tensor = encode(part, sample)
                return tensor * float("nan") if part == name and sample.sample.id == sample_id else tensor

            encoder.encode = encode_or_nan
            return encoder

        family.build_encoder = build

    return setup


def test_nan_from_the_encoder_is_refused_and_not_stored(harness: Harness, folder: Path, cache: Path):
    write_pairs(folder, 4)
    result = harness.run(
        harness.new_folder(), *pairs_settings(folder, cache), "stage=cache", setup=encode_nan("latents", "1")
    )
    assert result.code == 65
    assert f"{folder}/training_images/1.png: its latents came out of the encoder as NaN or infinity" in result.output
    # The other entries are stored.
    assert fill(harness, folder, cache) == made(latents=1)


def test_nan_in_a_cache_entry_is_refused_with_the_file(harness: Harness, folder: Path, cache: Path):
    from safetensors.torch import load, save

    write_pairs(folder, 6)
    settings = [*pairs_settings(folder, cache, validation_fraction=0.3), *SHORT]
    fill(harness, folder, cache, "dataset.validation_fraction=0.3")
    for entry in (cache / "latents").rglob("*.safetensors"):
        data = entry.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        value = load(data)["value"]
        value[0] = float("nan")
        entry.write_bytes(save({"value": value}, header["__metadata__"]))
    result = harness.run(harness.new_folder(), *settings)
    assert result.code == 65
    assert re.search(
        rf"The cache entry {re.escape(str(cache))}/latents/\w\w/\w+\.safetensors is damaged", result.output
    )
    assert harness.run(harness.new_folder(), *settings, "cache.verify=full").code == 0


# F19: only what changed is made again


def test_changed_captions_and_images_are_encoded_again(harness: Harness, folder: Path, cache: Path):
    write_pairs(folder, 5)
    targets = folder / "training_images"
    assert fill(harness, folder, cache) == made(5, 5, 5, 5)
    assert fill(harness, folder, cache) == made()
    (targets / "2.txt").write_text("another instruction")
    assert fill(harness, folder, cache) == made(prompt=1, pooled=1)

    # Other bytes with the same name, size and time.
    path = targets / "3.png"
    other = io.BytesIO()
    random_image(77).save(other, "PNG")
    length = max(path.stat().st_size, len(other.getvalue())) + 8
    path.write_bytes(path.read_bytes().ljust(length, b"\0"))
    assert fill(harness, folder, cache) == made(latents=1)
    status = path.stat()
    for data, expected in ((other.getvalue(), made(latents=1)), (path.read_bytes(), made())):
        with open(path, "r+b") as file:
            file.write(data.ljust(length, b"\0"))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        now = path.stat()
        assert (now.st_size, now.st_mtime_ns, now.st_ino) == (length, status.st_mtime_ns, status.st_ino)
        assert fill(harness, folder, cache) == expected


def test_changed_settings_make_the_entries_that_depend_on_them(harness: Harness, folder: Path, cache: Path):
    write_pairs(folder, 5)
    assert fill(harness, folder, cache) == made(5, 5, 5, 5)
    for setting, expected in (
        ("dataset.resolution=48", made(latents=5, control=5)),
        ("dataset.control_resolution=16", made(control=5)),
        ("dataset.flip=true", made(latents=5, control=5)),
        ("dataset.caption_dropout=0.5", made(prompt=1, pooled=1)),
        ("model.text_length=6", made(prompt=5)),
        ("model.encoder_dtypes.text_encoder_2=float32", made(prompt=5)),
        ("model.encoder_dtype=float32", made(latents=5, pooled=5, control=5)),
    ):
        assert fill(harness, folder, cache, setting) == expected, setting
    assert fill(harness, folder, cache) == made()
    other_schema = at_call("trainer.run:execute", 1, lambda: setattr(sys.modules["trainer.cache.entry"], "SCHEMA", 999))
    assert fill(harness, folder, cache, setup=other_schema) == made(5, 5, 5, 5)


def test_changed_components_of_the_model_make_their_entries_again(
    harness: Harness, folder: Path, cache: Path, tmp_path: Path
):
    write_pairs(folder, 3)
    prefix = "model.path="
    model = next(Path(s.removeprefix(prefix)) for s in harness.settings if s.startswith(prefix))
    assert fill(harness, folder, cache) == made(3, 3, 3, 3)
    for component, expected in (
        ("vae", made(latents=3, control=3)),
        ("text_encoder", made(pooled=3)),
        ("tokenizer", made(pooled=3)),
        ("text_encoder_2", made(prompt=3)),
        ("tokenizer_2", made(prompt=3)),
        ("transformer", made()),
    ):
        copy = Path(shutil.copytree(model, tmp_path / component))
        config = next(path for path in sorted((copy / component).glob("*.json")) if "config" in path.name)
        config.write_text(config.read_text() + " ")
        assert fill(harness, folder, cache, f"model.path={copy}") == expected, component


# F20: killed and concurrent writers


def test_killed_and_concurrent_writers_leave_the_entries_of_one_writer(
    harness: Harness, folder: Path, cache: Path, tmp_path: Path
):
    write_pairs(folder, 4)
    fill(harness, folder, tmp_path / "serial")
    serial = read_entries(tmp_path / "serial")
    assert len(serial) == 16
    settings = [*harness.settings, *pairs_settings(folder, cache), f"out={tmp_path / 'out'}", "stage=cache"]
    kill = at_call("trainer.cache.store:os.replace", 8, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert start(settings, tmp_path / "text", kill).wait().code == -signal.SIGKILL
    entries = read_entries(cache)
    assert 0 < len(entries) < 16 and entries.items() <= serial.items()
    both = [start(settings, tmp_path / f"text-{i}") for i in range(2)]
    assert [process.wait().code for process in both] == [0, 0]
    assert read_entries(cache) == serial


@pytest.mark.slow  # the worker processes import everything again
def test_several_workers_make_the_entries_of_one(harness: Harness, folder: Path, tmp_path: Path):
    write_pairs(folder, 4)
    save_image(folder / "masks" / "1.png", 5)
    one, two = tmp_path / "one", tmp_path / "two"
    counts = fill(harness, folder, one)
    assert fill(harness, folder, two, "cache.workers=2") == counts
    trees = [{p.relative_to(root): p.read_bytes() for p in root.rglob("*.safetensors")} for root in (one, two)]
    assert trees[0] == trees[1] and len(trees[0]) == sum(counts.values()) > 16


# Space on the disk and memory


def test_unused_entries_are_deleted_on_request_only(harness: Harness, folder: Path, cache: Path):
    write_pairs(folder, 6)
    out, settings = harness.new_folder(), pairs_settings(folder, cache, validation_fraction=0.3)
    run = harness.finish(out, *settings, *SHORT)
    used = set(cache.rglob("*.safetensors"))
    fill(harness, folder, cache, "dataset.resolution=16")
    unused = set(cache.rglob("*.safetensors")) - used
    assert unused

    def drop_unused() -> str:
        result = harness.run(
            harness.new_folder(), *settings, "dataset.resolution=48", "stage=cache", "cache.drop_unused=true"
        )
        assert result.code == 0, result
        return result.output

    assert f"dropped {len(unused)} entries that no run uses" in drop_unused()
    assert set(cache.rglob("*.safetensors")) >= used
    assert harness.run(out, *settings, *SHORT).code == 0
    shutil.rmtree(run)
    text = drop_unused()
    assert "dropped 0 entries" not in text
    remaining = set(cache.rglob("*.safetensors"))
    assert not remaining & {path for path in used if path.parts[-3] in ("latents", "control")}
    assert f"total       {len(remaining)} entries" in text


def test_encoders_are_freed_before_the_denoiser_is_loaded(harness: Harness, folder: Path, cache: Path, tmp_path: Path):
    def record_modules() -> None:
        import gc

        import torch

        modules = [thing for thing in gc.get_objects() if isinstance(thing, torch.nn.Module)]
        names = {type(module).__name__ for module in modules if next(module.parameters(), None) is not None}
        (tmp_path / "modules").write_text(" ".join(sorted(names)))

    write_pairs(folder, 3)
    setup = at_call("trainer.training.session:build_network", 1, record_modules)
    harness.finish(harness.new_folder(), *pairs_settings(folder, cache), "evaluation.images=0", "steps=1", setup=setup)
    assert read_entries(cache)
    assert (tmp_path / "modules").read_text() == ""
