"""The contract of `trainer.model.Family`, for every family."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from families import case_of, path_of, usual_method
from parity import denoiser_of
from safetensors.torch import load_file, save_file
from synthetic import noise_sample

from trainer.config.groups import option_name
from trainer.config.schema import Run
from trainer.core.batch import Batch, Example, collate, get_conditions
from trainer.core.errors import UsageError
from trainer.core.rng import generator, normal, uniform
from trainer.dataset.sample import control_names
from trainer.evaluation.held_out_loss import held_out_loss
from trainer.hardware import Hardware
from trainer.method.full import Full
from trainer.method.trainable import trainable_parameters
from trainer.model import Family
from trainer.model.weights import is_leftover
from trainer.objective import Diffusion, Flow, Prediction, denoising_losses
from trainer.optimizer.adamw import AdamW
from trainer.precision import Precision
from trainer.training.build import build_network
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
    """Returns the network with the trainable parameters of the family's usual method."""
    network, method = family.load_network(dtype), usual_method(family, rank=2, alpha=2.0)
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
    # Those of the case may have different lengths, so that one is padded.
    examples = [encode_example(family, caption) for caption in case_of(option_name(family)).captions]
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


def requires_grad(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Makes all floating-point weights and buffers of a network require a gradient, and returns them by name."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                module.register_buffer(
                    name, buffer.clone().requires_grad_(), name not in module._non_persistent_buffers_set
                )
    tensors = network.state_dict(keep_vars=True)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items() if tensor.is_floating_point()}


def test_every_tensor_of_the_checkpoint_is_loaded_and_matters(family: Family, tmp_path: Path):
    """Persistent buffers, too. Networks can compute some of them, so that one that is not read goes unnoticed."""
    copy = shutil.copytree(family.path, tmp_path / "copy")
    expected: dict[str, torch.Tensor] = {}
    for path in (copy / family.denoiser).glob("*.safetensors"):
        changed = {
            name: tensor + 0.05 * normal(tuple(tensor.shape), name).to(tensor.dtype)
            for name, tensor in load_file(path).items()
            if tensor.is_floating_point() and not is_leftover(name)
        }
        save_file(load_file(path) | changed, path, {"format": "pt"})
        expected |= changed
    family = dataclasses.replace(family, path=str(copy))
    method, network = usual_method(family), family.load_network(torch.float32)
    if not method.is_adapter:
        # The network predicts nothing without it.
        method.attach(network, family.target_modules, seed=0)
    tensors = requires_grad(denoiser_of(family, network))
    assert sorted(expected.keys() ^ tensors.keys()) == []
    assert [name for name in expected if not torch.equal(tensors[name], expected[name].float())] == [], "not read"
    example = encode_example(family, CAPTIONS[0])
    t = torch.tensor([family.objective.quantile_to_time(0.5, 1.0)])
    output = predict(family, network, [example], example["latents"][None].float(), t)
    (output * normal(tuple(output.shape), "weights")).sum().backward()
    unread = case_of(option_name(family)).unread
    useless = [name for name, tensor in tensors.items() if tensor.grad is None or not tensor.grad.any()]
    unexplained = [name for name in useless if not any(fnmatch(name, pattern) for pattern in unread)]
    assert not unexplained, (
        f"these tensors change no prediction: {', '.join(unexplained)}. If the original does not use them either, say "
        f"why in unread of {path_of(option_name(family))}"
    )
    assert all(any(fnmatch(name, pattern) for name in useless) for pattern in unread)


def build(family: Family, **hardware: bool) -> torch.nn.Module:
    """Returns the network of a run with these settings of the hardware."""
    method = usual_method(family, rank=2, alpha=2.0)
    run = Run(model=family, method=method, precision=Precision(), hardware=Hardware(**hardware))
    return build_network(run, CPU)


def loss_and_gradients(family: Family, network: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Returns also how many tensors autograd saves."""
    # Of different lengths for some families, so that one is padded and a mask must reach every block.
    examples, saved = [encode_example(family, caption) for caption in case_of(option_name(family)).captions], []
    parameters = trainable_parameters(network)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(0.1 * normal(tuple(parameter.shape), name))
    t = torch.tensor([family.objective.quantile_to_time(0.5, 1.0)] * len(examples))
    latents = torch.stack([example["latents"] for example in examples]).float()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        loss = predict(family, network.train(), examples, latents, t).square().mean()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in parameters.items()}, len(saved)


def test_gradient_checkpointing_changes_no_gradient_or_is_refused(family: Family):
    plain = build(family)
    try:
        network = build(family, gradient_checkpointing=True)
    except UsageError as refusal:
        assert "type hardware.gradient_checkpointing=false" in str(refusal)
        return
    loss, gradients, saved = loss_and_gradients(family, network)
    expected_loss, expected, all_saved = loss_and_gradients(family, plain)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=0)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-6)
    assert saved < all_saved, "nothing is recomputed"


# Generating code takes minutes. "eager" traces the network in the same way, and runs what it traced.
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_network_predicts_the_same_or_compilation_is_refused(family: Family, backend: str):
    plain = build(family)
    try:
        network = build(family, compile=True)
    except UsageError as refusal:
        assert "type hardware.compile=false" in str(refusal)
        return
    compiled = [module for module in network.modules() if module._compiled_call_impl is not None]
    assert compiled, "nothing is compiled"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for module in compiled:
        module.compile(backend=backend)
    loss, gradients, _ = loss_and_gradients(family, network)
    expected_loss, expected, _ = loss_and_gradients(family, plain)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was traced"


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


STEPS, BATCH_SIZE, LEARNING_RATE = 30, 8, 3e-3


class ColorTask:
    """Latents of one color with little noise. The caption or the control image determines the color.

    If `shuffled`, it is a random one in training.
    """

    def __init__(self, family: Family, what: str, shuffled: bool):
        self.family, self.shuffled = family, shuffled
        count = usual_controls(family)
        self.shape = family.shapes(HEIGHT, WIDTH, [(HEIGHT, WIDTH)] * count)["latents"]
        encoder = family.build_encoder(CPU)
        names = [name for name in family.recipes(fake_digests(family), count) if not name.startswith("latents")]
        self.conditions = []
        for i in range(2):
            sample = noise_sample(CAPTIONS[i if what == "caption" else 0], WIDTH, HEIGHT, count)
            example = {name: encoder.encode(name, sample) for name in names}
            # To a VAE that is not trained, images of noise look alike.
            plain = {name: torch.full_like(example[name], 2 * i - 1) for name in control_names(count)}
            self.conditions.append(example | plain if what == "control" else example)

    def example(self, name: str, color: int, said: int) -> Example:
        plain = normal((self.shape[0], *[1] * (len(self.shape) - 1)), "colour", color)
        return self.conditions[said] | {"latents": plain + 0.1 * normal(self.shape, "sample", name)}

    def batches(self) -> Iterator[tuple[int, list[Batch]]]:
        objective, shift = self.family.objective, self.family.time_shift(*self.shape[-2:])
        for step in range(1, STEPS + 1):
            examples = []
            for i in range(BATCH_SIZE):
                said = int(generator("said", step, i).integers(2)) if self.shuffled else i % 2
                t = torch.tensor(objective.quantile_to_time(uniform("time", step, i), shift))
                noise = normal(self.shape, "noise", step, i)
                examples.append(self.example(f"{step} {i}", i % 2, said) | {"noise": noise, "t": t})
            yield step, [collate(examples)]


def train_and_evaluate(family: Family, what: str, shuffled: bool) -> float:
    """Returns the held-out loss after training all weights for a short time."""
    task = ColorTask(family, what, shuffled)
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


@pytest.mark.parametrize("what", ["caption", "control"])
def test_training_learns_what_captions_and_control_images_say(family: Family, what: str):
    if "full" not in family.methods:
        pytest.skip("this family trains too few parameters to learn this in seconds")
    if what == "control" and not usual_controls(family):
        pytest.skip("this family takes no control images")
    # A network that predicts the noise gains little from knowing the image.
    objectives = {Diffusion: Diffusion(prediction=Prediction.v_prediction), Flow: Flow()}
    family = dataclasses.replace(family, objective=objectives[type(family.objective)])
    assert train_and_evaluate(family, what, shuffled=False) < 0.9 * train_and_evaluate(family, what, shuffled=True)
