"""The samplers DDPM, DDIM and DPM-Solver++(2M), with one signature, and DDIM's inversion.

DDPM: Ho et al. 2020. DDIM and its inversion: Song et al. 2021. DPM-Solver++: Lu et al. 2022.

Position i of the (respaced) schedule has the level abar[i] and the original timestep timesteps[i];
position -1 is the clean sample, with abar 1. Coefficients are Python floats from float64 tables, so
that nothing in a loop waits for the device.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import Predict
from unclip_pl.diffusion.schedule import Schedule

Callback = Callable[[int, int], None]
"""Called with (steps done, steps) after each step."""
Sampler = Callable[..., Tensor]
"""A function with the signature of `ddpm`."""


@torch.no_grad()
def ddpm(
    predict: Predict,
    x: Tensor,
    schedule: Schedule,
    *,
    noise: Noise | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling with the variance of the Prediction (DDPM algorithm 2).

    The last step adds no noise.

    Args:
        predict: (x, t) -> Prediction. Its log_var must be that of these steps:
            `process.adapt(net, schedule)`.
        x: (B, ...) float32 standard normal.
        schedule: the steps.
        noise: one generator per sample.
        eta: not used.
        callback: to watch x or x0 too, wrap `predict`.

    Returns:
        the sample, shaped as x.

    Raises:
        ValueError: there is no `noise`.
    """
    noise = _required(noise, "ddpm")
    weight_x0 = schedule.posterior_x0_weight.tolist()
    weight_xt = schedule.posterior_xt_weight.tolist()
    for i, t in _down(schedule, x):
        prediction = predict(x, t)
        x = weight_x0[i] * prediction.x0 + weight_xt[i] * x
        if i > 0:
            x = x + (0.5 * prediction.log_var).exp() * noise.like(x)
        _report(callback, len(schedule) - i, schedule)
    return x


@torch.no_grad()
def ddim(
    predict: Predict,
    x: Tensor,
    schedule: Schedule,
    *,
    noise: Noise | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (eq. 12). The last step adds no noise, and log_var is not used.

    Arguments as in `ddpm`. eta: 0 is deterministic and needs no `noise`; 1 has the variance btilde
    of DDPM.
    """
    noise = _required(noise, "ddim with eta > 0") if eta > 0 else noise
    abar, abar_prev = schedule.alphas_cumprod.tolist(), schedule.alphas_cumprod_prev.tolist()
    for i, t in _down(schedule, x):
        prediction = predict(x, t)
        btilde = (1 - abar_prev[i]) / (1 - abar[i]) * (1 - abar[i] / abar_prev[i])
        sigma = eta * math.sqrt(btilde)
        weight_eps = math.sqrt(max(1 - abar_prev[i] - sigma**2, 0.0))
        x = math.sqrt(abar_prev[i]) * prediction.x0 + weight_eps * prediction.eps
        if noise is not None and sigma > 0:
            x = x + sigma * noise.like(x)
        _report(callback, len(schedule) - i, schedule)
    return x


@torch.no_grad()
def dpm_solver_pp(
    predict: Predict,
    x: Tensor,
    schedule: Schedule,
    *,
    noise: Noise | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M), algorithm 2: second order, from the x0 of two steps.

    The first and the last step are of first order. Arguments as in `ddpm`; the sampler is
    deterministic and does not use `noise` and `eta`.
    """
    levels = [(math.sqrt(a), math.sqrt(1 - a)) for a in schedule.alphas_cumprod.tolist()]
    lam = [math.log(alpha / sigma) for alpha, sigma in levels]
    previous, h_previous = None, math.inf
    for i, t in _down(schedule, x):
        prediction = predict(x, t)
        if i == 0:
            x = prediction.x0
        else:
            (alpha, sigma), h = levels[i - 1], lam[i - 1] - lam[i]
            x0 = prediction.x0
            if previous is not None:
                slope = 0.5 * h / h_previous
                x0 = (1 + slope) * x0 - slope * previous
            x = sigma / levels[i][1] * x - alpha * math.expm1(-h) * x0
            previous, h_previous = prediction.x0, h
        _report(callback, len(schedule) - i, schedule)
    return x


@torch.no_grad()
def invert(
    predict: Predict,
    x: Tensor,
    schedule: Schedule,
    *,
    callback: Callback | None = None,
) -> Tensor:
    """The x_T from which `ddim` with eta 0 on the same schedule draws x again (ADM appendix F).

    Approximate: better with more steps. It goes up through the sampler's own levels,
    -1 -> 0 -> ... -> K-1, each time with the eps of the level that it leaves (that of level 0 for
    the clean sample), and ends where the sampler starts.

    Arguments as in `ddpm`: x (B, ...) is clean, and `predict` should not be thresholded.
    """
    times = list(_down(schedule, x))[::-1]
    abar, abar_prev = schedule.alphas_cumprod.tolist(), schedule.alphas_cumprod_prev.tolist()
    for i in range(len(schedule)):
        prediction = predict(x, times[max(i - 1, 0)][1])
        x0 = (x - math.sqrt(1 - abar_prev[i]) * prediction.eps) / math.sqrt(abar_prev[i])
        x = math.sqrt(abar[i]) * x0 + math.sqrt(1 - abar[i]) * prediction.eps
        _report(callback, i + 1, schedule)
    return x


@torch.no_grad()
def invert_implicit(
    predict: Predict,
    x: Tensor,
    schedule: Schedule,
    *,
    callback: Callback | None = None,
    rounds: int = 1,
    min_sigma: float = 0.0,
) -> Tensor:
    """Find the same x_T as `invert`, far more exactly, with about as many calls of `predict`.

    Each level solves the step that `ddim` takes down from it.

    DDIM with eta 0 turns x_i by the angle delta between the levels:
    x_{i-1} = cos(delta) x_i - sin(delta) v(x_i), with v = alpha eps - sigma x_0. So
    x_i = (x_{i-1} + sin(delta) v(x_i)) / cos(delta), which is iterated, starting from the v of the
    level below. This is fixed-point inversion (Pan et al. 2023) in the angle of Salimans and Ho
    (2022). In that angle it also contracts at the last, almost pure levels of noise, which it does
    not in terms of eps.

    Args:
        predict: (x, t) -> Prediction, which should not be thresholded.
        x: (B, ...) float32, the clean sample.
        schedule: the K steps of the sampler that will draw x again.
        callback: called with (step, steps) after each level.
        rounds: iterations per level. `predict` is called at most K rounds + 1 times.
        min_sigma: the noise sqrt(1 - abar) of the level at which the way up starts, 0 to 1; x is
            taken for a sample of the first level that has as much. A network that predicts x0
            needs it: its eps is the error of x0 divided by sigma, too large where sigma is small.
    """
    times = list(_down(schedule, x))[::-1]
    angles = [math.atan2(math.sqrt(1 - a), math.sqrt(a)) for a in schedule.alphas_cumprod.tolist()]

    def velocity(x: Tensor, i: int) -> Tensor:
        prediction = predict(x, times[i][1])
        return math.cos(angles[i]) * prediction.eps - math.sin(angles[i]) * prediction.x0

    noisy = (i for i, angle in enumerate(angles) if math.sin(angle) >= min_sigma)
    start = next(noisy, len(angles) - 1)
    v, below = velocity(x, start), angles[start] if start else 0.0
    for i in range(start + 1 if start else 0, len(angles)):
        angle = angles[i]
        cos, sin = math.cos(angle - below), math.sin(angle - below)
        above = cos * x + sin * v
        for _ in range(rounds):
            v = velocity(above, i)
            if sin < cos:  # longer steps diverge
                above = (x + sin * v) / cos
        x, below = above, angle
        _report(callback, i + 1, schedule)
    return x


SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim, "dpm_solver_pp": dpm_solver_pp}


def _down(schedule: Schedule, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(position, original timesteps (B,)) from the noisiest position to 0."""
    timesteps = schedule.timesteps.tolist()
    for i in reversed(range(len(timesteps))):
        yield i, torch.full((len(x),), timesteps[i], dtype=torch.int64, device=x.device)


def _report(callback: Callback | None, done: int, schedule: Schedule) -> None:
    if callback is not None:
        callback(done, len(schedule))


def _required(noise: Noise | None, who: str) -> Noise:
    if noise is None:
        raise ValueError(
            f"{who} draws random numbers: pass noise=Noise(seeds) with one seed per sample"
        )
    return noise
