"""DDPM (Ho et al. 2020), DDIM and its inversion (Song et al. 2021), DPM-Solver++(2M) (Lu et al. 2022) with one signature.

Position i of the (respaced) schedule is the level abar[i], original timestep timesteps[i]; position -1 is the clean sample, abar 1.
Coefficients are Python floats of float64 tables: nothing in a loop waits for the device.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import Predict
from unclip_pl.diffusion.schedule import Schedule

Callback = Callable[[int, int], None]
Sampler = Callable[..., Tensor]


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
    """Ancestral sampling with the variance of the Prediction (DDPM algorithm 2); the last step adds no noise. eta is not used.

    predict(x, t) -> Prediction; x (B, ...) float32 standard normal; noise: one stream a sample. Returns the sample, shaped as x.
    callback(steps done, steps) after each step (to watch x or x0, wrap predict). ValueError without noise. The Prediction's log_var must be that of these
    steps: `process.adapt(net, schedule)`.
    """
    noise = _required(noise, "ddpm")
    weight_x0, weight_xt = (
        schedule.posterior_x0_weight.tolist(),
        schedule.posterior_xt_weight.tolist(),
    )
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
    """DDIM (eq. 12): eta 0 is deterministic, eta 1 has the variance btilde of DDPM. The last step adds no noise; log_var is not used.

    Arguments as for `ddpm`; noise may be None at eta 0.
    """
    noise = _required(noise, "ddim with eta > 0") if eta > 0 else noise
    abar, abar_prev = schedule.alphas_cumprod.tolist(), schedule.alphas_cumprod_prev.tolist()
    for i, t in _down(schedule, x):
        prediction = predict(x, t)
        sigma = eta * math.sqrt((1 - abar_prev[i]) / (1 - abar[i]) * (1 - abar[i] / abar_prev[i]))
        x = (
            math.sqrt(abar_prev[i]) * prediction.x0
            + _root(1 - abar_prev[i] - sigma**2) * prediction.eps
        )
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
    """DPM-Solver++(2M), algorithm 2: second order from the x0 of two steps; the first and the last step are of first order.

    Arguments as for `ddpm`; deterministic: noise and eta are not used.
    """
    levels = [(math.sqrt(a), math.sqrt(1 - a)) for a in schedule.alphas_cumprod.tolist()]
    lam = [math.log(alpha / sigma) for alpha, sigma in levels]
    previous, h_previous = None, math.inf
    for i, t in _down(schedule, x):
        prediction = predict(x, t)
        if i > 0:
            (alpha, sigma), h = levels[i - 1], lam[i - 1] - lam[i]
            slope = 0.0 if previous is None else 0.5 * h / h_previous
            x0 = (
                prediction.x0
                if previous is None
                else (1 + slope) * prediction.x0 - slope * previous
            )
            x = sigma / levels[i][1] * x - alpha * math.expm1(-h) * x0
            previous, h_previous = prediction.x0, h
        else:
            x = prediction.x0
        _report(callback, len(schedule) - i, schedule)
    return x


@torch.no_grad()
def invert(
    predict: Predict,
    x: Tensor,
    schedule: Schedule,
    *,
    noise: Noise | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """The x_T from which `ddim` at eta 0 on the same schedule draws x again, approximately: better with more steps (ADM appendix F).

    x (B, ...) clean. Walks the sampler's own levels upwards, -1 -> 0 -> ... -> K-1, with the eps of the level it leaves (of level 0
    for the clean one) and ends where the sampler starts. Leave thresholding out. noise and eta are not used.
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
    noise: Noise | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
    rounds: int = 1,
) -> Tensor:
    """As `invert`, but each level solves the step that `ddim` takes down from it, by `rounds` fixed-point iterations: as many calls, a far better way back.

    DDIM at eta 0 turns x_i by the angle delta between the levels, x_{i-1} = cos(delta) x_i - sin(delta) v(x_i) with v = alpha eps - sigma x_0, so that
    x_i = (x_{i-1} + sin(delta) v(x_i)) / cos(delta), iterated from the v of the level below (fixed-point inversion: Pan et al. 2023, in the angle of
    Salimans and Ho 2022, where it contracts also at the last, near-pure levels of noise, which it does not for eps). K rounds + 1 calls of `predict`.
    """
    times = list(_down(schedule, x))[::-1]
    angles = [math.atan2(math.sqrt(1 - a), math.sqrt(a)) for a in schedule.alphas_cumprod.tolist()]

    def velocity(x: Tensor, i: int) -> Tensor:
        prediction = predict(x, times[i][1])
        return math.cos(angles[i]) * prediction.eps - math.sin(angles[i]) * prediction.x0

    v, below = velocity(x, 0), 0.0
    for i, angle in enumerate(angles):
        cos, sin = math.cos(angle - below), math.sin(angle - below)
        found = cos * x + sin * v
        for _ in range(rounds):
            v = velocity(found, i)
            if sin < cos:  # else the steps are so long that it diverges
                found = (x + sin * v) / cos
        x, below = found, angle
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
            f"{who} draws random numbers: pass noise=Noise(seeds) with one seed a sample"
        )
    return noise


def _root(value: float) -> float:
    return math.sqrt(max(value, 0.0))
