"""Experiments: each has the values of its training guide, and trains a tiny model for a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from layouts import write_arrays, write_captions_json, write_imagefolder, write_pairs

from trainer.__main__ import main
from trainer.config.compose import compose_config, to_run
from trainer.config.groups import CONF, GROUPS
from trainer.config.identity import flatten, run_id, to_plain
from trainer.config.schema import Run

FACE_SEG = {path.stem: path for path in sorted((CONF / "experiment").glob("face_seg_*.yaml"))}


def saved_settings(runs: Path) -> dict:
    """Returns the settings in the manifest of the only run in a folder."""
    (path,) = runs.glob("*/run.json")
    return json.loads(path.read_text())["settings"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, 8)
    return folder


@pytest.mark.parametrize("name", FACE_SEG)
def test_face_seg_experiment_trains_and_exports_an_adapter(name: str, data: Path, tmp_path: Path):
    family = "qwen_image_edit" if "qwen" in name else "flux_kontext"
    tiny = GROUPS["model"][family].save_tiny_checkpoint(tmp_path / "model")
    # These override sizes, lengths and paths. All other values are those of the experiment.
    small = [
        "model.encoder_dtype=float32",
        "steps=2",
        "lr_scheduler.warmup=1",
        "sample.steps=1",
        "hardware.device=cpu",
        "tracking=none",
    ]
    arguments = [
        f"experiment={name}",
        *tiny,
        *small,
        f"dataset.path={data}",
        "dataset.validation_fraction=0.3",
        f"out={tmp_path / 'runs'}",
    ]
    assert main(arguments) == 0
    assert list((tmp_path / "runs").glob("*/export/pytorch_lora_weights.safetensors"))
    run = saved_settings(tmp_path / "runs")
    # The fp8 and fp4 experiments extend the bf16 experiment.
    source = "face_seg_qwen" if family == "qwen_image_edit" else "face_seg_kontext_bf16"
    experiment = yaml.safe_load(FACE_SEG[source].read_text())
    assert run["precision"]["storage"] == (name.rpartition("_")[2] if family == "flux_kontext" else "bf16")
    assert run["method"]["alpha"] == experiment["method"]["alpha_per_rank"] * 16
    assert (
        run["dataset"]["caption_dropout"]
        == run["dataset"]["control_dropout"]
        == experiment["dataset"]["control_dropout"]
        > 0
    )
    assert run["batch"] == experiment["batch"]


SHOES = {
    "model.kind": "sd15",
    "precision.storage": "fp32",
    "method.rank": 8,
    "method.alpha": 16,
    "method.dropout": 0,
    "method.init": "gaussian",
    "method.targets": ["to_k", "to_q", "to_v", "to_out.0"],
    "dataset.kind": "captions_json",
    "dataset.resolution": "512",
    "steps": 3000,
    "batch": 16,
    "max_grad_norm": 1,
    "optimizer.lr": 1e-4,
    "lr_scheduler.kind": "cosine",
    "lr_scheduler.warmup": 500,
    "hardware.device": "mps",
    "hardware.micro_batch": 2,
    "hardware.gradient_checkpointing": True,
    "evaluation.every": 500,
    "evaluation.images_per_prompt": 4,
    "evaluation.shown": 16,
    "sample.steps": 25,
    "save.every": 500,
    "save.keep": 5,
}
DREAMBOOTH = {
    "method.rank": 4,
    "method.alpha": 4,
    "method.init": "gaussian",
    "optimizer.weight_decay": 1e-4,
    "lr_scheduler.kind": "constant",
    "dataset.resolution": "512",
    "batch": 4,
    "steps": 500,
}
"""Defaults of diffusers' DreamBooth scripts, and the values of both READMEs."""
GUIDES = {
    "flux_dev_lora": DREAMBOOTH
    | {
        "model.kind": "flux_dev",
        "model.guidance": 1,
        "model.objective.times": "uniform",
        "precision.compute": "bfloat16",
        "optimizer.kind": "prodigy",
        "optimizer.lr": 1,
    },
    "flux2_klein_lora": DREAMBOOTH
    | {
        "model.kind": "flux2_klein",
        "model.text_length": 512,
        "model.objective.times": "uniform",
        "precision.compute": "bfloat16",
        "optimizer.kind": "prodigy",
        "optimizer.lr": 1,
        "lr_scheduler.warmup": 100,
    },
    "sd3_lora": DREAMBOOTH
    | {
        "model.kind": "sd3",
        "model.text_length": 77,
        "model.objective.times": "logit_normal",
        "precision.compute": "float16",
        "optimizer.kind": "adamw",
        "optimizer.lr": 4e-4,
    },
    "lumina2_lora": DREAMBOOTH
    | {
        "model.kind": "lumina2",
        "model.text_length": 256,
        "model.objective.times": "uniform",
        "precision.compute": "bfloat16",
        "optimizer.kind": "adamw8bit",
        "optimizer.lr": 1e-4,
        "dataset.resolution": "1024",
    },
    "z_image_lora": DREAMBOOTH
    | {
        "model.kind": "z_image",
        "model.text_length": 512,
        "model.objective.times": "uniform",
        "precision.compute": "bfloat16",
        "optimizer.kind": "adamw8bit",
        "optimizer.lr": 1e-4,
        "dataset.resolution": "1024",
        "hardware.gradient_checkpointing": True,
        "sample.guidance": 5,
    },
    "floorplans_a100": {
        "model.kind": "sd15",
        "model.objective.schedule": "scaled_linear",
        "model.objective.timesteps": 1000,
        "method.kind": "full",
        "method.master_weights": "fp32",
        "precision.compute": "float16",
        "optimizer.kind": "adamw8bit",
        "optimizer.lr": 5e-6,
        "optimizer.weight_decay": 0.01,
        "optimizer.betas": [0.9, 0.999],
        "optimizer.eps": 1e-8,
        "lr_scheduler.kind": "cosine_restarts",
        "lr_scheduler.min_ratio": 0.1,
        "dataset.kind": "arrays",
        "dataset.resolution": "512",
        "epochs": 15,
        "batch": 8,
        "max_grad_norm": 1,
        "hardware.card.memory_gib": 40,
        "hardware.micro_batch": 2,
        "hardware.gradient_checkpointing": True,
        "evaluation.every": 250,
        "sample.steps": 20,
        "sample.guidance": 7.5,
        "save.every": 500,
    },
    "sdxl_lora": {
        "model.kind": "sdxl",
        "model.vae": "madebyollin/sdxl-vae-fp16-fix",
        "method.rank": 8,
        "method.alpha": 16,
        "method.dropout": 0.1,
        "method.targets": ["to_k", "to_q", "to_v", "to_out.0"],
        "precision.compute": "float16",
        "optimizer.lr": 1e-4,
        "dataset.kind": "imagefolder",
        "dataset.caption_column": "text",
        "dataset.image_column": "file_name",
        "epochs": 100,
        "batch": 4,
        "hardware.micro_batch": 1,
        "save.every": 500,
        "save.keep": 5,
    },
    "shoes_m2_max": SHOES,
    "[shoes_m2_max,best_quality]": SHOES
    | {
        "method.rank": 16,
        "method.alpha": 32,
        "optimizer.lr": 5e-5,
        "lr_scheduler.warmup": 1000,
        "steps": 5000,
        "evaluation.every": 250,
    },
    "[shoes_m2_max,quick]": SHOES | {"method.rank": 4, "method.alpha": 8, "steps": 1500},
    "[shoes_m2_max,small_memory]": SHOES | {"hardware.micro_batch": 1},
}


def run_of(*overrides: str) -> Run:
    return to_run(compose_config(overrides))


@pytest.mark.parametrize("experiment", GUIDES)
def test_experiment_has_the_values_of_its_guide(experiment: str):
    values = flatten(to_plain(run_of(f"experiment={experiment}")))
    wrong = {
        name: (values.get(name), wanted) for name, wanted in GUIDES[experiment].items() if values.get(name) != wanted
    }
    assert wrong == {}
    if "shoes" in experiment:
        assert len(values["evaluation.prompts"]) == 4


PRESETS = ["best_quality", "quick", "small_memory", "smoke", "debug"]


@pytest.mark.parametrize(
    ("experiment", "preset"),
    [(None, preset) for preset in PRESETS]
    + [("sdxl_lora", preset) for preset in PRESETS]
    + [("floorplans_a100", "smoke"), ("floorplans_a100", "debug")],
)
def test_preset_composes_alone_and_on_top_of_an_experiment(experiment: str | None, preset: str):
    own = run_of(*([f"experiment={experiment}"] if experiment else []))
    run = run_of(f"experiment=[{experiment},{preset}]" if experiment else f"experiment={preset}")
    assert (run_id(run) == run_id(own)) == (preset == "small_memory")
    assert run.hardware.device == own.hardware.device


def test_preset_for_another_method_is_refused_in_one_line(capsys: pytest.CaptureFixture):
    assert main(["experiment=[floorplans_a100,quick]", "--cfg", "job"]) == 64
    assert "method.rank: the selected method has no such setting" in capsys.readouterr().err


SMALL = ["hardware=cpu", "precision=fp32", "model.vae=null", "sample.steps=1", "evaluation.samples=2", "tracking=none"]
"""Overrides of sizes, lengths and paths. All other values are those of the experiment."""
SHORT_RUNS = [
    ("[floorplans_a100,smoke]", "sd15", write_arrays, 5),
    ("[sdxl_lora,debug]", "sdxl", write_imagefolder, 2),
    pytest.param("[shoes_m2_max,debug]", "sd15", write_captions_json, 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("experiment", "family", "write", "steps"), SHORT_RUNS)
def test_experiment_with_a_preset_trains_and_exports(
    experiment: str, family: str, write, steps: int, tmp_path: Path, capsys: pytest.CaptureFixture
):
    write(tmp_path / "data", 10)
    tiny = GROUPS["model"][family].save_tiny_checkpoint(tmp_path / "model")
    paths = [f"dataset.path={tmp_path / 'data'}", f"out={tmp_path / 'runs'}", "dataset.validation_fraction=0.3"]
    assert main([f"experiment={experiment}", *SMALL, *tiny, *paths]) == 0
    output = capsys.readouterr().out
    assert f"done at step {steps}: held-out loss" in output
    assert " GiB\n" in output
    trains_all = "all weights are trained, in float32; matrix products in float32"
    assert (trains_all in output) == ("floorplans" in experiment)
    export = "pipeline/unet" if trains_all in output else "pytorch_lora_weights.safetensors"
    assert list((tmp_path / "runs").glob(f"*/export/{export}"))
