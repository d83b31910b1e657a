"""Pre-LN Transformer (GLIDE's text encoder, CLIP's initialisation): x + attention(LN x), x + MLP(LN x) with 4x width and exact GELU.

Tokens (B, N, width); q, k, v of one linear layer in the order (q, k, v) x heads x head width.
"""

from torch import Tensor, nn

from unclip_pl.networks.layers import attend, run


class Block(nn.Module):
    """One residual block. `width` must be a multiple of `heads`; `depth` of the whole stack only scales the initialisation."""

    def __init__(self, width: int, heads: int, depth: int = 1, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        branch = width**-0.5 * (2 * depth) ** -0.5
        for layer, std in ((self.qkv, width**-0.5), (self.proj, branch), (self.mlp[0], (2 * width) ** -0.5), (self.mlp[2], branch)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, width), mask (B, N) bool of the visible keys -> (B, N, width)."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, head width)
        x = x + self.proj(attend(qkv[:, :, 0], qkv[:, :, 1:], mask, self.causal))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """`depth` blocks and a last LayerNorm.

    Raises:
        ValueError: `width` is no multiple of `heads`.
    """

    def __init__(self, width: int, depth: int, heads: int, causal: bool = False, checkpointing: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"A Transformer of width {width} cannot have {heads} heads: choose a number that divides the width.")
        self.checkpointing = checkpointing
        self.blocks = nn.ModuleList(Block(width, heads, depth, causal) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, width), mask (B, N) bool of the visible keys (not with `causal`) -> (B, N, width)."""
        for block in self.blocks:
            x = run(block, self.checkpointing, x, mask)
        return self.norm(x)
