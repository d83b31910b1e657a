"""The caption as context tokens and as an addition to the timestep embedding.

From CLIP's token states (Karlo) or a trained Transformer (GLIDE). Masks are True where a token is
visible; `keep` False drops a caption. A dropped caption never takes a parameter out of the graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.networks.checkpointing import Checkpointing
from unclip_pl.networks.transformer import Transformer
from unclip_pl.utils.byte_pairs import BYTES, BytePairs
from unclip_pl.utils.choices import check_choices, check_least
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.tokens import caption_mask


@dataclass(frozen=True)
class TextConfig:
    """How a caption becomes context. Widths that the kind does not use are ignored."""

    kind: Literal["states", "transformer", "none"] = "none"
    """"states": CLIP's token states, linear layer, LayerNorm; "transformer": trained on the tokens;
    "none": no caption."""
    states_width: int = 0
    """states: width of CLIP's token states."""
    vocab_size: int = 49408
    """transformer: number of token ids."""
    context_length: int = 77
    """transformer: number of positions; shorter captions are padded."""
    width: int = 512
    depth: int = 6
    """transformer: number of blocks; 0: the embeddings of the tokens only."""
    heads: int = 8
    pooled: bool = True
    """Also add one vector of the caption to the timestep embedding: from CLIP's text embedding for
    "states" (Karlo), from the last token for "transformer" (GLIDE). False: the caption enters only
    through attention, so that with "states" CLIP's text embedding never reaches the network."""
    null: Literal["learned", "empty"] = "learned"
    """states: what replaces a dropped caption, learned vectors or CLIP's states of the empty
    caption (Karlo). For "transformer" it is always padding (GLIDE)."""
    checkpointing: Checkpointing = "none"
    """transformer: activations computed again in the backward pass ("selective" or "full")."""
    tokenizer: Literal["clip", "gpt2"] = "clip"
    """transformer: whose tokens it reads, CLIP's or those of GPT-2 (GLIDE). The merges of "gpt2"
    are part of the weights and come with them, from `unclip import glide`."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.null == "empty" and self.kind != "states":
            raise ValueError(
                'TextConfig.null "empty" is for kind "states" only: leave it "learned" for kind '
                f'"{self.kind}".'
            )
        if self.kind == "states" and self.states_width < 1:
            raise ValueError(
                'TextConfig of kind "states" needs states_width: set it to the width of CLIP\'s '
                "token states."
            )
        if self.kind != "none":
            check_least(self, 1, "context_length")
        if self.kind == "transformer":
            check_least(self, 1, "vocab_size", "width", "heads")
            check_least(self, 0, "depth")
        if self.kind == "transformer" and self.width % self.heads:
            raise ValueError(
                f"TextConfig.width {self.width} is no multiple of heads {self.heads}: choose heads "
                "that divide it."
            )
        if self.tokenizer == "gpt2" and self.kind != "transformer":
            raise ValueError(
                f'TextConfig.tokenizer "gpt2" is for kind "transformer", and this is "{self.kind}":'
                ' leave it "clip".'
            )
        if self.tokenizer == "gpt2" and self.vocab_size <= len(BYTES) + 1:
            raise ValueError(
                f'TextConfig.vocab_size is {self.vocab_size}, and tokenizer "gpt2" has 256 bytes, '
                "merges and a padding: set it to that of the weights (GLIDE: 50257)."
            )


class Context(NamedTuple):
    """A caption as the U-Net takes it."""

    context: Tensor | None
    """(B, S, context_width); None: no caption."""
    mask: Tensor | None
    """(B, S) bool, True where the token is visible; None: all."""
    pooled: Tensor | None
    """(B, pooled_width), added to the timestep embedding; None: nothing."""


def trim_padding(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cut tokens after the last one that is visible in any row; exact, as nothing sees the rest.

    On a GPU nothing is cut, since the host would have to wait for the mask.

    Args:
        x: (B, L, width).
        mask: (B, L) bool, True where the token is visible; None: all.

    Returns:
        x (B, n, width) and the mask (B, n), None where all that is left is visible.
    """
    if mask is None or mask.device.type != "cpu":
        return x, mask
    length = int(mask.any(0).nonzero().max()) + 1
    x, mask = x[:, :length], mask[:, :length]
    return x, None if bool(mask.all()) else mask


def replace_dropped(
    x: Tensor, mask: Tensor, keep: Tensor, null: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Put a null caption in the place of dropped ones, and cut padding by `trim_padding`.

    Args:
        x: (B, L, width), captions.
        mask: (B, L) bool, True where the token is visible.
        keep: (B,) bool, False where the caption is dropped.
        null: (n, width), tokens of the null caption, n <= L.

    Returns:
        as `trim_padding`.
    """
    is_null = torch.arange(x.shape[1], device=x.device) < len(null)
    mask = torch.where(keep[:, None], mask, is_null)
    null = F.pad(null, (0, 0, 0, x.shape[1] - len(null)))
    x = torch.where(keep[:, None, None], x.to(null.dtype), null)
    return trim_padding(x, mask)


class StatesText(nn.Module):
    """CLIP's token states -> Linear -> LayerNorm, and Linear of its text embedding (Karlo).

    A dropped caption is two states and an embedding: learned, or CLIP's for the empty caption
    (SOT, EOT), which `set_null` stores.
    """

    null_states: Tensor
    null_text_embed: Tensor | None

    def __init__(
        self, config: TextConfig, context_width: int, pooled_width: int, embed_dim: int
    ) -> None:
        super().__init__()
        self.needs = ("states", "text_embed") if pooled_width else ("states",)
        self.proj = nn.Linear(config.states_width, context_width)
        self.norm = nn.LayerNorm(context_width)
        kind = nn.Parameter if config.null == "learned" else nn.Buffer
        self.null_states = kind(torch.randn(2, config.states_width))
        self.pooled_proj = nn.Linear(embed_dim, pooled_width) if pooled_width else None
        self.null_text_embed = kind(torch.randn(embed_dim)) if pooled_width else None

    @torch.no_grad()
    def set_null(self, states: Tensor, text_embed: Tensor) -> None:
        """Store CLIP's states (2, states_width) and embedding (D,) of the empty caption."""
        self.null_states.copy_(states)
        if self.null_text_embed is not None:
            self.null_text_embed.copy_(text_embed)

    def forward(
        self,
        tokens: Tensor | None,
        mask: Tensor | None,
        text_embed: Tensor | None,
        states: Tensor | None,
        keep: Tensor,
    ) -> Context:
        null, kept = self.null_states, keep
        if states is None:  # every caption is dropped
            states, kept = null.new_zeros(len(keep), *null.shape), torch.zeros_like(keep)
            mask = None
        elif mask is None and tokens is not None:
            mask = caption_mask(tokens)
        if mask is None:
            mask = torch.ones_like(states[..., 0], dtype=torch.bool)
        states, mask = replace_dropped(states, mask, kept, null)
        context = self.norm(self.proj(states))
        if self.pooled_proj is None or self.null_text_embed is None:
            return Context(context, mask, None)
        embed = self.null_text_embed.expand(len(keep), -1)
        if text_embed is not None:
            embed = torch.where(keep[:, None], text_embed.to(embed.dtype), embed)
        pooled = self.pooled_proj(embed)
        return Context(context, mask, pooled)


class TransformerText(nn.Module):
    """GLIDE's text encoder: token + position, a learned embedding per padded position.

    Attention is not causal, and `pooled` comes from the last token. A dropped caption is padding
    only. All tokens are context: there is no mask.
    """

    needs = ("tokens",)
    merges: Tensor
    """Of the tokenizer "gpt2": (vocab_size - 257, 2), the ids that each merge joins."""

    def __init__(
        self, config: TextConfig, context_width: int, pooled_width: int, embed_dim: int
    ) -> None:
        super().__init__()
        self.config, self.length = config, config.context_length
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Parameter(torch.randn(self.length, config.width) * 0.01)
        self.padding_embedding = nn.Parameter(torch.randn(self.length, config.width) * 0.01)
        self.transformer = Transformer(
            config.width, config.depth, config.heads, checkpointing=config.checkpointing
        )
        same = context_width == config.width
        self.proj = nn.Identity() if same else nn.Linear(config.width, context_width)
        self.pooled_proj = nn.Linear(config.width, pooled_width) if pooled_width else None
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self._byte_pairs: BytePairs | None = None
        if config.tokenizer == "gpt2":
            count = config.vocab_size - len(BYTES) - 1
            self.merges = nn.Buffer(torch.zeros(count, 2, dtype=torch.int32))

    @property
    def byte_pairs(self) -> BytePairs:
        """The tokenizer "gpt2" that is part of the weights.

        Raises:
            UserError: there is none in them: they were never loaded.
        """
        if self._byte_pairs is None:
            if not bool(self.merges.any()):
                raise UserError(
                    'text.tokenizer is "gpt2", whose merges come with weights: start from a '
                    "release that has them (--init), such as one of `unclip import glide`."
                )
            self._byte_pairs = BytePairs(self.merges.tolist())
        return self._byte_pairs

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._byte_pairs = None  # other merges may have come

    def _mask(self, tokens: Tensor) -> Tensor:
        """Which tokens are the caption's."""
        if self.config.tokenizer == "gpt2":
            return tokens != self.config.vocab_size - 1
        return caption_mask(tokens)

    def forward(
        self,
        tokens: Tensor | None,
        mask: Tensor | None,
        text_embed: Tensor | None,
        states: Tensor | None,
        keep: Tensor,
    ) -> Context:
        if tokens is None:
            tokens = keep.new_zeros(len(keep), self.length, dtype=torch.int64)
            mask = torch.zeros_like(tokens, dtype=torch.bool)
        if tokens.shape[1] > self.length:
            raise ValueError(
                f"A caption has {tokens.shape[1]} tokens and context_length is {self.length}: "
                "raise it or tokenize to fewer."
            )
        missing = self.length - tokens.shape[1]
        mask = self._mask(tokens) if mask is None else mask
        mask = F.pad(mask & keep[:, None], (0, missing))
        x = self.token_embedding(F.pad(tokens, (0, missing))) + self.position_embedding
        x = self.transformer(torch.where(mask[..., None], x, self.padding_embedding))
        pooled = None if self.pooled_proj is None else self.pooled_proj(x[:, -1])
        return Context(self.proj(x), None, pooled)


class TextContext(nn.Module):
    """The caption's part of the conditions, of any kind.

    Args:
        config: the kind and its own sizes.
        context_width: width of the context tokens, the U-Net's.
        pooled_width: width of what is added to the timestep embedding, four times the U-Net's
            `width`; 0: nothing.
        embed_dim: width of CLIP's text embedding, the source of `pooled` for "states".

    Raises:
        ValueError: a caption without `context_width`.
    """

    def __init__(
        self, config: TextConfig, context_width: int = 0, pooled_width: int = 0, embed_dim: int = 0
    ) -> None:
        super().__init__()
        if config.kind != "none" and context_width < 1:
            raise ValueError(
                f'Text of kind "{config.kind}" needs a context to go into: set context_width of '
                "the U-Net."
            )
        pooled_width = pooled_width if config.pooled else 0
        self.config = config
        sizes = context_width, pooled_width, embed_dim
        self.encoder: StatesText | TransformerText | None = None
        if config.kind == "states":
            self.encoder = StatesText(config, *sizes)
        elif config.kind == "transformer":
            self.encoder = TransformerText(config, *sizes)

    @property
    def byte_pairs(self) -> BytePairs | None:
        """The tokenizer of its own; None: it reads CLIP's tokens.

        Raises:
            UserError: it is part of the weights, and they were never loaded.
        """
        if isinstance(self.encoder, TransformerText) and self.config.tokenizer == "gpt2":
            return self.encoder.byte_pairs
        return None

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """B captions -> (B, context_length) int64 on the CPU, by the tokenizer of its own."""
        if self.byte_pairs is None:
            raise ValueError("This text reads CLIP's tokens: tokenize with the CLIP.")
        return self.byte_pairs.tokenize(captions, self.config.context_length)

    def truncated_text(self, caption: str) -> str:
        """The end of a caption that `tokenize` cuts off, in lower case; "" where all is read."""
        if self.byte_pairs is None:
            raise ValueError("This text reads CLIP's tokens: ask the CLIP what it cuts off.")
        ids = self.byte_pairs.encode(caption)
        return self.byte_pairs.decode(ids[self.config.context_length :]).strip()

    def set_null(self, states: Tensor, text_embed: Tensor) -> None:
        """Store what replaces a dropped caption with `null: empty`; see `StatesText.set_null`."""
        if not isinstance(self.encoder, StatesText) or self.config.null != "empty":
            raise ValueError("Only text of kind states with null: empty stores the empty caption.")
        self.encoder.set_null(states, text_embed)

    def forward(
        self,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        text_embed: Tensor | None = None,
        states: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Context:
        """Encode captions. What the kind needs and is None counts as dropped, except in training.

        Args:
            tokens: (B, L) int64, CLIP's or those of `tokenize`.
            mask: (B, L) bool, True up to and including EOT; None: computed from `tokens`.
            text_embed: (B, D) float, CLIP's text embedding.
            states: (B, L, states_width) float, CLIP's token states.
            keep: (B,) bool, False where the caption is dropped; None: all are kept.

        Raises:
            ValueError: in training without what the kind needs; more tokens than `context_length`.
        """
        if self.encoder is None:
            return Context(None, None, None)
        given = {"tokens": tokens, "states": states, "text_embed": text_embed}
        missing = [name for name in self.encoder.needs if given[name] is None]
        if missing and self.training and torch.is_grad_enabled():
            raise ValueError(
                f'Text of kind "{self.config.kind}" trains on {" and ".join(missing)}, which the '
                "batch lacks: let the data give it."
            )
        if keep is None:
            inputs = [value for value in given.values() if value is not None]
            if not inputs:
                raise ValueError(
                    "TextContext needs a caption, or `keep` to say for how many samples it is "
                    "dropped."
                )
            keep = torch.ones(len(inputs[0]), dtype=torch.bool, device=inputs[0].device)
        return self.encoder(tokens, mask, text_embed, states, keep)
