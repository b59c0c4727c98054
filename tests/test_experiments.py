"""The recipes that edit pictures, each for two steps on the tiny self of its model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from layouts import pairs

from trainer import model
from trainer.__main__ import main
from trainer.command_line import CONF

RECIPES = {path.stem: path for path in sorted((CONF / "experiment").glob("face_seg_*.yaml"))}


def settings(folder: Path) -> dict:
    (path,) = folder.glob("*/run.json")
    return json.loads(path.read_text())["settings"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    pairs(folder, 8)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_its_model_and_exports_what_it_trained(name: str, data: Path, tmp_path: Path):
    family = "qwen_image_edit" if "qwen" in name else "flux_kontext"
    tiny = model.families()[family].tiny(tmp_path / "model")
    # Sizes, lengths and places are this test's, all else the recipe's.
    small = ["model.encoder_dtype=float32", "steps=2", "lr_scheduler.warmup=1", "sample.steps=1", "hardware.device=cpu", "tracking=none"]
    arguments = [f"experiment={name}", *tiny, *small, f"dataset.path={data}", "dataset.validation_fraction=0.3", f"out={tmp_path / 'runs'}"]
    assert main(arguments) == 0
    assert list((tmp_path / "runs").glob("*/export/pytorch_lora_weights.safetensors"))
    run = settings(tmp_path / "runs")
    recipe = yaml.safe_load(RECIPES["face_seg_qwen" if family == "qwen_image_edit" else "face_seg_kontext_bf16"].read_text())
    assert run["precision"]["storage"] == (name.rpartition("_")[2] if family == "flux_kontext" else "bf16")
    assert run["method"]["alpha"] == recipe["method"]["alpha_per_rank"] * 16
    assert run["dataset"]["caption_dropout"] == run["dataset"]["control_dropout"] == recipe["dataset"]["control_dropout"] > 0
    assert run["batch"] == recipe["batch"]
