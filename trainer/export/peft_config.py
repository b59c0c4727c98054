"""The configuration of an adapter that peft or diffusers wrote: what of it is read, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.core.documents import entry, expect
from trainer.core.errors import DataError, UsageError

METHODS = ("LORA", "LOHA", "LOKR")
"""Kinds of adapters that are read, as peft calls them. DoRA is one of LORA."""
CHANGES_BASE = re.compile(r"pissa.*|olora|corda|loftq|lora_ga", re.IGNORECASE)
"""Initializations that also change the base weights. The adapter fits only these."""
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica", "lycoris")
"""Initializations that leave the base weights as they are."""
READ = ("peft_type", "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora")
CHECKED = ("init_lora_weights", "init_weights", "modules_to_save", "bias", "lora_bias")
WITHOUT_EFFECT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    # The names and shapes of the tensors say which layers are adapted, and how.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("use_dora", "decompose_both", "decompose_factor", "use_effective_conv2d", "ensure_weight_tying"),
    # Settings of training and of initializations.
    *("lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "runtime_config", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core"),
)
"""Entries that do not change what the tensors mean. An entry that is not listed here or above must be empty."""


@dataclass(slots=True, frozen=True)
class PeftConfig:
    """The scale of each layer's update."""

    where: str
    """Names the file in messages."""
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    """Patterns of the names of layers with another rank -> rank."""
    alphas: Mapping[str, float]
    square_root: bool
    """Whether the update is divided by the square root of the rank, as in rsLoRA."""

    def scale(self, layer: str, rank: int | None) -> float:
        """Returns the factor of a layer's update. `rank` is that of its tensors, if they have one.

        Raises errors.DataError if the configuration has another one.
        """
        configured = _match(self.ranks, layer, self.rank)
        if rank is not None and rank != configured:
            raise DataError(f"{self.where} gives {layer} the rank {configured}, but its tensors have {rank}")
        alpha = _match(self.alphas, layer, self.alpha)
        return alpha / (math.sqrt(configured) if self.square_root else configured)


def parse_peft_config(values: object, where: str) -> PeftConfig:
    """Returns the configuration in `values`, which come from a file that `where` names.

    Raises errors.DataError if it is damaged, and errors.UsageError if the adapter is of a kind that is not read.
    """
    config = expect(values, dict, where)
    kind = expect(config.get("peft_type") or "LORA", str, f"{where}: peft_type")
    if kind not in METHODS:
        raise UsageError(
            f"{where} is of an adapter of the type {kind[:80]}, which is not read; type the method.init_from of a "
            "LoRA, DoRA, LoHa or LoKr, or leave it out"
        )
    _check_inits(config, where)
    _check_parts(config, where)
    alpha_name = "lora_alpha" if kind == "LORA" else "alpha"
    ranks = expect(config.get("rank_pattern") or {}, dict[str, int], f"{where}: rank_pattern")
    alphas = expect(config.get("alpha_pattern") or {}, dict[str, float], f"{where}: alpha_pattern")
    rank, alpha = entry(config, "r", int, where), entry(config, alpha_name, float, where)
    if min(rank, *ranks.values()) < 1 if ranks else rank < 1:
        raise DataError(f"{where} has a rank below 1. Restore the file.")
    if 0 in (alpha, *alphas.values()):
        raise DataError(f"{where} has an alpha of 0, with which the adapter has no effect. Restore the file.")
    for pattern in (*ranks, *alphas):
        _check_pattern(pattern, where)
    square_root = expect(config.get("use_rslora") or False, bool, f"{where}: use_rslora")
    return PeftConfig(where, rank, alpha, ranks, alphas, square_root)


def _check_inits(config: dict[str, Any], where: str) -> None:
    for name in ("init_lora_weights", "init_weights"):
        init = config.get(name)
        if isinstance(init, str) and CHANGES_BASE.fullmatch(init):
            raise UsageError(
                f"{where} has {name}={init[:80]}, which also changed the base weights, so the adapter does not fit the "
                "published ones. Save it as a plain LoRA, with peft's save_pretrained(..., "
                "path_initial_model_for_weight_conversion=FOLDER), and type method.init_from of that"
            )
        if not any(init is plain or init == plain for plain in PLAIN_INITS):
            raise UsageError(f"{where} has {name}={str(init)[:80]}, which this program does not know; leave it out")


def _check_parts(config: dict[str, Any], where: str) -> None:
    """Refuses a configuration of more than low-rank factors."""
    more = []
    if config.get("modules_to_save"):
        more.append(f"modules_to_save={config['modules_to_save']}")
    if config.get("bias", "none") not in ("none", None):
        more.append(f"bias={config['bias']}")
    if config.get("lora_bias"):
        more.append("lora_bias=True")
    known = (*READ, *CHECKED, *WITHOUT_EFFECT)
    more += [f"{name}={value}" for name, value in config.items() if value and name not in known]
    if more:
        found = ", ".join(text[:80] for text in more)
        raise UsageError(
            f"{where} says that more was trained than the factors of an adapter ({found}), which this program cannot "
            "start from. Merge it into a checkpoint with peft's merge_and_unload and type model.path of that, or train "
            "the adapter without it"
        )


def _check_pattern(pattern: str, where: str) -> None:
    # Repeated groups can take forever to match.
    try:
        re.compile(pattern)
        usable = not re.search(r"\)\s*[*+?{]", pattern)
    except (re.error, RecursionError, OverflowError):
        usable = False
    if not usable or len(pattern) > 1000:
        raise DataError(f"{where} has a pattern of layers that cannot be used: {pattern[:80]!r}. Restore the file.")


def _match(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the whole name of a layer or its end, as in peft."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), default)
