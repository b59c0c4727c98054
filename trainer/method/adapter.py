"""Settings that all adapters share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from trainer.core.errors import UsageError
from trainer.core.rng import seed_for
from trainer.method import Method
from trainer.method.trainable import cast_trainable_to_float32

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig


@dataclass(slots=True)
class Adapter(Method):
    """Base class of the adapter settings: products of small matrices, times alpha / rank, added to frozen weights."""

    rank: int = 16
    alpha: float | None = None
    """Null: `alpha_per_rank` x rank."""
    alpha_per_rank: float = 1.0
    """Fixes alpha / rank, so that a sweep over ranks does not change the scale of the update."""
    targets: list[str] | None = None
    """Names of the adapted layers, or the ends of their names; null: the model's default."""

    freezes = True
    is_adapter = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(
                f"method.rank={self.rank} adapts nothing; type a rank of 1 or more, such as method.rank=16"
            )
        if self.alpha is not None and self.alpha <= 0:
            raise UsageError(
                f"method.alpha={self.alpha:g} leaves the adapter without effect; type a number above 0 (also for "
                "method.alpha_per_rank)"
            )
        for name in ("dropout", "rank_dropout", "module_dropout"):
            value = getattr(self, name, 0.0)
            if not 0 <= value < 1:
                raise UsageError(
                    f"method.{name}={value:g} is not a probability below 1; type a number such as method.{name}=0.1"
                )

    def resolve(self, targets: tuple[str, ...]) -> Self:
        alpha = self.rank * self.alpha_per_rank if self.alpha is None else self.alpha
        return replace(self, alpha=alpha, targets=self.targets or list(targets))

    def peft_config(self, targets: list[str]) -> PeftConfig:
        """Returns the settings of the adapter as peft expects them."""
        raise NotImplementedError

    def attach(self, network: torch.nn.Module, targets: tuple[str, ...], seed: int) -> None:
        import torch
        from peft import inject_adapter_in_model

        network.requires_grad_(False)
        torch.manual_seed(seed_for(seed, "adapter"))
        try:
            inject_adapter_in_model(self.peft_config(list(self.targets or targets)), network)
        except ValueError as error:
            raise UsageError(
                f"method.targets={self.targets} matches no layer of this model ({error}); "
                f"the default is {list(targets)}"
            ) from error
        cast_trainable_to_float32(network)
