"""Any optimizer of the package pytorch-optimizer, by name."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainer.core.errors import InstallationError, UsageError
from trainer.core.state_dicts import join_tensors, split_tensors
from trainer.optimizer import Optimizer

if TYPE_CHECKING:
    import torch

    from trainer.optimizer.stochastic_rounding import StochasticRounding


@dataclass(slots=True)
class Custom(Optimizer):
    """An optimizer of pytorch-optimizer that can be resumed exactly; `check` tries it on small tensors."""

    name: str = ""
    """Name in the registry of pytorch-optimizer, such as `came` or `stableadamw`."""
    weight_decay: float = 0.0
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer's constructor."""

    updates_jointly = True

    def create(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        try:
            from pytorch_optimizer import get_supported_optimizers, load_optimizer
        except ModuleNotFoundError as error:
            raise InstallationError(
                "optimizer=custom needs the package pytorch-optimizer; type pip install pytorch-optimizer"
            ) from error
        if not self.name:
            raise UsageError("optimizer=custom has no name; type the name of one, for example optimizer.name=came")
        names = get_supported_optimizers()
        if self.name not in names:
            similar = difflib.get_close_matches(self.name, names, 5, 0.5)
            raise UsageError(
                f"optimizer.name={self.name} is not an optimizer of pytorch-optimizer; type one of "
                f"{', '.join(similar or names)}"
            )
        kind: Any = load_optimizer(self.name)  # each has arguments of its own
        # Many constructors ignore arguments that they do not know.
        known = [name for name, p in inspect.signature(kind).parameters.items() if p.kind is not p.VAR_KEYWORD]
        if unknown := sorted(self.arguments.keys() - set(known)):
            raise UsageError(
                f"optimizer.arguments: {self.name} has no {', '.join(unknown)}; it has {', '.join(known[1:])}"
            )
        # Always passed where it exists, since its default differs between optimizers.
        has_decay = "weight_decay" in known
        if self.weight_decay and not has_decay:
            raise UsageError(f"optimizer.name={self.name} has no weight decay; type optimizer.weight_decay=0")
        decay = {"weight_decay": self.weight_decay} if has_decay else {}
        try:
            return kind(list(parameters), lr=self.lr, **decay, **self.arguments)
        except Exception as error:  # each optimizer has exceptions of its own
            raise UsageError(
                f"optimizer.name={self.name} does not accept these settings: {error}. Change optimizer.arguments, "
                "optimizer.weight_decay or optimizer.lr"
            ) from error

    def check(self) -> None:
        import torch

        shapes, steps = [(4, 3), (3,)], 4
        with torch.random.fork_rng(devices=[]):
            weights = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
            optimizer = self.create(weights)
            if hasattr(optimizer, "eval"):
                raise UsageError(
                    f"optimizer.name={self.name} keeps the weights to evaluate apart; type optimizer=schedulefree"
                )
            try:
                _take_steps(optimizer, weights, range(steps))
                resumed = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
                again = self.create(resumed)
                state, tensors = split_tensors(optimizer.state_dict())  # as in a checkpoint
                again.load_state_dict(copy.deepcopy(join_tensors(state, tensors)))
                torch.manual_seed(0)
                _take_steps(optimizer, weights, range(steps, 2 * steps))
                torch.manual_seed(1)
                _take_steps(again, resumed, range(steps, 2 * steps))
            except Exception as error:
                raise UsageError(
                    f"optimizer.name={self.name} does not work with this training loop: {error}. Type optimizer=adamw, "
                    "or another name"
                ) from error
        if not all(torch.equal(one, other) for one, other in zip(weights, resumed, strict=True)):
            raise UsageError(
                f"optimizer.name={self.name} does not continue exactly from a checkpoint: its state is incomplete or "
                "it draws random numbers. Type optimizer=adamw, or another name"
            )

    def effective_lr(self, optimizer: torch.optim.Optimizer | StochasticRounding) -> float | None:
        (group,) = optimizer.param_groups
        return group["d"] * group["lr"] if "d" in group else None


def _take_steps(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], steps: Iterable[int]) -> None:
    """Takes steps with gradients that are a function of the step."""
    import torch

    for step in steps:
        optimizer.zero_grad()
        for weight in weights:
            values = torch.arange(weight.numel(), dtype=torch.float32).reshape(weight.shape)
            weight.grad = torch.sin(values + step) + 0.1 * weight.detach()
        optimizer.step()
