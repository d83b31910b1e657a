"""The autoregressive prior's network (unCLIP section 2.2).

A causal Transformer over caption, z_t, dot-product token and the codes of z_i:

    reads     encoded caption (L) | z_t | z_i . z_t | code 1 | ... | code K-1
    predicts                                code 1  | code 2 | ... | code K

The prediction is K times logits over the buckets. The paper's latent decoder has 384 positions, too
few for 256 text tokens and 319 codes, and its text calls the caption a prefix, so it is one here.
Learned embeddings, not a mask, fill the empty positions of a prefix. The paper can be read both
ways on where the dot product goes and on whether a dropped text drops it too: both are settings.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.networks.checkpointing import Checkpointing
from unclip_pl.networks.embedding import EmbeddingNormalizer
from unclip_pl.networks.text import TextConfig, TextContext
from unclip_pl.networks.transformer import Past, Transformer
from unclip_pl.utils.choices import check_choices, check_least


@dataclass(frozen=True)
class ARPriorConfig:
    """The causal Transformer. The caption takes `context_length` positions of its `TextConfig`."""

    embed_dim: int = 256
    """D, the CLIP's."""
    width: int = 256
    depth: int = 6
    heads: int = 4
    max_codes: int = 64
    """The most codes an embedding may have; the data decide (see `EmbeddingQuantizer`)."""
    buckets: int = 1024
    dot_first: bool = False
    """The dot-product token comes before the caption ("prepended" to the whole sequence), not
    between z_t and the codes."""
    drop_dot: bool = True
    """A dropped text drops the dot product too, which reveals z_t. The paper mentions only the text
    as dropped: false keeps the dot product, in the unconditional branch of guidance as well."""
    checkpointing: Checkpointing = "none"
    """Activations computed again in the backward pass: "none", "selective" or "full"."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self, 1, "embed_dim", "width", "depth", "heads", "max_codes")
        check_least(self, 2, "buckets")


class ARPriorNet(nn.Module):
    """Caption, CLIP text embedding and codes so far to logits of the next code.

    Args:
        config: its sizes.
        text: the caption: "states" (CLIP's token states), "transformer" (trained on the tokens;
            `depth: 0` is their embeddings only) or "none".
    """

    def __init__(self, config: ARPriorConfig, text: TextConfig) -> None:
        super().__init__()
        width = config.width
        self.config, self.length = config, 0 if text.kind == "none" else text.context_length
        self.text = TextContext(text, width, 0, config.embed_dim)
        self.padding_embedding: nn.Parameter | None = None  # a "transformer" pads by itself
        if text.kind == "states":
            self.padding_embedding = nn.Parameter(torch.randn(self.length, width) * 0.01)
        self.normalizer = EmbeddingNormalizer(config.embed_dim, "unit")
        self.text_embed_proj = nn.Linear(config.embed_dim, width)
        if text.null == "learned":
            self.null_text_embed = nn.Parameter(torch.randn(width) * 0.01)
        else:
            self.empty_text_embed = nn.Buffer(torch.ones(config.embed_dim))
        # The last row is for a dropped text.
        self.dot_embedding = nn.Embedding(config.buckets + 1, width)
        # The same for all dimensions: a bucket is the same quantile in each.
        self.code_embedding = nn.Embedding(config.buckets, width)
        positions = self.length + 1 + config.max_codes
        self.position_embedding = nn.Parameter(torch.randn(positions, width) * 0.01)
        self.transformer = Transformer(
            width, config.depth, config.heads, causal=True, checkpointing=config.checkpointing
        )
        self.head = nn.Linear(width, config.buckets)
        with torch.no_grad():
            for table in (self.dot_embedding, self.code_embedding, self.head):
                table.weight[: config.buckets] = smooth_table(config.buckets, width) * 0.02
            self.dot_embedding.weight[-1].normal_(std=0.02)
            self.head.bias.zero_()

    def prefix(
        self,
        keep: Tensor,
        dot: Tensor | None = None,
        text_embed: Tensor | None = None,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Tensor:
        """The sequence in front of the codes. Without `text_embed` every text is dropped.

        Args:
            keep: (B,) bool, False where caption and z_t are dropped, and the dot product with them
                if `drop_dot` is set.
            dot: (B,) int64, bucket of z_i . z_t.
            text_embed: (B, D), CLIP's text embedding z_t on its own scale.
            tokens: (B, L) int64 of the caption.
            mask: (B, L) bool, True up to and including EOT; None: computed from `tokens`.
            states: (B, L, states_width) float, CLIP's token states, for text of kind "states".

        Returns:
            (B, L + 2, width).

        Raises:
            ValueError: more tokens than `context_length`.
        """
        if text_embed is None:
            keep = torch.zeros_like(keep)
        z_t = self._null_text_embed().expand(len(keep), -1)
        if text_embed is not None:
            projected = self.text_embed_proj(self.normalizer.normalize(text_embed).to(z_t.dtype))
            z_t = torch.where(keep[:, None], projected, z_t)
        dropped = torch.full_like(keep, self.config.buckets, dtype=torch.int64)
        if dot is None:
            bucket = dropped
        else:
            bucket = torch.where(keep, dot, dropped) if self.config.drop_dot else dot
        dot_token = self.dot_embedding(bucket).to(z_t.dtype)[:, None]
        parts = [z_t[:, None]]
        if self.length:
            if states is not None and states.shape[1] > self.length:
                raise ValueError(
                    f"A caption has {states.shape[1]} tokens and text.context_length is "
                    f"{self.length}: raise it to that."
                )
            caption = self.text(tokens, mask, states=states, keep=keep)
            parts.insert(0, self._padded(caption.context, caption.mask).to(z_t.dtype))
        parts.insert(0 if self.config.dot_first else len(parts), dot_token)
        x = torch.cat(parts, dim=1)
        return x + self.position_embedding[: x.shape[1]]

    def set_null(self, states: Tensor, text_embed: Tensor) -> None:
        """Store CLIP's output for the empty caption, which `text.null` "empty" needs.

        It is the states (2, states_width) and the embedding (D,).
        """
        self.text.set_null(states, text_embed)
        self.empty_text_embed.copy_(text_embed)

    def _null_text_embed(self) -> Tensor:
        """(width,): what replaces the z_t of a dropped caption."""
        if self.text.config.null == "learned":
            return self.null_text_embed
        return self.text_embed_proj(self.normalizer.normalize(self.empty_text_embed[None]))[0]

    def _padded(self, context: Tensor, mask: Tensor | None) -> Tensor:
        """The caption at full length, with learned embeddings where it has no token.

        (B, S, width), (B, S) -> (B, L, width).
        """
        if self.padding_embedding is None:
            return context
        if mask is None:
            mask = context.new_ones(context.shape[:2], dtype=torch.bool)
        missing = self.length - context.shape[1]
        mask, context = F.pad(mask, (0, missing)), F.pad(context, (0, 0, 0, missing))
        return torch.where(mask[..., None], context, self.padding_embedding)

    def embed_codes(self, codes: Tensor, first: int = 0) -> Tensor:
        """Codes from index `first` on as tokens. (B, n) int64 -> (B, n, width)."""
        start = self.length + 2 + first
        return self.code_embedding(codes) + self.position_embedding[start : start + codes.shape[1]]

    def forward(self, prefix: Tensor, codes: Tensor) -> Tensor:
        """Logits of the code after the prefix and after each of `codes`.

        (B, P, width), (B, n) int64 -> (B, n + 1, buckets).
        """
        x = torch.cat([prefix, self.embed_codes(codes).to(prefix.dtype)], dim=1)
        return self.head(self.transformer(x, last=codes.shape[1] + 1))

    @torch.no_grad()
    def generate(
        self,
        prefix: Tensor,
        uniform: Tensor,
        null: Tensor | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        callback: Callable[[int, int], object] | None = None,
    ) -> Tensor:
        """Draw one code after another, caching keys and values of earlier tokens.

        Args:
            prefix: (B, P, width), with its text.
            uniform: (B, K) in [0, 1), one number per code.
            null: (B, P, width), without text; None for no guidance.
            guidance_scale: s of uncond + s (cond - uncond), on the logits; not used without
                `null`.
            temperature: 0 takes the most probable code; see `sample_top_p`.
            top_p: (0, 1], the share of the probability that is kept; see `sample_top_p`.
            callback: called with (step, steps) after each code.

        Returns:
            (B, K) int64.
        """
        x = prefix if null is None else torch.cat([prefix, null])
        past, codes = None, []
        steps = uniform.shape[1]
        for k in range(steps):
            hidden, past = self.step(x, past)
            logits = self.head(hidden).float()
            if null is not None:
                cond, uncond = logits.chunk(2)
                logits = uncond + guidance_scale * (cond - uncond)
            codes.append(sample_top_p(logits, uniform[:, k], temperature, top_p))
            if k + 1 < steps:
                x = self.embed_codes(codes[-1][:, None], k).to(prefix.dtype)
                x = x if null is None else torch.cat([x, x])
            if callback:
                callback(k + 1, steps)
        return torch.stack(codes, dim=1)

    def step(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """Read further tokens (B, n, width): the last hidden state (B, width), and the new past."""
        hidden, past = self.transformer.extend(x, past, last=1)
        return hidden[:, 0], past


def smooth_table(buckets: int, width: int, waves: int = 16) -> Tensor:
    """Random smooth functions of the bucket, of unit variance, (buckets, width).

    Buckets are ordered, and neighbours start with similar embeddings.
    """
    level = (torch.arange(buckets) + 0.5) / buckets
    frequency = torch.arange(1, waves + 1)
    waves_of = torch.cos(torch.pi * level[:, None] * frequency) * frequency**-0.5
    return waves_of @ torch.randn(waves, width) * (2 / (1 / frequency).sum()).sqrt()


def sample_top_p(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> Tensor:
    """Sample from softmax(logits / temperature), cut to its nucleus (Holtzman et al. 2020).

    The distribution function is inverted, with the buckets in their order.

    Args:
        logits: (B, N) float32.
        uniform: (B,) in [0, 1); numbers close to each other give buckets close to each other.
        temperature: 0 takes the most probable.
        top_p: the nucleus is the smallest set of most probable buckets that together have at least
            this probability; 1: all buckets.

    Returns:
        (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probability = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probability.sort(dim=-1, descending=True, stable=True)
        # The most probable bucket is always inside, because 0 < top_p.
        inside = ordered.cumsum(-1) - ordered < top_p
        probability = probability * torch.zeros_like(inside).scatter(-1, order, inside)
    upto = probability.cumsum(-1)
    total = upto[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniform.to(upto)[:, None] * total, below_total)
    return torch.searchsorted(upto, target, right=True)[:, 0]
