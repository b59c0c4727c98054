"""What a file of weights is, in words, and why some of its tensors are not read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from trainer.model.single_file import TensorFile

NOT_READ = {
    "model_ema.*": "a moving average of the weights",
    "*.position_ids": "positions of tokens, which are computed",
    "*alphas_cumprod*": "a noise schedule, which is a setting here",
    "*betas": "a noise schedule, which is a setting here",
    "*posterior_*": "a noise schedule, which is a setting here",
    "denoiser.sigmas": "a noise schedule, which is a setting here",
    "*lvlb_weights": "a noise schedule, which is a setting here",
    "*logvar": "a loss weight that only its training used",
    "first_stage_model.loss.*": "parts of the loss that the VAE was trained with",
    "loss.*": "parts of the loss that the VAE was trained with",
    "*logit_scale": "a part of CLIP that no image model uses",
    "*text_projection*": "a part of CLIP that this model does not use",
    "scaled_fp8": "a mark of ComfyUI",
    "*.comfy_quant": "a mark of ComfyUI",
    "*.scale_input": "scales for products in float8, which are not used here",
    "*.input_scale": "scales for products in float8, which are not used here",
    "v_pred": "a mark for v-prediction",
    "ztsnr": "a mark for a noise schedule that ends in pure noise",
}
"""Tensors that need not be read, by patterns of their names, and why."""
DROPPED = ("model_ema.*", "v_pred", "ztsnr", "scaled_fp8", "*.comfy_quant", "*.scale_input", "*.input_scale")
"""Those of them that are not copied into an export, because they describe the weights or the training of the base."""
KINDS = {
    "a LoRA or another adapter (which method.init_from continues)": ("*lora_*", "*.lokr_*", "*.hada_*", "*.oft_*"),
    "a ControlNet": ("control_model.*", "controlnet_cond_embedding.*", "control_all_x_embedder.*"),
    "an embedding (textual inversion)": ("emb_params", "clip_l", "string_to_param*"),
}
"""Kinds of files that are no base model, by patterns of which one name must match."""
DIFFUSERS_KINDS = {
    "v1": "Stable Diffusion 1",
    "v2": "Stable Diffusion 2",
    "xl_base": "SDXL",
    "xl_refiner": "the SDXL refiner",
    "xl_inpaint": "SDXL for inpainting",
    "inpainting": "Stable Diffusion 1 for inpainting",
    "inpainting_v2": "Stable Diffusion 2 for inpainting",
    "instruct-pix2pix": "InstructPix2Pix",
    "flux-dev": "FLUX.1 dev or Kontext",
    "flux-schnell": "FLUX.1 schnell",
    "flux-fill": "FLUX.1 Fill",
    "sd3": "Stable Diffusion 3",
}
"""The words for some of the kinds that diffusers recognizes."""


class _Shaped(NamedTuple):
    """A tensor of which only the shape is known."""

    shape: tuple[int, ...]


def describe_kind(file: TensorFile) -> str:
    """Returns a phrase for what the file seems to hold, such as "a LoRA", or "tensors of an unknown kind"."""
    for kind, patterns in KINDS.items():
        if any(fnmatchcase(key, pattern) for key in file.shapes for pattern in patterns):
            return kind
    found = _diffusers_kind(file)
    prefixes = [key.partition(".")[0] for key in file.shapes]
    if not {"model", "double_blocks", "joint_blocks"} & {*prefixes} and {"encoder", "decoder"} <= {*prefixes}:
        return "a VAE"
    if found == "v1" and not any(key.startswith("model.diffusion_model.") for key in file.shapes):
        names = ", ".join(sorted({*prefixes})[:3])
        return f"tensors of an unknown kind ({names}, ...)"
    return f"{DIFFUSERS_KINDS.get(found, found)} weights"


def _diffusers_kind(file: TensorFile) -> str:
    """Returns diffusers' name of the kind; "v1" also if it is none of those that diffusers knows."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    shaped: Any = {key: _Shaped(shape) for key, shape in file.shapes.items()}
    try:
        return infer_diffusers_model_type(shaped)
    except (LookupError, AttributeError, TypeError, ValueError):
        return "v1"


def reason_not_read(key: str) -> str | None:
    """Returns why a tensor need not be read; None if that is not known."""
    return next((reason for pattern, reason in NOT_READ.items() if fnmatchcase(key, pattern)), None)


def summarize_not_read(keys: Collection[str]) -> str:
    """Returns the tensors that need not be read, grouped by reason: "686 tensors (a.b, ...): a moving average"."""
    by_reason: dict[str, list[str]] = {}
    for key in sorted(keys):
        by_reason.setdefault(reason_not_read(key) or "of other components", []).append(key)
    return "; ".join(
        f"{len(found)} ({', '.join(found[:2])}{', ...' if len(found) > 2 else ''}): {reason}"
        for reason, found in by_reason.items()
    )


def scheduler_marks(file: TensorFile) -> dict[str, object]:
    """Returns what a file says about its training, as entries of a diffusers scheduler's config."""
    marks: dict[str, object] = {}
    if "v_pred" in file.shapes or file.metadata.get("modelspec.prediction_type", "").startswith("v"):
        marks["prediction_type"] = "v_prediction"
    if "ztsnr" in file.shapes:
        marks["rescale_betas_zero_snr"] = True
    return marks


def scheduler_mark_names(scheduler: Mapping[str, object]) -> tuple[str, ...]:
    """Returns the names of the empty tensors that say the same as this scheduler config."""
    v_prediction = scheduler.get("prediction_type") == "v_prediction"
    zero_snr = scheduler.get("rescale_betas_zero_snr", False)
    return tuple(name for name, holds in (("v_pred", v_prediction), ("ztsnr", zero_snr)) if holds)
