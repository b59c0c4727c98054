"""What each layout is read as, and what it refuses; the pictures themselves are the matter of test_dataset.py."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import layouts
import numpy as np
import pytest
from layouts import drawing, save, text

from trainer import dataset
from trainer.core.errors import DataError, UsageError
from trainer.core.files import Digests
from trainer.dataset import Arrays, CaptionsJson, Concepts, Csv, Hub, ImageFolder, Pairs, Personalized


@pytest.fixture
def digests(tmp_path: Path) -> Digests:
    return Digests(tmp_path / "digests" / "digests.db")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "set"


def faults_of(settings: dataset.Dataset, digests: Digests) -> str:
    with pytest.raises(DataError) as refusal:
        dataset.read(settings, digests)
    return str(refusal.value)


def same(source, number: int, atol: int = 0) -> bool:
    return bool(np.allclose(np.asarray(source.open(), int), np.asarray(drawing(number), int), atol=atol))


@pytest.mark.parametrize("layout", layouts.make)
def test_every_layout_gives_each_picture_with_its_caption(layout: str, folder: Path, digests: Digests):
    layouts.make[layout](folder, 4)
    settings = dataset.OPTIONS[layout](path=str(folder))
    listing = settings.read(digests)
    assert listing.faults == []
    assert len({sample.id for sample in listing.samples}) == len(listing.samples) >= 4
    assert listing.found == len(listing.samples)
    for sample in listing.samples:
        assert sample.image.size() == layouts.SIZE
        assert sample.image.open().size == layouts.SIZE
        assert len(sample.image.digest()) == 64
        assert "picture number" in sample.caption
    digests_of = [sample.image.digest() for sample in listing.samples if sample.split in (None, "train")]
    assert len(set(digests_of)) == len(digests_of)
    assert [sample.image.digest() for sample in dataset.read(settings, digests)] == [
        sample.image.digest() for sample in sorted(listing.samples, key=lambda sample: sample.id)
    ]


@pytest.mark.parametrize("layout", ["imagefolder", "captions_json", "pairs"])
def test_folders_named_train_and_validation_are_the_split(layout: str, folder: Path, digests: Digests):
    settings = dataset.OPTIONS[layout](path=str(folder))
    layouts.make[layout](folder / "train", 3)
    assert {sample.split for sample in dataset.read(settings, digests)} == {None}
    layouts.make[layout](folder / "test", 2)
    assert sorted(sample.split for sample in dataset.read(settings, digests)) == ["train"] * 3 + ["validation"] * 2
    layouts.make[layout](folder / "val", 1)
    assert sorted(sample.split for sample in dataset.read(settings, digests)) == ["test"] * 2 + ["train"] * 3 + [
        "validation"
    ]
    layouts.make[layout](folder / "validation", 1)
    listing = settings.read(digests)
    assert sorted(sample.split for sample in listing.samples) == ["test"] * 2 + ["train"] * 3 + ["validation"]
    assert listing.notes == ["val is left alone, for validation is what the run is judged by"]


# tables


def test_columns_name_controls_masks_pictures_and_captions(folder: Path, digests: Digests):
    for number, name in enumerate(("target/a", "one/a", "two/a", "mask/a")):
        save(folder / f"{name}.png", number)
    (folder / "all.tsv").write_text(
        "goal\tprompt\tfirst\tsecond\twhere\ntarget/a.png\tdo it\tone/a.png\ttwo/a.png\tmask/a.png\n"
    )
    settings = Csv(
        path=str(folder),
        image_column="goal",
        caption_column="prompt",
        control_columns=["first", "second"],
        mask_column="where",
    )
    (sample,) = dataset.read(settings, digests)
    assert sample.caption == "do it"
    assert [same(source, number) for number, source in enumerate((sample.image, *sample.controls, sample.mask))] == [
        True
    ] * 4
    assert dataset.read(Csv(**{**fields(settings), "path": str(folder / "all.tsv")}), digests) == [sample]
    for key, wrong in (
        ("image_column", "x"),
        ("caption_column", "x"),
        ("control_columns", ["x"]),
        ("mask_column", "x"),
    ):
        assert (
            f"has no column 'x' (its columns: goal, prompt, first, second, where); type dataset.{key}=NAME"
            in faults_of(Csv(**{**fields(settings), key: wrong}), digests)
        )


def fields(settings: dataset.Dataset) -> dict:
    from dataclasses import asdict

    return asdict(settings)


def test_a_csv_with_torn_lines_says_which(folder: Path, digests: Digests):
    layouts.table(folder, 3)
    path = folder / "all.csv"
    path.write_text(path.read_text() + '\n0.png,two,cells\n1.png,"never closed\n')
    message = faults_of(Csv(path=str(folder)), digests)
    assert "all.csv line 6: has 3 cells, and the header line has 2; quote what holds a ','" in message
    assert "all.csv line 7: unexpected end of data; what follows was not read" in message
    path.write_text("text,text\n")
    assert "has the same column twice" in faults_of(Csv(path=str(folder)), digests)
    shutil.copy(path, folder / "other.csv")
    assert "several tables (all.csv, other.csv); type dataset.path=" in faults_of(Csv(path=str(folder)), digests)
    path.write_bytes("file_name;text\n0.png;café\n".encode())
    assert [s.caption for s in dataset.read(Csv(path=str(path), delimiter=";"), digests)] == ["café"]


def test_tables_called_train_and_val_are_the_split(folder: Path, digests: Digests):
    layouts.table(folder, 4)
    header, *rows = (folder / "all.csv").read_text().splitlines(keepends=True)
    (folder / "all.csv").unlink()
    for name, own in (("train", rows[:3]), ("val", rows[3:])):
        (folder / f"{name}.csv").write_text("".join([header, *own]))
    assert [sample.split for sample in dataset.read(Csv(path=str(folder)), digests)] == ["train"] * 3 + ["validation"]


def test_captions_may_be_objects_or_a_list_of_them(folder: Path, digests: Digests):
    layouts.captions_json(folder, 2)
    settings = CaptionsJson(path=str(folder), caption_column="caption")
    plain = dataset.read(CaptionsJson(path=str(folder)), digests)
    for entries in (
        {f"{i}.png": {"caption": text(i), "tags": ["a"]} for i in range(2)},
        [{"file_name": f"{i}.png", "caption": text(i)} for i in range(2)],
    ):
        (folder / "captions.json").write_text(json.dumps(entries))
        assert dataset.read(settings, digests) == plain


def test_every_fault_of_captions_json_is_listed(folder: Path, digests: Digests):
    layouts.captions_json(folder, 4)
    (folder / "images" / "2.png").write_bytes(b"<html>")
    (folder / "captions.json").write_text(
        '{"0.png": "a", "0.png": "b", "1.png": "", "2.png": "c", "9.png": "d", "../x": "e", "3.png": ["f"]}'
    )
    message = faults_of(CaptionsJson(path=str(folder)), digests)
    for fault in (
        "captions.json '0.png' (images/0.png): is the same sample as captions.json '0.png' (images/0.png)",
        "captions.json '1.png': the caption is empty",
        "2.png: is an HTML page",
        "captions.json '9.png': there is no file '9.png', here or in images/",
        "captions.json '../x': '../x' may lead out of the data set's folder",
        "captions.json '3.png': the caption is ['f'], not text",
    ):
        assert fault in message
    (folder / "captions.json").write_text('{"0.png": "a"}')
    listing = CaptionsJson(path=str(folder)).read(digests)
    assert listing.faults == [] and "3 pictures of images/ have no entry in captions.json" in listing.notes[0]
    for wrong, reason in (
        ("[1", "is not the JSON file"),
        ("7", "holds neither an object"),
        ("[7]", "entry 1: is no JSON object"),
    ):
        (folder / "captions.json").write_text(wrong)
        assert reason in faults_of(CaptionsJson(path=str(folder)), digests)


def test_a_mask_of_the_same_name_lies_over_its_picture_and_must_have_its_shape(folder: Path, digests: Digests):
    layouts.imagefolder(folder, 3)
    save(folder / "masks" / "1.png", 7, (20, 16))
    assert [sample.mask and sample.mask.size() for sample in dataset.read(ImageFolder(path=str(folder)), digests)] == [
        None,
        (20, 16),
        None,
    ]
    save(folder / "masks" / "2.png", 7, (32, 40))
    assert "its mask" in (message := faults_of(ImageFolder(path=str(folder)), digests))
    assert "2.png is 32 x 40 pixels, of another shape than the picture (40 x 32)" in message
    save(folder / "masks" / "2.jpg", 7)
    assert "has several masks: masks/2.jpg, masks/2.png" in faults_of(ImageFolder(path=str(folder)), digests)


# pairs


def test_several_controls_lie_in_folders_or_beside_each_other(tmp_path: Path, digests: Digests):
    layouts.pairs(tmp_path / "folders", 2, controls=3)
    folder = tmp_path / "names"
    layouts.pairs(folder, 2)
    for i in range(2):
        for number in (1, 2):
            save(folder / "control_images" / f"{i}_control_{number}.jpg", 100 * (number + 1) + i)
    folders, names = (dataset.read(Pairs(path=str(where)), digests) for where in (tmp_path / "folders", folder))
    assert [sample.id for sample in names] == [sample.id for sample in folders] == ["0", "1"]
    for sample in (*folders, *names):
        assert [c.digest() for c in sample.controls] == [c.digest() for c in folders[int(sample.id)].controls]
        assert len(sample.controls) == 3
    (folder / "control_images" / "1_control_2.jpg").unlink()
    (tmp_path / "folders" / "control_images_3" / "0.jpg").unlink()
    assert "control_images/1_control_2.*: there is no such control picture" in faults_of(
        Pairs(path=str(folder)), digests
    )
    assert "control_images_3/0.*: there is no such control picture" in faults_of(
        Pairs(path=str(tmp_path / "folders")), digests
    )


def test_a_picture_that_is_a_sample_of_its_own_is_nobodys_mask_or_control(folder: Path, digests: Digests):
    layouts.pairs(folder, 1)
    for name in ("0_control_1", "0_mask"):
        save(folder / "control_images" / f"{name}.jpg", 5)
        save(folder / "training_images" / f"{name}.png", 6)
        (folder / "training_images" / f"{name}.txt").write_text("its own")
    samples = dataset.read(Pairs(path=str(folder)), digests)
    assert [(sample.id, len(sample.controls), sample.mask) for sample in samples] == [
        ("0", 1, None),
        ("0_control_1", 1, None),
        ("0_mask", 1, None),
    ]


@pytest.mark.parametrize("place", ["masks/1.png", "training_images/1_mask.png", "control_images/1_mask.png"])
def test_an_edit_mask_lies_in_masks_or_beside_either_picture(place: str, folder: Path, digests: Digests):
    layouts.pairs(folder, 2)
    save(folder / place, 7)
    samples = dataset.read(Pairs(path=str(folder)), digests)
    assert [sample.mask is not None for sample in samples] == [False, True]
    assert same(samples[1].mask, 7)
    (folder / place).rename((folder / place).with_name((folder / place).name.replace("1", "5")))
    if place.startswith("masks"):
        assert "training_images/5.*: there is no such target picture" in faults_of(Pairs(path=str(folder)), digests)


# arrays


def test_arrays_stay_on_the_disk(folder: Path, digests: Digests):
    """A gigabyte of pictures, of which only what is looked at is read."""
    layouts.arrays(folder, 2)
    shape = (1400, 512, 512, 3)
    with open(folder / "train_images.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + int(np.prod(shape)))
    np.save(folder / "train_descriptions.npy", np.array(["a plan"] * shape[0]))
    before = anonymous()
    samples = dataset.read(Arrays(path=str(folder)), digests)
    assert samples[-1].image.open().size == (512, 512)
    samples[-1].image.digest()
    assert len(pickle.dumps(samples[-1].image)) < 1000
    assert anonymous() - before < 50 * 2**20


def anonymous() -> int:
    """Bytes of memory of this process that no file stands behind."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def test_arrays_say_what_they_should_be(folder: Path, digests: Digests):
    layouts.arrays(folder, 3)
    settings = Arrays(path=str(folder))
    assert sorted({sample.split for sample in dataset.read(settings, digests)}) == ["train", "validation"]
    images, texts = folder / "train_images.npy", folder / "train_descriptions.npy"
    good = np.load(images), np.load(texts)

    def refused(pictures: np.ndarray, words: np.ndarray, reason: str) -> None:
        os.remove(images), os.remove(texts)
        np.save(images, pictures)
        np.save(texts, words)
        assert reason in faults_of(settings, digests)

    refused(good[0] / 255, good[1], "is float64 (3, 32, 40, 3), where pictures are uint8 (N, height, width, 3)")
    refused(good[0], good[1][:2], "has 3 pictures and train_descriptions.npy 2 descriptions")
    refused(good[0], np.array(["a", "", "c"]), "train_descriptions.npy[1]: the caption is empty")
    refused(good[0], np.arange(3), "where descriptions are text (N,)")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_arrays_of_objects_are_refused_unopened_with_the_way_to_convert_them(
    folder: Path, digests: Digests, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    layouts.arrays(folder, 2)
    texts = folder / "train_descriptions.npy"
    np.save(texts, np.array([text(0), Bomb()], object), allow_pickle=True)
    message = faults_of(Arrays(path=str(folder)), digests)
    assert "holds Python objects (dtype object), which loading would execute" in message
    assert not (tmp_path / "executed").exists()
    # The way to convert them does.
    np.save(texts, np.array([text(0), text(1)], object), allow_pickle=True)
    command = message.splitlines()[-1].strip()
    assert os.system(command) == 0
    assert len(dataset.read(Arrays(path=str(folder)), digests)) == 4
    (folder / "test_images.npy").write_bytes(pickle.dumps(Bomb()))
    assert "test_images.npy: is not a .npy file" in faults_of(Arrays(path=str(folder)), digests)
    assert not (tmp_path / "executed").exists()


# concepts


def test_a_trigger_stands_in_front_where_a_caption_lacks_it(folder: Path, digests: Digests):
    layouts.concepts(folder, 2)
    (folder / "toy" / "images" / "1.txt").write_text("My SKS toy")
    settings = Concepts(path=str(folder), triggers={"toy": "sks"}, weights={"toy": 0.5}, repeats={"clock": 3})
    captions = {
        sample.id: (sample.caption, sample.weight, sample.repeats) for sample in dataset.read(settings, digests)
    }
    assert captions == {
        "clock/images/0": ("clock picture number 0", 1.0, 3),
        "clock/images/1": ("clock picture number 1", 1.0, 3),
        "toy/images/0": ("sks, toy picture number 0", 0.5, 1),
        "toy/images/1": ("My SKS toy", 0.5, 1),
    }
    with pytest.raises(UsageError, match=r"dataset.triggers names dog; the concepts in .* are clock, toy"):
        dataset.read(Concepts(path=str(folder), triggers={"dog": "sks"}), digests)


def test_a_concept_without_any_caption_is_captioned_by_its_name_and_says_so(folder: Path, digests: Digests):
    layouts.concepts(folder, 2)
    for path in (folder / "toy" / "images").glob("*.txt"):
        path.unlink()
    settings = Concepts(path=str(folder))
    assert [sample.caption for sample in dataset.read(settings, digests)][2:] == ["toy", "toy"]
    assert "toy: no picture has a .txt, so the caption of all is 'toy'" in settings.read(digests).notes[0]
    assert [s.caption for s in dataset.read(Concepts(path=str(folder), triggers={"toy": "sks"}), digests)][2:] == [
        "sks",
        "sks",
    ]
    (folder / "clock" / "images" / "0.txt").unlink()
    (folder / "clock" / "images" / "1.jpg").unlink()
    message = faults_of(settings, digests)
    assert "clock/images/0.txt: there is no such caption, and other pictures of the concept have theirs" in message
    assert "clock/images/1.txt: there is no such picture" in message


# histories


def test_a_history_is_composed_by_the_template(folder: Path, digests: Digests):
    layouts.personalized(folder, 2)
    first = dataset.read(Personalized(path=str(folder)), digests)[0]
    assert first.caption == "The user liked: picture number 0; picture number 1; picture number 2. Their style: bright."
    assert same(first.image, 3)
    settings = Personalized(path=str(folder), template="{style} {{x}} {target} | {history}", separator=" + ")
    samples = dataset.read(settings, digests)
    assert samples[0].caption == "bright {x} picture number 3 | picture number 0 + picture number 1 + picture number 2"
    assert sorted({sample.split for sample in samples}) == ["test", "train", "validation"]
    for wrong in ("{history", "{colour}", "{history.__class__}", "{history!r}", "{0}"):
        with pytest.raises(UsageError, match=r"dataset\.template"):
            Personalized(template=wrong)


def test_a_missing_item_or_picture_of_a_history_is_named(folder: Path, digests: Digests):
    layouts.personalized(folder, 4)
    records = json.loads((folder / "train.json").read_text())
    del records[0]["history_items_info"][1]
    records[1]["target_item_info"] = None
    records[2]["history_items_info"] = []
    records[3]["user_style"] = None
    records.append(records[3] | {"user_style": "dark"})
    records.append("nonsense")
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "images" / "5.png").unlink()
    message = faults_of(Personalized(path=str(folder)), digests)
    for fault in (
        "train.json record 0: history item 'item_1' is missing from history_items_info",
        "train.json record 1: item_4 is missing",
        "train.json record 2: its history_items_info is empty",
        "train.json record 3, item 'item_5': there is no file 'images/5.png'",
        "train.json record 3: has no user_style, and user_styles.json says none of 'train_user'",
        "train.json record 5: is no record with history_items_info",
    ):
        assert fault in message
    (folder / "user_styles.json").write_text(json.dumps([{"user": "train_user", "style": "dark"}]))
    assert "has no user_style" not in faults_of(Personalized(path=str(folder)), digests)


# the hub's library


def test_a_local_folder_goes_the_way_of_a_hub_data_set(folder: Path, digests: Digests):
    layouts.imagefolder(folder, 3)
    found = dataset.read(Hub(path=str(folder)), digests)
    assert [sample.id for sample in found] == [f"train-{i:08d}" for i in range(3)]
    assert [sample.image.digest() for sample in found] == [
        s.image.digest() for s in dataset.read(ImageFolder(path=str(folder)), digests)
    ]
    message = faults_of(Hub(path=str(folder), image_column="photo", caption_column="words"), digests)
    assert "train row 0: has no column 'photo' (its columns: image, text); type dataset.image_column=NAME" in message
    with pytest.raises(
        UsageError, match=r"dataset.train_split=x: the data set has train; type dataset.train_split=NAME"
    ):
        dataset.read(Hub(path=str(folder), train_split="x"), digests)


def test_a_parquet_file_that_is_replaced_under_its_name_size_and_time_is_read_anew(
    folder: Path, digests: Digests, monkeypatch
):
    layouts.hub(folder, 3)
    path = folder / "train-00000.parquet"
    before = [sample.caption for sample in dataset.read(Hub(path=str(folder)), digests)]
    status = path.stat()
    path.unlink()
    folder.rmdir()
    monkeypatch.setattr(layouts, "text", lambda number: f"pictura number {number}")
    layouts.hub(folder, 3)
    path.write_bytes(path.read_bytes().ljust(status.st_size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    after = [sample.caption for sample in dataset.read(Hub(path=str(folder)), digests)]
    assert before[1] == "picture number 1" and after[1] == "pictura number 1"


def test_hub_cells_hold_lists_of_controls_and_masks(folder: Path, digests: Digests):
    import datasets

    layouts.pairs(folder / "source", 2, controls=2)

    def cell(path: Path) -> dict:
        return {"bytes": path.read_bytes(), "path": None}

    rows = {
        "target": [cell(folder / "source" / "training_images" / f"{i}.png") for i in range(2)],
        "prompt": [text(0), text(1)],
        "controls": [
            [cell(folder / "source" / name / f"{i}.jpg") for name in ("control_images", "control_images_2")]
            for i in range(2)
        ],
        "mask": [None, cell(folder / "source" / "training_images" / "0.png")],
    }
    features = datasets.Features(
        {
            "target": datasets.Image(),
            "prompt": datasets.Value("string"),
            "controls": datasets.List(datasets.Image()),
            "mask": datasets.Image(),
        }
    )
    (folder / "hub").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "hub" / "train.parquet")
    settings = Hub(
        path=str(folder / "hub"),
        image_column="target",
        caption_column="prompt",
        control_columns=["controls"],
        mask_column="mask",
    )
    found = dataset.read(settings, digests)
    for own, other in zip(found, dataset.read(Pairs(path=str(folder / "source")), digests), strict=True):
        assert (own.caption, own.image.digest()) == (other.caption, other.image.digest())
        assert [control.digest() for control in own.controls] == [control.digest() for control in other.controls]
    assert [sample.mask is not None for sample in found] == [False, True]


def test_what_a_local_folder_refers_to_outside_of_it_is_not_opened(folder: Path, digests: Digests, tmp_path: Path):
    layouts.hub(tmp_path / "elsewhere", 2)
    folder.mkdir()
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: ../elsewhere/train-00000.parquet\n---\n"
    )
    assert "lies outside the folder" in faults_of(Hub(path=str(folder)), digests)
    save(tmp_path / "secret.png", 1)
    shutil.rmtree(folder)
    layouts.imagefolder(folder, 2)
    (folder / "images" / "0.jpg").unlink()
    (folder / "images" / "0.jpg").symlink_to(tmp_path / "secret.png")
    assert "0.jpg, which lies outside the folder; put the file itself there" in faults_of(
        Hub(path=str(folder)), digests
    )


def test_a_hub_data_set_that_is_not_to_be_had_says_so(digests: Digests):
    from trainer.core.errors import WeightsError

    with pytest.raises(
        WeightsError,
        match=r"dataset.path=nobody/nothing: the data set is not to be had from the hub.*Type dataset.path=FOLDER",
    ):
        dataset.read(Hub(path="nobody/nothing"), digests)
    assert "there is no such folder" in faults_of(Hub(path="./nowhere"), digests)
    with pytest.raises(UsageError, match=r"dataset\.path=OWNER/NAME"):
        dataset.read(Hub(), digests)
