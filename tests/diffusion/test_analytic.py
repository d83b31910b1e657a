"""The analytic variance against the closed form of Gaussian data: its reverse steps are exact, so
that a few of them keep the covariance.
"""

import pytest
import torch

from unclip_pl.diffusion.analytic import ErrorByTimestep, analytic_variance, with_analytic_variance
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig, Process
from unclip_pl.diffusion.samplers import ddpm

STD = 0.7
PROCESS = Process(DiffusionConfig(parametrization="x0", variance="fixed_small"))
ABAR = PROCESS.schedule.alphas_cumprod
EXACT = STD**2 * (1 - ABAR) / (ABAR * STD**2 + 1 - ABAR)  # Var(x_0 | x_t) of N(0, STD^2)


def optimal(x, t):
    """E(x_0 | x_t)"""
    abar = ABAR[t].view(-1, *[1] * (x.ndim - 1))
    return (abar.sqrt() * STD**2 / (abar * STD**2 + 1 - abar) * x.double()).float()


@pytest.mark.parametrize("steps", [2, 5, 64])
def test_variance_is_that_of_the_true_reverse_step(steps):
    """For Gaussian data x_s given x_r is Gaussian, and Bayes' rule gives its variance."""
    schedule = PROCESS.schedule.respaced(steps)
    r, s = schedule.alphas_cumprod[1:], schedule.alphas_cumprod[:-1]
    at_r, at_s = r * STD**2 + 1 - r, s * STD**2 + 1 - s
    exact = at_s - (r / s) * at_s.square() / at_r
    torch.testing.assert_close(analytic_variance(schedule, EXACT)[1:], exact, rtol=1e-9, atol=0)


def test_it_is_the_form_of_analytic_dpm():
    """lambda^2 + (sqrt((1-abar_r)/a) - sqrt(1-abar_s-lambda^2))^2 (1 - E|eps|^2/d).

    Bao et al. 2022, theorem 1, with eps of the optimal prediction.
    """
    schedule = PROCESS.schedule.respaced(20)
    r, s = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    lam2, ratio = schedule.posterior_variance, r / s
    second_moment = (1 - r) / (r * STD**2 + 1 - r)  # of eps given x_t: linear in x_t
    theirs = lam2 + (((1 - r) / ratio).sqrt() - (1 - s - lam2).sqrt()).square() * (
        1 - second_moment
    )
    torch.testing.assert_close(
        analytic_variance(schedule, EXACT)[1:], theirs[1:], rtol=1e-6, atol=1e-12
    )


def test_few_steps_keep_the_spread_of_the_data_and_the_small_variance_does_not():
    schedule = PROCESS.schedule.respaced(6)
    predict = PROCESS.adapt(optimal, schedule)
    drawn = {}
    for name, choice in {
        "analytic": with_analytic_variance(predict, schedule, EXACT.float()),
        "small": predict,
    }.items():
        noise = Noise([1, 2])
        drawn[name] = float(ddpm(choice, noise((20_000,)), schedule, noise=noise).std())
    assert abs(drawn["analytic"] - STD) < 0.01
    assert drawn["small"] < STD - 0.05


def test_error_is_estimated_at_every_timestep():
    torch.manual_seed(0)
    errors = ErrorByTimestep(1000, 10)
    while errors.next < errors.total:
        x0 = STD * torch.randn(70, 64)
        t = errors.timesteps(70)
        assert t.max() - t.min() > 500  # all levels of noise in each batch
        errors.add(t, x0, optimal(PROCESS.diffuse(x0, t, torch.randn(70, 64)), t))
    assert errors.counts.min() >= 10
    assert ((errors.mean() / EXACT).log().abs() < 0.35).all() and abs(
        (errors.mean() / EXACT).mean() - 1
    ) < 0.01
    with pytest.raises(ValueError, match=r"at least 1 draw"):
        ErrorByTimestep(1000, 0)
