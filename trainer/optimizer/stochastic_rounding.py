"""Stochastic rounding, for training weights that stay in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from trainer.core.rng import seed_for

MAX_FLOAT32_ENTRIES = 2**26
"""Largest number of entries that are float32 at the same time; with their gradients they take half a GiB."""


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rounds float32 values to one of the two neighboring bfloat16 numbers each (Gupta et al. 2015).

    The probability of a neighbor is proportional to its closeness, so that the expected result is the value. A value
    that bfloat16 can represent does not change.
    """
    # The bits of a float32 are its sign and an integer that grows with its magnitude; bfloat16 is their upper half.
    noise = torch.randint(0, 2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    return ((values.view(torch.int32) + noise) & -(2**16)).view(torch.float32).to(torch.bfloat16)


class StochasticRounding:
    """Optimizer for bfloat16 parameters that computes in float32, a few tensors at a time, and rounds stochastically.

    bfloat16 has 8 significant bits. Rounded to nearest, an update below 1/512 of a weight would always be lost;
    rounded stochastically, it is kept on average. The random numbers are a function of (seed, step, tensor), so
    a resumed run and all processes use the same ones.
    """

    def __init__(
        self,
        create: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer],
        parameters: list[torch.nn.Parameter],
        seed: int,
    ):
        self.parameters, self.seed, self.steps = parameters, seed, 0
        # The parameters of the inner optimizer. Outside of their update they take no memory.
        self.float32_copies = [torch.nn.Parameter(_empty_like(parameter)) for parameter in parameters]
        self.inner = create(self.float32_copies)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for indices in self._groups():
            for i in indices:
                parameter, copy = self.parameters[i], self.float32_copies[i]
                assert parameter.grad is not None
                copy.data = parameter.float()
                copy.grad, parameter.grad = parameter.grad.float(), None
            # The other copies have no gradient, so the optimizer skips them.
            self.inner.step()
            for i in indices:
                parameter, copy = self.parameters[i], self.float32_copies[i]
                generator = torch.Generator(parameter.device)
                generator.manual_seed(seed_for(self.seed, "rounding", self.steps, i))
                parameter.copy_(round_stochastically(copy.data, generator))
                copy.data, copy.grad = _empty_like(parameter), None

    def _groups(self) -> Iterator[list[int]]:
        """Yields the indices of parameters with a gradient, in groups of at most `MAX_FLOAT32_ENTRIES` entries."""
        group: list[int] = []
        entries = 0
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            if group and entries + parameter.numel() > MAX_FLOAT32_ENTRIES:
                yield group
                group, entries = [], 0
            group.append(i)
            entries += parameter.numel()
        if group:
            yield group

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict() | {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.inner.load_state_dict({name: value for name, value in state.items() if name != "steps"})


def _empty_like(parameter: torch.Tensor) -> torch.Tensor:
    """Returns a float32 tensor of the parameter's shape that takes no memory."""
    return torch.zeros((), device=parameter.device).expand(parameter.shape)
