"""Times, schedules, sampling, batch order, random numbers and the training loop, each compared with a formula."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from least_squares import train
from synthetic import NoiseSource

from trainer.core.errors import UsageError
from trainer.core.rng import generator, normal, uniform
from trainer.dataset import Dataset
from trainer.dataset.sample import Sample
from trainer.dataset.transform import Resolution, Transform
from trainer.evaluation.held_out_loss import QUANTILES
from trainer.evaluation.metrics.psnr import psnr
from trainer.lr_scheduler.constant import Constant
from trainer.lr_scheduler.cosine import Cosine
from trainer.objective import Flow, TimeDistribution, denoising_losses
from trainer.training.visits import Visits

# The flow objective


def test_training_times_are_logit_normal_and_shifted():
    flow = Flow(mean=0.3, std=0.8)
    quantiles = (np.arange(20_000) + 0.5) / 20_000
    times = [flow.quantile_to_time(float(quantile), 1.0) for quantile in quantiles]
    logits = torch.logit(torch.tensor(times, dtype=torch.float64))
    assert logits.mean().item() == pytest.approx(0.3, abs=1e-3)
    assert logits.std().item() == pytest.approx(0.8, abs=1e-2)
    t = flow.quantile_to_time(0.7, 1.0)
    assert flow.quantile_to_time(0.7, 3.0) == pytest.approx(3 * t / (1 + 2 * t))
    assert Flow(times=TimeDistribution.uniform).quantile_to_time(0.7, 1.0) == 0.7


def test_held_out_times_increase_with_quantiles():
    times = [Flow().quantile_to_time(quantile, 2.0) for quantile in QUANTILES]
    assert len(times) == 9
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 1


def test_perfect_prediction_has_no_loss_and_samples_the_latents():
    latents, noise = normal((2, 3, 4, 4), "latents"), normal((2, 3, 4, 4), "noise")
    flow, t = Flow(), torch.tensor([0.2, 0.7])

    def losses(prediction: torch.Tensor) -> torch.Tensor:
        return denoising_losses(flow, lambda *_: prediction, latents, noise, t, {})

    torch.testing.assert_close(losses(noise - latents), torch.zeros(2))
    torch.testing.assert_close(losses(noise - latents + 2), torch.full((2,), 4.0))
    torch.testing.assert_close(flow.sample(lambda x, t: noise - latents, noise, flow.sampling_times(5, 2.0)), latents)


def test_add_noise_interpolates_from_latents_to_noise():
    latents, noise = normal((3, 2, 2), "latents"), normal((3, 2, 2), "noise")
    noisy = Flow().add_noise(latents, noise, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(noisy, torch.stack([latents[0], 0.75 * latents[1] + 0.25 * noise[1], noise[2]]))


@pytest.mark.parametrize("terminal", [0.0, 0.02])
def test_sampling_times_equal_those_of_diffusers(terminal: float):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=terminal or None)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7), mu=math.log(2.3))
    np.testing.assert_allclose(Flow(terminal=terminal).sampling_times(7, 2.3), scheduler.sigmas, rtol=1e-6)


# Learning rate schedules


def test_cosine_schedule_warms_up_and_decays_to_its_floor():
    schedule = Cosine(warmup=10, min_ratio=0.1)
    factors = [schedule.factor(step, 110) for step in range(1, 111)]
    assert factors[:10] == [step / 10 for step in range(1, 11)]
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0.1 < factors[-1] < 0.101
    assert [Constant(warmup=2).factor(step, 5) for step in range(1, 6)] == [0.5, 1, 1, 1, 1]


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UsageError, match="0 to 9"):
        Cosine(warmup=10).check(10)


# Batches and random numbers


def test_each_epoch_visits_every_sample_once_in_a_new_order():
    count, batch = 10, 4
    samples = [Sample(f"{i}", NoiseSource(f"{i}", 8, 8), "a caption") for i in range(count)]
    visits = Visits(7, batch, Dataset(), Transform((Resolution("8", ((8, 8),)),)), samples)
    stream = [visit.sample for step in range(1, 11) for visit in visits.of_step(step)]
    epochs = [stream[i : i + count] for i in range(0, 40, count)]
    assert all(Counter(epoch) == Counter(samples) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = replace(visits, seed=8)
    assert stream != [visit.sample for step in range(1, 11) for visit in other.of_step(step)]
    assert [visit.number for step in (1, 2) for visit in visits.of_step(step)] == list(range(8))


def test_random_numbers_depend_on_their_names_only_and_never_change():
    first = generator(1, "noise", 5, "cat").standard_normal(4)
    generator(1, "order", 2).permutation(100)
    np.testing.assert_array_equal(generator(1, "noise", 5, "cat").standard_normal(4), first)
    assert uniform(1, "noise") != uniform(1, "time") != uniform(2, "time")
    # If these numbers change, earlier runs cannot be continued.
    expected = pytest.approx([-0.5409578106591928, 1.0978546612995643], abs=0)
    assert generator(0, "noise", 1, "a").standard_normal(2).tolist() == expected
    assert uniform(0, "time", 1, "a") == 0.7302785742918823


def test_psnr_of_known_errors():
    black = np.zeros((2, 2, 3), np.uint8)
    assert psnr(black, black) == 99
    assert psnr(black, black + 255) == 0
    assert psnr(black, black + 51) == pytest.approx(20 * math.log10(5))


# The training loop


def test_micro_batches_train_like_one_batch():
    whole, split = train(steps=3), train([[0, 1], [2, 3], [4]], steps=3)
    torch.testing.assert_close(split.weights[-1], whole.weights[-1], rtol=0, atol=1e-6)
    for split_step, whole_step in zip(split.steps, whole.steps, strict=True):
        assert split_step.loss == pytest.approx(whole_step.loss, abs=1e-6)
        assert split_step.grad_norm == pytest.approx(whole_step.grad_norm, abs=1e-6)
    assert [step.number for step in whole.steps] == [1, 2, 3]


def test_clipping_limits_the_update_and_reports_the_norm_before_it():
    free = train(steps=1)
    clipped = train(steps=1, max_grad_norm=free.steps[0].grad_norm / 2)
    torch.testing.assert_close(clipped.weights[0], free.weights[0] / 2)
    assert clipped.steps[0].grad_norm == free.steps[0].grad_norm


def test_moving_average_has_a_short_memory_at_first():
    result = train(steps=1, decay=0.99)
    # The decay of the first step is min(0.99, 2 / 11).
    torch.testing.assert_close(result.averages[0], result.weights[0] * 9 / 11)


def test_nonfinite_loss_in_one_micro_batch_updates_nothing():
    result = train([[0, 1], [2, 3], [4]], steps=3, nan_samples=[4])
    torch.testing.assert_close(result.weights[-1], torch.zeros(3), rtol=0, atol=0)
    assert [step.finite for step in result.steps] == [False, False, False]
    assert all(step.finite for step in train([[0, 1], [2, 3], [4]], steps=3).steps)
