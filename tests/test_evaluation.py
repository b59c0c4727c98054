"""`stage=evaluate` and `stage=report`: several networks side by side, their measurements, and their report."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import save_image
from vision_models import save_tiny_clip, save_tiny_dino

from trainer.__main__ import main
from trainer.comparison.record import FILE_NAME, Comparison, Measurement, Network, Picture
from trainer.core import errors
from trainer.dataset import image_grid
from trainer.evaluation.intervals import Estimate
from trainer.evaluation.metrics.psnr import psnr
from trainer.report.write import write_report

HOSTILE = "</td><script>alert(1)</script><img src=x onerror='alert(2)'>\" & 'x'"
SMALL = ["dataset.pairs=4", "dataset.held_out=3", "batch=2", "sample.steps=1", "hardware=cpu", "tracking=none"]


class Elements(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two trained runs."""
    out = tmp_path_factory.mktemp("out") / "runs"
    for rank in (2, 4):
        assert main([*SMALL, "steps=2", f"method.rank={rank}", "evaluation.images=2", f"out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def ids(runs: Path) -> list[str]:
    return sorted(path.parent.name for path in runs.glob("*/run.json"))


@pytest.fixture(scope="module")
def compared(runs: Path, ids: list[str]) -> Path:
    """The folder of a comparison of both runs and the base."""
    models = runs.parent / "models"
    typed = [f"evaluation.clip={save_tiny_clip(models / 'clip')}", f"evaluation.dino={save_tiny_dino(models / 'dino')}"]
    against = f"evaluation.against=[base,{ids[1]}]"
    more = ["evaluation.images=3", "evaluation.images_per_prompt=2", *typed]
    assert main(["stage=evaluate", f"run={ids[0]}", f"out={runs}", against, *more]) == 0
    return runs / "comparisons" / f"{ids[0]}-vs-{ids[1]}"


def test_networks_get_the_same_prompts_controls_and_seeds(runs: Path, ids: list[str], compared: Path):
    comparison = Comparison.read(compared)
    assert [network.name for network in comparison.networks] == [ids[0], "base", ids[1]]
    assert [picture.prompt for picture in comparison.pictures] == [0, 0, 1, 1, 2, 2]
    assert [picture.seed for picture in comparison.pictures] == list(range(6))
    for picture in comparison.pictures:
        images = {name: image_grid.load_png(compared / path) for name, path in picture.images.items()}
        assert set(picture.references) == {"control", "target"}
        # All start from the same noise, and two steps change little.
        assert all(psnr(images["base"], images[name]) > 20 for name in ids)
        assert not np.array_equal(images["base"], images[ids[0]])
    assert all(network.metrics["val/loss"] > 0 for network in comparison.networks)
    assert comparison.networks[1].step == 0


def test_values_are_those_of_the_images(compared: Path, ids: list[str]):
    comparison = Comparison.read(compared)
    measured = {measurement.metric: measurement for measurement in comparison.measurements}
    assert set(comparison.left_out) == {"lpips", "clip_history", "dino_history"}
    values = {}
    for name in ("base", *ids):
        values[name] = [
            psnr(image_grid.load_png(compared / p.images[name]), image_grid.load_png(compared / p.references["target"]))
            for p in comparison.pictures
        ]
        assert measured["psnr"].estimates[name].value == pytest.approx(np.mean(values[name]))
    differences = np.subtract(values[ids[0]], values["base"])
    found = measured["psnr"].differences["base"]
    assert found.value == pytest.approx(differences.mean())
    assert found.low is not None and found.high is not None
    assert differences.min() <= found.low <= found.value <= found.high <= differences.max() + 1e-9
    for measurement in comparison.measurements:
        assert all(e.low is not None and e.high is not None and e.low <= e.high for e in measurement.estimates.values())


def test_images_of_a_run_can_be_trained_on_and_are_made_once(compared: Path, runs: Path, ids: list[str]):
    folders = list((runs / ids[0]).glob("evaluation/step-0000000[12]/images-*"))
    (folder,) = [path for path in folders if len(list(path.glob("*.png"))) == 6]
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == [f"{i:05d}.png" for i in range(6)]
    assert all(line["text"] == "make it night" for line in lines)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.png")}
    lost = folder / "00003.png"
    lost.unlink()
    report = compared / "report.html"
    report.unlink()
    more = ["evaluation.images=3", "evaluation.images_per_prompt=2"]
    assert main(["stage=evaluate", f"run={ids[0]}", f"out={runs}", f"evaluation.against=[base,{ids[1]}]", *more]) == 0
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.png")}
    assert after[lost][1] == before[lost][1]
    assert {path for path in before if before[path][0] != after[path][0]} == {lost}
    assert report.is_file()


def test_report_is_made_again_from_the_files(runs: Path, ids: list[str], compared: Path):
    report = compared / "report.html"
    before = report.read_text()
    report.write_text("")
    typed = ["stage=report", f"run={ids[0]}", f"out={runs}"]
    assert main([*typed, f"evaluation.against=[base,{ids[1]}]"]) == 0
    assert report.read_text() == before
    # A run that was not evaluated alone shows the images of its training.
    assert main(typed) == 0
    page = (runs / ids[0] / "report.html").read_text()
    assert "method.rank" in page and "stage=evaluate" in page and page.count("<img class=") >= 3


def test_report_is_complete_and_loads_nothing(compared: Path, ids: list[str]):
    page = (compared / "report.html").read_text()
    elements = Elements(page)
    sources = [attributes.get("src") for tag, attributes in elements.tags if tag == "img"]
    images = [source for source in sources if source]
    # Six rows with control, three networks and target; two images of curves.
    assert len(images) == 6 * 5 + 2 and all(source.startswith("data:image/") for source in images)
    assert not re.search(r"""(?:src|href)=["']?(?!data:)[^"' >]""", page.split("<script>")[0])
    comparison = Comparison.read(compared)
    first = base64.b64decode(images[1].partition(",")[2])
    assert first == (compared / comparison.pictures[0].images[ids[0]]).read_bytes()
    for text in (*comparison.verdicts(), "3 prompts", "method.rank", f"run={ids[0]}", "steps=2"):
        assert text in elements.text, text


def hostile_comparison(folder: Path) -> Comparison:
    save_image(folder / "a.png", 1)
    networks = [Network(HOSTILE, ".", 1, {"val/loss": 1.0}), Network("base", ".", 0, {})]
    images = {HOSTILE: "a.png", "base": "a.png"}
    pictures = [Picture(HOSTILE, 0, 0, images, {HOSTILE: "a.png"})]
    estimates = {HOSTILE: Estimate(1.0, 0.5, 1.5), "base": Estimate(0.0, -1.0, 1.0)}
    measurement = Measurement(
        "x", HOSTILE, HOSTILE, "higher", HOSTILE, estimates, {"base": Estimate(1.0, 0.1, 2.0)}, {"base": [HOSTILE]}
    )
    return Comparison(HOSTILE, networks, pictures, [measurement], {"y": HOSTILE})


def test_hostile_texts_in_a_report_are_only_text(tmp_path: Path, runs: Path, ids: list[str]):
    run = tmp_path / "hostile"
    shutil.copytree(runs / ids[0], run)
    records = [{"time": 1.0, "kind": kind, "text": HOSTILE} for kind in ("warning", "command")]
    with (run / "journal.jsonl").open("a") as journal:
        journal.writelines(json.dumps(record) + "\n" for record in records)
    hostile_comparison(tmp_path).write(tmp_path, {})
    write_report(tmp_path / "report.html", [run], tmp_path)
    elements = Elements((tmp_path / "report.html").read_text())
    assert [tag for tag, _ in elements.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)
    assert elements.text.count("alert(1)") > 8


def test_a_record_is_read_as_it_was_written_or_refused(tmp_path: Path):
    comparison = hostile_comparison(tmp_path)
    comparison.write(tmp_path, {"step": 1})
    assert Comparison.read(tmp_path) == comparison
    path = tmp_path / FILE_NAME
    good = json.loads(path.read_text())

    def refused(change: Any) -> str:
        content = json.loads(json.dumps(good))
        change(content["comparison"])
        path.write_text(json.dumps(content))
        with pytest.raises(errors.DataError) as refusal:
            Comparison.read(tmp_path)
        assert FILE_NAME in str(refusal.value)
        return str(refusal.value)

    def first(values: dict[str, Any]) -> dict[str, Any]:
        return values["measurements"][0]

    assert "has no networks" in refused(lambda values: values.pop("networks"))
    assert "must be a number" in refused(lambda values: first(values)["estimates"]["base"].update(value="1"))
    assert "same networks" in refused(lambda values: values["networks"].pop())
    assert "same networks" in refused(lambda values: values["pictures"][0]["images"].pop("base"))
    assert "one note" in refused(lambda values: first(values)["notes"].update(base=[]))


def measurement(better: str | None, difference: Estimate) -> Measurement:
    estimates = {"a": Estimate(1.0), "b": Estimate(1.0)}
    return Measurement("m", "M", "dB", better, None, estimates, {"b": difference})


@pytest.mark.parametrize(
    ("better", "difference", "words"),
    [
        ("higher", Estimate(2.0, 1.0, 3.0), "a is better than b by 2 dB, more than chance (95 % interval 1 to 3)"),
        ("lower", Estimate(2.0, 1.0, 3.0), "a is worse than b by 2 dB, more than chance (95 % interval 1 to 3)"),
        ("lower", Estimate(-2.0, -3.0, -1.0), "a is better than b by 2 dB, more than chance (95 % interval 1 to 3)"),
        (None, Estimate(-2.0, -3.0, -1.0), "a is lower than b by 2 dB, more than chance (95 % interval 1 to 3)"),
        ("higher", Estimate(2.0, -1.0, 5.0), "a and b do not differ by more than chance (difference 2 dB, 95 %"),
    ],
)
def test_a_verdict_is_in_words(better: str | None, difference: Estimate, words: str):
    verdict = measurement(better, difference).verdict("a", "b", prompts=8)
    assert words in verdict
    # Few prompts show nothing.
    assert (
        measurement(better, difference)
        .verdict("a", "b", prompts=7)
        .startswith(f"a - b = {difference.value:g} dB; 7 prompt(s) are too")
    )


@pytest.mark.parametrize(
    ("typed", "code", "message"),
    [
        ("evaluation.against=[nobody]", 64, "neither nobody nor .* is a run folder"),
        ("evaluation.against=[base,base]", 64, "names base twice"),
        ("evaluation.metrics=[psnr,beauty]", 64, "evaluation.metrics: beauty is unknown; type some of .*clip_score"),
        ("evaluation.clip=nowhere/at_all", 69, "evaluation.clip=nowhere/at_all: .*openai/clip-vit-base-patch32"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_written(
    typed: str, code: int, message: str, runs: Path, ids: list[str], capsys: pytest.CaptureFixture[str]
):
    before = sorted(runs.rglob("*"))
    assert main(["stage=evaluate", f"run={ids[0]}", f"out={runs}", typed]) == code
    assert re.search(message, capsys.readouterr().err)
    assert sorted(runs.rglob("*")) == before


@pytest.mark.parametrize("typed", ["run=[a,b,c]", "run=a,b,c"])
def test_several_runs_are_typed_as_those_to_compare_with(typed: str, capsys: pytest.CaptureFixture[str]):
    assert main(["stage=evaluate", typed]) == 64
    assert "type stage=evaluate run=a 'evaluation.against=[b,c]'" in capsys.readouterr().err


def test_what_does_not_exist_is_named(runs: Path, ids: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    untrained = tmp_path / "untrained"
    shutil.copytree(runs / ids[0], untrained, ignore=shutil.ignore_patterns("checkpoints"))
    assert main(["stage=evaluate", f"run={untrained}", f"out={runs}"]) == 65
    assert "has no checkpoint" in capsys.readouterr().err
    assert main(["stage=report", f"run={ids[1]}", f"out={runs}", f"evaluation.against=[{ids[0]}]"]) == 64
    assert "have not been compared yet; type stage=evaluate" in capsys.readouterr().err


def test_a_report_without_an_image_is_refused_and_the_old_one_stays(
    compared: Path, runs: Path, ids: list[str], tmp_path: Path
):
    hostile_comparison(tmp_path).write(tmp_path, {})
    write_report(tmp_path / "report.html", [runs / ids[0]], tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    (tmp_path / "a.png").unlink()
    with pytest.raises(errors.DataError, match=r"a\.png is missing; type the same stage=evaluate"):
        write_report(tmp_path / "report.html", [runs / ids[0]], tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
