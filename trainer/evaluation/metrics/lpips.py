"""LPIPS (Zhang et al. 2018), by the package of its authors."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trainer.evaluation.metrics import PictureMetric, Pictures, Setup, needs_targets

if TYPE_CHECKING:
    import numpy as np
    import torch


class LPIPS(PictureMetric):
    """Perceptual distance to the target."""

    title: ClassVar[str] = "LPIPS"
    better: ClassVar[Literal["higher", "lower"] | None] = "lower"

    def missing(self, setup: Setup, pictures: Pictures) -> str | None:
        if reason := needs_targets(pictures):
            return reason
        if setup.lpips is None:
            return "type evaluation.lpips=alex (or vgg, squeeze), whose weights torchvision downloads"
        missing = [package for package in ("lpips", "torchvision") if find_spec(package) is None]
        return f"pip install {' '.join(missing)}" if missing else None

    def values(self, setup: Setup, pictures: Pictures) -> Sequence[float]:
        import lpips
        import torch

        assert pictures.targets is not None
        model: Any = lpips.LPIPS(net=setup.lpips, verbose=False).to(setup.device).eval()

        def to_tensor(image: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(image).to(setup.device).permute(2, 0, 1)[None].float() / 127.5 - 1

        with torch.no_grad():
            return [
                float(model(to_tensor(image), to_tensor(target)))
                for image, target in zip(pictures.images, pictures.targets, strict=True)
            ]
