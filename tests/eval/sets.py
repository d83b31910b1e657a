"""Features and Gaussians for the tests of eval."""

import math

import torch


def features(
    n: int, dim: int, seed: int = 0, shift: float = 0.0, rank: int | None = None
) -> torch.Tensor:
    """(N, D) float32, not negative, with a decaying spectrum and a mean, like pooled features."""
    generator = torch.Generator().manual_seed(seed)
    rank = rank or min(dim, 64)
    base = torch.randn(rank, dim, generator=torch.Generator().manual_seed(1)) / rank**0.5
    z = torch.randn(n, rank, generator=generator) / torch.arange(1, rank + 1).sqrt()
    return (z @ base + 0.3 + shift + 0.05 * torch.randn(n, dim, generator=generator)).clamp(min=0)


def exactly(mean: torch.Tensor, root: torch.Tensor, n: int, seed: int = 0) -> torch.Tensor:
    """(N, D) float64, N > D, with the sample mean `mean` and the sample covariance (over N - 1)
    root root^T, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, len(mean), generator=generator, dtype=torch.float64)
    q = torch.linalg.qr(z - z.mean(0)).Q * math.sqrt(n - 1)
    return q @ root.T + mean
