"""What a network's output means: eps, x0 or v, and the learned-range variance, turned once into a Prediction (DDPM, IDDPM eq. 15, Salimans and Ho 2022).

x_t = alpha x_0 + sigma eps with alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t). t is int64 (B,), an index of the original schedule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from unclip_pl.diffusion.schedule import SCHEDULES, Schedule


class Prediction(NamedTuple):
    """What samplers know of a network, float32. `x0`, `eps`: shaped as x_t; `log_var`: of p(x_{t-1} | x_t), broadcastable to x_t."""

    x0: Tensor
    eps: Tensor
    log_var: Tensor


Predict = Callable[[Tensor, Tensor], Prediction]
Network = Callable[[Tensor, Tensor], Tensor]
Weights = tuple[Tensor, Tensor]


class Meaning(NamedTuple):
    """A parametrisation as linear maps: target of (x_0, noise); x_0 of (x_t, output); eps of (x_t, output)."""

    target: Weights
    x0: Weights
    eps: Weights


def _eps(alpha: Tensor, sigma: Tensor) -> Meaning:
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    return Meaning(target=(zero, one), x0=(1 / alpha, -sigma / alpha), eps=(zero, one))


def _x0(alpha: Tensor, sigma: Tensor) -> Meaning:
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    return Meaning(target=(one, zero), x0=(zero, one), eps=(1 / sigma, -alpha / sigma))


def _v(alpha: Tensor, sigma: Tensor) -> Meaning:
    return Meaning(target=(-sigma, alpha), x0=(alpha, -sigma), eps=(sigma, alpha))


PARAMETRIZATIONS: dict[str, Callable[[Tensor, Tensor], Meaning]] = {"eps": _eps, "x0": _x0, "v": _v}
VARIANCES: dict[str, float | None] = {
    "learned_range": None,
    "fixed_small": -1.0,
    "fixed_large": 1.0,
}  # the v that a fixed one stands for


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process of a stage; the defaults are those of the decoder (unCLIP Table 3, GLIDE)."""

    schedule: str = "cosine"
    """Noise schedule: cosine or linear."""
    timesteps: int = 1000
    """Number T of timesteps in training."""
    parametrization: str = "eps"
    """What the network predicts: eps (the noise), x0 (the clean sample) or v (alpha eps - sigma x0)."""
    variance: str = "learned_range"
    """Variance of a reverse step: learned_range (C more channels), fixed_small (btilde) or fixed_large (beta)."""
    max_snr: float | None = None
    """Weight of the squared error in x_0: min(SNR, max_snr) + 1 with SNR = abar / (1 - abar), which is
    the weight that v gives it, but held where little noise is left. None: the output's own error
    with weight 1 (L_simple)."""
    variance_bound: float | None = 2.0
    """Keep |v| of a learned variance below this: at 2, log Sigma leaves [log btilde, log beta] by at
    most half its width. null: take v as it is, as IDDPM does, and so for weights trained elsewhere."""

    def __post_init__(self) -> None:
        for field, choices in (
            ("schedule", SCHEDULES),
            ("parametrization", PARAMETRIZATIONS),
            ("variance", VARIANCES),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"diffusion {field} {getattr(self, field)!r} does not exist: choose one of {', '.join(choices)}"
                )
        if self.variance_bound is not None and not self.variance_bound >= 1:
            raise ValueError(
                f"diffusion variance_bound is {self.variance_bound}: give 1 (Sigma between btilde and "
                "beta) or more, or null for no bound"
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
    """Tables of a diffusion process, float32 on the module's device, whatever `.half()` or `.to_empty()` asks; nothing is saved in a state_dict.

    Samples have any trailing shape: images (B, C, H, W) in [-1, 1], embeddings (B, D).
    """

    forward_weights: Tensor
    target_weights: Tensor
    x0_weights: Tensor
    eps_weights: Tensor
    eps_of_x0_weights: Tensor
    posterior_weights: Tensor
    log_variances: Tensor
    loss_weights: Tensor
    """(T,): what the squared error of the network's output at t counts in the loss."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule = Schedule.named(config.schedule, config.timesteps)
        alpha, sigma = (
            self.schedule.alphas_cumprod.sqrt(),
            (1 - self.schedule.alphas_cumprod).sqrt(),
        )
        meaning = PARAMETRIZATIONS[config.parametrization](alpha, sigma)
        self._tables = {
            "forward_weights": _pair((alpha, sigma)),
            "target_weights": _pair(meaning.target),
            "x0_weights": _pair(meaning.x0),
            "eps_weights": _pair(meaning.eps),
            "eps_of_x0_weights": _pair(_x0(alpha, sigma).eps),
            "posterior_weights": _pair(
                (self.schedule.posterior_x0_weight, self.schedule.posterior_xt_weight)
            ),
            "log_variances": _pair(
                (self.schedule.posterior_log_variance, self.schedule.betas.log())
            ),
            "loss_weights": self._loss_weights(meaning).float(),
        }
        for name, table in self._tables.items():
            self.register_buffer(name, table, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Process":
        super()._apply(fn, recurse)
        for name, table in self._tables.items():
            setattr(self, name, table.to(getattr(self, name).device))
        return self

    def _loss_weights(self, meaning: Meaning) -> Tensor:
        """(T,) float64; the error in x_0 is that of the output times `meaning.x0[1]`."""
        alphas_cumprod = self.schedule.alphas_cumprod
        if self.config.max_snr is None:
            return torch.ones_like(alphas_cumprod)
        snr = alphas_cumprod / (1 - alphas_cumprod)
        return (snr.clamp(max=self.config.max_snr) + 1) * meaning.x0[1].square()

    def out_channels(self, c: int) -> int:
        """Channels that a network must give for samples of `c` channels: 2c with a learned variance."""
        return 2 * c if self.config.variance == "learned_range" else c

    def diffuse(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """A draw x_t of q(x_t | x_0), shaped as x0, for standard normal `noise`."""
        return _mix(self.forward_weights, t, x0, noise)

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network must give at x_t: noise, x0 or alpha noise - sigma x0."""
        return _mix(self.target_weights, t, x0, noise)

    def to_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_0 of a network's output without its variance channels (see `split`), unclamped."""
        return _mix(self.x0_weights, t, x_t, output)

    def to_eps(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """eps of a network's output without its variance channels (see `split`)."""
        return _mix(self.eps_weights, t, x_t, output)

    def x0_to_eps(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The eps that belongs to an x_0, (x_t - alpha x_0) / sigma: for x_0 that were changed (thresholding)."""
        return _mix(self.eps_of_x0_weights, t, x_t, x0)

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) on the full schedule (DDPM eq. 7)."""
        return _mix(self.posterior_weights, t, x0, x_t)

    def split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """A raw output (B, out_channels(C), ...) as (prediction like x_t, v like x_t or None), float32. ValueError for other shapes."""
        expected = (x_t.shape[0], self.out_channels(x_t.shape[1]), *x_t.shape[2:])
        if tuple(output.shape) != expected:
            raise ValueError(
                f"the network gave {tuple(output.shape)} where variance {self.config.variance!r} needs {expected}: "
                f"build it with process.out_channels({x_t.shape[1]}) output channels"
            )
        mean, *v = output.float().split(x_t.shape[1], dim=1)
        return mean, v[0] if v else None

    def log_variance(
        self, v: Tensor | None, t: Tensor, ndim: int, table: Tensor | None = None
    ) -> Tensor:
        """log Sigma = frac log beta + (1 - frac) log btilde, frac = (v + 1) / 2 (IDDPM eq. 15).

        |v| is held within the config's `variance_bound`, if that is not None.

        A fixed variance ((B, 1, ...) with `ndim` axes) is a constant v. `table` (T, 2): log btilde, log beta of a respaced schedule.
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

        `steps`: the respaced schedule that the sampler will walk, so that log_var is that of its steps (at timesteps outside of it
        log_var is NaN); None: the full one. ValueError where `steps` does not come from this process.
        """
        table = self.log_variances if steps is None else self._respaced_log_variances(steps)

        def predict(x: Tensor, t: Tensor) -> Prediction:
            x = x.float()
            output, v = self.split(net(x, t), x)
            return Prediction(
                self.to_x0(output, x, t),
                self.to_eps(output, x, t),
                self.log_variance(v, t, x.ndim, table),
            )

        return predict

    def _respaced_log_variances(self, steps: Schedule) -> Tensor:
        known = self.schedule.alphas_cumprod
        if int(steps.timesteps[-1]) >= len(known) or not torch.equal(
            known[steps.timesteps], steps.alphas_cumprod
        ):
            raise ValueError(
                "the steps are not those of this process: make them with process.schedule.respaced(...)"
            )
        table = torch.full((len(known), 2), float("nan"), device="cpu")
        table[steps.timesteps] = _pair((steps.posterior_log_variance, steps.betas.log()))
        return table.to(self.log_variances.device)


class _Bound(torch.autograd.Function):
    """Clamp to +-bound; outside, the gradient passes where descent leads back inside, so that no v is stuck."""

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
