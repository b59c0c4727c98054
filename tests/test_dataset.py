"""Settings of datasets, limits, splits and the demo world."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from layouts import read_faults, read_samples, write_pairs
from omegaconf import OmegaConf

from trainer.config.groups import CONF, GROUPS
from trainer.core.digests import Digests
from trainer.core.errors import DataError, UsageError
from trainer.dataset import Dataset
from trainer.dataset.demo import Demo, Task
from trainer.dataset.imagefolder import ImageFolder
from trainer.dataset.listing import Listing
from trainer.dataset.pairs import Pairs
from trainer.dataset.sample import Sample
from trainer.dataset.source import FileSource
from trainer.dataset.splitting import split_samples

# Settings


def test_resolution_is_one_side_or_width_by_height():
    assert ImageFolder().size() is None
    assert ImageFolder(resolution=1024).size() == (1024, 1024)
    assert ImageFolder(resolution="832x576").size() == (832, 576)
    for wrong in ("832*576", "0", "x64", -64, "64x0", "big"):
        with pytest.raises(UsageError, match=r"dataset\.resolution"):
            ImageFolder(resolution=wrong)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("validation_fraction", 1.0),
        ("validation_fraction", -0.1),
        ("caption_dropout", 1.5),
        ("limit", 0),
        ("resolution", "1x"),
        ("on_fault", "go"),
        ("buckets", "x"),
        ("buckets", ["1*2"]),
        ("buckets", []),
        ("bucket_ratio", 0.5),
        ("max_upscale", 0.5),
    ],
)
def test_invalid_settings_are_refused_when_the_command_line_is_read(key: str, value: object):
    with pytest.raises(UsageError, match=f"dataset.{key}"):
        OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Pairs), {key: value}))


def test_settings_from_the_command_line_have_their_types():
    settings = OmegaConf.merge(OmegaConf.structured(Pairs), OmegaConf.from_dotlist(["resolution=832x576", "limit=3"]))
    assert OmegaConf.to_object(settings) == Pairs(resolution="832x576", limit=3)


@pytest.mark.parametrize("option", GROUPS["dataset"])
def test_yaml_files_contain_the_defaults_of_the_settings_class(option: str):
    settings_class = GROUPS["dataset"][option]
    common, own = (OmegaConf.load(CONF / name) for name in ("dataset.yaml", f"dataset/{option}.yaml"))
    assert own.pop("defaults") == [f"/schema/dataset/{option}@_here_", "/dataset@_here_", "_self_"]
    settings = OmegaConf.merge(OmegaConf.structured(settings_class), common, own)
    assert OmegaConf.to_object(settings) == settings_class()
    # Each setting is explained in one of the two files.
    assert {*common, *own} == set(settings)


@pytest.mark.parametrize("layout", [ImageFolder, Pairs])
def test_missing_path_is_a_usage_error_and_missing_folder_a_data_error(
    layout: type[Dataset], tmp_path: Path, digests: Digests
):
    with pytest.raises(UsageError, match="type dataset.path=FOLDER"):
        layout().read(digests)
    assert "there is no such folder" in read_faults(layout(path=str(tmp_path / "absent")), digests)
    (tmp_path / "empty").mkdir()
    assert "there is no" in read_faults(layout(path=str(tmp_path / "empty")), digests)


def test_importing_settings_imports_no_heavy_library():
    modules = ", ".join(f"trainer.dataset.{option}" for option in GROUPS["dataset"])
    heavy = {"torch", "numpy", "PIL", "datasets", "safetensors"}
    code = f"import sys, {modules}, trainer.cache.store; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CONF.parent)
    assert done.stdout.split() == []


# Limits and splits


def sample(id: str, split: str | None = None) -> Sample:
    return Sample(id, FileSource(Path(id), None), "text", split=split)


def test_limit_keeps_the_first_samples_by_id(folder: Path, digests: Digests):
    write_pairs(folder, 4)
    samples = read_samples(Pairs(path=str(folder), limit=3), digests)
    assert [sample.id for sample in samples] == ["0", "1", "2"]


def test_limit_applies_to_each_split_of_the_layout(digests: Digests):
    @dataclass(slots=True)
    class Layout(Dataset):
        def read(self, digests: Digests) -> Listing:
            return Listing([sample(f"{name}-{i}", name) for name in ("validation", "train") for i in range(5)])

    ids = [sample.id for sample in read_samples(Layout(limit=2), digests)]
    assert ids == ["train-0", "train-1", "validation-0", "validation-1"]


def test_added_samples_move_no_sample_to_another_split():
    few = split_samples([sample(f"s{i}") for i in range(0, 400, 2)], 0.15, dataset_name="it")
    many = split_samples([sample(f"s{i}") for i in reversed(range(400))], 0.15, dataset_name="it")
    assert set(few.train) < set(many.train)
    assert set(few.validation) < set(many.validation)
    assert 40 <= len(many.validation) <= 80
    # The identity of a run relies on the same split on every machine and in every version.
    assert [sample.id for sample in few.validation][:5] == ["s24", "s32", "s34", "s48", "s66"]


def test_split_of_the_layout_takes_precedence():
    samples = [sample(f"t{i}", "train") for i in range(50)] + [sample("v", "validation")]
    split = split_samples(samples, 0.5, dataset_name="it")
    assert len(split.train) == 50
    assert [sample.id for sample in split.validation] == ["v"]
    assert len(split_samples(samples, 0.0, dataset_name="it").validation) == 1


@pytest.mark.parametrize("count", range(2, 8))
def test_few_samples_still_give_both_splits(count: int):
    samples = [sample(f"few {i}") for i in range(count)]
    least, most = (split_samples(samples, fraction, dataset_name="it") for fraction in (1e-9, 1 - 1e-9))
    assert (len(least.train), len(least.validation)) == (count - 1, 1)
    assert (len(most.train), len(most.validation)) == (1, count - 1)
    assert least.train == [sample for sample in samples if sample not in least.validation]
    assert len(split_samples(samples, 0.0, dataset_name="it").validation) == 0


def test_empty_split_is_refused_with_counts_and_the_setting_to_change():
    only = [sample("only")]
    message = r"it: of 1 samples 1 are for training and 0 for validation.*type dataset\.validation_fraction=0"
    with pytest.raises(DataError, match=message):
        split_samples(only, 0.15, dataset_name="it")
    assert split_samples(only, 0.0, dataset_name="it").train == only
    message = r"0 are for training and 3 for validation.*smaller dataset\.validation_fraction"
    with pytest.raises(DataError, match=message):
        split_samples([sample(f"v{i}", "validation") for i in range(3)], 0.15, dataset_name="it")
    with pytest.raises(DataError, match="of 0 samples"):
        split_samples([], 0.15, dataset_name="it")


# The demo world


def test_described_scenes_have_captions_and_no_control_images(digests: Digests):
    samples = read_samples(Demo(resolution="64", task=Task.describe, pairs=8, held_out=2), digests)
    assert {len(sample.controls) for sample in samples} == {0}
    assert len({sample.caption for sample in samples}) == 10
    assert all(re.fullmatch(r"a \w+ \w+( and a \w+ \w+)*, \w+", sample.caption) for sample in samples)
