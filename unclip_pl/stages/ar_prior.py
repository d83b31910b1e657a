"""The autoregressive prior P(z_i | y): CLIP image embeddings from captions, one code after another
(unCLIP section 2.2).

An image embedding is a sequence of quantised PCA coordinates, fitted to the store before the first
step; cross-entropy on the codes.
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
from unclip_pl.networks.ar_prior import ARPriorConfig, ARPriorNet
from unclip_pl.networks.long_text import caption_of
from unclip_pl.networks.quantizer import EmbeddingQuantizer
from unclip_pl.networks.text import TextConfig
from unclip_pl.stages.base import (
    OptimizerConfig,
    Stage,
    as_config,
    check_clip,
    check_length,
    check_own_tokens,
    empty_caption,
)
from unclip_pl.utils.errors import UserError

ROWS = 131072
"""Embeddings that the buckets are cut from: 128 for each of 1,024. Mean and covariance are of
all."""


@dataclass(frozen=True)
class SamplingConfig:
    """How to draw; every value can be changed after training."""

    guidance_scale: float = 1.0
    """s of null + s (conditional - null) on the logits; 1 is no guidance and costs one pass instead
    of two."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most probable code."""
    top_p: float = 1.0
    """Draw from the most probable codes that hold this share of the probability."""
    dot_percentile: float = 50.0
    """z_i . z_t is drawn from the data's distribution above this percentile (the paper tried 50,
    70, 85, 95; 50 was best)."""

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
    """Trains on `image_embed`, `text_embed` and `tokens` (or `text_states`, or `text_tokens` that
    are longer) of a batch; see `TextConfig` for the caption.

    Args:
        net: the causal Transformer; `embed_dim` must be the CLIP's.
        text: how the caption becomes the prefix.
        max_error: share of the variance that PCA may lose (the paper: below 1 %); data for which
            `net.max_codes` lose more are refused. 0 keeps `net.max_codes` whatever they lose.
        drop_text: how often caption and z_t are left out together, with the dot product unless
            `net.drop_dot` is false, so that guidance has a null branch.
    """

    def __init__(
        self,
        net: ARPriorConfig = ARPriorConfig(),
        text: TextConfig = TextConfig(),
        max_error: float = 0.01,
        drop_text: float = 0.1,
        sampling: SamplingConfig = SamplingConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(
            lr=1.6e-4, betas=(0.9, 0.91), eps=1e-10, weight_decay=0.04
        ),
    ) -> None:
        super().__init__()
        self.remember(
            optimizer,
            net=net,
            text=text,
            max_error=max_error,
            drop_text=drop_text,
            sampling=sampling,
        )
        self.net_config, self.text_config = (
            as_config(ARPriorConfig, net),
            as_config(TextConfig, text),
        )
        self.sampling, self.drop_text = as_config(SamplingConfig, sampling), drop_text
        self.quantizer = EmbeddingQuantizer(
            self.net_config.embed_dim, self.net_config.max_codes, self.net_config.buckets, max_error
        )
        self.net = ARPriorNet(self.net_config, self.text_config)
        self.needs = (
            "text_embed",
            *{"states": ("text_states",), "transformer": ("tokens",), "none": ()}[
                self.text_config.kind
            ],
        )

    def check_data(self, data: Any) -> None:
        check_clip(data, self.net_config.embed_dim, self.text_config)
        if self.text_config.kind != "none":
            check_length(data, self.text_config)
        check_own_tokens(data, self.text_config)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and not self.quantizer.codes and data is not None:
            self.fit_quantizer(data.store, data.train_shards)
        if stage == "fit" and self.text_config.null == "empty" and hasattr(data, "clip"):
            self.net.set_null(*empty_caption(data.clip))

    def fit_quantizer(self, store: EmbeddingStore, shards: Sequence[str]) -> None:
        """Fit PCA, buckets and the dot product's distribution to the store's embeddings of
        `shards`, and say what the codes cost.

        Raises:
            UserError: the store has no such embeddings, too few, or none of this width; they need
                more codes than `net.max_codes`.
        """
        image_embed, text_embed = spread_rows(store, shards, ROWS)
        if image_embed.shape[1] != self.net_config.embed_dim:
            raise UserError(
                f"The store {store.folder} has embeddings of {image_embed.shape[1]} numbers and "
                "model.net.embed_dim is "
                f"{self.net_config.embed_dim}: set it to {image_embed.shape[1]}."
            )
        statistics = store.statistics(shards)
        self.quantizer.fit(statistics.mean, statistics.covariance, image_embed, text_embed)
        error = self.quantizer.error(image_embed[:8192])
        rank_zero_info(
            f"AR prior: {self.quantizer.codes} codes from {statistics.count} embeddings of "
            f"{self.net_config.embed_dim} numbers; PCA alone loses "
            f"{error.pca_mse:.2%} of the variance (cosine {error.pca_cosine:.4f}), with buckets "
            f"{error.mse:.2%} (cosine {error.cosine:.4f})."
        )

    def prefix(self, batch: dict, keep: Tensor, dot: Tensor | None) -> Tensor:
        """What stands before the codes of `len(keep)` samples; the null where `keep` (B,) is False,
        or where the batch has no text at all.

        Raises:
            ValueError: a part of the text is missing, or in training all of it.
        """
        missing = [name for name in self.needs if batch.get(name) is None]
        if missing and (len(missing) < len(self.needs) or self.training):
            raise ValueError(
                f"The AR prior needs {' and '.join(missing)} beside what the batch has: let the "
                "data give it, or leave all text out to sample."
            )
        given = {} if missing else caption_of(batch, self.text_config)
        return self.net.prefix(keep, dot, None if missing else batch["text_embed"], **given)

    def loss(
        self, batch: dict, generator: torch.Generator | None = None, drop_text: float | None = None
    ) -> dict[str, Tensor]:
        """As every stage's; `drop_text` stands in for the stage's own share."""
        share = self.drop_text if drop_text is None else drop_text
        image_embed, text_embed = batch["image_embed"], batch["text_embed"]
        codes, dot = (
            self.quantizer.encode(image_embed),
            self.quantizer.encode_dot(image_embed, text_embed),
        )
        where = generator.device if generator else image_embed.device
        keep = (
            torch.rand(len(codes), generator=generator, device=where).to(image_embed.device)
            >= share
        )
        logits = self.net(self.prefix(batch, keep, dot), codes[:, :-1])
        nats = F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())
        accuracy = (logits.detach().argmax(-1) == codes).float().mean()
        return {"loss": nats, "accuracy": accuracy}

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Also `val/loss_captioned`, with no caption dropped."""
        super().validation_step(batch, batch_idx)
        loss = self.loss(batch, torch.Generator().manual_seed(batch_idx), drop_text=0.0)["loss"]
        self.log("val/loss_captioned", loss, batch_size=len(batch["key"]), sync_dist=True)

    @torch.no_grad()
    def sample(
        self,
        batch: dict,
        noise: Noise,
        sampling: SamplingConfig | None = None,
        callback: Callable[[int, int], object] | None = None,
    ) -> Tensor:
        """Draw image embeddings for the captions in `batch`.

        Args:
            batch: `text_embed` (B, D) and the caption's entries (`tokens`, `text_mask`,
                `text_states`); nothing for draws without a text.
            noise: one generator an embedding; their number is B.
            sampling: settings other than the stage's own.
            callback: called with (step, steps) after each code.

        Returns:
            float32 (B, D) on CLIP's own scale.

        Raises:
            ValueError: the quantiser is not fitted; only a part of the text is given.
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
    """At most `count` image and text embeddings, evenly spread over the rows of `shards`: twice (N,
    D) float16."""
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
