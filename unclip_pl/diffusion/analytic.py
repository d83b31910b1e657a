"""The analytic variance of a reverse step (Analytic-DPM, Bao et al. 2022).

The diffusion prior of unCLIP samples with it (Table 3). For a step from position r to s,

    sigma^2 = lambda^2 + abar_s beta^2 / (1 - abar_r)^2 C_r

where lambda^2 is the posterior variance (btilde) and C_r the variance per dimension that the data
have once x_r is known. C_r is estimated as the mean squared error of the predicted x_0. For the
optimal prediction this equals Analytic-DPM's (1 - abar_r) / abar_r (1 - E|eps|^2 / d); for an
imperfect one it is the best variance around it (Bao et al. 2022b). Unlike that formula it does not
cancel where abar_r is near 0 or 1.
"""

import torch
from torch import Tensor

from unclip_pl.diffusion.process import Predict, Prediction
from unclip_pl.diffusion.schedule import Schedule


def analytic_variance(steps: Schedule, error: Tensor) -> Tensor:
    """sigma^2 of each step of a (respaced) schedule.

    Args:
        steps: K positions of a schedule of T timesteps.
        error: (T,), C_r of each original timestep.

    Returns:
        (K,) float64, on the CPU.
    """
    error_of_steps = error.cpu().double()[steps.timesteps]
    return steps.posterior_variance + steps.posterior_x0_weight.square() * error_of_steps


def with_analytic_variance(predict: Predict, steps: Schedule, error: Tensor) -> Predict:
    """`predict` with the analytic variance in place of its own, for the `ddpm` sampler on `steps`.

    Arguments as in `analytic_variance`. At timesteps outside of `steps` log_var is NaN.
    """
    table = torch.full((len(error),), float("nan"), dtype=torch.float64)
    table[steps.timesteps] = analytic_variance(steps, error).log()
    table = table.float().to(error.device)

    def predict_analytic(x: Tensor, t: Tensor) -> Prediction:
        return predict(x, t)._replace(log_var=table[t].view(-1, *[1] * (x.ndim - 1)))

    return predict_analytic


class ErrorByTimestep:
    """Averages the squared error of the predicted x_0 at each timestep.

    Timesteps come in a random order, so that each batch sees all levels of noise.

    Args:
        timesteps: T.
        draws: how often each timestep is visited; 10 are enough (Analytic-DPM, section 3.1).
        device: of the timesteps that `timesteps()` returns.

    Raises:
        ValueError: `draws` is below 1.
    """

    def __init__(self, timesteps: int, draws: int, device: torch.device | str = "cpu") -> None:
        if draws < 1:
            raise ValueError(
                f"The analytic variance needs at least 1 draw per timestep: got {draws}."
            )
        order = torch.randperm(timesteps, generator=torch.Generator().manual_seed(0))
        self.order = order.to(device)
        # On the CPU, because not every device has float64.
        self.sums = torch.zeros(timesteps, dtype=torch.float64)
        self.counts = torch.zeros_like(self.sums)
        self.next = 0
        """Rows handed out so far."""
        self.total = timesteps * draws
        """Rows needed in all."""

    def timesteps(self, size: int) -> Tensor:
        """The next `size` timesteps, (size,) int64."""
        rows = torch.arange(self.next, self.next + size, device=self.order.device)
        self.next += size
        return self.order[rows % len(self.order)]

    def add(self, t: Tensor, x0: Tensor, predicted: Tensor) -> None:
        """Count x_0 and its prediction, both (B, D), at timesteps t (B,)."""
        t = t.cpu()
        error = (predicted.float() - x0.float()).square().mean(1)
        self.sums.index_add_(0, t, error.cpu().double())
        self.counts.index_add_(0, t, torch.ones(len(t), dtype=torch.float64))

    def mean(self) -> Tensor:
        """(T,) float32; NaN where a timestep was never visited."""
        return (self.sums / self.counts).float()
