"""Pre-LN Transformer (GLIDE's text encoder, CLIP's initialisation).

x + attention(LN x), then x + MLP(LN x) with 4x width and exact GELU. Tokens are (B, N, width).
A causal Transformer can continue from keys and values that it computed before (`extend`), so that a
prefix which does not change is computed once.
"""

import torch
from torch import Tensor, nn

from unclip_pl.networks.checkpointing import Checkpointing, apply_checkpointing
from unclip_pl.networks.layers import Block, LayerNorm32, attention

Past = list[Tensor]
"""Keys and values of all tokens so far, (B, M, 2, heads, head_width) for each block."""


class TransformerBlock(Block):
    """One residual block. `width` must be a multiple of `heads`.

    `depth` is that of the whole stack; it only scales the initialisation.
    """

    def __init__(self, width: int, heads: int, depth: int = 1, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = LayerNorm32(width), LayerNorm32(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(up, nn.GELU(), down)
        residual_std = width**-0.5 * (2 * depth) ** -0.5
        stds = {self.qkv: width**-0.5, self.proj: residual_std}
        stds |= {up: (2 * width) ** -0.5, down: residual_std}
        for layer, std in stds.items():
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        past: Tensor | None = None,
        last: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One block on the tokens that follow `past`.

        Args:
            x: (B, N, width).
            mask: (B, M + N) bool, True where a key is visible, those of `past` included; None: all.
            past: (B, M, 2, heads, head_width), keys and values of the tokens before.
            last: compute the output of this many tokens at the end only; None: of all.

        Returns:
            the tokens (B, N or last, width); keys and values of all, (B, M + N, 2, heads,
            head_width).
        """
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, kv = qkv[:, :, 0], qkv[:, :, 1:]
        if past is not None:
            kv = torch.cat([past, kv], dim=1)
        if last is not None:
            first = x.shape[1] - last
            x, q = x[:, first:], q[:, first:]
        k, v = kv.unbind(2)
        x = x + self.proj(attention(q, k, v, mask, self.causal))
        return x + self.mlp(self.norm2(x)), kv


class Transformer(nn.Module):
    """`depth` blocks and a last LayerNorm.

    Raises:
        ValueError: `width` is no multiple of `heads`.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        causal: bool = False,
        checkpointing: Checkpointing = "none",
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"A Transformer of width {width} cannot have {heads} heads: choose a number that "
                "divides the width."
            )
        self.causal = causal
        blocks = (TransformerBlock(width, heads, depth, causal) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        apply_checkpointing(self, checkpointing)

    def forward(self, x: Tensor, mask: Tensor | None = None, last: int | None = None) -> Tensor:
        """Encode all tokens.

        Args:
            x: (B, N, width).
            mask: (B, N) bool, True where a key is visible; None: all.
            last: return this many tokens at the end only, which saves most of the last block.

        Returns:
            (B, N or last, width).
        """
        for i, block in enumerate(self.blocks):
            outputs = last if i == len(self.blocks) - 1 else None
            x, _ = block(x, mask, None, outputs)  # keys and values are not kept
        return self.norm(x)

    def extend(
        self, x: Tensor, past: Past | None, mask: Tensor | None = None, last: int | None = None
    ) -> tuple[Tensor, Past]:
        """The outputs of further tokens after those in `past`, and the past that includes them.

        Equals the plain computation on all tokens if the Transformer is causal. `past` is not
        changed, so that several continuations may share it.

        Args:
            x: (B, N, width).
            past: of the tokens before; None: there are none.
            mask: (B, M + N) bool, True where a key is visible; None: all. Outputs of hidden tokens
                mean nothing.
            last: as in `forward`; 0 where only the past is wanted.
        """
        if past is not None and not self.causal:
            raise ValueError(
                "A Transformer that is not causal cannot continue from earlier tokens: they would "
                "have to see the new ones."
            )
        extended: Past = []
        for i, block in enumerate(self.blocks):
            outputs = last if i == len(self.blocks) - 1 else None
            x, kv = block(x, mask, None if past is None else past[i], outputs)
            extended.append(kv)
        return self.norm(x), extended
