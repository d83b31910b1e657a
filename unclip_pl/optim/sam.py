"""Sharpness-aware minimisation (SAM; Foret et al. 2020, arXiv 2010.01412).

The gradient is taken at the worst point near the weights, w + rho g / ||g||, and applied at w.

`climb` moves the weights there before a pass, `descend` moves them back after its backward pass.
What happens to the gradient after that (accumulation, clipping, averaging over ranks) is as without
SAM; each pass has its own point.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def climb(
    loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter], rho: float
) -> list[Tensor]:
    """Move `parameters` by `rho` along the gradient of `loss`, all of them as one vector.

    The gradient is this process's own: nothing is averaged over ranks, and `.grad` is not changed.

    Args:
        loss: returns a scalar for the current weights.
        parameters: those to move; one without a gradient stays.
        rho: length of the move, > 0.

    Returns:
        The former values, for `descend`.
    """
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    norms = [g.float().norm() for g in gradients if g is not None]
    scale = rho / torch.stack(norms).norm().clamp(min=torch.finfo(torch.float32).tiny)
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.add_(gradient * scale)
    torch.clear_autocast_cache()  # it holds the weights as they were before the move
    return before


@torch.no_grad()
def descend(parameters: Sequence[nn.Parameter], before: Sequence[Tensor]) -> None:
    """Give `parameters` the values that `climb` returned, exactly."""
    for parameter, value in zip(parameters, before, strict=True):
        parameter.copy_(value)
    torch.clear_autocast_cache()
