"""Training weights that stay in bfloat16: each update is rounded up or down by chance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from trainer.core.rng import seed_for

AT_ONCE = 2**26
"""Entries that are in float32 at a time, which takes half a GiB with their gradients."""


def rounded(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 -> one of the two bfloat16 next to each value, the nearer the likelier, so that the mean is the value (stochastic rounding;
    Gupta et al. 2015). What is a bfloat16 already stays."""
    # A float is its sign and a whole number that grows with the magnitude; bfloat16 is the upper half of it.
    noise = torch.randint(0, 2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    return ((values.view(torch.int32) + noise) & -(2**16)).view(torch.float32).to(torch.bfloat16)


class Rounded:
    """An optimizer of bfloat16 `parameters` that does its arithmetic in float32, a few tensors after the others.

    A bfloat16 has 8 digits of two: an update below a 512th of a weight would be rounded away, always. By chance it is added in full now and then.
    The chance is a function of (seed, step, tensor): a resumed run and every process of several roll the same dice.
    """

    def __init__(
        self,
        build: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer],
        parameters: list[torch.nn.Parameter],
        seed: int,
    ):
        self.parameters, self.seed, self.steps = parameters, seed, 0
        # What the optimizer takes for its parameters: in float32, and without memory but for those whose turn it is.
        self.shadows = [torch.nn.Parameter(_empty(p)) for p in parameters]
        self.inner = build(self.shadows)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for turn in self._turns():
            for i in turn:
                parameter, shadow = self.parameters[i], self.shadows[i]
                shadow.data = parameter.float()
                shadow.grad, parameter.grad = parameter.grad.float(), None
            # Those without a gradient, all others, are left alone.
            self.inner.step()
            for i in turn:
                parameter, shadow = self.parameters[i], self.shadows[i]
                generator = torch.Generator(parameter.device).manual_seed(
                    seed_for(self.seed, "rounding", self.steps, i)
                )
                parameter.copy_(rounded(shadow.data, generator))
                shadow.data, shadow.grad = _empty(parameter), None

    def _turns(self) -> Iterator[list[int]]:
        """The numbers of the tensors that have a gradient, as many at once as `AT_ONCE` allows."""
        turn, entries = [], 0
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            if turn and entries + parameter.numel() > AT_ONCE:
                yield turn
                turn, entries = [], 0
            turn.append(i)
            entries += parameter.numel()
        if turn:
            yield turn

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict() | {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.inner.load_state_dict({name: value for name, value in state.items() if name != "steps"})


def _empty(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), device=parameter.device).expand(parameter.shape)
