"""The scale on which a network sees CLIP embeddings.

It is norm 0.5375 sqrt(D) (unCLIP; 17.2 at D = 1024) or zero mean and unit variance (Karlo).

Outside of the network embeddings are as CLIP gives them, float32 (B, D), not normalised. The
statistics are buffers, and so are saved with the weights.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EmbeddingNormalizer(nn.Module):
    """Normalises and denormalises CLIP embeddings.

    Args:
        dim: D.
        mode: "none" changes nothing; "unit" gives each embedding the norm 0.5375 sqrt(D), and
            `denormalize` gives it the root mean square norm of the data (1 before `fit`);
            "standard" is (z - mean) / std (0 and 1 before `fit`).

    Raises:
        ValueError: unknown mode.
    """

    norm: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, mode: Literal["none", "unit", "standard"] = "unit") -> None:
        super().__init__()
        if mode not in ("none", "unit", "standard"):
            raise ValueError(
                f'EmbeddingNormalizer does not know the mode "{mode}": use "none", "unit" or '
                '"standard".'
            )
        self.dim, self.mode = dim, mode
        self.scale = 0.5375 * math.sqrt(dim)
        if mode == "unit":
            self.register_buffer("norm", torch.ones(()))
        elif mode == "standard":
            self.register_buffer("mean", torch.zeros(dim))
            self.register_buffer("std", torch.ones(dim))

    @property
    def fitted(self) -> bool:
        """Whether the statistics come from data; "none" has none and needs no `fit`."""
        if self.mode == "unit":
            return bool(self.norm != 1)
        return self.mode == "none" or bool((self.mean != 0).any() or (self.std != 1).any())

    @torch.no_grad()
    def fit(self, mean: Tensor, std: Tensor) -> None:
        """Take the data's statistics, both (D,), any float type.

        Raises:
            ValueError: another length than D, or a standard deviation that is not positive.
        """
        if mean.shape != (self.dim,) or std.shape != (self.dim,):
            raise ValueError(
                f"EmbeddingNormalizer.fit got mean {tuple(mean.shape)} and std {tuple(std.shape)}, "
                f"both must be ({self.dim},)."
            )
        if self.mode == "unit":
            self.norm.copy_((mean.double().square() + std.double().square()).sum().sqrt())
        elif self.mode == "standard":
            if not bool((std > 0).all()):
                raise ValueError(
                    "EmbeddingNormalizer.fit needs positive standard deviations: compute them "
                    "from more than one embedding."
                )
            self.mean.copy_(mean)
            self.std.copy_(std)

    def normalize(self, z: Tensor) -> Tensor:
        """CLIP's scale -> the network's. (..., D) -> (..., D) float32."""
        z = z.float()
        if self.mode == "unit":
            return F.normalize(z, dim=-1) * self.scale
        return (z - self.mean) / self.std if self.mode == "standard" else z

    def denormalize(self, z: Tensor) -> Tensor:
        """The network's scale -> CLIP's. (..., D) -> (..., D) float32."""
        z = z.float()
        if self.mode == "unit":
            return z * (self.norm / self.scale)
        return z * self.std + self.mean if self.mode == "standard" else z
