"""Times, schedules, sampling, order, averages: what a formula says, computed another way."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from trainer.core.errors import UsageError
from trainer.core.rng import generator, normal, uniform
from trainer.evaluation.held_out_loss import QUANTILES
from trainer.evaluation.metrics import psnr
from trainer.lr_scheduler.constant import Constant
from trainer.lr_scheduler.cosine import Cosine
from trainer.objective import Flow, TimeDistribution
from trainer.training.batches import visits
from trainer.training.loop import TrainingLoop


def test_times_are_logit_normal_then_shifted():
    flow = Flow(mean=0.3, std=0.8)
    uniform = (np.arange(20_000) + 0.5) / 20_000
    logits = torch.logit(torch.tensor([flow.quantile_to_time(float(u), 1.0) for u in uniform], dtype=torch.float64))
    assert logits.mean().item() == pytest.approx(0.3, abs=1e-3)
    assert logits.std().item() == pytest.approx(0.8, abs=1e-2)
    time = flow.quantile_to_time(0.7, 1.0)
    assert flow.quantile_to_time(0.7, 3.0) == pytest.approx(3 * time / (1 + 2 * time))
    assert Flow(times=TimeDistribution.uniform).quantile_to_time(0.7, 1.0) == 0.7


def test_the_held_out_times_rise_with_their_quantiles():
    times = [Flow().quantile_to_time(quantile, 2.0) for quantile in QUANTILES]
    assert len(times) == 9
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 1


def test_a_perfect_prediction_has_no_loss_and_leads_from_noise_to_the_picture():
    clean, noise = normal((2, 3, 4, 4), "clean"), normal((2, 3, 4, 4), "noise")
    flow, time = Flow(), torch.tensor([0.2, 0.7])
    torch.testing.assert_close(flow.losses(noise - clean, clean, noise, time), torch.zeros(2))
    torch.testing.assert_close(flow.sample(lambda x, t: noise - clean, noise, steps=5, shift=2.0), clean)
    torch.testing.assert_close(flow.losses(noise - clean + 2, clean, noise, time), torch.full((2,), 4.0))


def test_noising_runs_from_the_picture_to_the_noise():
    clean, noise = normal((3, 2, 2), "clean"), normal((3, 2, 2), "noise")
    noised = Flow().add_noise(clean, noise, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(noised, torch.stack([clean[0], 0.75 * clean[1] + 0.25 * noise[1], noise[2]]))


@pytest.mark.parametrize("terminal", [0.0, 0.02])
def test_sampling_times_are_those_of_the_flow_match_scheduler(terminal: float):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=terminal or None)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7), mu=math.log(2.3))
    seen = []
    Flow(terminal=terminal).sample(lambda x, t: seen.append(t[0].item()) or x, torch.zeros(1, 1), 7, 2.3)
    np.testing.assert_allclose(seen, scheduler.sigmas[:-1], rtol=1e-6)


def test_warm_up_rises_and_cosine_falls_to_its_floor():
    schedule = Cosine(warmup=10, min_ratio=0.1)
    factors = [schedule.factor(step, 110) for step in range(1, 111)]
    assert factors[:10] == [step / 10 for step in range(1, 11)]
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0.1 < factors[-1] < 0.101
    assert [Constant(warmup=2).factor(step, 5) for step in range(1, 6)] == [0.5, 1, 1, 1, 1]


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(UsageError, match="0 to 9"):
        Cosine(warmup=10).check(10)


def test_each_sample_comes_once_an_epoch_and_every_epoch_in_another_order():
    count, batch = 10, 4
    stream = [index for step in range(1, 11) for _, index in visits(7, step, batch, count)]
    epochs = [stream[i : i + count] for i in range(0, 40, count)]
    assert all(Counter(epoch) == Counter(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert stream != [index for step in range(1, 11) for _, index in visits(8, step, batch, count)]
    assert [visit for step in (1, 2) for visit, _ in visits(7, step, batch, count)] == list(range(8))


def test_named_streams_are_independent_of_what_was_drawn_before_and_never_change():
    first = generator(1, "noise", 5, "cat").standard_normal(4)
    generator(1, "order", 2).permutation(100)
    np.testing.assert_array_equal(generator(1, "noise", 5, "cat").standard_normal(4), first)
    assert uniform(1, "noise") != uniform(1, "time") != uniform(2, "time")
    # Another number here means that no earlier run can be continued.
    assert generator(0, "noise", 1, "a").standard_normal(2).tolist() == pytest.approx(PINNED[:2], abs=0)
    assert uniform(0, "time", 1, "a") == PINNED[2]


PINNED = [-0.5409578106591928, 1.0978546612995643, 0.7302785742918823]


def test_psnr_of_known_errors():
    black = np.zeros((2, 2, 3), np.uint8)
    assert psnr(black, black) == 99
    assert psnr(black, black + 255) == 0
    assert psnr(black, black + 51) == pytest.approx(20 * math.log10(5))


def linear(
    micro_batches: list[list[int]],
    *,
    steps: int = 3,
    max_grad_norm: float = 1e9,
    average=None,
    decay: float = 0.0,
    poison=(),
):
    """SGD steps of least squares on five samples, cut into micro-batches; the parameter and the steps. `poison` are samples of no value."""
    x, y = normal((5, 3), "x"), normal((5,), "y")
    y[list(poison)] = torch.nan
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    batches = ((step, [{"x": x[rows], "y": y[rows]} for rows in micro_batches]) for step in range(1, steps + 1))
    loop = TrainingLoop(
        parameters=[parameter],
        losses=lambda batch: (batch["x"] @ parameter - batch["y"]) ** 2,
        optimizer=optimizer,
        learning_rate=lambda step: 0.1,
        batch_size=5,
        max_grad_norm=max_grad_norm,
        seed=0,
        average=average,
        decay=decay,
    )
    return parameter.detach(), list(loop.steps(batches))


def test_five_samples_in_twos_equal_five_at_once():
    whole, whole_steps = linear([[0, 1, 2, 3, 4]])
    parts, part_steps = linear([[0, 1], [2, 3], [4]])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    assert [step.loss for step in part_steps] == pytest.approx([step.loss for step in whole_steps], abs=1e-6)
    assert [step.grad_norm for step in part_steps] == pytest.approx([step.grad_norm for step in whole_steps], abs=1e-6)
    assert [step.number for step in whole_steps] == [1, 2, 3]


def test_clipping_bounds_the_update_and_the_norm_is_told_from_before():
    free, steps = linear([[0, 1, 2, 3, 4]], steps=1)
    norm = steps[0].grad_norm
    clipped, again = linear([[0, 1, 2, 3, 4]], steps=1, max_grad_norm=norm / 2)
    torch.testing.assert_close(clipped, free / 2)
    assert again[0].grad_norm == norm


def test_the_average_follows_with_a_short_memory_at_first():
    average = [torch.zeros(3)]
    after_one, _ = linear([[0, 1, 2, 3, 4]], steps=1)
    linear([[0, 1, 2, 3, 4]], steps=1, average=average, decay=0.99)
    # min(0.99, 2 / 11) of the old value stays.
    torch.testing.assert_close(average[0], after_one * 9 / 11)


def test_a_loss_that_is_not_finite_in_one_micro_batch_updates_nothing():
    parameter, done = linear([[0, 1], [2, 3], [4]], poison=[4])
    torch.testing.assert_close(parameter, torch.zeros(3), rtol=0, atol=0)
    assert [step.finite for step in done] == [False, False, False]
    _, done = linear([[0, 1], [2, 3], [4]])
    assert [step.finite for step in done] == [True, True, True]
