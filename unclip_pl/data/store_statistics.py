"""Mean and covariance of the image embeddings in a store."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Statistics:
    """Statistics of the image embeddings, in float64.

    `count`, `mean` (D,), and `covariance` (D, D), divided by N, not N - 1.
    """

    count: int
    mean: torch.Tensor
    covariance: torch.Tensor

    @property
    def std(self) -> torch.Tensor:
        """(D,)"""
        return self.covariance.diagonal().clamp(min=0).sqrt()
