"""The contract of `trainer.model.Family`, for every family."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from synthetic import NoiseSource, noise_sample

from trainer.config.groups import GROUPS
from trainer.core.batch import Batch, Example, collate, get_conditions
from trainer.core.rng import generator, normal, uniform
from trainer.dataset.sample import Sample
from trainer.dataset.transform import TransformedSample
from trainer.evaluation.held_out_loss import held_out_loss
from trainer.method.full import Full
from trainer.method.trainable import trainable_parameters
from trainer.model import Family
from trainer.objective import Diffusion, Flow, Prediction, denoising_losses
from trainer.optimizer.adamw import AdamW
from trainer.training.loop import TrainingLoop

HEIGHT, WIDTH = 32, 48
CAPTIONS = ("make it night", "paint the photo")
CPU = torch.device("cpu")


@pytest.fixture
def family(tiny) -> Family:
    return tiny.family()


def fake_digests(family: Family) -> dict[str, str]:
    return {name: name for name in family.components}


def usual_controls(family: Family) -> int:
    """One control image if the family takes any."""
    return min(1, max(family.control_counts))


def encode_example(family: Family, caption: str, controls: int | None = None) -> Example:
    controls = usual_controls(family) if controls is None else controls
    encoder, sample = family.build_encoder(CPU), noise_sample(caption, WIDTH, HEIGHT, controls)
    return {name: encoder.encode(name, sample) for name in family.recipes(fake_digests(family), controls)}


def load_trainable(family: Family, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Returns the network with the trainable parameters of the family's first method."""
    network, method = family.load_network(dtype), GROUPS["method"][family.methods[0]]()
    if method.is_adapter:
        method.rank, method.alpha = 2, 2.0
    method.attach(network, family.target_modules, seed=0)
    return network


def predict(
    family: Family, network: Any, examples: list[Example], latents: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    return family.predict(network, latents, t, get_conditions(collate(examples)))


def test_cached_tensors_have_the_announced_shapes(family: Family):
    for controls in {min(family.control_counts), min(2, max(family.control_counts))}:
        example = encode_example(family, CAPTIONS[0], controls)
        shapes = family.shapes(HEIGHT, WIDTH, [(HEIGHT, WIDTH)] * controls)
        assert example.keys() == shapes.keys()
        for name, tensor in example.items():
            if name.startswith(("prompt", "tokens")):
                # The announced length is the longest possible one.
                assert tensor.shape[0] <= shapes[name][0] and tuple(tensor.shape[1:]) == shapes[name][1:]
            else:
                assert tuple(tensor.shape) == shapes[name]
            assert torch.isfinite(tensor).all()


def test_latents_decode_to_images_of_the_original_size(family: Family):
    images = family.build_encoder(CPU).decode(encode_example(family, "")["latents"][None])
    assert images.shape == (1, 3, HEIGHT, WIDTH)
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1


def test_predictions_have_the_shape_of_the_latents_and_depend_on_every_condition(family: Family):
    network = load_trainable(family).eval()
    one, other = (encode_example(family, caption) for caption in CAPTIONS)
    latents = torch.stack([normal(tuple(one["latents"].shape), "x")] * 2)
    t = torch.tensor([0.3, 0.3])
    with torch.no_grad():
        same = predict(family, network, [one, one], latents, t)
        assert same.shape == latents.shape
        torch.testing.assert_close(same[0], same[1], rtol=0, atol=1e-5)
        different = predict(family, network, [one, one], latents, torch.tensor([0.3, 0.6]))
        assert not torch.allclose(different[0], different[1], atol=1e-4)
        for name in ("prompt", "pooled", "tokens", "control"):
            if name in one and one[name].shape == other[name].shape:
                different = predict(family, network, [one, one | {name: other[name]}], latents, t)
                assert not torch.allclose(different[0], different[1], atol=1e-5), name


def test_predictions_do_not_depend_on_the_other_samples_of_a_batch(family: Family):
    network = load_trainable(family).eval()
    examples = [encode_example(family, caption) for caption in CAPTIONS]
    latents = torch.stack([normal(tuple(examples[0]["latents"].shape), i) for i in range(2)])
    t = torch.tensor([0.2, 0.7])
    with torch.no_grad():
        together = predict(family, network, examples, latents, t)
        alone = [
            predict(family, network, examples[i : i + 1], latents[i : i + 1], t[i : i + 1])
            for i in range(len(examples))
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_meta_model_has_the_parameters_of_the_network(family: Family):
    def shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}

    assert shapes(family.meta_model()) == shapes(family.load_network(torch.float32))
    assert all(parameter.is_meta for parameter in family.meta_model().parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainable_parameters_are_float32_and_get_gradients(family: Family, dtype: torch.dtype):
    network = load_trainable(family, dtype)
    parameters = trainable_parameters(network)
    assert {parameter.dtype for parameter in network.parameters() if not parameter.requires_grad} == {dtype}
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    example = encode_example(family, CAPTIONS[0])
    latents = example["latents"][None].float()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        predict(family, network, [example], latents, torch.tensor([0.5])).square().sum().backward()
    with_gradients = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert with_gradients == parameters.keys()


def test_recipes_depend_on_exactly_the_components_that_encode(family: Family):
    recipes = family.recipes(fake_digests(family), usual_controls(family))
    for component in family.components:
        others = family.recipes(fake_digests(family) | {component: "another"}, usual_controls(family))
        changed = {name for name in recipes if recipes[name].digest != others[name].digest}
        # Neither the denoiser nor its scheduler computes anything that is cached.
        assert bool(changed) == (component not in (family.denoiser, "scheduler")), component
        assert changed != recipes.keys()


def test_times_shift_towards_noise_as_images_grow(family: Family):
    shifts = [family.time_shift(side, side) for side in (32, 64, 128)]
    assert shifts == sorted(shifts)
    assert all(shift >= 1 for shift in shifts)


STEPS, BATCH_SIZE, LEARNING_RATE = 50, 8, 3e-3


class ColorTask:
    """Latents of one color, which the caption determines, with little noise.

    If `shuffled`, the captions of the training samples are random.
    """

    def __init__(self, family: Family, shuffled: bool):
        self.family, self.shuffled = family, shuffled
        controls = tuple(NoiseSource("control", WIDTH, HEIGHT) for _ in range(usual_controls(family)))
        self.shape = family.shapes(HEIGHT, WIDTH, [(HEIGHT, WIDTH)] * len(controls))["latents"]
        encoder = family.build_encoder(CPU)
        names = [name for name in family.recipes(fake_digests(family), len(controls)) if not name.startswith("latents")]
        self.conditions = []
        for caption in CAPTIONS:
            sample = Sample(caption, NoiseSource("target", WIDTH, HEIGHT), caption, controls)
            transformed = TransformedSample(sample, WIDTH, HEIGHT)
            self.conditions.append({name: encoder.encode(name, transformed) for name in names})

    def example(self, name: str, color: int, caption: int) -> Example:
        plain = normal((self.shape[0], *[1] * (len(self.shape) - 1)), "colour", color)
        return self.conditions[caption] | {"latents": plain + 0.1 * normal(self.shape, "sample", name)}

    def batches(self) -> Iterator[tuple[int, list[Batch]]]:
        objective, shift = self.family.objective, self.family.time_shift(*self.shape[-2:])
        for step in range(1, STEPS + 1):
            examples = []
            for i in range(BATCH_SIZE):
                caption = int(generator("said", step, i).integers(2)) if self.shuffled else i % 2
                t = torch.tensor(objective.quantile_to_time(uniform("time", step, i), shift))
                noise = normal(self.shape, "noise", step, i)
                examples.append(self.example(f"{step} {i}", i % 2, caption) | {"noise": noise, "t": t})
            yield step, [collate(examples)]


def train_and_evaluate(family: Family, shuffled: bool) -> float:
    """Returns the held-out loss after training all weights for a short time."""
    task = ColorTask(family, shuffled)
    network = family.load_network(torch.float32).train()
    Full().attach(network, family.target_modules, seed=0)
    weights = list(trainable_parameters(network).values())

    def predict_with_network(
        latents: torch.Tensor, t: torch.Tensor, conditions: Batch, guidance: float | None = None
    ) -> torch.Tensor:
        return family.predict(network, latents, t, conditions, guidance)

    def losses(batch: Batch) -> torch.Tensor:
        return denoising_losses(
            family.objective,
            predict_with_network,
            batch["latents"],
            batch["noise"],
            batch["t"],
            get_conditions(batch),
        )

    loop = TrainingLoop(
        parameters=weights,
        losses=losses,
        optimizer=AdamW(lr=LEARNING_RATE).build(weights, seed=0),
        learning_rate=lambda step: LEARNING_RATE,
        batch_size=BATCH_SIZE,
        max_grad_norm=1.0,
        seed=0,
    )
    for _ in loop.steps(task.batches()):
        pass
    held_out = [(f"{i}", task.example(f"held out {i}", i % 2, i % 2)) for i in range(8)]
    return held_out_loss(family, predict_with_network, held_out, CPU, 32)["val/loss"]


def test_training_learns_what_captions_say(family: Family):
    if "full" not in family.methods:
        pytest.skip("this family trains too few parameters to learn this in seconds")
    # A network that predicts the noise gains little from knowing the image.
    objectives = {Diffusion: Diffusion(prediction=Prediction.v_prediction), Flow: Flow()}
    family = dataclasses.replace(family, objective=objectives[type(family.objective)])
    assert train_and_evaluate(family, shuffled=False) < 0.9 * train_and_evaluate(family, shuffled=True)
