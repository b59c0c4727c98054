"""Samples and faults of the layouts pairs and concepts, which are folders of files."""

from __future__ import annotations

import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from images import SIZE, random_image, save_image
from layouts import assert_faults, caption, read_faults, read_samples, write_concepts, write_pairs

from trainer.core.digests import Digests
from trainer.core.errors import UsageError
from trainer.dataset.concepts import Concepts
from trainer.dataset.pairs import Pairs

# pairs


def rename_pair(folder: Path, old: str, new: str) -> None:
    for path in [*(folder / "control_images").iterdir(), *(folder / "training_images").iterdir()]:
        if path.stem == old:
            path.rename(path.with_name(f"{new}{path.suffix}"))


def test_pairs_are_matched_by_name(folder: Path, digests: Digests):
    write_pairs(folder, 3)
    rename_pair(folder, "0", "b")
    rename_pair(folder, "1", "a.1")
    rename_pair(folder, "2", "c")
    (folder / "training_images" / ".hidden.png").write_bytes(b"")
    (folder / "training_images" / "notes.md").write_text("not a sample")
    samples = read_samples(Pairs(path=str(folder)), digests)
    assert [sample.id for sample in samples] == ["a.1", "b", "c"]
    first = samples[0]
    assert first.caption == caption(1)
    assert first.split is None
    assert [Path(source.name).name for source in (first.image, *first.controls)] == ["a.1.png", "a.1.jpg"]
    assert first.image.size() == SIZE
    assert np.array_equal(np.asarray(first.image.open()), np.asarray(random_image(1)))


def test_every_fault_of_pairs_is_listed(folder: Path, digests: Digests):
    names = ["good", "no_control", "no_target", "no_text", "empty", "latin", "long", "Case", "case", "twice"]
    controls, targets = folder / "control_images", folder / "training_images"
    for number, name in enumerate(names):
        save_image(controls / f"{name}.jpg", number)
        save_image(targets / f"{name}.png", number)
        (targets / f"{name}.txt").write_text(caption(number))
    (controls / "no_control.jpg").unlink()
    (targets / "no_target.png").unlink()
    (targets / "no_text.txt").unlink()
    (targets / "empty.txt").write_text(" \n")
    (targets / "latin.txt").write_bytes("café".encode("latin-1"))
    (targets / "long.txt").write_text("a" * 100_000)
    save_image(targets / "twice.webp", 0)
    (controls / "stray.jpg").write_bytes(b"<!DOCTYPE html><title>404</title>")
    message = assert_faults(
        Pairs(path=str(folder)),
        digests,
        "control_images/no_control.*: there is no such control image",
        "training_images/no_target.*: there is no such target image",
        "training_images/no_text.txt: there is no such instruction",
        "training_images/empty.txt: the caption is empty",
        "training_images/latin.txt: it is not UTF-8 text",
        "training_images/long.txt: the caption has 100000 characters",
        "training_images/case.png: differs in case only from training_images/Case.png",
        "training_images/twice.webp: is the same sample as training_images/twice.png",
        "stray.jpg: is an HTML page, not an image",
        "training_images/stray.*: there is no such target image",
        "training_images/stray.txt: there is no such instruction",
    )
    assert "11 faults in 11 samples" in message
    assert "good" not in message


def test_names_match_in_every_unicode_form(folder: Path, digests: Digests):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write_pairs(folder, 1)
    rename_pair(folder, "0", composed)
    (folder / "control_images" / f"{composed}.jpg").rename(folder / "control_images" / f"{decomposed}.jpg")
    assert [sample.id for sample in read_samples(Pairs(path=str(folder)), digests)] == [composed]


def test_link_out_of_the_folder_is_refused_and_a_link_inside_is_not(tmp_path: Path, folder: Path, digests: Digests):
    write_pairs(folder, 1)
    (folder / "control_images" / "b.jpg").symlink_to("0.jpg")
    save_image(folder / "training_images" / "b.png", 1)
    (folder / "training_images" / "b.txt").write_text("inside")
    (tmp_path / "link").symlink_to(folder)
    assert len(read_samples(Pairs(path=str(tmp_path / "link")), digests)) == 2
    (tmp_path / "secret.txt").write_text("password")
    (folder / "training_images" / "b.txt").unlink()
    (folder / "training_images" / "b.txt").symlink_to(tmp_path / "secret.txt")
    fault = "training_images/b.txt: is a link out of the dataset's folder"
    assert "password" not in assert_faults(Pairs(path=str(folder)), digests, fault)


def test_named_pipe_is_a_fault_and_not_opened(folder: Path, digests: Digests):
    write_pairs(folder, 1)
    os.mkfifo(folder / "control_images" / "b.jpg")
    assert "b.jpg: is not a file" in read_faults(Pairs(path=str(folder)), digests)


def test_several_controls_are_in_numbered_folders_or_have_numbered_names(tmp_path: Path, digests: Digests):
    in_folders, by_name = tmp_path / "folders", tmp_path / "names"
    write_pairs(in_folders, 2, controls=3)
    write_pairs(by_name, 2)
    for i in range(2):
        for number in (2, 3):
            source = in_folders / f"control_images_{number}" / f"{i}.jpg"
            shutil.copy(source, by_name / "control_images" / f"{i}_control_{number - 1}.jpg")
    expected = [
        (str(i), [path.read_bytes() for path in sorted(in_folders.glob(f"control_images*/{i}.jpg"))]) for i in range(2)
    ]
    for folder in (in_folders, by_name):
        samples = read_samples(Pairs(path=str(folder)), digests)
        controls = [(s.id, [Path(control.name).read_bytes() for control in s.controls]) for s in samples]
        assert controls == expected
    (by_name / "control_images" / "1_control_2.jpg").unlink()
    (in_folders / "control_images_3" / "0.jpg").unlink()
    missing = ": there is no such control image"
    assert_faults(Pairs(path=str(by_name)), digests, f"control_images/1_control_2.*{missing}")
    assert_faults(Pairs(path=str(in_folders)), digests, f"control_images_3/0.*{missing}")


def test_image_of_a_sample_is_not_a_mask_or_control_of_another(folder: Path, digests: Digests):
    write_pairs(folder, 3)
    rename_pair(folder, "1", "0_control_1")
    rename_pair(folder, "2", "0_mask")
    samples = read_samples(Pairs(path=str(folder)), digests)
    found = [(sample.id, len(sample.controls), sample.mask) for sample in samples]
    assert found == [("0", 1, None), ("0_control_1", 1, None), ("0_mask", 1, None)]


@pytest.mark.parametrize("name", ["masks/1.png", "training_images/1_mask.png", "control_images/1_mask.png"])
def test_edit_mask_is_in_masks_or_beside_either_image(name: str, folder: Path, digests: Digests):
    write_pairs(folder, 2)
    path = save_image(folder / name, 7)
    samples = read_samples(Pairs(path=str(folder)), digests)
    assert [sample.mask and sample.mask.name for sample in samples] == [None, str(path)]
    path.rename(path.with_name(path.name.replace("1", "5")))
    if name.startswith("masks"):
        fault = "training_images/5.*: there is no such target image"
        assert fault in read_faults(Pairs(path=str(folder)), digests)


# concepts


def test_trigger_is_put_in_front_of_captions_without_it(folder: Path, digests: Digests):
    write_concepts(folder, 2)
    (folder / "toy" / "images" / "1.txt").write_text("My SKS toy")
    settings = Concepts(path=str(folder), triggers={"toy": "sks"}, weights={"toy": 0.5}, repeats={"clock": 3})
    samples = {sample.id: (sample.caption, sample.weight, sample.repeats) for sample in read_samples(settings, digests)}
    assert samples == {
        "clock/images/0": ("clock image number 0", 1.0, 3),
        "clock/images/1": ("clock image number 1", 1.0, 3),
        "toy/images/0": ("sks, toy image number 0", 0.5, 1),
        "toy/images/1": ("My SKS toy", 0.5, 1),
    }
    with pytest.raises(UsageError, match=r"dataset.triggers names dog; the concepts in .* are clock, toy"):
        Concepts(path=str(folder), triggers={"dog": "sks"}).read(digests)


def test_concept_without_captions_is_captioned_by_its_name(folder: Path, digests: Digests):
    write_concepts(folder, 2)
    for path in (folder / "toy" / "images").glob("*.txt"):
        path.unlink()
    settings = Concepts(path=str(folder))
    assert [sample.caption for sample in read_samples(settings, digests)][2:] == ["toy", "toy"]
    assert "toy: no image has a .txt, so the caption of all is 'toy'" in settings.read(digests).notes[0]
    triggered = Concepts(path=str(folder), triggers={"toy": "sks"})
    assert [sample.caption for sample in read_samples(triggered, digests)][2:] == ["sks", "sks"]


def test_missing_images_and_captions_of_a_concept_are_faults(folder: Path, digests: Digests):
    write_concepts(folder, 2)
    (folder / "clock" / "images" / "0.txt").unlink()
    (folder / "clock" / "images" / "1.jpg").unlink()
    assert_faults(
        Concepts(path=str(folder)),
        digests,
        "clock/images/0.txt: there is no such caption, and other images of the concept have theirs",
        "clock/images/1.txt: there is no such image",
    )
