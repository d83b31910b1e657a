"""The diffusion prior's network: a causal Transformer that predicts a clean CLIP image embedding from a noised one (unCLIP section 2.2).

Sequence: encoded text, CLIP text embedding, timestep, noised image embedding, learned query; the answer stands at the query. Only the last three
change while sampling, so that `encode_text` computes the keys and values of the others once and `denoise` goes on from there.
Karlo's prior is width 2048, depth 20, heads 32, text "states", padding "masked".
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.networks.layers import timestep_embedding
from unclip_pl.networks.text import caption_mask
from unclip_pl.networks.transformer import Past, Transformer

MOVING = 3  # timestep, noised embedding, query: what is new at each step


@dataclass(frozen=True)
class PriorTransformerConfig:
    """Sizes of the Transformer; the defaults are Table 3 of the paper."""

    embed_dim: int = 1024
    """D, the width of CLIP's embeddings."""
    width: int = 2048
    depth: int = 24
    heads: int = 32
    checkpointing: bool = False
    """Compute activations again in the backward pass."""

    def __post_init__(self) -> None:
        if min(self.embed_dim, self.width, self.depth, self.heads) < 1 or self.width % 2:
            raise ValueError("PriorTransformerConfig needs an embed_dim, depth and heads of at least 1 and an even width.")


@dataclass(frozen=True)
class PriorTextConfig:
    """How a caption becomes the first part of the sequence. Sizes that the kind does not use are ignored."""

    kind: Literal["states", "tokens"] = "states"
    """"states": a linear layer of CLIP's token states; "tokens": a trained embedding of the tokens, encoded by the Transformer itself."""
    states_width: int = 768
    """states: width of CLIP's token states."""
    vocab_size: int = 49408
    """tokens: number of token ids."""
    context_length: int = 77
    """Number L of positions; shorter captions are padded."""
    padding: Literal["learned", "masked"] = "learned"
    """Behind a caption's end: an embedding learned for each position (GLIDE; no mask, so that a GPU's fastest kernels serve), or nothing visible (Karlo;
    on a CPU what is hidden costs nothing)."""

    def __post_init__(self) -> None:
        if self.kind not in ("states", "tokens"):
            raise ValueError(f'PriorTextConfig does not know the kind "{self.kind}": use "states" or "tokens".')
        if self.padding not in ("learned", "masked"):
            raise ValueError(f'PriorTextConfig does not know the padding "{self.padding}": use "learned" or "masked".')
        if self.context_length < 2 or min(self.states_width, self.vocab_size) < 1:
            raise ValueError("PriorTextConfig needs a context_length of at least 2 and a states_width and vocab_size of at least 1.")


class Prefix(NamedTuple):
    """Keys and values of N captions with their text embeddings: `past`, (N, M, 2, heads, head width) a block; `mask` (N, M) bool, None: all visible."""

    past: Past
    mask: Tensor | None

    def rows(self, index: Tensor) -> "Prefix":
        """Those of some rows, in the order of `index`, which may repeat them."""
        return Prefix([kv[index] for kv in self.past], None if self.mask is None else self.mask[index])


class PriorTransformer(nn.Module):
    """x_t, t, caption and CLIP text embedding -> the clean embedding, all on the network's scale.

    A dropped caption has neither its tokens nor its text embedding: with padding "learned" it is one of padding alone, with "masked" it has two
    learned tokens (in the place of SOT and EOT: put CLIP's for the empty caption there and it is Karlo's); a learned one stands for z_t.
    """

    def __init__(self, config: PriorTransformerConfig, text: PriorTextConfig) -> None:
        super().__init__()
        self.config, self.text = config, text
        width, length = config.width, text.context_length
        self.encode = nn.Linear(text.states_width, width) if text.kind == "states" else nn.Embedding(text.vocab_size, width)
        self.embed = nn.Linear(config.embed_dim, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.enter = nn.Linear(config.embed_dim, width)
        self.query = nn.Parameter(torch.randn(width) * 0.01)
        self.position = nn.Parameter(torch.randn(length + 1 + MOVING, width) * 0.01)
        self.null_text = nn.Parameter(torch.randn(length if text.padding == "learned" else 2, width) * 0.02)
        self.null_embed = nn.Parameter(torch.randn(width) * 0.02)
        self.transformer = Transformer(width, config.depth, config.heads, causal=True, checkpointing=config.checkpointing)
        self.exit = nn.Linear(width, config.embed_dim)
        if text.kind == "tokens":
            nn.init.normal_(self.encode.weight, std=0.02)

    def forward(
        self, x: Tensor, t: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None, text_embed: Tensor | None = None,
        states: Tensor | None = None, keep: Tensor | None = None,
    ) -> Tensor:
        """The clean embedding, in one pass over the whole sequence; x (B, D), t int64 (B,); the caption as in `encode_text`. Returns (B, D)."""
        keep = torch.ones_like(t, dtype=torch.bool) if keep is None else keep
        before, visible = self._before(keep, tokens, mask, text_embed, states)
        if x.device.type == "cpu":  # elsewhere a shape that depends on the captions would wait for the device
            before, visible = _seen(before, visible)
        sequence = torch.cat([before, self._moving(x, t)], dim=1)
        visible = None if visible is None else F.pad(visible, (0, MOVING), value=True)
        return self.exit(self.transformer(sequence, visible, last=1)[:, 0])

    def encode_text(
        self, keep: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None, text_embed: Tensor | None = None, states: Tensor | None = None
    ) -> Prefix:
        """Keys and values of captions, for any number of calls of `denoise`.

        Args:
            keep: (B,) bool, False where the caption is dropped.
            tokens: (B, L) int64; None: all are dropped (kind "tokens").
            mask: (B, L) bool, True up to and including EOT; None: found from `tokens`, or all of `states`.
            text_embed: (B, D) on the network's scale; None: the null embedding.
            states: (B, L, states_width), CLIP's token states; None: all are dropped (kind "states").

        Raises:
            ValueError: more tokens than `context_length`.
        """
        before, visible = _seen(*self._before(keep, tokens, mask, text_embed, states))
        return Prefix(self.transformer.extend(before, None, visible, last=0)[1], visible)

    def denoise(self, x: Tensor, t: Tensor, prefix: Prefix) -> Tensor:
        """`forward` for captions that `encode_text` has read: x (B, D), t (B,) and B rows of `prefix`. Returns (B, D)."""
        visible = None if prefix.mask is None else F.pad(prefix.mask, (0, MOVING), value=True)
        return self.exit(self.transformer.extend(self._moving(x, t), prefix.past, visible, last=1)[0][:, 0])

    def _moving(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, 3, width)"""
        time = self.time(timestep_embedding(t, self.config.width).to(x.dtype))
        return torch.stack([time, self.enter(x), self.query.expand(len(x), -1)], dim=1) + self.position[-MOVING:]

    def _before(
        self, keep: Tensor, tokens: Tensor | None, mask: Tensor | None, text_embed: Tensor | None, states: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What does not change while sampling: (B, L + 1, width), and which of it may be seen (None: all)."""
        size, length = len(keep), self.text.context_length
        given = states if self.text.kind == "states" else tokens
        if given is None:
            text, kept, mask = self.null_text.new_zeros(size, length, self.config.width), torch.zeros_like(keep), keep.new_zeros(size, length)
        else:
            missing = length - given.shape[1]
            if missing < 0:
                raise ValueError(f"A caption has {given.shape[1]} tokens and context_length is {length}: raise it or tokenize to fewer.")
            if mask is None:
                mask = caption_mask(tokens) if tokens is not None else torch.ones_like(given[..., 0], dtype=torch.bool)
            text, kept, mask = F.pad(self.encode(given), (0, 0, 0, missing)), keep, F.pad(mask, (0, missing))
        if self.text.padding == "learned":
            text, visible = torch.where((mask & kept[:, None])[..., None], text, self.null_text), None
        else:
            text = torch.where(kept[:, None, None], text, F.pad(self.null_text, (0, 0, 0, length - 2)))
            first = torch.arange(length, device=keep.device) < 2
            visible = F.pad(torch.where(kept[:, None], mask, first), (0, 1), value=True)
        embed = self.null_embed.expand(size, -1)
        embed = embed if text_embed is None else torch.where(keep[:, None], self.embed(text_embed), embed)
        return torch.cat([text, embed[:, None]], dim=1) + self.position[:-MOVING], visible


def _seen(before: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, N, width) and mask (B, N) without the positions that no row sees; no mask where all that is left is seen."""
    if visible is None:
        return before, None
    some = visible.any(0)
    before, visible = before[:, some], visible[:, some]
    return before, None if bool(visible.all()) else visible
