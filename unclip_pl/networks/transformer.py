"""Pre-LN Transformer (GLIDE's text encoder, CLIP's initialisation): x + attention(LN x), x + MLP(LN x) with 4x width and exact GELU.

Tokens (B, N, width); q, k, v of one linear layer in the order (q, k, v) x heads x head width. A causal one can go on from keys and values
that it computed before (`extend`), so that a prefix which does not change is paid for once.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.networks.layers import LayerNorm32, Unit, attend, run

Past = list[Tensor]
"""Keys and values of all tokens so far, (B, M, 2, heads, head width) for each block."""


class Packing(NamedTuple):
    """Which tokens of a batch (B, N) are worth computing: all but attention then works on those alone, (T, width)."""

    places: Tensor
    """(T,) int64, their places among the B * N."""
    size: int
    """B"""

    @classmethod
    def of(cls, mask: Tensor) -> "Packing":
        """For a mask (B, N) bool of the tokens that something may see."""
        return cls(mask.flatten().nonzero()[:, 0], len(mask))

    def pack(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (T, width)"""
        return x.flatten(0, 1).index_select(0, self.places)

    def unpack(self, x: Tensor, length: int) -> Tensor:
        """(T, width) -> (B, N, width), zeros where nothing was computed."""
        return x.new_zeros(self.size * length, x.shape[1]).index_copy(0, self.places, x).unflatten(0, (self.size, length))


class Block(Unit):
    """One residual block. `width` must be a multiple of `heads`; `depth` of the whole stack only scales the initialisation."""

    def __init__(self, width: int, heads: int, depth: int = 1, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = LayerNorm32(width), LayerNorm32(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        widen, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(widen, nn.GELU(), narrow)
        branch = width**-0.5 * (2 * depth) ** -0.5
        for layer, std in ((self.qkv, width**-0.5), (self.proj, branch), (widen, (2 * width) ** -0.5), (narrow, branch)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, past: Tensor | None = None, last: int | None = None, packing: Packing | None = None, length: int = 0
    ) -> tuple[Tensor, Tensor]:
        """One block on the tokens that follow `past`.

        Args:
            x: (B, N, width); with `packing` (T, width).
            mask: (B, M + N) bool of the visible keys, those of `past` included; None: all.
            past: (B, M, 2, heads, head width), keys and values of the tokens before.
            last: how many tokens at the end have an output; None: all.
            packing, length: which of the tokens x holds, and N.

        Returns:
            the tokens, as x or (B, last, width); keys and values of all tokens, (B, M + N, 2, heads, head width).
        """
        normed, width = self.norm1(x), x.shape[-1]

        def spread(x: Tensor) -> Tensor:
            return x if packing is None else packing.unpack(x, length)

        if last is None:
            q, kv = spread(self.qkv(normed)).split((width, 2 * width), dim=-1)
        else:  # queries of the last tokens alone: the others' outputs are not needed
            weight, bias = self.qkv.weight, self.qkv.bias
            kv = spread(F.linear(normed, weight[width:], bias[width:]))
            first = kv.shape[1] - last
            x = spread(x)[:, first:]
            q = F.linear(spread(normed)[:, first:], weight[:width], bias[:width])
        kv = kv.unflatten(-1, (2, self.heads, -1))
        kv = kv if past is None else torch.cat([past, kv], dim=1)
        if last == 0:
            return x, kv
        seen = attend(q.unflatten(-1, (self.heads, -1)), kv, mask, self.causal)
        x = x + self.proj(seen if packing is None or last is not None else packing.pack(seen))
        return x + self.mlp(self.norm2(x)), kv


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

    def forward(self, x: Tensor, mask: Tensor | None = None, last: int | None = None) -> Tensor:
        """x (B, N, width), mask (B, N) bool of the visible keys -> (B, N, width), or (B, last, width) of the last tokens alone."""
        return self.extend(x, None, mask, last)[0]

    def extend(self, x: Tensor, past: Past | None, mask: Tensor | None = None, last: int | None = None) -> tuple[Tensor, Past]:
        """The outputs of further tokens x (B, N, width) after those in `past` (None: there are none), and the past that includes them.

        Equals the plain computation on all tokens if the Transformer is causal. mask (B, M + N) bool, `last` as in `forward`, 0 where the past alone
        is wanted; the last tokens must be visible, and outputs of hidden ones mean nothing. `past` is not changed, so that several continuations may
        share it. On a CPU hidden tokens cost nothing outside of attention; on other devices their number would have to be waited for.
        """
        if past is not None and not self.blocks[0].causal:
            raise ValueError("A Transformer that is not causal cannot go on from earlier tokens: they would have to see the new ones.")
        length, packing = x.shape[1], None
        if mask is not None and x.device.type == "cpu" and not bool((own := mask[:, -length:]).all()):
            packing = Packing.of(own)
            x = packing.pack(x)
        now: Past = []
        for i, block in enumerate(self.blocks):
            only = last if block is self.blocks[-1] else None
            x, kv = run(block, self.checkpointing, x, mask, None if past is None else past[i], only, packing, length)
            now.append(kv)
        x = packing.unpack(x, length) if packing is not None and last is None else x
        return self.norm(x), now
