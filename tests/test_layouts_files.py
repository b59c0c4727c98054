"""Samples and faults of the layouts arrays, personalized and hub."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from images import random_image, save_image
from layouts import (
    assert_faults,
    caption,
    read_faults,
    read_samples,
    write_arrays,
    write_hub,
    write_imagefolder,
    write_pairs,
    write_personalized,
)

from trainer.core.digests import Digests
from trainer.core.errors import UsageError, WeightsError
from trainer.dataset.arrays import Arrays
from trainer.dataset.hub import Hub
from trainer.dataset.imagefolder import ImageFolder
from trainer.dataset.pairs import Pairs
from trainer.dataset.personalized import Personalized

# arrays


def anonymous_memory() -> int:
    """Bytes of memory of this process that are not mapped from files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def test_arrays_stay_on_the_disk(folder: Path, digests: Digests):
    """Of a gigabyte of images, only the entries in use are read."""
    write_arrays(folder, 2)
    shape = (1400, 512, 512, 3)
    with open(folder / "train_images.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + int(np.prod(shape)))
    np.save(folder / "train_descriptions.npy", np.array(["a plan"] * shape[0]))
    before = anonymous_memory()
    image = read_samples(Arrays(path=str(folder)), digests)[-1].image
    assert image.open().size == (512, 512)
    image.digest()
    assert len(pickle.dumps(image)) < 1000
    assert anonymous_memory() - before < 50 * 2**20


def test_arrays_of_other_shapes_and_types_are_refused(folder: Path, digests: Digests):
    write_arrays(folder, 3)
    settings = Arrays(path=str(folder))
    assert sorted({sample.split for sample in read_samples(settings, digests)}) == ["train", "validation"]
    images_file, descriptions_file = folder / "train_images.npy", folder / "train_descriptions.npy"
    images, descriptions = np.load(images_file), np.load(descriptions_file)
    for wrong_images, wrong_descriptions, reason in (
        (images / 255, descriptions, "is float64 (3, 32, 40, 3), but images are uint8 (N, height, width, 3)"),
        (images, descriptions[:2], "has 3 images and train_descriptions.npy 2 descriptions"),
        (images, np.array(["a", "", "c"]), "train_descriptions.npy[1]: the caption is empty"),
        (images, np.arange(3), "but descriptions are text (N,)"),
    ):
        np.save(images_file, wrong_images)
        np.save(descriptions_file, wrong_descriptions)
        assert reason in read_faults(settings, digests)


class Payload:
    """Creates a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_arrays_of_objects_are_refused_unopened_with_a_command_that_converts_them(
    folder: Path, digests: Digests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    write_arrays(folder, 2)
    settings = Arrays(path=str(folder))
    descriptions = folder / "train_descriptions.npy"
    np.save(descriptions, np.array([caption(0), Payload()], object), allow_pickle=True)
    message = assert_faults(settings, digests, "contains Python objects (dtype object), and loading them would execute")
    assert not (tmp_path / "executed").exists()
    np.save(descriptions, np.array([caption(0), caption(1)], object), allow_pickle=True)
    command = message.splitlines()[-1].strip()
    assert os.system(command) == 0
    assert len(read_samples(settings, digests)) == 4
    (folder / "test_images.npy").write_bytes(pickle.dumps(Payload()))
    assert "It must be a .npy file" in read_faults(settings, digests)
    assert not (tmp_path / "executed").exists()


# personalized


def test_caption_is_the_template_with_the_history(folder: Path, digests: Digests):
    write_personalized(folder, 2)
    first = read_samples(Personalized(path=str(folder)), digests)[0]
    assert first.caption == "The user liked: image number 0; image number 1; image number 2. Their style: bright."
    assert np.array_equal(np.asarray(first.image.open()), np.asarray(random_image(3)))
    settings = Personalized(path=str(folder), template="{style} {{x}} {target} | {history}", separator=" + ")
    samples = read_samples(settings, digests)
    assert samples[0].caption == "bright {x} image number 3 | image number 0 + image number 1 + image number 2"
    assert sorted({sample.split for sample in samples}) == ["test", "train", "validation"]


@pytest.mark.parametrize("template", ["{history", "{colour}", "{history.__class__}", "{history!r}", "{0}"])
def test_template_with_unknown_fields_is_refused(template: str):
    with pytest.raises(UsageError, match=r"dataset\.template"):
        Personalized(template=template)


def test_every_fault_of_a_record_is_listed(folder: Path, digests: Digests):
    write_personalized(folder, 4)
    settings = Personalized(path=str(folder))
    records = json.loads((folder / "train.json").read_text())
    del records[0]["history_items_info"][1]
    records[1]["target_item_info"] = None
    records[2]["history_items_info"] = []
    records[3]["user_style"] = None
    records.append(records[3] | {"user_style": "dark"})
    records.append("nonsense")
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "images" / "5.png").unlink()
    assert_faults(
        settings,
        digests,
        "train.json record 0: history item 'item_1' is missing from history_items_info",
        "train.json record 1: item_4 is missing",
        "train.json record 2: its history_items_info is empty",
        "train.json record 3, item 'item_5': there is no file 'images/5.png'",
        "train.json record 3: has no user_style or worker_style, and user_styles.json has none for 'train_user'",
        "train.json record 5: is not a record with history_items_info",
    )
    for styles in ([{"user": "train_user", "style": "dark"}], {"train_user": "dark"}):
        (folder / "user_styles.json").write_text(json.dumps(styles))
        assert "has no user_style" not in read_faults(settings, digests)


def test_records_and_styles_of_odd_types_are_faults(folder: Path, digests: Digests):
    write_personalized(folder, 6)
    settings = Personalized(path=str(folder))
    records = json.loads((folder / "train.json").read_text())
    records[0]["history_items_info"][0]["item_id"] = [1]
    records[1]["history_item_ids"] = 7
    records[2]["history_item_ids"] = [["item_2"]]
    records[3]["user_id"] = {"name": "x"}
    records[4]["user_style"] = ["bright"]
    records[5]["target_item_id"] = True
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "user_styles.json").write_text(json.dumps([7, {"user": [1], "style": "dark"}, {"user": 1, "style": {}}]))
    assert_faults(
        settings,
        digests,
        "train.json record 0, item [1]: its item_id is [1], neither text nor a number",
        "train.json record 0: history item 'item_0' is missing from history_items_info",
        "train.json record 1: its history_item_ids is 7, not a list",
        "train.json record 2: history item ['item_2'] is missing from history_items_info",
        "train.json record 3: its user_id is {'name': 'x'}, neither text nor a number",
        "train.json record 4: its user_style is ['bright'], neither text nor a number",
        "train.json record 5: its target_item_id is True, neither text nor a number",
        "user_styles.json entry 0: is 7, not an object with user and style",
        "user_styles.json entry 1: its user is [1], neither text nor a number",
        "user_styles.json entry 2: its style is {}, neither text nor a number",
    )
    (folder / "user_styles.json").write_text("7")
    assert "user_styles.json contains 7, neither an object" in read_faults(settings, digests)


# hub


def test_hub_layout_reads_a_local_folder(folder: Path, digests: Digests):
    write_imagefolder(folder, 3)
    settings = Hub(path=str(folder))
    samples = read_samples(settings, digests)
    assert [sample.id for sample in samples] == [f"train-{i:08d}" for i in range(3)]
    expected = [sample.image.digest() for sample in read_samples(ImageFolder(path=str(folder)), digests)]
    assert [sample.image.digest() for sample in samples] == expected
    fault = "train row 0: has no column 'photo' (its columns: image, text); type dataset.image_column=NAME"
    assert_faults(replace(settings, image_column="photo", caption_column="words"), digests, fault)
    refusal = r"dataset.train_split=x: the dataset has train; type dataset.train_split=NAME"
    with pytest.raises(UsageError, match=refusal):
        replace(settings, train_split="x").read(digests)


def test_parquet_file_that_changes_but_keeps_name_size_and_time_is_read_again(folder: Path, digests: Digests):
    settings = Hub(path=str(folder))
    write_hub(folder, 3)
    path = folder / "train-00000.parquet"
    before = [sample.caption for sample in read_samples(settings, digests)]
    status = path.stat()
    shutil.rmtree(folder)
    write_hub(folder, 3, caption=lambda number: f"imago number {number}")
    path.write_bytes(path.read_bytes().ljust(status.st_size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    after = [sample.caption for sample in read_samples(settings, digests)]
    assert (before[1], after[1]) == ("image number 1", "imago number 1")


def test_hub_cells_contain_masks_and_lists_of_controls(folder: Path, digests: Digests):
    import datasets

    pairs, hub = folder / "pairs", folder / "hub"
    write_pairs(pairs, 2, controls=2)

    def cell(path: Path) -> dict:
        return {"bytes": path.read_bytes(), "path": None}

    rows = {
        "target": [cell(pairs / "training_images" / f"{i}.png") for i in range(2)],
        "prompt": [caption(0), caption(1)],
        "controls": [
            [cell(pairs / name / f"{i}.jpg") for name in ("control_images", "control_images_2")] for i in range(2)
        ],
        "mask": [None, cell(pairs / "training_images" / "0.png")],
    }
    features = datasets.Features(
        {
            "target": datasets.Image(),
            "prompt": datasets.Value("string"),
            "controls": datasets.List(datasets.Image()),
            "mask": datasets.Image(),
        }
    )
    hub.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(hub / "train.parquet")
    settings = Hub(
        path=str(hub),
        image_column="target",
        caption_column="prompt",
        control_columns=["controls"],
        mask_column="mask",
    )
    samples = read_samples(settings, digests)
    for sample, expected in zip(samples, read_samples(Pairs(path=str(pairs)), digests), strict=True):
        assert (sample.caption, sample.image.digest()) == (expected.caption, expected.image.digest())
        assert [c.digest() for c in sample.controls] == [c.digest() for c in expected.controls]
    assert [sample.mask is not None for sample in samples] == [False, True]


def test_hub_layout_opens_no_file_outside_a_local_folder(folder: Path, digests: Digests, tmp_path: Path):
    settings = Hub(path=str(folder))
    write_hub(tmp_path / "elsewhere", 2)
    folder.mkdir()
    data_files = "../elsewhere/train-00000.parquet"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {data_files}\n---\n")
    assert "lies outside the folder" in read_faults(settings, digests)
    shutil.rmtree(folder)
    write_imagefolder(folder, 2)
    (folder / "images" / "0.jpg").unlink()
    (folder / "images" / "0.jpg").symlink_to(save_image(tmp_path / "secret.png", 1))
    assert "0.jpg, which lies outside the folder; put the file itself there" in read_faults(settings, digests)


def test_unavailable_hub_dataset_is_refused_with_what_to_type(digests: Digests):
    refusal = r"dataset.path=nobody/nothing: the dataset cannot be loaded from the hub.*Type dataset.path=FOLDER"
    with pytest.raises(WeightsError, match=refusal):
        Hub(path="nobody/nothing").read(digests)
    assert "there is no such folder" in read_faults(Hub(path="./nowhere"), digests)
    with pytest.raises(UsageError, match=r"dataset\.path=OWNER/NAME"):
        Hub().read(digests)
