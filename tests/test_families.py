"""The contract of trainer.model, for every family that is there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from synthetic import NoiseSource, noise_sample

from trainer.config.groups import GROUPS
from trainer.core.batch import collate, get_conditions
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


@pytest.fixture
def family(tiny) -> Family:
    return tiny.family()


def digests(family: Family) -> dict[str, str]:
    return {name: name for name in family.components}


def row(family: Family, caption: str, controls: int | None = None) -> dict[str, torch.Tensor]:
    """What is cached of a sample; with as many controls as the family takes, up to one, where none are asked for."""
    controls = min(1, max(family.control_counts)) if controls is None else controls
    encoder, seen = family.build_encoder(torch.device("cpu")), noise_sample(caption, WIDTH, HEIGHT, controls)
    return {part: encoder.encode(part, seen) for part in family.recipes(digests(family), controls)}


def network_of(family: Family, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The network with what the family's first method trains in it."""
    network, method = family.load_network(dtype), GROUPS["method"][family.methods[0]]()
    if method.is_adapter:
        method.rank, method.alpha = 2, 2.0
    method.attach(network, family.target_modules, seed=0)
    return network


def prediction(
    family: Family, network, rows: list[dict[str, torch.Tensor]], x: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    return family.predict(network, x, t, get_conditions(collate(rows)))


def test_cached_tensors_have_the_shapes_that_the_family_announces(family: Family):
    for controls in {min(family.control_counts), min(2, max(family.control_counts))}:
        made = row(family, "make it night", controls)
        spec = family.shapes(HEIGHT, WIDTH, [(HEIGHT, WIDTH)] * controls)
        # What is padded in a batch is announced at its longest.
        longest = {
            name: (made[name].shape[0] if name.startswith(("prompt", "tokens")) else shape[0], *shape[1:])
            for name, shape in spec.items()
        }
        assert {name: tuple(tensor.shape) for name, tensor in made.items()} == longest
        assert all(made[name].shape[0] <= shape[0] for name, shape in spec.items())
        assert all(torch.isfinite(tensor).all() for tensor in made.values())


def test_latents_decode_to_pictures_of_the_size_they_were_made_from(family: Family):
    images = family.build_encoder(torch.device("cpu")).decode(row(family, "")["latents"][None])
    assert images.shape == (1, 3, HEIGHT, WIDTH)
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1


def test_a_prediction_has_the_shape_of_its_input_and_hears_time_caption_and_control(family: Family):
    network = network_of(family).eval()
    one, other = row(family, "make it night"), row(family, "paint the photo")
    shape = tuple(one["latents"].shape)
    x = torch.stack([normal(shape, "x")] * 2)
    t = torch.tensor([0.3, 0.3])
    with torch.no_grad():
        same = prediction(family, network, [one, one], x, t)
        assert same.shape == x.shape
        torch.testing.assert_close(same[0], same[1], rtol=0, atol=1e-5)
        assert not torch.allclose(*prediction(family, network, [one, one], x, torch.tensor([0.3, 0.6])), atol=1e-4)
        for part in ("prompt", "pooled", "tokens", "control"):
            if part in one and one[part].shape == other[part].shape:
                assert not torch.allclose(
                    *prediction(family, network, [one, one | {part: other[part]}], x, t), atol=1e-5
                ), part


def test_a_sample_is_predicted_alike_alone_and_in_a_batch(family: Family):
    network = network_of(family).eval()
    rows = [row(family, "make it night"), row(family, "paint the photo")]
    x = torch.stack([normal(tuple(rows[0]["latents"].shape), i) for i in range(2)])
    t = torch.tensor([0.2, 0.7])
    with torch.no_grad():
        both = prediction(family, network, rows, x, t)
        for i in range(2):
            torch.testing.assert_close(
                both[i : i + 1],
                prediction(family, network, rows[i : i + 1], x[i : i + 1], t[i : i + 1]),
                rtol=0,
                atol=1e-5,
            )


def test_the_skeleton_is_the_network_without_its_weights(family: Family):
    whole = {name: tuple(parameter.shape) for name, parameter in family.load_network(torch.float32).named_parameters()}
    assert {name: tuple(parameter.shape) for name, parameter in family.meta_model().named_parameters()} == whole
    assert all(parameter.is_meta for parameter in family.meta_model().parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_adapter_trains_in_float32_and_gets_a_gradient(family: Family, dtype: torch.dtype):
    network = network_of(family, dtype)
    parameters = trainable_parameters(network)
    assert {parameter.dtype for parameter in network.parameters() if not parameter.requires_grad} == {dtype}
    assert parameters and all(parameter.dtype == torch.float32 for parameter in parameters.values())
    rows = [row(family, "make it night")]
    x = rows[0]["latents"][None].float()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        prediction(family, network, rows, x, torch.tensor([0.5])).square().sum().backward()
    assert [name for name, parameter in parameters.items() if parameter.grad is None] == []
    assert {name for name, parameter in network.named_parameters() if parameter.grad is not None} == set(parameters)


def test_cached_parts_are_named_by_all_that_makes_them(family: Family):
    controls = min(1, max(family.control_counts))
    before = family.recipes(digests(family), controls)
    for component in family.components:
        after = family.recipes(digests(family) | {component: "another"}, controls)
        changed = {part for part in before if before[part].digest != after[part].digest}
        # The denoiser and its noise table make nothing that is cached.
        assert bool(changed) == (component not in ("transformer", "unet", "scheduler")), component
        assert changed != set(before)


def test_times_move_towards_noise_as_pictures_grow(family: Family):
    shifts = [family.time_shift(side, side) for side in (32, 64, 128)]
    assert shifts == sorted(shifts)
    assert all(shift >= 1 for shift in shifts)


CAPTIONS = ("make it night", "paint the photo")
STEPS, BATCH, RATE = 50, 8, 3e-3


def learned(family: Family, shuffled: bool) -> float:
    """Held-out loss after a short training of all weights on samples whose caption decides their latents, or, `shuffled`, does not."""
    controls = tuple(NoiseSource("control", WIDTH, HEIGHT) for _ in range(min(1, max(family.control_counts))))
    encoder, told = family.build_encoder(torch.device("cpu")), []
    parts = [part for part in family.recipes(digests(family), len(controls)) if not part.startswith("latents")]
    for caption in CAPTIONS:
        seen = TransformedSample(
            Sample(caption, NoiseSource("target", WIDTH, HEIGHT), caption, controls), WIDTH, HEIGHT
        )
        told.append({part: encoder.encode(part, seen) for part in parts})
    shape = family.shapes(HEIGHT, WIDTH, [(HEIGHT, WIDTH)] * len(controls))["latents"]

    def sample(name: str, kind: int, said: int) -> dict[str, torch.Tensor]:
        # One colour for each caption, and a little noise.
        colour = normal((shape[0], *[1] * (len(shape) - 1)), "colour", kind)
        return told[said] | {"latents": colour + 0.1 * normal(shape, "sample", name)}

    def batches():
        for step in range(1, STEPS + 1):
            rows = []
            for i in range(BATCH):
                row = sample(f"{step} {i}", i % 2, int(generator("said", step, i).integers(2)) if shuffled else i % 2)
                time = family.objective.quantile_to_time(uniform("time", step, i), family.time_shift(*shape[-2:]))
                rows.append(row | {"noise": normal(shape, "noise", step, i), "t": torch.tensor(time)})
            yield step, [collate(rows)]

    def predict(
        x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor], guidance: float | None = None
    ) -> torch.Tensor:
        return family.predict(network, x, t, cond, guidance)

    def losses(row: dict[str, torch.Tensor]) -> torch.Tensor:
        return denoising_losses(
            family.objective, predict, row["latents"], row["noise"], row["t"], get_conditions(row)
        )

    network = family.load_network(torch.float32).train()
    Full().attach(network, family.target_modules, seed=0)
    weights = list(trainable_parameters(network).values())
    optimizer = AdamW(lr=RATE).build(weights, seed=0)
    loop = TrainingLoop(
        parameters=weights,
        losses=losses,
        optimizer=optimizer,
        learning_rate=lambda step: RATE,
        batch_size=BATCH,
        max_grad_norm=1.0,
        seed=0,
    )
    for _ in loop.steps(batches()):
        pass
    held_out = [(f"{i}", sample(f"held out {i}", i % 2, i % 2)) for i in range(8)]
    return held_out_loss(family, predict, held_out, torch.device("cpu"), 32)["val/loss"]


def test_training_learns_what_captions_say(family: Family):
    if "full" not in family.methods:
        pytest.skip("what trains is too little to learn this in seconds")
    # Asked for the noise alone, a network gains little from knowing the picture.
    asked = {Diffusion: Diffusion(prediction=Prediction.v_prediction), Flow: Flow()}[type(family.objective)]
    family = dataclasses.replace(family, objective=asked)
    assert learned(family, shuffled=False) < 0.9 * learned(family, shuffled=True)
