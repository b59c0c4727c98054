"""The published networks, built without weights: how many parameters train with the default targets."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES, case_of, has_case, path_of

from trainer.method.lora import Lora
from trainer.method.trainable import trainable_parameters

EACH_SIZE = pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, id=f"{name}-{size}")
        for name in FAMILIES
        if has_case(name)
        for size in case_of(name).published
    ],
)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_says_how_many_parameters_are_published(name: str):
    case = case_of(name)
    case.need("published")
    assert case.published, f"set published in {path_of(name)}, or say in left_out why there is nothing to count"


@EACH_SIZE
def test_parameter_counts_of_published_networks(name: str, size: str, tmp_path: Path):
    case = case_of(name)
    family, published = case.published_family(size, tmp_path), case.published[size]
    if not published.configs:
        family.check_configs()
    network = family.meta_model()
    total = sum(parameter.numel() for parameter in network.parameters())
    Lora(rank=8, alpha=8.0).attach(network, family.target_modules, seed=0)
    parameters = trainable_parameters(network)
    trainable = sum(parameter.numel() for parameter in parameters.values())
    assert (total, trainable, len(parameters) // 2) == (published.parameters, published.trainable, published.layers)
    for component, count in published.components.items():
        assert sum(parameter.numel() for parameter in family.meta_component(component).parameters()) == count
