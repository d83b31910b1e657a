"""Gaussian data, of which the best denoiser is known in closed form."""

import torch

from unclip_pl.diffusion.process import Prediction

MEAN = torch.tensor([0.6, -0.3])
COVARIANCE = torch.tensor([[0.40, 0.18], [0.18, 0.25]])


def best_denoiser(process, steps=None, true_variance=False):
    """predict(x, t) with E[x_0 | x_t] for x_0 ~ N(MEAN, COVARIANCE).

    log_var is that of the process, or with `true_variance` that of p(x_{t-1} | x_t) itself on the
    respaced schedule `steps` (its diagonal).
    """
    abar = process.schedule.alphas_cumprod
    positions = {} if steps is None else {t: i for i, t in enumerate(steps.timesteps.tolist())}

    def predict(x, t):
        a = abar[t[0]].float()
        gain = a.sqrt() * COVARIANCE @ torch.linalg.inv(a * COVARIANCE + (1 - a) * torch.eye(2))
        x0 = MEAN + (x - a.sqrt() * MEAN) @ gain.T
        log_var = process.log_variance(None, t, x.ndim)
        if true_variance:
            i = positions[int(t[0])]
            left = torch.diagonal(COVARIANCE - a.sqrt() * gain @ COVARIANCE)
            variance = steps.posterior_variance[i] + steps.posterior_x0_weight[i] ** 2 * left
            log_var = variance.float().log()
        return Prediction(x0, process.x0_to_eps(x0, x, t), log_var)

    return predict


def whitened(size):
    """Standard normal numbers (size, 2) whose own mean is exactly 0 and covariance exactly I.

    So moments after a linear sampler show only what the sampler did.
    """
    x = torch.randn((size, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x - x.mean(0)
    return (x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T).float()
