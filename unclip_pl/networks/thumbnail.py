"""A first guess of the image from its CLIP embedding, at a few pixels: a small MLP.

A U-Net sees the embedding through two linear layers, which is little to learn from where on the
canvas a thing lies. On small data that is what it learns last. The MLP learns it in minutes, and
the U-Net gets its guess as an upsampler gets the small image (unCLIP section 2.1). Prediction
first and diffusion after it: Whang et al. 2022 (arXiv 2112.02475).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.networks.layers import Block, LayerNorm32, zero_module

DROPOUT = 0.005
"""Share of the embedding that training leaves out: a prior's embeddings are not exact either. More
blurs what was seen: on OpenMoji, after 6,000 steps of 32, the mean squared error on single objects
of the training was 0.024 with 0.03 and 0.014 with none."""


class MLPBlock(Block):
    """Norm, linear layer, SiLU, linear layer; plus the input. (..., width) -> (..., width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm32(width)
        self.linear1 = nn.Linear(width, width)
        self.linear2 = zero_module(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear2(F.silu(self.linear1(self.norm(x))))


class Thumbnail(nn.Module):
    """Guesses the mean of all images that have an embedding, E[x_0 | z_i], reduced by areas.

    Args:
        embed_dim: D, the width of the embedding.
        channels: C of the image.
        side: s, that of the thumbnail in pixels.
        width: of the hidden layers.
    """

    def __init__(self, embed_dim: int, channels: int, side: int, width: int) -> None:
        super().__init__()
        self.shape = channels, side, side
        self.dropout = nn.Dropout(DROPOUT)
        self.linear_in = nn.Linear(embed_dim, width)
        self.blocks = nn.Sequential(MLPBlock(width), MLPBlock(width))
        self.norm_out = LayerNorm32(width)
        self.linear_out = zero_module(nn.Linear(width, channels * side**2))

    def forward(self, embed: Tensor) -> Tensor:
        """The embedding (B, D) on the network's scale -> (B, C, s, s), about [-1, 1]."""
        h = self.norm_out(self.blocks(self.linear_in(self.dropout(embed))))
        return self.linear_out(h).unflatten(-1, self.shape)

    def loss(self, embed: Tensor, image: Tensor) -> Tensor:
        """The mean squared error of the guess.

        Args:
            embed: (B, D); nothing is learned about it.
            image: (B, C, H, W) in [-1, 1], H and W multiples of s.

        Returns:
            a float32 scalar.
        """
        target = F.adaptive_avg_pool2d(image.float(), self.shape[1:])
        return F.mse_loss(self(embed.detach()).float(), target)
