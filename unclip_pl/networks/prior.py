"""The diffusion prior's network (unCLIP section 2.2).

A causal Transformer predicts the clean CLIP image embedding from a noised one.

Sequence: encoded text, CLIP text embedding, timestep, noised image embedding, learned query; the
prediction is read at the query. The text sees nothing of the last three (causal mask), so that
sampling computes its keys and values once (`encode_text`) and continues from them at every step
(`denoise`). Karlo's prior is width 2048, depth 20, heads 32, text "states", padding "masked".
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.networks.checkpointing import Checkpointing
from unclip_pl.networks.layers import timestep_embedding
from unclip_pl.networks.text import replace_dropped
from unclip_pl.networks.transformer import Past, Transformer
from unclip_pl.utils.choices import check_choices
from unclip_pl.utils.tokens import caption_mask

NUM_STEP_TOKENS = 3
"""Timestep, noised embedding and query: the tokens that change at each step."""


@dataclass(frozen=True)
class PriorTransformerConfig:
    """Sizes of the Transformer; the defaults are Table 3 of the paper."""

    embed_dim: int = 1024
    """D, the width of CLIP's embeddings."""
    width: int = 2048
    depth: int = 24
    heads: int = 32
    checkpointing: Checkpointing = "none"
    """Activations computed again in the backward pass: "none", "selective" or "full"."""

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.embed_dim, self.width, self.depth, self.heads) < 1 or self.width % 2:
            raise ValueError(
                "PriorTransformerConfig needs an embed_dim, depth and heads of at least 1 and an "
                "even width."
            )


@dataclass(frozen=True)
class PriorTextConfig:
    """How a caption becomes the first part of the sequence. Sizes of other kinds are ignored."""

    kind: Literal["states", "tokens"] = "states"
    """"states": a linear layer of CLIP's token states; "tokens": a trained embedding of the tokens,
    encoded by the Transformer itself."""
    states_width: int = 768
    """states: width of CLIP's token states."""
    vocab_size: int = 49408
    """tokens: number of token ids."""
    context_length: int = 77
    """Number L of positions; shorter captions are padded."""
    padding: Literal["learned", "masked"] = "learned"
    """After a caption's end: "learned" is an embedding for each position (GLIDE; it needs no mask,
    so that a GPU's fastest kernels serve), "masked" hides the positions (Karlo)."""
    null: Literal["learned", "empty"] = "learned"
    """What replaces a dropped caption: learned vectors, or CLIP's states of the empty caption
    (Karlo; needs kind "states" and padding "masked")."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.null == "empty" and (self.kind, self.padding) != ("states", "masked"):
            raise ValueError(
                'PriorTextConfig.null "empty" needs kind "states" and padding "masked": set those, '
                'or null "learned".'
            )
        if self.context_length < 2 or min(self.states_width, self.vocab_size) < 1:
            raise ValueError(
                "PriorTextConfig needs a context_length of at least 2 and a states_width and "
                "vocab_size of at least 1."
            )


class Prefix(NamedTuple):
    """N captions with their text embeddings, read by the Transformer."""

    past: Past
    """Keys and values, (N, M, 2, heads, head_width) for each block."""
    mask: Tensor | None
    """(N, M) bool, True where the token is visible; None: all."""

    def index_select(self, index: Tensor) -> "Prefix":
        """The rows of `index` in its order; it may repeat rows."""
        mask = None if self.mask is None else self.mask[index]
        return Prefix([kv[index] for kv in self.past], mask)


class PriorTransformer(nn.Module):
    """x_t, t, caption and CLIP text embedding z_t -> the clean embedding, on the network's scale.

    A dropped caption loses its tokens and z_t together. With padding "learned" it becomes padding
    only; with "masked" it becomes two tokens. A learned embedding replaces z_t. With `text.null`
    "empty" tokens and z_t are CLIP's of the empty caption (SOT and EOT), which `set_null` stores.
    """

    def __init__(self, config: PriorTransformerConfig, text: PriorTextConfig) -> None:
        super().__init__()
        self.config, self.text = config, text
        width, length = config.width, text.context_length
        if text.kind == "states":
            self.text_proj: nn.Module = nn.Linear(text.states_width, width)
        else:
            self.text_proj = nn.Embedding(text.vocab_size, width)
        self.text_embed_proj = nn.Linear(config.embed_dim, width)
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.proj_in = nn.Linear(config.embed_dim, width)
        self.query = nn.Parameter(torch.randn(width) * 0.01)
        positions = length + 1 + NUM_STEP_TOKENS
        self.position_embedding = nn.Parameter(torch.randn(positions, width) * 0.01)
        if text.null == "learned":
            null_tokens = length if text.padding == "learned" else 2
            self.null_text = nn.Parameter(torch.randn(null_tokens, width) * 0.02)
            self.null_text_embed = nn.Parameter(torch.randn(width) * 0.02)
        else:
            self.empty_states = nn.Buffer(torch.zeros(2, text.states_width))
            self.empty_text_embed = nn.Buffer(torch.zeros(config.embed_dim))
        self.transformer = Transformer(
            width, config.depth, config.heads, causal=True, checkpointing=config.checkpointing
        )
        self.proj_out = nn.Linear(width, config.embed_dim)
        if isinstance(self.text_proj, nn.Embedding):
            nn.init.normal_(self.text_proj.weight, std=0.02)

    @torch.no_grad()
    def set_null(self, states: Tensor, text_embed: Tensor) -> None:
        """Store CLIP's output for the empty caption, which `text.null` "empty" needs.

        It is the states (2, states_width) and, on the network's scale, the embedding (D,).
        """
        self.empty_states.copy_(states)
        self.empty_text_embed.copy_(text_embed)

    def null(self) -> tuple[Tensor, Tensor]:
        """The tokens (n, width) and z_t (width) of a dropped caption."""
        if self.text.null == "learned":
            return self.null_text, self.null_text_embed
        return self.text_proj(self.empty_states), self.text_embed_proj(self.empty_text_embed)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        text_embed: Tensor | None = None,
        states: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """The clean embedding, in one pass over the whole sequence.

        x (B, D), t int64 (B,), the caption as in `encode_text`. Returns (B, D).
        """
        keep = torch.ones_like(t, dtype=torch.bool) if keep is None else keep
        prefix, mask = self._prefix_tokens(keep, tokens, mask, text_embed, states)
        sequence = torch.cat([prefix, self._step_tokens(x, t)], dim=1)
        hidden = self.transformer(sequence, self._with_step_tokens(mask), last=1)
        return self.proj_out(hidden[:, 0])

    def encode_text(
        self,
        keep: Tensor,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        text_embed: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Prefix:
        """Keys and values of captions, for any number of calls of `denoise`.

        Args:
            keep: (B,) bool, False where the caption is dropped.
            tokens: (B, L) int64; None: all are dropped (kind "tokens").
            mask: (B, L) bool, True up to and including EOT; None: computed from `tokens`, or all
                of `states`.
            text_embed: (B, D) on the network's scale; None: the null embedding.
            states: (B, L, states_width), CLIP's token states; None: all are dropped (kind
                "states").

        Raises:
            ValueError: more tokens than `context_length`.
        """
        prefix, mask = self._prefix_tokens(keep, tokens, mask, text_embed, states)
        return Prefix(self.transformer.extend(prefix, None, mask, last=0)[1], mask)

    def denoise(self, x: Tensor, t: Tensor, prefix: Prefix) -> Tensor:
        """`forward` for captions that `encode_text` has read.

        x (B, D), t (B,) and B rows of `prefix`. Returns (B, D).
        """
        mask = self._with_step_tokens(prefix.mask)
        hidden, _ = self.transformer.extend(self._step_tokens(x, t), prefix.past, mask, last=1)
        return self.proj_out(hidden[:, 0])

    def _step_tokens(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, 3, width)"""
        time = self.time_embed(timestep_embedding(t, self.config.width).to(x.dtype))
        tokens = torch.stack([time, self.proj_in(x), self.query.expand(len(x), -1)], dim=1)
        return tokens + self.position_embedding[-NUM_STEP_TOKENS:]

    @staticmethod
    def _with_step_tokens(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else F.pad(mask, (0, NUM_STEP_TOKENS), value=True)

    def _prefix_tokens(
        self,
        keep: Tensor,
        tokens: Tensor | None,
        mask: Tensor | None,
        text_embed: Tensor | None,
        states: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Text and z_t as tokens (B, n + 1, width), and which of them are visible (None: all)."""
        null_text, null_text_embed = self.null()
        text, mask, kept = self._caption_tokens(keep, tokens, mask, states)
        visible: Tensor | None = None
        if self.text.padding == "learned":
            text = torch.where((mask & kept[:, None])[..., None], text, null_text)
        else:
            text, visible = replace_dropped(text, mask, kept, null_text)
        text = text + self.position_embedding[: text.shape[1]]
        z_t = null_text_embed.expand(len(keep), -1)
        if text_embed is not None:
            z_t = torch.where(keep[:, None], self.text_embed_proj(text_embed), z_t)
        z_t = z_t + self.position_embedding[self.text.context_length]
        if visible is not None:
            visible = F.pad(visible, (0, 1), value=True)
        return torch.cat([text, z_t[:, None]], dim=1), visible

    def _caption_tokens(
        self, keep: Tensor, tokens: Tensor | None, mask: Tensor | None, states: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Captions (B, L, width), padded, with the mask (B, L) of their own tokens and `keep`."""
        length = self.text.context_length
        inputs = states if self.text.kind == "states" else tokens
        if inputs is None:  # every caption is dropped
            nothing = keep.new_zeros(len(keep), length)
            text = self.query.new_zeros(len(keep), length, self.config.width)
            return text, nothing, torch.zeros_like(keep)
        missing = length - inputs.shape[1]
        if missing < 0:
            raise ValueError(
                f"A caption has {inputs.shape[1]} tokens and context_length is {length}: raise it "
                "or tokenize to fewer."
            )
        if mask is None and tokens is not None:
            mask = caption_mask(tokens)
        elif mask is None:
            mask = torch.ones_like(inputs[..., 0], dtype=torch.bool)
        text = F.pad(self.text_proj(inputs), (0, 0, 0, missing))
        return text, F.pad(mask, (0, missing)), keep
