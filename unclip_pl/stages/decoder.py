"""The decoder P(x | z_i, y): a 64x64 image from a CLIP image embedding (unCLIP section 2.1).

Its caption is an optional second condition, or the only one (GLIDE).

An ADM U-Net. The embedding is added to the timestep embedding and gives four extra context tokens.
The loss is hybrid, with learned variance.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unclip_pl.diffusion.guidance import classifier_free_guidance, thresholded
from unclip_pl.diffusion.losses import training_losses
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig, Predict, Process
from unclip_pl.diffusion.sampler_config import SamplerConfig
from unclip_pl.diffusion.samplers import SAMPLERS
from unclip_pl.diffusion.schedule import Schedule, Spacing
from unclip_pl.diffusion.training_draws import draw_keep_masks, draw_timesteps_and_noise
from unclip_pl.networks.embedding import EmbeddingNormalizer
from unclip_pl.networks.long_text import caption_inputs, has_own_tokenizer, reads_ids
from unclip_pl.networks.text import TextConfig, TextContext
from unclip_pl.networks.unet import UNet, UNetConfig
from unclip_pl.stages.base import OptimizerConfig, Stage
from unclip_pl.stages.data_checks import (
    check_captions,
    check_clip,
    check_length,
    check_tokens,
    empty_caption,
)
from unclip_pl.utils.choices import check_choices, check_share
from unclip_pl.utils.errors import UserError


@dataclass(frozen=True)
class CondDropoutConfig:
    """Conditions dropped in training, so that guidance has an unconditional branch.

    Both are dropped independently (unCLIP section 2.1).
    """

    embed: float = 0.1
    """Probability that the CLIP embedding is dropped."""
    text: float = 0.5
    """Probability that the caption is dropped."""
    null_embed: Literal["learned", "zeros"] = "learned"
    """What replaces a dropped embedding."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_share("model.cond_dropout.embed", self.embed)
        check_share("model.cond_dropout.text", self.text)


@dataclass(frozen=True)
class DecoderSamplingConfig(SamplerConfig):
    """How the decoder samples; every value can be changed after training."""

    owner: ClassVar[str] = "The decoder"

    sampler: str = "ddpm"
    steps: Spacing = 250
    """A number, numbers for equal sections, "fast27" or "ddimK"; see `Schedule.respaced`."""
    guidance_scale: float = 1.0
    """s of uncond + s (cond - uncond); 1 is no guidance and costs one pass instead of two."""
    threshold: Literal["static", "dynamic"] | None = "static"
    """Keeps x_0 in [-1, 1] at each step: by clamping ("static") or as Imagen does ("dynamic")."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(
                f"The decoder's guidance_scale is {self.guidance_scale}: give 1 (no guidance) or "
                "more, or 0 for the unconditional branch only."
            )


class Decoder(Stage):
    """Trains on `image`, `image_embed` and `tokens` (or `text_states`, `text_embed`) of a batch.

    Which of them a caption needs depends on `text.kind` (see `TextConfig`).

    With `condition: text` the caption's CLIP embedding, `text_embed`, replaces `image_embed` in
    training and sampling: the paper's baseline without a prior (section 5.1). With `condition:
    none` the caption is all that it sees (GLIDE); where `text.tokenizer` is its own as well, it has
    nothing to do with a CLIP and reads `caption`.

    Args:
        net: the U-Net; `embed_dim` must be the CLIP's (0 with `condition: none`), `out_channels` 6
            where `diffusion` learns the variance, else 3.
        text: how the caption becomes context; `kind: none` leaves it out.
        cond_dropout: how often training drops the embedding and the caption.
        normalizer: scale of the embedding as the network sees it: "unit" (norm 0.5375 sqrt(D), the
            17.2 at D = 1024 that the paper has in its prior, and does not mention for the decoder)
            or "none".
        condition: which embedding of CLIP is the condition: "image", "text" or "none".

    Raises:
        ValueError: settings that do not fit each other.
    """

    null_embed: Tensor | None
    """(D,), replaces a dropped embedding, on the network's scale; None with `condition: none`."""

    def __init__(
        self,
        net: UNetConfig = UNetConfig(),
        text: TextConfig = TextConfig(),
        diffusion: DiffusionConfig = DiffusionConfig(),
        cond_dropout: CondDropoutConfig = CondDropoutConfig(),
        sampling: DecoderSamplingConfig = DecoderSamplingConfig(),
        normalizer: Literal["unit", "none"] = "unit",
        optimizer: OptimizerConfig = OptimizerConfig(lr=1.2e-4),
        condition: Literal["image", "text", "none"] = "image",
    ) -> None:
        super().__init__(
            net=net,
            text=text,
            diffusion=diffusion,
            cond_dropout=cond_dropout,
            sampling=sampling,
            normalizer=normalizer,
            optimizer=optimizer,
            condition=condition,
        )
        if condition not in ("image", "text", "none"):
            raise ValueError(
                f'The decoder knows no condition "{condition}": choose "image", "text" or "none" '
                "(captions only)."
            )
        self.condition = condition
        self.net_config: UNetConfig = self.config.net
        self.text_config: TextConfig = self.config.text
        self.cond_dropout: CondDropoutConfig = self.config.cond_dropout
        self.sampling: DecoderSamplingConfig = self.config.sampling
        self.process = Process(self.config.diffusion)
        self.count_steps()  # refuses what is impossible at once
        learned = self.process.config.variance == "learned_range"
        self.scalars = ("loss", "mse", "vb") if learned else ("loss", "mse")
        if self.net_config.thumbnail:
            self.scalars += ("thumbnail_mse",)
        if condition == "text":  # the embedding is the caption's, too
            self.captioned_dropout = replace(self.cond_dropout, embed=0.0, text=0.0)
        elif self.text_config.kind != "none":
            self.captioned_dropout = replace(self.cond_dropout, text=0.0)
        embed_dim, context_width = self.net_config.embed_dim, self.net_config.context_width
        self._check_condition(embed_dim)
        self.normalizer = EmbeddingNormalizer(embed_dim, normalizer)
        emb_width = 4 * self.net_config.width
        self.text = TextContext(self.text_config, context_width, emb_width, embed_dim)
        self.net = UNet(self.net_config)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.net_config.out_channels != (needed := self.process.out_channels(3)):
            raise ValueError(
                f"model.net.out_channels is {self.net_config.out_channels}, and diffusion.variance "
                f"{self.process.config.variance} needs {needed}: set it to that."
            )
        if condition == "none":
            self.null_embed = None
        elif self.cond_dropout.null_embed == "learned":
            self.null_embed = nn.Parameter(torch.randn(embed_dim) * 0.5375)
        else:
            self.null_embed = nn.Buffer(torch.zeros(embed_dim))

    def _check_condition(self, embed_dim: int) -> None:
        """ValueError where the widths and the text do not fit the condition."""
        if self.condition != "none":
            if embed_dim < 1:
                raise ValueError(
                    f"model.net.embed_dim is {embed_dim}, and a decoder is conditioned on "
                    "embeddings of a CLIP: set it to their width, or model.condition to none "
                    "(captions only)."
                )
            tokens, width = self.net_config.embed_tokens, self.net_config.context_width
            if width and not tokens and self.text_config.kind == "none":
                raise ValueError(
                    f"model.net.context_width is {width}, and neither a caption (model.text.kind) "
                    "nor the embedding (model.net.embed_tokens) fills that context: set one of "
                    "these two, or the width to 0."
                )
            return
        if embed_dim:
            raise ValueError(
                f"model.net.embed_dim is {embed_dim}, and with model.condition none there are no "
                "embeddings: set it to 0."
            )
        if self.text_config.kind != "transformer":
            raise ValueError(
                f"model.text.kind is {self.text_config.kind}, and with model.condition none the "
                "captions need a text encoder of the decoder's own: set it to transformer."
            )

    @property
    def reads_clip(self) -> bool:
        """Whether anything of a CLIP reaches the decoder: embeddings, states or tokens."""
        return self.condition != "none" or not has_own_tokenizer(self.text_config)

    def use_data(self, data: Any) -> None:
        super().use_data(data)
        if not self.reads_clip:
            self.clip_fingerprint = None
        if self.text_config.null == "empty" and hasattr(data, "clip"):
            self.text.set_null(*empty_caption(data.clip))

    def check_data(self, data: Any) -> None:
        if self.condition != "none":
            check_clip(data, self.net_config.embed_dim, self.text_config)
        if reads_ids(self.text_config):
            check_length(data, self.text_config)
        check_tokens(data, self.text_config)
        if data.image_size != self.net_config.image_size:
            raise UserError(
                f"data.image_size is {data.image_size} and model.net.image_size is "
                f"{self.net_config.image_size}: make them equal."
            )
        if self.text_config.kind != "none" or self.condition == "text":
            check_captions(data)

    def conditions(
        self, batch: dict, size: int, keep_embed: Tensor, keep_text: Tensor
    ) -> dict[str, Tensor | None]:
        """The U-Net's conditions for `size` samples.

        Args:
            batch: see `sample`.
            size: B, the number of samples.
            keep_embed: (B,) bool. Where it is False, or the batch has no embedding, the null
                replaces it.
            keep_text: (B,) bool, the same for the caption.

        Returns:
            keyword arguments of `UNet.encode_context`.
        """
        embed = batch["embed"] if "embed" in batch else batch.get(f"{self.condition}_embed")
        if self.null_embed is not None:
            null = self.null_embed.expand(size, -1)
            if embed is None:
                embed = null
            else:
                embed = torch.where(keep_embed[:, None], self.normalizer.normalize(embed), null)
        caption = caption_inputs(batch, self.text_config)
        context = self.text(**caption, text_embed=batch.get("text_embed"), keep=keep_text)
        return {
            "embed": embed,
            "context": context.context,
            "context_mask": context.mask,
            "pooled": context.pooled,
        }

    def tokenized(self, batch: dict) -> dict:
        """The batch with `text_tokens` of its `caption`, if the text has its own tokenizer."""
        if "text_tokens" in batch or "caption" not in batch or self.text.byte_pairs is None:
            return batch
        return batch | {"text_tokens": self.text.tokenize(batch["caption"]).to(self.device)}

    def loss(
        self,
        batch: dict,
        generator: torch.Generator | None = None,
        cond_dropout: CondDropoutConfig | None = None,
    ) -> dict[str, Tensor]:
        """See `Stage.loss`; `cond_dropout` replaces the stage's own."""
        dropout, batch = cond_dropout or self.cond_dropout, self.tokenized(batch)
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        size = len(image)
        t, noise = draw_timesteps_and_noise(image, self.process.config.timesteps, generator)
        keep_embed, keep_text = draw_keep_masks(
            size, (dropout.embed, dropout.text), image.device, generator
        )
        conditions = self.conditions(batch, size, keep_embed, keep_text)
        x_t = self.process.diffuse(image, t, noise)
        output = self.net(x_t, t, **conditions)
        losses = training_losses(output, image, x_t, t, noise, self.process)
        result = {"loss": losses.loss.mean(), "mse": losses.mse.mean()}
        if losses.vb is not None:
            result["vb"] = losses.vb.mean()
        embed = conditions["embed"]
        if self.net.clip_to_thumbnail is not None and embed is not None:
            result["thumbnail_mse"] = self.net.clip_to_thumbnail.loss(embed, image)
            result["loss"] = result["loss"] + result["thumbnail_mse"]
        return result | {"t": t, "per_sample": losses.mse}

    def predictor(
        self, batch: dict, size: int, schedule: Schedule, settings: DecoderSamplingConfig
    ) -> Predict:
        """Make predict(x, t) for the conditions of a batch, guided and thresholded.

        Args:
            batch: the conditions; see `sample`.
            size: the number of images.
            schedule: the steps that the sampler will take.
            settings: their guidance scale and threshold are used.
        """
        use_guidance, batch = settings.guidance_scale != 1, self.tokenized(batch)
        keep = torch.ones(size, dtype=torch.bool, device=self.device)
        if use_guidance:  # the conditional rows, then the same rows with everything dropped
            keep = torch.cat([keep, ~keep])
            batch = {
                key: torch.cat([value, value]) if torch.is_tensor(value) else value
                for key, value in batch.items()
            }
        conditions = self.conditions(batch, len(keep), keep, keep)
        encoded = self.net.encode_context(**conditions)  # once, not at each step
        predict = self.process.adapt(lambda x, t: self.net(x, t, encoded=encoded), schedule)
        if use_guidance:
            predict = classifier_free_guidance(predict, settings.guidance_scale)
        return self.wrap_predict(thresholded(predict, self.process, settings.threshold))

    @torch.no_grad()
    def sample(
        self,
        batch: dict,
        noise: Noise,
        sampling: DecoderSamplingConfig | None = None,
        callback: Any = None,
        x_T: Tensor | None = None,
    ) -> Tensor:
        """Draw images for the conditions in `batch`.

        Args:
            batch: any of `image_embed` (B, D) and the caption's entries (`tokens`, `text_mask`,
                `text_embed`, `text_states`; B strings `caption` for a tokenizer of its own); what
                is missing counts as dropped. An entry `embed` (B, D), or None for the null,
                replaces the embedding of its `condition`.
            noise: one generator per image; their number is B.
            sampling: settings in place of the stage's own.
            callback: called with (step, steps) after each step.
            x_T: where to start, (B, 3, H, W); None draws it from `noise`.

        Returns:
            float32 (B, 3, H, W) in [-1, 1]; without a threshold values may lie outside.
        """
        settings = sampling or self.sampling
        schedule = self.process.schedule.respaced(settings.steps)
        x = noise(self.shape, self.device) if x_T is None else x_T.to(self.device)
        predict = self.predictor(batch, len(noise), schedule, settings)
        sampler = SAMPLERS[settings.sampler]
        return sampler(predict, x, schedule, noise=noise, eta=settings.eta, callback=callback)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, H, W) of an image."""
        return 3, self.net_config.image_size, self.net_config.image_size
