"""L_simple and L_hybrid = L_simple + lambda L_vlb (IDDPM, Nichol and Dhariwal 2021, section 3.1). Per sample, float32, L_vlb in bits per dimension."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from unclip_pl.diffusion.process import Process

HALF_BIN = 1 / 255  # half of one of 256 levels in [-1, 1]
GAP_BOUND = 1e3  # means further apart than this count as this far: keeps the KL finite


class Losses(NamedTuple):
    """What a loss gives for each sample, (B,) each.

    `loss`: what to minimise; `mse`: the squared error of the output, not weighted; `vb`: the term
    of L_vlb at t in bits per dimension, or None.
    """

    loss: Tensor
    mse: Tensor
    vb: Tensor | None


def simple(
    output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, process: Process
) -> Losses:
    """Squared error of the network's raw output (B, C or 2C, ...) against `process.target`, weighted
    by `process.loss_weights`; variance channels are left out.

    x0, x_t, noise (B, C, ...), t int64 (B,). ValueError where the output has other channels than the process needs.
    """
    predicted, _ = process.split(output, x_t)
    mse = _mean(_error(predicted, x0, t, noise, process).square())
    return Losses(process.loss_weights[t] * mse, mse, None)


def hybrid(
    output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    process: Process,
    vlb_weight: float = 0.001,
) -> Losses:
    """weighted mse + vlb_weight * T * vb: the one t that was drawn stands for the T terms of L_vlb; `simple` where the variance is fixed.

    Only the variance learns from vb (the mean is detached). x0 (B, C, ...) in [-1, 1]: the term of t = 0 counts 256 grey levels.
    Never NaN for a finite or infinite output where the process has a `variance_bound`, for v is held
    within it, and the distance of the means within GAP_BOUND.
    """
    if process.config.variance != "learned_range":
        return simple(output, x0, x_t, t, noise, process)
    predicted, v = process.split(output, x_t)
    mse = _mean(_error(predicted, x0, t, noise, process).square())
    vb = _vlb_term(predicted.detach(), v, x0.float(), x_t.float(), t, process)
    loss = process.loss_weights[t] * mse + vlb_weight * process.config.timesteps * vb
    return Losses(loss, mse, vb)


def _error(predicted: Tensor, x0: Tensor, t: Tensor, noise: Tensor, process: Process) -> Tensor:
    return predicted - process.target(x0.float(), t, noise.float())


def _vlb_term(
    predicted: Tensor, v: Tensor | None, x0: Tensor, x_t: Tensor, t: Tensor, process: Process
) -> Tensor:
    """(B,) bits per dimension: KL(q(x_{t-1} | x_t, x_0) || p) for t > 0, -log p(x_0 | x_1) for t = 0.

    Both means have the same share of x_t, so they differ by weight_x0 (x0_hat - x0).
    """
    column = (-1,) + (1,) * (x_t.ndim - 1)
    weight_x0, true_log_var = (
        process.posterior_weights[t, 0].view(column),
        process.log_variances[t, 0].view(column),
    )
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
    """-log of the mass that N(mean, e^log_var) has in the bin of x, in nats, elementwise (DDPM section 3.3).

    x in [-1, 1] on 256 levels; the outermost bins are open. The normal cdf is the tanh approximation; probabilities at least 1e-12.
    """
    inverse_std = (-0.5 * log_var).exp()
    above = _normal_cdf((x - mean + HALF_BIN) * inverse_std)
    below = _normal_cdf((x - mean - HALF_BIN) * inverse_std)
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return -mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _mean(x: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return x.flatten(1).mean(1)
