"""What the config of a flow scheduler may say."""

from __future__ import annotations

from trainer.core.errors import UsageError
from trainer.model.configs import ConfigRules
from trainer.objective import Flow

# `resolution_shift` follows the shifts. `num_train_timesteps` is the unit of time of the scheduler only: networks get
# times from 0 to 1.
SCHEDULER_RULES = ConfigRules(
    "FlowMatchEulerDiscreteScheduler",
    {
        "invert_sigmas": (False, None),
        "stochastic_sampling": (False, None),
        "time_shift_type": ("exponential", "linear"),
        "use_beta_sigmas": (False, None),
        "use_exponential_sigmas": (False, None),
        "use_karras_sigmas": (False, None),
    },
)


def check_terminal(objective: Flow, terminal: float | None) -> None:
    """Raises errors.UsageError if sampling would end elsewhere than the checkpoint's scheduler (`shift_terminal`)."""
    if objective.terminal != (terminal or 0):
        raise UsageError(
            f"The checkpoint's scheduler says shift_terminal={terminal}, and model.objective.terminal is "
            f"{objective.terminal:g}, so images would be sampled at other times; type "
            f"model.objective.terminal={terminal or 0:g}"
        )
