"""The settings that a search varies, and their values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.core.errors import UsageError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(slots=True, frozen=True)
class Choice:
    """A setting that takes one of a few values, which have no order."""

    key: str
    values: tuple[str, ...]

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)

    def __str__(self) -> str:
        return f"{self.key}={','.join(self.values)}"


@dataclass(slots=True, frozen=True)
class Range:
    """A setting that takes any number from `low` to `high`; whole numbers if both are, or multiples of `step`.

    Raises errors.UsageError if there is no such number.
    """

    key: str
    low: float
    high: float
    step: float | None = None
    """Distance of the values from each other, counted from `low`."""
    log: bool = False
    """Whether the logarithm of the value is uniform."""

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UsageError(
                f"{self.key} has no values between {self.low:g} and {self.high:g}; type the lower end first, such as "
                f"{self.key}='interval(1e-5,1e-2)'"
            )
        if self.log and self.low <= 0:
            raise UsageError(
                f"{self.key} starts at {self.low:g}, which has no logarithm; type a number above 0, or leave out "
                "tag(log, ...)"
            )

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution, IntDistribution

        if all(isinstance(value, int) for value in (self.low, self.high, self.step or 1)):
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def __str__(self) -> str:
        return f"{self.key}={self.low:g}..{self.high:g}"


Dimension = Choice | Range
