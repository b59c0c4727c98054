"""Losses, weights of times, and noise of the objectives, each compared with the formula of its source."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trainer.core.errors import UsageError
from trainer.core.rng import normal, uniform
from trainer.objective import Diffusion, Flow, HuberSchedule, Loss, TimeDistribution, Weighting, denoising_losses
from trainer.objective.diffusion import alphas_cumprod

FLOW_TIMES = torch.tensor([0.002, 0.3, 0.9])
TIMESTEPS = torch.tensor([1.0, 400.0, 990.0])


def losses(objective: Any, error: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Returns the losses of a prediction that misses its target by `error`."""
    latents, noise = normal(tuple(error.shape), "latents"), normal(tuple(error.shape), "noise")
    prediction = objective.target(latents, noise, t) + error
    return denoising_losses(objective, lambda *_: prediction, latents, noise, t, {})


@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap", "none"])
def test_weights_of_flow_times_are_those_of_diffusers(weighting: str):
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    expected = compute_loss_weighting_for_sd3(weighting, FLOW_TIMES) * torch.ones(3)
    flow = Flow(weighting=Weighting[weighting])
    torch.testing.assert_close(losses(flow, torch.ones(3, 2, 4, 4), FLOW_TIMES), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses(flow.unweighted(), torch.ones(3, 2, 4, 4), FLOW_TIMES), torch.ones(3))


def test_the_weight_of_clean_latents_is_finite():
    weights = Flow(weighting=Weighting.sigma_sqrt).weight_by_time(torch.ones(2), torch.tensor([0.0, 1e-3]))
    assert weights.tolist() == pytest.approx([1e6, 1e6])


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 1.75])
def test_mode_times_are_distributed_as_those_of_diffusers(scale: float):
    from diffusers.training_utils import compute_density_for_timestep_sampling

    torch.manual_seed(0)
    drawn = compute_density_for_timestep_sampling("mode", 200_000, mode_scale=scale).sort().values
    flow = Flow(times=TimeDistribution.mode, mode_scale=scale)
    quantiles = [0.01, 0.1, 0.3, 0.5, 0.8, 0.99]
    found = [flow.quantile_to_time(quantile, 1.0) for quantile in quantiles]
    assert found == pytest.approx([drawn[int(quantile * 200_000)].item() for quantile in quantiles], abs=5e-3)
    t = flow.quantile_to_time(0.3, 1.0)
    assert flow.quantile_to_time(0.3, 3.0) == pytest.approx(3 * t / (1 + 2 * t))


def thresholds(objective: Flow | Diffusion, t: torch.Tensor, c: float) -> list[float]:
    """The Huber thresholds of kohya's sd-scripts, computed from its formulas in Python floats."""
    if objective.huber_schedule is HuberSchedule.constant:
        return [c] * len(t)
    if objective.huber_schedule is HuberSchedule.exponential:
        steps = t.tolist() if isinstance(objective, Diffusion) else [1000 * time for time in t.tolist()]
        return [math.exp(math.log(c) / 1000 * step) for step in steps]
    if isinstance(objective, Diffusion):
        table = alphas_cumprod(objective.schedule, objective.beta_start, objective.beta_end, 1000)
        sigmas = [math.sqrt((1 - table[int(step)]) / table[int(step)]) for step in t.tolist()]
    else:
        sigmas = [time / (1 - time) for time in t.tolist()]
    return [(1 - c) / (1 + sigma) ** 2 + c for sigma in sigmas]


@pytest.mark.parametrize("kind", [Flow, Diffusion])
@pytest.mark.parametrize("schedule", list(HuberSchedule))
def test_huber_losses_are_those_of_kohyas_scripts(kind: type[Flow] | type[Diffusion], schedule: HuberSchedule):
    t = FLOW_TIMES if kind is Flow else TIMESTEPS
    error = 3 * normal((3, 2, 4, 4), "error")
    for loss in (Loss.huber, Loss.smooth_l1):
        objective = kind(loss=loss, huber_c=0.2, huber_schedule=schedule)
        expected = []
        for row, c in zip(error.flatten(1).tolist(), thresholds(objective, t, 0.2), strict=True):
            factor = 2 * c if loss is Loss.huber else 2
            expected.append(sum(factor * (math.sqrt(e**2 + c**2) - c) for e in row) / len(row))
        assert losses(objective, error, t).tolist() == pytest.approx(expected, rel=1e-4)
        plain = losses(objective.unweighted(), error, t)
        torch.testing.assert_close(plain, error.square().flatten(1).mean(1), rtol=1e-4, atol=0)


def test_noise_offset_adds_a_constant_to_each_channel():
    shape = (64, 24, 24)
    plain, shifted = Flow().draw_noise(shape, 1, "noise"), Flow(noise_offset=0.5).draw_noise(shape, 1, "noise")
    difference = shifted - plain
    torch.testing.assert_close(difference, difference[:, :1, :1].expand(shape))
    assert difference[:, 0, 0].std().item() == pytest.approx(0.5, rel=0.3)
    assert torch.equal(plain, normal(shape, 1, "noise"))
    assert torch.equal(shifted, Flow(noise_offset=0.5).draw_noise(shape, 1, "noise"))


def test_pyramid_noise_is_that_of_kohyas_scripts():
    """`pyramid_noise_like` for one sample, with the same random numbers."""
    names, discount, iterations, (channels, height, width) = (0, "noise", "a"), 0.4, 6, (4, 24, 16)
    noise = normal((channels, height, width), *names)[None]
    resize = torch.nn.Upsample(size=(height, width), mode="bilinear")
    for i in range(iterations):
        r = uniform(*names, "pyramid factor", i) * 2 + 2
        low_height, low_width = max(1, int(height / (r**i))), max(1, int(width / (r**i)))
        noise = noise + resize(normal((channels, low_height, low_width), *names, "pyramid", i)[None]) * discount**i
        if low_height == 1 or low_width == 1:
            break
    objective = Diffusion(multires_noise_iterations=iterations, multires_noise_discount=discount)
    found = objective.draw_noise((channels, height, width), *names)
    torch.testing.assert_close(found, (noise / noise.std())[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": Loss.huber, "huber_c": 0.0}, "huber_c=0 .* type a number above 0"),
        ({"huber_c": 0.2}, "huber_c has no effect .* type model.objective.loss=huber"),
        ({"huber_schedule": HuberSchedule.constant}, "huber_schedule has no effect"),
        ({"noise_offset": -0.1}, "noise_offset=-0.1 .* type a number above 0"),
        ({"multires_noise_iterations": -1}, "multires_noise_iterations=-1 "),
        ({"multires_noise_iterations": 6, "multires_noise_discount": 1.5}, "multires_noise_discount=1.5 "),
        ({"multires_noise_discount": 0.4}, "type model.objective.multires_noise_iterations=6"),
        ({"noise_offset": 0.1, "multires_noise_iterations": 6}, "leave one of them out"),
        ({"mode_scale": 2.0}, "mode_scale=2 .* -1 to 1.75"),
        ({"times": TimeDistribution.uniform, "mode_scale": 0.5}, "type model.objective.times=mode"),
    ],
)
def test_impossible_options_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        Flow(**settings)


def test_pyramid_noise_needs_more_than_one_latent_pixel():
    with pytest.raises(UsageError, match=r"1x1 .* dataset\.resolution"):
        Flow(multires_noise_iterations=6).check_latents(1, 1)
    Flow(multires_noise_iterations=6).check_latents(2, 2)
    Flow().check_latents(1, 1)
