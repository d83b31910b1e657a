"""Samplers draw Gaussian data with the right mean and covariance from its exact denoiser."""

import pytest
import torch

from tests.oracles.gaussian import COVARIANCE, MEAN, best_denoiser, whitened
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig, Process
from unclip_pl.diffusion.samplers import (
    SAMPLERS,
    ddpm,
)


class OneStream(Noise):
    """Thousands of generators would be slow: one stream for the batch is enough for moments."""

    def __init__(self):
        super().__init__([1])

    def like(self, x):
        return self(x.shape)[0]


def even_in_log_snr(schedule, steps):
    """Positions of a schedule that are about evenly spaced in log SNR."""
    abar = schedule.alphas_cumprod
    log_snr = (abar / (1 - abar)).log()
    even = torch.linspace(log_snr[0], log_snr[-1], steps, dtype=torch.float64)
    return schedule.at(sorted({int((log_snr - value).abs().argmin()) for value in even}))


def moments_error(name, eta, schedule, steps, size):
    """Largest error of the mean and of the covariance of what is drawn."""
    config = DiffusionConfig(schedule=schedule, parametrization="x0", variance="fixed_small")
    process = Process(config)
    if steps == "even log SNR":
        respaced = even_in_log_snr(process.schedule, 20)
    else:
        respaced = process.schedule.respaced(steps)
    predict = best_denoiser(process)
    drawn = SAMPLERS[name](predict, whitened(size), respaced, noise=OneStream(), eta=eta)
    mean_error, covariance_error = drawn.mean(0) - MEAN, drawn.T.cov() - COVARIANCE
    return mean_error.abs().max().item(), covariance_error.abs().max().item()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("name, steps", [("ddim", 500), ("dpm_solver_pp", 200)])
def test_deterministic_samplers_draw_the_gaussian_they_were_given(name, steps, schedule):
    mean, covariance = moments_error(name, 0.0, schedule, steps, size=500)
    assert mean < 0.005 and covariance < 0.008


@pytest.mark.parametrize("name, eta", [("ddpm", 0.0), ("ddim", 1.0), ("ddim", 0.5)])
def test_stochastic_samplers_draw_the_gaussian_they_were_given(name, eta):
    mean, covariance = moments_error(name, eta, "cosine", 1000, size=8000)
    assert mean < 0.03 and covariance < 0.03  # four standard deviations of the scatter


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_dpm_solver_is_nearer_than_ddim_where_steps_are_even_in_log_snr(schedule):
    """Even timesteps would end in a step many times as long as the one before it, where
    extrapolation does not help (nor does it in diffusers)."""
    errors = {
        name: moments_error(name, 0.0, schedule, "even log SNR", 200)[1]
        for name in ("ddim", "dpm_solver_pp")
    }
    assert errors["dpm_solver_pp"] < 0.5 * errors["ddim"], errors


def test_ddpm_uses_the_variance_that_it_is_told():
    """With Var[x_{t-1} | x_t] as log_var 20 steps keep the variance of Gaussian data; with btilde
    or beta they do not."""
    process = Process(DiffusionConfig(parametrization="x0", variance="fixed_small"))
    steps = process.schedule.respaced(20)
    x = whitened(8000)
    variances = COVARIANCE.diagonal()
    predict = best_denoiser(process, steps, true_variance=True)
    right = ddpm(predict, x, steps, noise=OneStream()).var(0)
    torch.testing.assert_close(right, variances, rtol=0.06, atol=0)

    def fixed(table):
        def predict(x, t):
            position = int((steps.timesteps == t[0]).nonzero())
            return best_denoiser(process)(x, t)._replace(log_var=table[position].float())

        return ddpm(predict, x, steps, noise=OneStream()).var(0)

    assert (fixed(steps.posterior_log_variance) < 0.9 * variances).all()
    assert (fixed(steps.betas.log()) > right).all()
