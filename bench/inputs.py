"""Models, datasets and settings that the benchmarks use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from bench.process import run, trainer_command

MINI = Path(__file__).parents[1] / "trainer/model/mini_kontext/weights"
LARGE = {
    "in_channels": 32,
    "num_layers": 1,
    "num_single_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 16,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "axes_dims_rope": (8, 28, 28),
}
"""Configuration of a transformer with about 100 M parameters that fits the encoders of the mini model."""
MINIMAL_EVALUATION = ["evaluation.images=1", "evaluation.samples=1", "sample.steps=1", "evaluation.every=1000000"]
"""A minimal evaluation at step 0, and none later."""


def training_only(folder: Path, model: Path, *settings: str) -> list[str]:
    """Returns the settings of an endless run that logs each step and never saves."""
    return [
        f"out={folder / 'race'}",
        f"model.path={model}",
        "steps=1000000",
        "save.every=1000000",
        "log.every=1",
        *MINIMAL_EVALUATION,
        *settings,
    ]


def save_cached_tensors(settings: list[str], folder: Path) -> Path:
    """Fills the cache of a run and saves the cached tensors of its training samples, stacked, to one file."""
    import torch
    from safetensors.torch import save_file

    from trainer.config.compose import compose_config, to_run
    from trainer.training.data import prepare

    run(trainer_command(*settings, "stage=cache"))
    data = prepare(to_run(compose_config(settings), settings))
    examples = [data.cache.example(data.transform.apply(sample)) for sample in data.split.train]
    path = folder / "tensors.safetensors"
    save_file({name: torch.stack([example[name] for example in examples]) for name in examples[0]}, path)
    return path


def large_model(folder: Path) -> Path:
    """Returns a copy of the mini model with a larger transformer of random weights; creates it if it does not exist."""
    import torch

    from trainer.model.pretrained import quiet_libraries

    path = folder / "large"
    if not path.exists():
        quiet_libraries()
        from diffusers import FluxTransformer2DModel

        shutil.copytree(MINI, path, ignore=shutil.ignore_patterns("transformer"))
        torch.manual_seed(0)
        FluxTransformer2DModel(**LARGE).save_pretrained(path / "transformer")
    return path


def millions_of_parameters(model: Path) -> float:
    """Returns the number of parameters of the transformer, in millions."""
    from trainer.model.flux_kontext import FluxKontext

    return sum(parameter.numel() for parameter in FluxKontext(path=str(model)).meta_model().parameters()) / 1e6


def tiny_model(folder: Path) -> list[str]:
    """Returns the settings of the smallest model, with which the time does not depend on the model."""
    from trainer.model.flux_kontext import FluxKontext

    path = folder / "tiny"
    settings = path / "settings.json"
    if not settings.exists():
        settings.write_text(json.dumps(FluxKontext.save_tiny_checkpoint(path)))
    return ["model=flux_kontext", *json.loads(settings.read_text()), "batch=1", "model.encoder_dtype=float32"]


def save_images(folder: Path, count: int) -> None:
    """Saves an `imagefolder` dataset of images of a single color, with captions."""
    from PIL import Image

    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as table:
        for i in range(count):
            Image.new("RGB", (40, 32), (i % 256, i // 256 % 256, 90)).save(folder / f"{i:05d}.png")
            table.write(json.dumps({"file_name": f"{i:05d}.png", "text": f"a photo of the night {i % 10}"}) + "\n")


def save_kontext_model(folder: Path) -> None:
    """Saves a small FLUX Kontext with the 16 latent channels of the published one."""
    import torch

    from trainer.model.flux.layout import save_checkpoint
    from trainer.model.pretrained import quiet_libraries
    from trainer.model.tiny_components import WORDS, build_vae

    quiet_libraries()
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    vae = build_vae(
        (16, 16, 16, 16),
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.36,
        shift_factor=0.11,
    )
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    save_checkpoint(folder, vae, transformer, WORDS, text_length=77, text_width=32)


def save_pairs(folder: Path, table: Path, count: int) -> None:
    """Saves a `pairs` dataset of images of 256 x 256 pixels, and in `table` the same for `datasets.load_dataset`."""
    from datasets import Dataset, Features, Image, Value
    from PIL.Image import linear_gradient

    rows: dict[str, list[str]] = {"image": [], "control": [], "caption": []}
    for name in ("training_images", "control_images"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        target, control = folder / f"training_images/{i:02d}.png", folder / f"control_images/{i:02d}.jpg"
        gradient = linear_gradient("L").rotate(10 * i).convert("RGB")
        gradient.save(target)
        gradient.transpose(0).save(control)
        caption = f"make it night {i}"
        target.with_suffix(".txt").write_text(caption)
        for column, value in zip(rows.values(), (str(target), str(control), caption), strict=True):
            column.append(value)
    table.mkdir()
    features = Features({"image": Image(), "control": Image(), "caption": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(table / "train.parquet")
