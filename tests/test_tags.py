"""Captions of tags in several orders: which orders there are, which one a visit sees, and what must be cached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import Tiny
from images import save_image
from synthetic import NoiseSource

from trainer.__main__ import main
from trainer.core.errors import UsageError
from trainer.dataset import Dataset
from trainer.dataset.sample import Sample
from trainer.dataset.tags import shuffled_captions
from trainer.dataset.transform import Resolution, Transform
from trainer.training.visits import Visits

CAPTION = "sks, a house,  red roof, two trees,, night"


def test_orders_keep_the_first_tags_and_hold_the_others():
    settings = Dataset(shuffle_tags=True, keep_tags=1, tag_orders=20)
    captions = shuffled_captions(settings, CAPTION)
    assert len(captions) == 20 and captions == shuffled_captions(settings, CAPTION)
    assert all(caption.startswith("sks, ") for caption in captions)
    expected = Counter(["sks", "a house", "red roof", "two trees", "night"])
    assert all(Counter(caption.split(", ")) == expected for caption in captions)
    # 4 tags have 24 orders; equally likely ones leave 14 of them on average in 20 draws.
    assert len(set(captions)) > 8
    # More orders are further ones: the texts that are cached already stay useful.
    assert shuffled_captions(Dataset(shuffle_tags=True, keep_tags=1, tag_orders=3), CAPTION) == captions[:3]


def test_captions_without_tags_to_shuffle_stay_as_they_are():
    assert shuffled_captions(Dataset(), CAPTION) == [CAPTION]
    settings = Dataset(shuffle_tags=True, keep_tags=1)
    assert shuffled_captions(settings, "a house") == ["a house"]
    assert shuffled_captions(settings, "sks , a house") == ["sks , a house"]


def test_each_visit_sees_one_of_the_orders():
    sample = Sample("id", NoiseSource("image", 32, 32), CAPTION)
    transform = Transform((Resolution("32", ((32, 32),)),))

    def captions(settings: Dataset, seed: int = 0) -> list[str]:
        visits = Visits(seed, 1, settings, transform, [sample])
        return [visits.transformed(visits.visit(number)).caption for number in range(400)]

    settings = Dataset(shuffle_tags=True, tag_orders=4)
    seen = captions(settings)
    assert set(seen) == set(shuffled_captions(settings, CAPTION))
    assert all(70 <= count <= 130 for count in Counter(seen).values())
    assert seen == captions(settings) and seen != captions(settings, seed=1)
    assert set(captions(Dataset())) == {CAPTION}
    assert set(captions(Dataset(shuffle_tags=True, caption_dropout=1))) == {""}
    assert transform.apply(sample).caption == CAPTION


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_tags": 1}, "dataset.shuffle_tags=true"),
        ({"tag_orders": 8}, "dataset.shuffle_tags=true"),
        ({"shuffle_tags": True, "keep_tags": -1}, "keep_tags=-1 .* type 0 or more"),
        ({"shuffle_tags": True, "tag_orders": 1}, "tag_orders=1 .* type 2 or more"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        Dataset(**settings)


def test_a_run_encodes_all_orders_once_and_says_how_many(
    tiny_checkpoint: Callable[[str], Tiny], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    folder = tmp_path / "tagged"
    captions = ["sks, a, b, c, d, e", "sks, f, g, h, i, j", "one tag"]
    for i, caption in enumerate(captions):
        save_image(folder / f"{i}.jpg", i).with_suffix(".txt").write_text(caption)
    settings = Dataset(shuffle_tags=True, keep_tags=1, tag_orders=3)
    texts = len({text for caption in captions for text in shuffled_captions(settings, caption)})
    arguments = [
        *("model=sd15", *tiny_checkpoint("sd15").settings),
        *("dataset=imagefolder", f"dataset.path={folder}", "dataset.resolution=32", "dataset.validation_fraction=0"),
        *("dataset.shuffle_tags=true", "dataset.keep_tags=1", "dataset.tag_orders=3", "sample.guidance=1"),
        *("tracking=none", "hardware=cpu", "steps=3", "batch=2", f"out={tmp_path / 'runs'}", "evaluation.every=null"),
    ]
    assert main([*arguments, "stage=check"]) == 0
    expected = f"shuffled in 2 of 3 training captions; 3 orders of each make {texts} texts to encode"
    assert expected in capfd.readouterr().out
    assert main([*arguments, "stage=cache"]) == 0
    # Two images are generated from captions in their original order.
    assert f"{texts + 2} prompt made" in capfd.readouterr().out
    assert main(arguments) == 0
