"""What a checkpoint's configs say is followed or refused, and nothing outside of it is read."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Tiny, case_of
from safetensors.torch import load_file, save_file

from trainer.config.groups import GROUPS
from trainer.core.digests import Digests
from trainer.core.errors import DataError, TrainerError, UsageError
from trainer.model import Family
from trainer.model.flux_kontext import FluxKontext
from trainer.model.unet.family import UNetFamily
from trainer.objective import Diffusion, Prediction, Spacing


def family_with(tiny_checkpoint: Callable[[str], Tiny], name: str, folder: Path, file: str, **changes: Any) -> Any:
    """Returns a family whose checkpoint is a copy with changes to one config."""
    family: Any = case_of(name).family(tiny_checkpoint(name))
    shutil.copytree(family.path, folder, dirs_exist_ok=True)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return dataclasses.replace(family, path=str(folder))


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_checkpoints_say_nothing_that_is_ignored(
    tiny_checkpoint: Callable[[str], Tiny], name: str, tmp_path: Path
):
    family: Family = family_with(tiny_checkpoint, name, tmp_path / "copy", SCHEDULER, new_option_that_is_off=False)
    family.check_configs()


@pytest.mark.parametrize(
    ("name", "file", "changes", "message"),
    [
        ("sd15", SCHEDULER, {"thresholding": True}, "thresholding=True"),
        ("sd15", SCHEDULER, {"prediction_type": "sample"}, "prediction_type='sample'"),
        ("sd15", SCHEDULER, {"clip_skip": 2}, "clip_skip=2"),
        ("sdxl", SCHEDULER, {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "EDMEulerScheduler"),
        ("sdxl", SCHEDULER, {"timestep_spacing": "odd"}, "timestep_spacing='odd'"),
        ("sdxl", "vae/config.json", {"latents_mean": [1.0, 2.0, 3.0, 4.0]}, "latents_mean"),
        ("sd15", "vae/config.json", {"shift_factor": 0.1}, "shift_factor=0.1"),
        ("sd15", "unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim=256"),
        ("sd15", "unet/config.json", {"in_channels": 9}, "in_channels=9"),
        ("sd15", "unet/config.json", {"_class_name": "UNet3DConditionModel"}, "UNet3DConditionModel"),
        ("sd15", "unet/config.json", {"unheard_of": 3}, "unheard_of=3"),
        ("sd15", "text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask=True"),
        ("sdxl", "text_encoder_2/config.json", {"model_type": "roberta"}, "roberta"),
        ("sdxl", "model_index.json", {"requires_aesthetics_score": True}, "requires_aesthetics_score=True"),
        ("sdxl", "model_index.json", {"unet": ["my_module", "MyUNet"]}, "never runs the code"),
        ("sdxl", "tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": "a.B"}}, "auto_map"),
        ("sd15", "tokenizer/tokenizer_config.json", {"vocab_file": "../../vocab.json"}, "vocab_file"),
        ("flux_kontext", SCHEDULER, {"invert_sigmas": True}, "invert_sigmas=True"),
        ("flux_kontext", SCHEDULER, {"use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ("flux_kontext", SCHEDULER, {"shift_terminal": 0.1}, "type model.objective.terminal=0.1"),
        ("flux_kontext", "transformer/config.json", {"in_channels": 24}, "in_channels=24"),
        ("qwen_image_edit", SCHEDULER, {"stochastic_sampling": True}, "stochastic_sampling=True"),
        ("qwen_image_edit", "transformer/config.json", {"guidance_embeds": True}, "guidance_embeds=True"),
    ],
)
def test_what_is_not_followed_is_refused_by_name(
    tiny_checkpoint: Callable[[str], Tiny], name: str, file: str, changes: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(TrainerError) as refusal:
        family_with(tiny_checkpoint, name, tmp_path / "copy", file, **changes).check_configs()
    assert message in str(refusal.value)


def test_scheduler_of_a_checkpoint_is_followed_and_settings_override_it(
    tiny_checkpoint: Callable[[str], Tiny], tmp_path: Path
):
    changes = {
        "_class_name": "EulerDiscreteScheduler",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    family: UNetFamily = family_with(tiny_checkpoint, "sd15", tmp_path / "copy", SCHEDULER, **changes)
    with pytest.raises(UsageError, match=r"type model.objective.prediction=v_prediction"):
        family.check_configs()
    family.objective = Diffusion(prediction=Prediction.v_prediction)
    family.check_configs()
    assert family.warnings() == []
    scheduler = family.resolved_objective().scheduler
    assert scheduler.rescale_betas_zero_snr and scheduler.timestep_spacing is Spacing.trailing
    assert family.resolved_objective().unweighted().scheduler == scheduler
    chosen = dataclasses.replace(family.objective, rescale_betas_zero_snr=False, timestep_spacing=Spacing.linspace)
    family.objective = chosen
    scheduler = family.resolved_objective().scheduler
    assert not scheduler.rescale_betas_zero_snr and scheduler.timestep_spacing is Spacing.linspace
    assert "rescale_betas_zero_snr=True (not False)" in family.warnings()[0]


def test_keys_that_a_scheduler_lacks_have_the_defaults_of_its_class(
    tiny_checkpoint: Callable[[str], Tiny], tmp_path: Path
):
    family: UNetFamily = family_with(tiny_checkpoint, "sdxl", tmp_path / "copy", SCHEDULER)
    path = tmp_path / "copy" / SCHEDULER
    path.write_text(json.dumps({"_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000}))
    scheduler = family.resolved_objective().scheduler
    assert (scheduler.timestep_spacing, scheduler.steps_offset) == (Spacing.linspace, 0)
    assert scheduler.set_alpha_to_one and scheduler.clip_sample_range is None
    assert "beta_schedule=linear (not scaled_linear)" in family.warnings()[0]
    path.write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    assert family.resolved_objective().scheduler.clip_sample_range == 1


@pytest.mark.parametrize(
    ("changes", "shift"),
    [
        ({"use_dynamic_shifting": False, "shift": 3.0}, 3.0),
        ({"base_shift": 2.0, "max_shift": 2.0, "time_shift_type": "linear"}, 2.0),
    ],
)
def test_shift_is_that_of_the_flow_scheduler(
    tiny_checkpoint: Callable[[str], Tiny], changes: dict[str, Any], shift: float, tmp_path: Path
):
    from diffusers import FlowMatchEulerDiscreteScheduler

    family: FluxKontext = family_with(tiny_checkpoint, "flux_kontext", tmp_path / "copy", SCHEDULER, **changes)
    family.check_configs()
    assert family.time_shift(64, 64) == pytest.approx(shift)
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "copy", subfolder="scheduler")
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=2.0)
    assert scheduler.sigmas[1].item() == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5))


def digest(family: Family, folder: Path) -> dict[str, str]:
    return family.component_digests(Digests(folder / "digests"))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/outside.safetensors", "weights.bin", 7])
def test_index_that_names_other_files_is_refused(tiny_checkpoint: Callable[[str], Tiny], name: object, tmp_path: Path):
    family: Family = family_with(tiny_checkpoint, "sd15", tmp_path / "copy", SCHEDULER)
    index = tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    for use in (lambda: digest(family, tmp_path), family.weights):
        with pytest.raises(DataError, match=r"conv_in\.weight.*not a safetensors file beside the index"):
            use()


def test_links_out_of_a_checkpoint_are_refused_and_those_of_the_hub_cache_are_followed(
    tiny_checkpoint: Callable[[str], Tiny], tmp_path: Path
):
    family: Family = family_with(tiny_checkpoint, "sd15", tmp_path / "copy", SCHEDULER)
    expected = digest(family, tmp_path)
    # A snapshot of the hub's cache consists of links to blobs.
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "123", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "copy").rglob("*.*"))):
        target = snapshot / path.relative_to(tmp_path / "copy")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / f"{number}")
        target.symlink_to(os.path.relpath(blobs / f"{number}", target.parent))
    assert digest(GROUPS["model"]["sd15"](path=str(snapshot)), tmp_path) == expected
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "copy" / "vae" / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(DataError, match=r"notes\.txt is a link out of the checkpoint"):
        digest(family, tmp_path)
    (tmp_path / "copy" / "vae" / "notes.txt").unlink()
    # Two components may share a file.
    shared = tmp_path / "copy" / "text_encoder" / "config.json"
    shared.rename(tmp_path / "copy" / "shared.json")
    shared.symlink_to(tmp_path / "copy" / "shared.json")
    assert digest(family, tmp_path) == expected


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("change", ["lack", "also hold"])
def test_weights_that_are_not_those_of_the_config_are_refused(
    tiny_checkpoint: Callable[[str], Tiny], component: str, change: str, tmp_path: Path
):
    family: UNetFamily = family_with(tiny_checkpoint, "sd15", tmp_path / "copy", SCHEDULER)
    (path,) = (tmp_path / "copy" / component).glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[0]
    if change == "lack":
        del tensors[name]
    else:
        tensors |= {"extra.weight": torch.ones(2), "embeddings.position_ids": torch.ones(2)}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(DataError, match=change) as refusal:
        if component == "unet":
            family.load_network(torch.float32)
        elif component == "vae":
            family.load_vae(torch.float32, torch.device("cpu"))
        else:
            family.load_text_encoder("", torch.device("cpu"))
    assert "position_ids" not in str(refusal.value)
