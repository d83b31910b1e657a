"""The autoregressive prior P(z_i | y): CLIP image embeddings from captions (unCLIP section 2.2).

One code is drawn after another.

An image embedding is a sequence of quantised PCA coordinates, fitted to the store before the first
step. The loss is cross-entropy on the codes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from unclip_pl.data.store import EmbeddingStore
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.training_draws import draw_keep_masks
from unclip_pl.networks.ar_prior import ARPriorConfig, ARPriorNet
from unclip_pl.networks.long_text import caption_inputs, has_own_tokenizer
from unclip_pl.networks.quantizer import EmbeddingQuantizer
from unclip_pl.networks.text import TextConfig
from unclip_pl.stages.base import OptimizerConfig, Stage
from unclip_pl.stages.data_checks import (
    check_captions,
    check_clip,
    check_length,
    check_tokens,
    empty_caption,
)
from unclip_pl.utils.choices import check_share
from unclip_pl.utils.errors import UserError

BUCKET_SAMPLE = 131072
"""Embeddings that the buckets are cut from: 128 for each of 1,024. Mean and covariance come from
all embeddings."""
REQUIRED_INPUTS = {
    "none": ("text_embed",),
    "states": ("text_embed", "text_states"),
    "transformer": ("text_embed", "tokens"),
}
"""What a batch must have, by the kind of text."""


@dataclass(frozen=True)
class ARPriorSamplingConfig:
    """How the AR prior samples; every value can be changed after training."""

    guidance_scale: float = 1.0
    """s of uncond + s (cond - uncond) on the logits; 1 is no guidance and costs one pass instead of
    two."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most probable code."""
    top_p: float = 1.0
    """Sample from the most probable codes that together have this probability."""
    dot_percentile: float = 50.0
    """z_i . z_t is drawn from the part of its distribution above this percentile (the paper tried
    50, 70, 85 and 95; 50 was best)."""

    def __post_init__(self) -> None:
        if not 1 <= self.guidance_scale < float("inf"):
            raise ValueError(
                f"guidance_scale of the AR prior is {self.guidance_scale}: give 1 (no guidance) or "
                "more."
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature of the AR prior is {self.temperature}: give 0 (the most probable "
                "code) or more."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p of the AR prior is {self.top_p}: give a share above 0 and up to 1."
            )
        if not 0 <= self.dot_percentile < 100:
            raise ValueError(
                f"dot_percentile of the AR prior is {self.dot_percentile}: give a number from 0 to "
                "below 100."
            )


class ARPrior(Stage):
    """Trains on `image_embed`, `text_embed` and the caption of a batch.

    The caption is `tokens` (or `text_states`, or `text_tokens` that are longer); see `TextConfig`.

    Args:
        net: the causal Transformer; `embed_dim` must be the CLIP's.
        text: how the caption becomes the prefix.
        max_error: share of the variance that PCA may lose (the paper: below 1 %). Data are refused
            if `net.max_codes` codes lose more. 0: use `net.max_codes` codes whatever they lose.
        cond_dropout: share of samples that lose caption and z_t together, and the dot product too
            unless `net.drop_dot` is false, so that guidance has an unconditional branch.
    """

    scalars = ("loss", "accuracy")
    captioned_dropout = 0.0

    def __init__(
        self,
        net: ARPriorConfig = ARPriorConfig(),
        text: TextConfig = TextConfig(),
        max_error: float = 0.01,
        cond_dropout: float = 0.1,
        sampling: ARPriorSamplingConfig = ARPriorSamplingConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(
            lr=1.6e-4, betas=(0.9, 0.91), eps=1e-10, weight_decay=0.04
        ),
    ) -> None:
        super().__init__(
            net=net,
            text=text,
            max_error=max_error,
            cond_dropout=cond_dropout,
            sampling=sampling,
            optimizer=optimizer,
        )
        self.net_config: ARPriorConfig = self.config.net
        self.text_config: TextConfig = self.config.text
        if has_own_tokenizer(self.text_config):
            raise ValueError(
                f'model.text.tokenizer is "{self.text_config.tokenizer}", and an AR prior reads '
                'the tokens of CLIP: set it to "clip".'
            )
        self.sampling: ARPriorSamplingConfig = self.config.sampling
        self.cond_dropout = cond_dropout
        check_share("model.cond_dropout", cond_dropout)
        self.quantizer = EmbeddingQuantizer(
            self.net_config.embed_dim, self.net_config.max_codes, self.net_config.buckets, max_error
        )
        self.net = ARPriorNet(self.net_config, self.text_config)

    def check_data(self, data: Any) -> None:
        check_clip(data, self.net_config.embed_dim, self.text_config)
        if self.text_config.kind != "none":
            check_length(data, self.text_config)
        check_tokens(data, self.text_config)
        check_captions(data)

    def use_data(self, data: Any) -> None:
        super().use_data(data)
        if not self.quantizer.codes:
            self.fit_quantizer(data.store, data.train_shards)
        if self.text_config.null == "empty" and hasattr(data, "clip"):
            self.net.set_null(*empty_caption(data.clip))

    def fit_quantizer(self, store: EmbeddingStore, shards: Sequence[str]) -> None:
        """Fit PCA, buckets and the distribution of z_i . z_t, and report what the codes lose.

        Args:
            store: embeddings of the training data.
            shards: those of the store to use.

        Raises:
            UserError: the store has no such embeddings, too few, or none of this width; or they
                need more codes than `net.max_codes`.
        """
        image_embed, text_embed = spread_rows(store, shards, BUCKET_SAMPLE)
        if image_embed.shape[1] != self.net_config.embed_dim:
            raise UserError(
                f"The store {store.folder} has embeddings of {image_embed.shape[1]} numbers and "
                f"model.net.embed_dim is {self.net_config.embed_dim}: set it to "
                f"{image_embed.shape[1]}."
            )
        statistics = store.statistics(shards)
        self.quantizer.fit(statistics.mean, statistics.covariance, image_embed, text_embed)
        error = self.quantizer.error(image_embed[:8192])
        rank_zero_info(
            f"AR prior: {self.quantizer.codes} codes from {statistics.count} embeddings of "
            f"{self.net_config.embed_dim} numbers. PCA loses {error.pca_mse:.2%} of the variance "
            f"(cosine {error.pca_cosine:.4f}), PCA and buckets {error.mse:.2%} (cosine "
            f"{error.cosine:.4f})."
        )

    def prefix(self, batch: dict, keep: Tensor, dot: Tensor | None) -> Tensor:
        """The sequence in front of the codes.

        Args:
            batch: see `sample`.
            keep: (B,) bool; False, or a batch without any text: the null replaces the text.
            dot: (B,) int64, bucket of z_i . z_t.

        Returns:
            (B, L + 2, width).

        Raises:
            ValueError: a part of the text is missing, or in training all of it.
        """
        required = REQUIRED_INPUTS[self.text_config.kind]
        missing = [name for name in required if batch.get(name) is None]
        if missing and (len(missing) < len(required) or self.training):
            raise ValueError(
                f"The AR prior needs {' and '.join(missing)} in addition to what the batch has: "
                "let the data give it, or leave all text out to sample."
            )
        if missing:
            return self.net.prefix(keep, dot)
        caption = caption_inputs(batch, self.text_config)
        return self.net.prefix(keep, dot, batch["text_embed"], **caption)

    def loss(
        self,
        batch: dict,
        generator: torch.Generator | None = None,
        cond_dropout: float | None = None,
    ) -> dict[str, Tensor]:
        """See `Stage.loss`; `cond_dropout` replaces the stage's own."""
        dropout = self.cond_dropout if cond_dropout is None else cond_dropout
        image_embed, text_embed = batch["image_embed"], batch["text_embed"]
        codes = self.quantizer.encode(image_embed)
        dot = self.quantizer.encode_dot(image_embed, text_embed)
        (keep,) = draw_keep_masks(len(codes), [dropout], image_embed.device, generator)
        logits = self.net(self.prefix(batch, keep, dot), codes[:, :-1])
        nats = F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())
        accuracy = (logits.detach().argmax(-1) == codes).float().mean()
        return {"loss": nats, "accuracy": accuracy}

    def count_steps(self, sampling: Any = None) -> int:
        """How many steps `sample` reports: one for each code, whatever the settings."""
        return self.quantizer.codes

    @torch.no_grad()
    def sample(
        self,
        batch: dict,
        noise: Noise,
        sampling: ARPriorSamplingConfig | None = None,
        callback: Callable[[int, int], object] | None = None,
    ) -> Tensor:
        """Draw image embeddings for the captions in `batch`.

        Args:
            batch: `text_embed` (B, D) and the caption's entries (`tokens`, `text_mask`,
                `text_states`); empty to sample without text.
            noise: one generator per embedding; their number is B.
            sampling: settings in place of the stage's own.
            callback: called with (step, steps) after each code.

        Returns:
            float32 (B, D) on CLIP's own scale.

        Raises:
            ValueError: the quantiser is not fitted, or the batch has only a part of the text.
        """
        settings, size = sampling or self.sampling, len(noise)
        uniform = noise.uniform((1 + self.quantizer.codes,), self.device)
        dot = self.quantizer.draw_dot(uniform[:, 0], settings.dot_percentile)
        keep = torch.ones(size, dtype=torch.bool, device=self.device)
        prefix = self.prefix(batch, keep, dot)
        null = None if settings.guidance_scale == 1 else self.prefix(batch, ~keep, dot)
        codes = self.net.generate(
            prefix,
            uniform[:, 1:],
            null,
            settings.guidance_scale,
            settings.temperature,
            settings.top_p,
            callback,
        )
        return self.quantizer.decode(codes)


def spread_rows(store: EmbeddingStore, shards: Sequence[str], count: int) -> tuple[Tensor, Tensor]:
    """At most `count` image and text embeddings, evenly spread over the rows of `shards`.

    Returns:
        image embeddings and text embeddings, both (N, D) float16.

    Raises:
        UserError: there are no shards.
    """
    step = max(1, -(-sum(store.row_counts(shards)) // count))
    images, texts, first = [], [], 0
    for rows in map(store.shard, shards):
        images.append(torch.from_numpy(rows.image_embed[first::step].copy()))
        texts.append(torch.from_numpy(rows.text_embed[first::step].copy()))
        first = (first - len(rows.keys)) % step
    if not images:
        raise UserError(
            f"The AR prior fits its codes to the training shards of the store {store.folder}, and "
            "there are none: set data.train."
        )
    return torch.cat(images), torch.cat(texts)
