"""The diffusion objective, compared with the schedulers of diffusers and with its formulas."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from trainer.core.errors import UsageError
from trainer.core.rng import normal
from trainer.objective import Diffusion, NoiseScheduler, Prediction, Schedule, Spacing, denoising_losses
from trainer.objective.diffusion import alphas_cumprod

SHAPE = (6, 4, 5, 3)
TIMES = torch.tensor([0.0, 1.0, 17.0, 240.0, 498.0, 499.0])
EACH_PREDICTION = pytest.mark.parametrize("prediction", list(Prediction))


def build_scheduler(kind: type, objective: Diffusion, **options: Any) -> Any:
    """Returns the scheduler of diffusers with the settings of `objective`."""
    return kind(
        num_train_timesteps=objective.timesteps,
        beta_start=objective.beta_start,
        beta_end=objective.beta_end,
        beta_schedule=objective.schedule.value,
        prediction_type=objective.prediction.value,
        clip_sample=False,
        **options,
    )


def losses_of(objective: Diffusion, prediction: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Losses of a prediction for fixed latents and noise at `TIMES`."""
    latents, noise = normal(SHAPE, "latents"), normal(SHAPE, "noise")
    return denoising_losses(objective, lambda *_: prediction, latents, noise, TIMES, {}, weight)


@pytest.mark.parametrize("timesteps", [500, 777, 1000])
@pytest.mark.parametrize("schedule", list(Schedule))
def test_noise_schedule_equals_that_of_the_ddpm_scheduler(schedule: Schedule, timesteps: int):
    from diffusers import DDPMScheduler

    objective = Diffusion(schedule=schedule, timesteps=timesteps)
    table = alphas_cumprod(schedule, objective.beta_start, objective.beta_end, timesteps)
    scheduler = build_scheduler(DDPMScheduler, objective)
    assert len(table) == timesteps
    # The scheduler multiplies up to a thousand float32 numbers.
    np.testing.assert_allclose(table, scheduler.alphas_cumprod.double().numpy(), rtol=1e-4, atol=1e-6)
    latents, noise = normal(SHAPE, "latents"), normal(SHAPE, "noise")
    expected = scheduler.add_noise(latents, noise, TIMES.long())
    torch.testing.assert_close(objective.add_noise(latents, noise, TIMES), expected, rtol=0, atol=1e-5)


@EACH_PREDICTION
def test_loss_is_the_squared_error_of_the_prediction(prediction: Prediction):
    from diffusers import DDPMScheduler

    objective = Diffusion(prediction=prediction)
    target = noise = normal(SHAPE, "noise")
    if prediction is Prediction.v_prediction:
        scheduler = build_scheduler(DDPMScheduler, objective)
        target = scheduler.get_velocity(normal(SHAPE, "latents"), noise, TIMES.long())
    torch.testing.assert_close(losses_of(objective, target), torch.zeros(6), rtol=0, atol=1e-9)
    torch.testing.assert_close(losses_of(objective, target + 2), torch.full((6,), 4.0))
    one_column_of_three = torch.zeros(6, 1, 5, 3)
    one_column_of_three[..., :1] = 1
    torch.testing.assert_close(losses_of(objective, target + 2, one_column_of_three), torch.full((6,), 4 / 3))


@EACH_PREDICTION
def test_min_snr_limits_the_weight_of_small_times(prediction: Prediction):
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    plain, limited = Diffusion(prediction=prediction), Diffusion(prediction=prediction, min_snr=5.0)
    output = normal(SHAPE, "output")
    snr = compute_snr(build_scheduler(DDPMScheduler, plain), TIMES.long())
    weight = snr.clamp(max=5) / (snr if prediction is Prediction.epsilon else snr + 1)
    torch.testing.assert_close(losses_of(limited, output), weight * losses_of(plain, output), rtol=1e-4, atol=0)
    assert limited.unweighted() == plain
    assert weight[0] < 0.01 or prediction is Prediction.v_prediction


def test_all_timesteps_are_equally_likely():
    objective = Diffusion(timesteps=500)
    counts = Counter(objective.quantile_to_time((i + 0.5) / 5000, 3.0) for i in range(5000))
    assert counts == dict.fromkeys(map(float, range(500)), 10)
    assert objective.quantile_to_time(1 - 2**-60, 1.0) == 499


@EACH_PREDICTION
@pytest.mark.parametrize("steps", [1, 7, 25, 400])
def test_sampling_equals_that_of_the_ddim_scheduler(prediction: Prediction, steps: int):
    from diffusers import DDIMScheduler

    objective = Diffusion(prediction=prediction, timesteps=900)
    scheduler = build_scheduler(DDIMScheduler, objective, steps_offset=1, set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    times = []

    def predict(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times.append(t[0].item())
        return torch.tanh(latents.roll(1, -1) + t.view(-1, 1, 1, 1) / 900)

    expected = noise = normal((2, 4, 6, 3), "noise")
    for t in scheduler.timesteps:
        output = predict(expected, torch.full((2,), t.item()))
        expected = scheduler.step(output, t, expected).prev_sample
    times.clear()
    latents = objective.sample(predict, noise, objective.sampling_times(steps, 1.0))
    assert times == scheduler.timesteps.tolist()
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


@EACH_PREDICTION
def test_perfect_network_samples_the_latents(prediction: Prediction):
    objective = Diffusion(prediction=prediction, schedule=Schedule.linear)
    latents = normal((1, 4, 6, 3), "latents").double()
    table = alphas_cumprod(objective.schedule, objective.beta_start, objective.beta_end, 1000)

    def predict(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = table[int(t)]
        noise = (noisy - a**0.5 * latents) / (1 - a) ** 0.5
        return noise if prediction is Prediction.epsilon else a**0.5 * noise - (1 - a) ** 0.5 * latents

    sampled = objective.sample(predict, normal((1, 4, 6, 3), "noise").double(), objective.sampling_times(10, 1.0))
    # Sampling ends at the first timestep, so a little noise remains.
    assert (sampled - latents).abs().max() < 4 * (1 - table[0]) ** 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timesteps": 1}, "model.objective.timesteps=1 "),
        ({"beta_start": 0.0}, "model.objective.beta_start=0 "),
        ({"beta_start": 0.02, "beta_end": 0.01}, "beta_end=0.01 "),
        ({"min_snr": 0.0}, "model.objective.min_snr=0 "),
    ],
)
def test_invalid_settings_are_refused(settings: dict, message: str):
    with pytest.raises(UsageError, match=message):
        Diffusion(**settings)


def test_more_sampling_steps_than_timesteps_are_refused():
    with pytest.raises(UsageError, match="type sample.steps=500"):
        Diffusion(timesteps=500).check_sample_steps(501)


TRAINED_BETAS = tuple(np.linspace(0.001, 0.02, 900).tolist())


@EACH_PREDICTION
@pytest.mark.parametrize("kind", ["zero SNR", "trained betas"])
def test_noise_of_a_followed_scheduler_equals_that_of_diffusers(prediction: Prediction, kind: str):
    from diffusers import DDPMScheduler

    options: dict[str, Any] = (
        {"rescale_betas_zero_snr": True} if kind == "zero SNR" else {"trained_betas": TRAINED_BETAS}
    )
    settings = Diffusion(prediction=prediction, timesteps=900)
    if kind == "zero SNR" and prediction is Prediction.epsilon:
        with pytest.raises(UsageError, match=r"type model.objective.prediction=v_prediction"):
            settings.follow(NoiseScheduler(**options))
        return
    objective = settings.follow(NoiseScheduler(**options))
    scheduler = build_scheduler(DDPMScheduler, objective, **options)
    latents, noise, t = normal(SHAPE, "latents"), normal(SHAPE, "noise"), torch.tensor([0, 1, 17, 240, 898, 899])
    found = objective.add_noise(latents, noise, t.float())
    torch.testing.assert_close(found, scheduler.add_noise(latents, noise, t), rtol=0, atol=1e-4)
    if prediction is Prediction.v_prediction:
        velocity = scheduler.get_velocity(latents, noise, t)
        torch.testing.assert_close(objective.target(latents, noise, t.float()), velocity, rtol=0, atol=1e-4)
    if kind == "zero SNR":
        assert torch.equal(found[-1], noise[-1])
        assert torch.isfinite(dataclasses.replace(objective, min_snr=5.0).weight_by_time(torch.ones(6), t)).all()


def tanh_network(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(latents.roll(1, -1) + t.view(-1, 1, 1, 1) / 900)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("spacing", list(Spacing))
@pytest.mark.parametrize("steps", [1, 6, 30])
def test_sampling_with_every_spacing_equals_that_of_diffusers(spacing: Spacing, zero_snr: bool, steps: int):
    """DDIM where the timesteps are evenly spaced, and elsewhere Euler's method, which solves the same equation."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    scheduled = NoiseScheduler(
        timestep_spacing=spacing, rescale_betas_zero_snr=zero_snr, steps_offset=3, set_alpha_to_one=True
    )
    objective = Diffusion(prediction=Prediction.v_prediction, timesteps=900).follow(scheduled)
    options = {"timestep_spacing": spacing.value, "rescale_betas_zero_snr": zero_snr, "steps_offset": 3}
    noise = normal((2, 4, 6, 3), "noise")
    if spacing is Spacing.linspace:
        scheduler: Any = EulerDiscreteScheduler.from_config(build_scheduler(DDIMScheduler, objective, **options).config)
        scheduler.set_timesteps(steps)
        expected = noise * (scheduler.sigmas[0] ** 2 + 1).sqrt()
        for t in scheduler.timesteps:
            output = tanh_network(scheduler.scale_model_input(expected, t), torch.full((2,), t.item()))
            expected = scheduler.step(output, t, expected).prev_sample
    else:
        scheduler = build_scheduler(DDIMScheduler, objective, set_alpha_to_one=True, **options)
        scheduler.set_timesteps(steps)
        expected = noise
        for t in scheduler.timesteps:
            output = tanh_network(expected, torch.full((2,), t.item()))
            expected = scheduler.step(output, t, expected).prev_sample
    found = objective.sample(tanh_network, noise, objective.sampling_times(steps, 1.0))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


def test_clipped_sampling_equals_that_of_the_ddim_scheduler():
    from diffusers import DDIMScheduler

    objective = Diffusion().follow(NoiseScheduler(clip_sample_range=0.5))
    scheduler: Any = DDIMScheduler.from_config(
        build_scheduler(DDIMScheduler, objective, steps_offset=1, set_alpha_to_one=False).config,
        clip_sample=True,
        clip_sample_range=0.5,
    )
    scheduler.set_timesteps(5)
    expected = noise = normal((2, 4, 6, 3), "noise")
    for t in scheduler.timesteps:
        expected = scheduler.step(tanh_network(expected, torch.full((2,), t.item())), t, expected).prev_sample
    found = objective.sample(tanh_network, noise, objective.sampling_times(5, 1.0))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
