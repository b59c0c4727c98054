"""What a diffusion scheduler's config says, and what of it training and sampling follow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.core.errors import DataError
from trainer.model.configs import check_class, check_known_keys, class_defaults, refuse
from trainer.objective import NoiseScheduler, Spacing

DDIM = "DDIMScheduler"
"""The scheduler that samples as `Diffusion` does."""
CLASSES = tuple(
    f"{name}Scheduler"
    for name in (
        "DDIM",
        "DDIMParallel",
        "DDPM",
        "DDPMParallel",
        "DEISMultistep",
        "DPMSolverMultistep",
        "DPMSolverSDE",
        "DPMSolverSinglestep",
        "EulerAncestralDiscrete",
        "EulerDiscrete",
        "HeunDiscrete",
        "KDPM2AncestralDiscrete",
        "KDPM2Discrete",
        "LCM",
        "LMSDiscrete",
        "PNDM",
        "SASolver",
        "TCD",
        "UniPCMultistep",
    )
)
"""Schedulers of diffusers that add noise as `Diffusion` does. They differ in how they sample."""

OBJECTIVE = ("prediction_type", "beta_schedule", "num_train_timesteps", "beta_start", "beta_end")
"""Keys that the settings of the objective state; `UNetFamily` compares them."""
FOLLOWED = (
    "rescale_betas_zero_snr",
    "trained_betas",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "clip_sample",
    "clip_sample_range",
)
"""Keys that `read_noise_scheduler` returns."""
OTHER_SOLVERS = (
    "algorithm_type",
    "corrector_order",
    "disable_corrector",
    "euler_at_final",
    "final_sigmas_type",
    "interpolation_type",
    "lambda_min_clipped",
    "lower_order_final",
    "noise_sampler_seed",
    "original_inference_steps",
    "predict_x0",
    "predictor_order",
    "sigma_max",
    "sigma_min",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "tau_func",
    "timestep_scaling",
    "timestep_type",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
)
"""Keys about how other solvers place and take their sampling steps. They do not change what the network learns, and
this program samples with DDIM."""
DEPENDENT = {
    "dynamic_thresholding_ratio": "thresholding",
    "flow_shift": "use_flow_sigmas",
    "sample_max_value": "thresholding",
    "time_shift_type": "use_dynamic_shifting",
}
"""Keys that matter only with another key, which is checked."""
ONLY: dict[str, tuple[Any, ...]] = {
    "thresholding": (False, None),
    "use_dynamic_shifting": (False, None),
    "use_flow_sigmas": (False, None),
    "shift_terminal": (None,),
    "timestep_spacing": tuple(spacing.value for spacing in Spacing),
    # Learned variances, which double the network's channels.
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "timestep_type": ("discrete",),
}
"""The values that are followed of keys whose other values are not."""


def check_scheduler(path: Path, config: Mapping[str, Any]) -> None:
    """Raises errors.DataError if a scheduler's config says something that is not followed."""
    check_class(path, config.get("_class_name", DDIM), CLASSES)
    check_known_keys(path, config, {*OBJECTIVE, *FOLLOWED, *OTHER_SOLVERS, *DEPENDENT, *ONLY})
    for key, accepted in ONLY.items():
        if key in config and config[key] not in accepted:
            expected = " or ".join(map(repr, accepted))
            raise refuse(path, key, config[key], f"this program trains and samples with {expected}")
    if config.get("prediction_type") == "sample":
        raise refuse(path, "prediction_type", "sample", "this program trains epsilon and v_prediction")


def scheduler_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a scheduler's values: those of its config, and the defaults of its class for keys that it lacks."""
    defaults = class_defaults(config.get("_class_name", DDIM))
    # A class without these options ends at the clean image and does not limit it.
    neutral = {"set_alpha_to_one": True, "clip_sample": False}
    return neutral | defaults | dict(config)


def read_noise_scheduler(path: Path, config: Mapping[str, Any]) -> NoiseScheduler:
    """Returns what sampling and the noise of training follow. Raises errors.DataError if a value has a wrong type."""
    values = scheduler_values(config)
    betas = values.get("trained_betas")
    try:
        return NoiseScheduler(
            rescale_betas_zero_snr=bool(values.get("rescale_betas_zero_snr")),
            trained_betas=None if betas is None else tuple(map(float, betas)),
            timestep_spacing=Spacing(values.get("timestep_spacing", "leading")),
            steps_offset=int(values.get("steps_offset", 1)),
            set_alpha_to_one=bool(values["set_alpha_to_one"]),
            clip_sample_range=float(values.get("clip_sample_range", 1)) if values["clip_sample"] else None,
        )
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} is not the config of a scheduler ({error}); type a different model.path") from error
