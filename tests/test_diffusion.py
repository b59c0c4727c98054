"""The diffusion objective against diffusers' schedulers and against its own formulas."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from trainer.core.errors import UsageError
from trainer.core.rng import normal
from trainer.objective import Diffusion, Prediction, Schedule
from trainer.objective.diffusion import alphas_cumprod

SHAPE = (6, 4, 5, 3)
TIMES = torch.tensor([0.0, 1.0, 17.0, 240.0, 498.0, 499.0])
EVERY = pytest.mark.parametrize("prediction", list(Prediction))


def theirs(kind: type, settings: Diffusion, **more: object):
    """The scheduler of diffusers with these settings."""
    return kind(
        num_train_timesteps=settings.timesteps,
        beta_start=settings.beta_start,
        beta_end=settings.beta_end,
        beta_schedule=settings.schedule.value,
        prediction_type=settings.prediction.value,
        clip_sample=False,
        **more,
    )


@pytest.mark.parametrize("timesteps", [500, 777, 1000])
@pytest.mark.parametrize("schedule", list(Schedule))
def test_noise_tables_are_those_of_the_ddpm_scheduler(schedule: Schedule, timesteps: int):
    from diffusers import DDPMScheduler

    settings = Diffusion(schedule=schedule, timesteps=timesteps)
    table = alphas_cumprod(schedule, settings.beta_start, settings.beta_end, timesteps)
    scheduler = theirs(DDPMScheduler, settings)
    assert len(table) == timesteps
    # Theirs is a product of a thousand float32 numbers.
    np.testing.assert_allclose(table, scheduler.alphas_cumprod.double().numpy(), rtol=1e-4, atol=1e-6)
    clean, noise = normal(SHAPE, "clean"), normal(SHAPE, "noise")
    torch.testing.assert_close(
        settings.add_noise(clean, noise, TIMES), scheduler.add_noise(clean, noise, TIMES.long()), rtol=0, atol=1e-5
    )


@EVERY
def test_the_loss_is_the_squared_error_of_what_the_network_is_asked_for(prediction: Prediction):
    from diffusers import DDPMScheduler

    settings = Diffusion(prediction=prediction)
    clean, noise = normal(SHAPE, "clean"), normal(SHAPE, "noise")
    wanted = (
        noise
        if prediction is Prediction.epsilon
        else theirs(DDPMScheduler, settings).get_velocity(clean, noise, TIMES.long())
    )
    torch.testing.assert_close(settings.losses(wanted, clean, noise, TIMES), torch.zeros(6), rtol=0, atol=1e-9)
    torch.testing.assert_close(settings.losses(wanted + 2, clean, noise, TIMES), torch.full((6,), 4.0))
    left = torch.zeros(6, 1, 5, 3)
    left[..., :1] = 1
    torch.testing.assert_close(settings.losses(wanted + 2, clean, noise, TIMES, left), torch.full((6,), 4 / 3))


@EVERY
def test_min_snr_caps_the_weight_of_early_times(prediction: Prediction):
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    plain, capped = Diffusion(prediction=prediction), Diffusion(prediction=prediction, min_snr=5.0)
    clean, noise, out = (normal(SHAPE, name) for name in ("clean", "noise", "out"))
    snr = compute_snr(theirs(DDPMScheduler, plain), TIMES.long())
    weight = snr.clamp(max=5) / (snr if prediction is Prediction.epsilon else snr + 1)
    torch.testing.assert_close(
        capped.losses(out, clean, noise, TIMES), weight * plain.losses(out, clean, noise, TIMES), rtol=1e-4, atol=0
    )
    assert capped.unweighted() == plain
    assert weight[0] < 0.01 or prediction is Prediction.v_prediction


def test_every_timestep_is_as_likely_as_any_other():
    settings = Diffusion(timesteps=500)
    seen = Counter(settings.quantile_to_time((i + 0.5) / 5000, 3.0) for i in range(5000))
    assert seen == dict.fromkeys(map(float, range(500)), 10)
    assert settings.quantile_to_time(1 - 2**-60, 1.0) == 499


@EVERY
@pytest.mark.parametrize("steps", [1, 7, 25, 400])
def test_sampling_equals_the_ddim_schedulers(prediction: Prediction, steps: int):
    from diffusers import DDIMScheduler

    settings = Diffusion(prediction=prediction, timesteps=900)
    scheduler = theirs(DDIMScheduler, settings, steps_offset=1, set_alpha_to_one=False)
    scheduler.set_timesteps(steps)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.roll(1, -1) + t.view(-1, 1, 1, 1) / 900)

    noise = normal((2, 4, 6, 3), "noise")
    expected, seen = noise, []
    for time in scheduler.timesteps:
        expected = scheduler.step(network(expected, torch.full((2,), time.item())), time, expected).prev_sample
    found = settings.sample(lambda x, t: seen.append(t[0].item()) or network(x, t), noise, steps, 1.0)
    assert seen == scheduler.timesteps.tolist()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@EVERY
def test_a_perfect_network_leads_from_noise_to_the_picture(prediction: Prediction):
    clean, settings = normal((1, 4, 6, 3), "clean").double(), Diffusion(prediction=prediction, schedule=Schedule.linear)
    table = alphas_cumprod(settings.schedule, settings.beta_start, settings.beta_end, 1000)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        signal = table[int(t)]
        noise = (x - signal**0.5 * clean) / (1 - signal) ** 0.5
        return noise if prediction is Prediction.epsilon else signal**0.5 * noise - (1 - signal) ** 0.5 * clean

    drawn = settings.sample(network, normal((1, 4, 6, 3), "noise").double(), 10, 1.0)
    # What is left is the noise of the first timestep.
    assert (drawn - clean).abs().max() < 4 * (1 - table[0]) ** 0.5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"timesteps": 1}, "model.objective.timesteps=1 "),
        ({"beta_start": 0.0}, "model.objective.beta_start=0 "),
        ({"beta_start": 0.02, "beta_end": 0.01}, "beta_end=0.01 "),
        ({"min_snr": 0.0}, "model.objective.min_snr=0 "),
    ],
)
def test_settings_without_sense_are_refused(settings: dict, said: str):
    with pytest.raises(UsageError, match=said):
        Diffusion(**settings)


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(UsageError, match="type sample.steps=500"):
        Diffusion(timesteps=500).check_sample_steps(501)
