"""Inversion: the way up visits the levels of the sampler, and comes back to the data."""

import math

import pytest
import torch

from tests.oracles.gaussian import COVARIANCE, MEAN, best_denoiser, whitened
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig, Process
from unclip_pl.diffusion.samplers import (
    ddim,
    invert,
    invert_implicit,
)


def start(size=2):
    return Noise(range(size))((3, 4, 4))


def two_peaks(process):
    """eps from the best denoiser of pixels from N(+-0.6, 0.2^2), which is not linear."""

    def denoise(x, t):
        a = process.schedule.alphas_cumprod[t[0]].item()
        variance = a * 0.2**2 + 1 - a
        peak = 0.6 * torch.tanh(0.6 * a**0.5 / variance * x)
        x0 = (a**0.5 * 0.2**2 * x + (1 - a) * peak) / variance
        return process.x0_to_eps(x0, x, t)

    return denoise


def round_trip_error(name, steps):
    process = Process(DiffusionConfig(variance="fixed_small", schedule=name))
    schedule = process.schedule.respaced(steps)
    predict = process.adapt(two_peaks(process), schedule)
    signs = torch.randint(0, 2, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = 0.6 * signs + 0.2 * start()
    latent = invert(predict, x, schedule)
    return (ddim(predict, latent, schedule) - x).square().mean().sqrt().item()


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_the_error_of_an_inversion_round_trip_falls_with_the_steps(name):
    errors = [round_trip_error(name, steps) for steps in (25, 100, 500)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02, errors


def test_inversion_of_gaussian_data_comes_near_the_exact_flow_and_back():
    """For a Gaussian the probability flow maps (x - m) / std of the data to that of the noise."""
    process = Process(DiffusionConfig(parametrization="x0", variance="fixed_small"))
    x = MEAN + whitened(200) @ torch.linalg.cholesky(COVARIANCE).T
    errors = []
    for steps in (50, 200, 1000):
        schedule = process.schedule.respaced(steps)
        latent = invert(best_denoiser(process), x, schedule)
        errors.append((ddim(best_denoiser(process), latent, schedule) - x).abs().max().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01, errors
    values, vectors = torch.linalg.eigh(COVARIANCE)
    whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    torch.testing.assert_close(latent, (x - MEAN) @ whiten, atol=0.02, rtol=0)


@pytest.mark.parametrize("steps", [8, 10, 30])
def test_implicit_inversion_solves_the_step_down(steps):
    """Enough rounds make the way back exact for any number of steps; one is better than none."""
    process = Process(DiffusionConfig(parametrization="v", variance="fixed_small"))
    schedule = process.schedule.respaced(steps)
    predict = process.adapt(lambda x, t: 0.8 * torch.sin(2 * x) - 0.3, schedule)
    x = 0.5 * start()

    def error(inversion, **options):
        latent = inversion(predict, x, schedule, **options)
        return float((ddim(predict, latent, schedule) - x).abs().max())

    assert error(invert_implicit, rounds=60) < 1e-4
    assert error(invert_implicit) < 0.7 * error(invert)


def test_implicit_inversion_asks_as_often_as_the_explicit_one():
    process = Process(DiffusionConfig(variance="fixed_small"))
    schedule, seen = process.schedule.respaced(5), []

    def predict(x, t):
        seen.append(int(t[0]))
        return process.adapt(lambda x, t: 0.1 * x, schedule)(x, t)

    invert_implicit(predict, start(), schedule)
    assert seen == [0, 0, 250, 500, 749, 999]


def test_inversion_and_sampling_visit_the_same_timesteps():
    process = Process(DiffusionConfig(variance="fixed_small"))
    schedule = process.schedule.respaced(5)
    seen = []

    def predict(x, t):
        seen.append(int(t[0]))
        return process.adapt(lambda x, t: 0.1 * x, schedule)(x, t)

    ddim(predict, start(), schedule)
    invert(predict, start(), schedule)
    assert seen == [999, 749, 500, 250, 0, 0, 0, 250, 500, 749]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_implicit_inversion_of_very_few_steps_stays_finite(steps):
    process = Process(DiffusionConfig(parametrization="v", variance="fixed_small"))
    predict = process.adapt(lambda x, t: -0.5 * x)
    latent = invert_implicit(predict, 0.5 * start(), process.schedule.respaced(steps))
    assert latent.abs().max() < 10


@pytest.mark.parametrize("steps", [25, 50])
def test_what_a_network_of_x0_misses_stays_small_where_inversion_starts_at_some_noise(steps):
    """It takes what it misses for noise: at the lowest level 150 times as much."""
    process = Process(DiffusionConfig(parametrization="x0", variance="fixed_small"))
    schedule = process.schedule.respaced(steps)
    exact = best_denoiser(process)

    def shrinking(x, t):
        x0 = 0.8 * exact(x, t).x0
        return exact(x, t)._replace(x0=x0, eps=process.x0_to_eps(x0, x, t))

    x = MEAN + whitened(200) @ torch.linalg.cholesky(COVARIANCE).T
    size = {}
    for min_sigma in (0.0, 0.1):
        latent = invert_implicit(shrinking, x, schedule, min_sigma=min_sigma)
        size[min_sigma] = latent.square().mean().sqrt().item()
    assert size[0.0] > 2.5 and size[0.1] < 1.5, size


def test_without_a_least_noise_inversion_starts_at_the_lowest_level():
    process = Process(DiffusionConfig(parametrization="v", variance="fixed_small"))
    schedule = process.schedule.respaced(10)
    predict = process.adapt(lambda x, t: -0.5 * x)
    lowest = math.sqrt(1 - schedule.alphas_cumprod[0])
    steps = {}
    for min_sigma in (0.0, lowest / 2, 0.1, 1.0):
        levels = []
        callback = lambda step, total, levels=levels: levels.append(step)
        invert_implicit(predict, start(), schedule, callback=callback, min_sigma=min_sigma)
        steps[min_sigma] = len(levels)
    assert list(steps.values()) == [10, 10, 8, 0]  # those above the level that x is taken for
