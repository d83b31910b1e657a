"""What a network's output means: eps, x0 or v, and the learned-range variance.

`Process.adapt` turns the output into a `Prediction` once (DDPM; IDDPM eq. 15; Salimans and Ho
2022), so that samplers know nothing of it. x_t = alpha x_0 + sigma eps with alpha = sqrt(abar_t),
sigma = sqrt(1 - abar_t); t is int64 (B,), an index of the original schedule.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from unclip_pl.diffusion.schedule import SCHEDULES, Schedule


class Prediction(NamedTuple):
    """What samplers know of a network, float32."""

    x0: Tensor
    """The clean sample, shaped as x_t."""
    eps: Tensor
    """The noise, shaped as x_t."""
    log_var: Tensor
    """Log variance of p(x_{t-1} | x_t), broadcastable to x_t."""


Predict = Callable[[Tensor, Tensor], Prediction]
"""(x_t, t) -> Prediction: a denoiser as samplers call it."""
Network = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t) -> raw output, conditions bound."""
Weights = tuple[Tensor, Tensor]


class Parametrization(NamedTuple):
    """What a network predicts, as linear maps; each pair of weights is two tables (T,)."""

    target: Weights
    """The target from (x_0, noise)."""
    x0: Weights
    """x_0 from (x_t, output)."""
    eps: Weights
    """eps from (x_t, output)."""


def _eps(alpha: Tensor, sigma: Tensor) -> Parametrization:
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    return Parametrization(target=(zero, one), x0=(1 / alpha, -sigma / alpha), eps=(zero, one))


def _x0(alpha: Tensor, sigma: Tensor) -> Parametrization:
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    return Parametrization(target=(one, zero), x0=(zero, one), eps=(1 / sigma, -alpha / sigma))


def _v(alpha: Tensor, sigma: Tensor) -> Parametrization:
    return Parametrization(target=(-sigma, alpha), x0=(alpha, -sigma), eps=(sigma, alpha))


PARAMETRIZATIONS: dict[str, Callable[[Tensor, Tensor], Parametrization]] = {
    "eps": _eps,
    "x0": _x0,
    "v": _v,
}
VARIANCES: dict[str, float | None] = {
    "learned_range": None,
    "fixed_small": -1.0,
    "fixed_large": 1.0,
}
"""The constant v that a fixed variance stands for."""


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process of a stage. Defaults are the decoder's (unCLIP Table 3, GLIDE)."""

    schedule: str = "cosine"
    """Noise schedule: cosine or linear."""
    timesteps: int = 1000
    """Number T of timesteps in training."""
    parametrization: str = "eps"
    """What the network predicts: eps (noise), x0 (clean sample) or v (alpha eps - sigma x0)."""
    variance: str = "learned_range"
    """Variance of a reverse step: learned_range (the network has C more channels), fixed_small
    (btilde) or fixed_large (beta)."""
    max_snr: float | None = None
    """Weights the squared error in x_0 by min(SNR, max_snr) + 1, with SNR = abar / (1 - abar). This
    is the weight that v gives it, but limited where little noise is left. null: the error of the
    output itself with weight 1 (L_simple)."""
    variance_bound: float | None = 2.0
    """Keeps |v| of a learned variance below this. At 2, log Sigma leaves [log btilde, log beta] by
    at most half its width. null: v is not limited, as in IDDPM; use it for weights trained
    elsewhere."""

    def __post_init__(self) -> None:
        choices_of: dict[str, Collection[str]] = {
            "schedule": SCHEDULES,
            "parametrization": PARAMETRIZATIONS,
            "variance": VARIANCES,
        }
        for field, choices in choices_of.items():
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"diffusion {field} {getattr(self, field)!r} does not exist: choose one of "
                    f"{', '.join(choices)}"
                )
        if self.variance_bound is not None and not self.variance_bound >= 1:
            raise ValueError(
                f"diffusion variance_bound is {self.variance_bound}: give 1 (Sigma between btilde "
                "and beta) or more, or null for no bound"
            )
        if self.timesteps < 2:
            raise ValueError(f"diffusion timesteps must be at least 2: got {self.timesteps}")
        if self.max_snr is not None and not 0 < self.max_snr < float("inf"):
            raise ValueError(f"diffusion max_snr must be above 0, or null: got {self.max_snr}")
        if self.max_snr is not None and self.parametrization == "eps":
            raise ValueError(
                "diffusion max_snr weights the error in x0, which parametrization eps cannot do at "
                "much noise: use parametrization x0 or v, or max_snr null."
            )


class Process(nn.Module):
    """Tables of a diffusion process and the maps that they give.

    The tables are float32 on the module's device, whatever `.half()` or `.to_empty()` asks, and are
    not saved in a state_dict. Samples may have any trailing shape: images (B, C, H, W) in [-1, 1],
    embeddings (B, D).
    """

    forward_weights: Tensor
    target_weights: Tensor
    x0_weights: Tensor
    eps_weights: Tensor
    eps_of_x0_weights: Tensor
    posterior_x0_weight: Tensor
    log_variances: Tensor
    loss_weights: Tensor
    """(T,): weight of the squared error of the network's output at t in the loss."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule = Schedule.named(config.schedule, config.timesteps)
        alphas_cumprod = self.schedule.alphas_cumprod
        alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        log_variances = self.schedule.posterior_log_variance, self.schedule.betas.log()
        parametrization = PARAMETRIZATIONS[config.parametrization](alpha, sigma)
        self._tables = {
            "forward_weights": _pair((alpha, sigma)),
            "target_weights": _pair(parametrization.target),
            "x0_weights": _pair(parametrization.x0),
            "eps_weights": _pair(parametrization.eps),
            "eps_of_x0_weights": _pair(_x0(alpha, sigma).eps),
            "posterior_x0_weight": self.schedule.posterior_x0_weight.float(),
            "log_variances": _pair(log_variances),
            "loss_weights": self._loss_weights(parametrization).float(),
        }
        for name, table in self._tables.items():
            self.register_buffer(name, table, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Process":
        super()._apply(fn, recurse)
        for name, table in self._tables.items():
            setattr(self, name, table.to(getattr(self, name).device))
        return self

    def _loss_weights(self, parametrization: Parametrization) -> Tensor:
        """(T,) float64; the error in x_0 is that of the output times `parametrization.x0[1]`."""
        alphas_cumprod = self.schedule.alphas_cumprod
        if self.config.max_snr is None:
            return torch.ones_like(alphas_cumprod)
        snr = alphas_cumprod / (1 - alphas_cumprod)
        return (snr.clamp(max=self.config.max_snr) + 1) * parametrization.x0[1].square()

    def out_channels(self, c: int) -> int:
        """Output channels of a network for samples of `c` channels: 2c with a learned variance."""
        return 2 * c if self.config.variance == "learned_range" else c

    def diffuse(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """A draw x_t of q(x_t | x_0), shaped as x0, for standard normal `noise`."""
        return _mix(self.forward_weights, t, x0, noise)

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network must predict at x_t: noise, x0 or alpha noise - sigma x0."""
        return _mix(self.target_weights, t, x0, noise)

    def to_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_0 from a network's output without its variance channels (see `split`), unclamped."""
        return _mix(self.x0_weights, t, x_t, output)

    def to_eps(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """eps from a network's output without its variance channels (see `split`)."""
        return _mix(self.eps_weights, t, x_t, output)

    def x0_to_eps(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The eps that belongs to a changed x_0 (thresholding): (x_t - alpha x_0) / sigma."""
        return _mix(self.eps_of_x0_weights, t, x_t, x0)

    def split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """A raw output as the prediction and v.

        Args:
            output: (B, out_channels(C), ...).
            x_t: (B, C, ...).

        Returns:
            both shaped as x_t, float32; v is None where the variance is fixed.

        Raises:
            ValueError: `output` has another shape.
        """
        expected = (x_t.shape[0], self.out_channels(x_t.shape[1]), *x_t.shape[2:])
        if tuple(output.shape) != expected:
            raise ValueError(
                f"the network gave {tuple(output.shape)} where variance {self.config.variance!r} "
                f"needs {expected}: build it with process.out_channels({x_t.shape[1]}) output "
                "channels"
            )
        mean, *v = output.float().split(x_t.shape[1], dim=1)
        return mean, v[0] if v else None

    def log_variance(
        self, v: Tensor | None, t: Tensor, ndim: int, table: Tensor | None = None
    ) -> Tensor:
        """log Sigma = frac log beta + (1 - frac) log btilde, frac = (v + 1) / 2 (IDDPM eq. 15).

        Args:
            v: shaped as x_t; limited to the config's `variance_bound`, if there is one. None for a
                fixed variance, which is a constant v.
            t: (B,).
            ndim: number of axes of x_t.
            table: (T, 2), log btilde and log beta of a respaced schedule; None: of the full one.

        Returns:
            shaped as v, or (B, 1, ...) with `ndim` axes.
        """
        low, high = _at(self.log_variances if table is None else table, t, ndim)
        position: Tensor | float  # -1 is log btilde, 1 is log beta
        if v is None:
            position = cast(float, VARIANCES[self.config.variance])
        elif self.config.variance_bound is None:
            position = v
        else:
            position = _Bound.apply(v, self.config.variance_bound)
        return low + (position + 1) / 2 * (high - low)

    def adapt(self, net: Network, steps: Schedule | None = None) -> Predict:
        """`net(x, t) -> raw output` as predict(x, t) -> Prediction.

        Args:
            net: the network with its conditions bound.
            steps: the respaced schedule that the sampler will use, so that log_var is that of its
                steps. At timesteps outside of it log_var is NaN. None: the full schedule.

        Raises:
            ValueError: `steps` was not respaced from this process's schedule.
        """
        table = self.log_variances if steps is None else self._respaced_log_variances(steps)

        def predict(x: Tensor, t: Tensor) -> Prediction:
            x = x.float()
            output, v = self.split(net(x, t), x)
            x0 = self.to_x0(output, x, t)
            eps = self.to_eps(output, x, t)
            return Prediction(x0, eps, self.log_variance(v, t, x.ndim, table))

        return predict

    def _respaced_log_variances(self, steps: Schedule) -> Tensor:
        ours = self.schedule.alphas_cumprod
        inside = int(steps.timesteps[-1]) < len(ours)
        if not inside or not torch.equal(ours[steps.timesteps], steps.alphas_cumprod):
            raise ValueError(
                "the steps are not those of this process: make them with "
                "process.schedule.respaced(...)"
            )
        table = torch.full((len(ours), 2), float("nan"), device="cpu")
        table[steps.timesteps] = _pair((steps.posterior_log_variance, steps.betas.log()))
        return table.to(self.log_variances.device)


class _Bound(torch.autograd.Function):
    """Clamps to [-bound, bound], with a gradient that leads back inside.

    Outside, a gradient passes if descent leads back inside, so that no v gets stuck there.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.bound = bound
        return v.clamp(-bound, bound)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return torch.where((v.abs() <= ctx.bound) | (grad * v.sign() > 0), grad, 0.0), None


def _pair(weights: Weights) -> Tensor:
    """Two float64 tables (T,) as one of (T, 2), float32."""
    return torch.stack(weights, dim=1).float()


def _at(table: Tensor, t: Tensor, ndim: int) -> Weights:
    """Both columns of a (T, 2) table at t, each (B, 1, ...) with `ndim` axes."""
    rows = table[t]
    shape = (-1,) + (1,) * (ndim - 1)
    return rows[:, 0].view(shape), rows[:, 1].view(shape)


def _mix(table: Tensor, t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """weight_a[t] a + weight_b[t] b, float32."""
    weight_a, weight_b = _at(table, t, a.ndim)
    return weight_a * a + weight_b * b
