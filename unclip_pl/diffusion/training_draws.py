"""The random numbers of a training step: timesteps, noise, and which conditions are dropped.

They are drawn on the generator's device, so that a CPU generator gives the same validation loss on
every device; without a generator, by torch's own on the device of the data.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def draw_timesteps_and_noise(
    x0: Tensor, timesteps: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Uniform timesteps (B,) int64 below `timesteps`, and standard normal noise shaped as x0."""
    t = _draw(torch.randint, timesteps, (len(x0),), generator=generator, device=x0.device)
    noise = _draw(torch.randn, x0.shape, generator=generator, device=x0.device)
    return t, noise


def draw_keep_masks(
    size: int,
    dropout: Sequence[float],
    device: torch.device,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Draw a mask (size,) bool for each probability in `dropout`; False where a sample drops it.

    Each mask belongs to one condition and is independent of the others.
    """
    uniform = _draw(torch.rand, (len(dropout), size), generator=generator, device=device)
    return [row >= probability for row, probability in zip(uniform, dropout, strict=True)]


def _draw(
    random: Callable[..., Tensor],
    *arguments: object,
    generator: torch.Generator | None,
    device: torch.device,
) -> Tensor:
    source = generator.device if generator else device
    return random(*arguments, generator=generator, device=source).to(device)
