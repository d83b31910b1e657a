"""L_simple, and L_hybrid = L_simple + lambda L_vlb (IDDPM, Nichol and Dhariwal 2021, section 3.1).

Per sample, in float32; L_vlb is in bits per dimension.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from unclip_pl.diffusion.process import Process

HALF_BIN = 1 / 255
"""Half of one of the 256 grey levels in [-1, 1]."""
VLB_WEIGHT = 0.001
"""lambda of L_hybrid."""
GAP_BOUND = 1e3
"""Means further apart than this count as this far apart, which keeps the KL divergence finite."""


class Losses(NamedTuple):
    """The parts of a loss, (B,) each."""

    loss: Tensor
    """What to minimise."""
    mse: Tensor
    """The squared error of the output, not weighted."""
    vb: Tensor | None
    """The term of L_vlb at t in bits per dimension; None where the variance is fixed."""


def training_losses(
    output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, process: Process
) -> Losses:
    """L_simple, weighted by `process.loss_weights`; with a learned variance L_hybrid.

    The one t that was drawn stands for the T terms of L_vlb. Only the variance learns from vb,
    because the mean is detached. For a finite or infinite output the loss is never NaN if the
    process has a `variance_bound`, which limits v, as GAP_BOUND limits the distance of the means.

    Args:
        output: the raw output (B, C or 2C, ...).
        x0: the clean sample (B, C, ...); in [-1, 1] with a learned variance, because the term of
            t = 0 counts 256 grey levels.
        x_t: the noisy sample (B, C, ...).
        t: (B,) int64, the timesteps of x_t.
        noise: the noise in x_t (B, C, ...).
        process: has the target and the weights.

    Raises:
        ValueError: the output has other channels than the process needs.
    """
    predicted, v = process.split(output, x_t)
    mse = _mean((predicted - process.target(x0.float(), t, noise.float())).square())
    loss = process.loss_weights[t] * mse
    if v is None:
        return Losses(loss, mse, None)
    vb = _vlb_term(predicted.detach(), v, x0.float(), x_t.float(), t, process)
    return Losses(loss + VLB_WEIGHT * process.config.timesteps * vb, mse, vb)


def _vlb_term(
    predicted: Tensor, v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, process: Process
) -> Tensor:
    """One term of L_vlb, (B,) in bits per dimension.

    KL(q(x_{t-1} | x_t, x_0) || p) for t > 0, -log p(x_0 | x_1) for t = 0. Both means have the same
    share of x_t, so they differ by weight_x0 (x0_hat - x0).
    """
    column = (-1,) + (1,) * (x_t.ndim - 1)
    weight_x0 = process.posterior_x0_weight[t].view(column)
    true_log_var = process.log_variances[t, 0].view(column)
    gap = (weight_x0 * (process.to_x0(predicted, x_t, t) - x0)).clamp(-GAP_BOUND, GAP_BOUND)
    log_var = process.log_variance(v, t, x_t.ndim)
    nats = torch.where(
        t.view(column) == 0,
        discretised_nll(x0, x0 + gap, log_var),
        gaussian_kl(gap, true_log_var, log_var),
    )
    return _mean(nats) / math.log(2)


def gaussian_kl(gap: Tensor, log_var1: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(m1, e^log_var1) || N(m2, e^log_var2)) in nats, elementwise, for gap = m2 - m1."""
    return 0.5 * (
        -1 + log_var2 - log_var1 + (log_var1 - log_var2).exp() + gap.square() * (-log_var2).exp()
    )


def discretised_nll(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """-log of the mass that N(mean, e^log_var) has in the bin of x (DDPM section 3.3).

    In nats, elementwise. x is in [-1, 1] on 256 levels; the outermost bins are open. The normal
    distribution function is the tanh approximation, and probabilities are at least 1e-12.
    """
    inverse_std = (-0.5 * log_var).exp()
    above = _normal_cdf((x - mean + HALF_BIN) * inverse_std)
    below = _normal_cdf((x - mean - HALF_BIN) * inverse_std)
    mass = above - below
    mass = torch.where(x > 0.999, 1 - below, mass)
    mass = torch.where(x < -0.999, above, mass)
    return -mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _mean(x: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return x.flatten(1).mean(1)
