"""The analytic variance of a reverse step (Analytic-DPM, Bao et al. 2022; the diffusion prior's sampler in unCLIP Table 3).

Step r -> s: sigma^2 = lambda^2 + abar_s beta^2 / (1 - abar_r)^2 C_r with lambda^2 the posterior variance (btilde) and C_r the variance that the data
still have a dimension when x_r is known. C_r is estimated as the mean squared error of the predicted x_0: for the optimal prediction this is
Analytic-DPM's (1 - abar_r) / abar_r (1 - E|eps|^2 / d), for an imperfect one the best variance around it (Bao et al. 2022b); and it does not cancel
where abar_r is near 0 or 1, as the other form does.
"""

import torch
from torch import Tensor

from unclip_pl.diffusion.process import Predict, Prediction
from unclip_pl.diffusion.schedule import Schedule


def analytic_variance(steps: Schedule, error: Tensor) -> Tensor:
    """sigma^2 of the steps of a (respaced) schedule, (K,) float64; error (T,): C_r at each original timestep."""
    known = error.cpu().double()[steps.timesteps]
    return steps.posterior_variance + steps.posterior_x0_weight.square() * known


def with_analytic_variance(predict: Predict, steps: Schedule, error: Tensor) -> Predict:
    """`predict` with the analytic variance in the place of its own, for the `ddpm` sampler on `steps`."""
    table = torch.full((len(error),), float("nan"), dtype=torch.float64)
    table[steps.timesteps] = analytic_variance(steps, error).log()
    table = table.float().to(error.device)

    def predict_analytic(x: Tensor, t: Tensor) -> Prediction:
        return predict(x, t)._replace(log_var=table[t].view(-1, *[1] * (x.ndim - 1)))

    return predict_analytic


class ErrorByTimestep:
    """Collects the mean squared error of x_0 at each timestep, `draws` times each, in an order that gives a batch all levels of noise.

    Args:
        timesteps: T.
        draws: how often each timestep is looked at; 10 are enough (Analytic-DPM, section 3.1).
    """

    def __init__(self, timesteps: int, draws: int, device: torch.device | str = "cpu") -> None:
        if draws < 1:
            raise ValueError(
                f"The analytic variance needs at least 1 draw a timestep: got {draws}."
            )
        self.order = torch.randperm(timesteps, generator=torch.Generator().manual_seed(0)).to(
            device
        )
        self.sums = torch.zeros(
            timesteps, dtype=torch.float64
        )  # on the CPU: not every device has float64
        self.counts = torch.zeros_like(self.sums)
        self.next, self.total = 0, timesteps * draws  # rows so far, rows needed

    def timesteps(self, size: int) -> Tensor:
        """The next `size` of them, (size,) int64."""
        t = self.order[
            torch.arange(self.next, self.next + size, device=self.order.device) % len(self.order)
        ]
        self.next += size
        return t

    def add(self, t: Tensor, x0: Tensor, predicted: Tensor) -> None:
        """x_0 and what was predicted of it at timesteps t (B,), both (B, D)."""
        self.sums.index_add_(
            0, t.cpu(), (predicted.float() - x0.float()).square().mean(1).cpu().double()
        )
        self.counts.index_add_(0, t.cpu(), torch.ones(len(t), dtype=torch.float64))

    def mean(self) -> Tensor:
        """(T,) float32; NaN where a timestep had no draw."""
        return (self.sums / self.counts).float()
