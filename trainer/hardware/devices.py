"""Capabilities and memory use of the device that a run has opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.hardware import Card

if TYPE_CHECKING:
    import torch

GIB = 1024**3


def detect_card(device: torch.device) -> Card:
    """Returns the capabilities of a device that `Hardware.open` has returned."""
    import psutil
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = properties.major + properties.minor / 10
        # developer.nvidia.com/cuda-gpus; TransformerEngine's support matrix: bfloat16 needs 8.0, float8 8.9
        return Card(
            properties.name,
            properties.total_memory / GIB,
            capability,
            bfloat16=capability >= 8.0,
            float16=True,
            float8=capability >= 8.9,
            bitsandbytes=True,
        )
    if device.type == "mps":
        # float16 gave NaN in training; bfloat16 needs macOS 14 and is no faster than float32, see m2_max.yaml.
        return Card(
            "Apple GPU",
            torch.mps.recommended_max_memory() / GIB,
            bfloat16=False,
            float16=False,
            float8=False,
            bitsandbytes=False,
        )
    return Card(
        "CPU",
        psutil.virtual_memory().total / GIB,
        bfloat16=True,
        float16=False,
        float8=True,
        bitsandbytes=True,
    )


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Returns the memory in use in GiB: the resident set of this process and, on a GPU, torch's memory and its peak."""
    import psutil
    import torch

    metrics = {"system/memory_gib": psutil.Process().memory_info().rss / GIB}
    if device.type == "cuda":
        metrics["system/device_memory_gib"] = torch.cuda.memory_allocated() / GIB
        metrics["system/device_memory_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    elif device.type == "mps":
        metrics["system/device_memory_gib"] = torch.mps.current_allocated_memory() / GIB
    return metrics
