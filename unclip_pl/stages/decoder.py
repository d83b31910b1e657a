"""The decoder P(x | z_i, y): a 64x64 image from a CLIP image embedding and, optionally, its caption (unCLIP section 2.1).

An ADM U-Net; the embedding is added to the timestep embedding and gives four extra context tokens; hybrid loss with learned variance.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unclip_pl.diffusion.guidance import guided, halves, thresholded
from unclip_pl.diffusion.losses import hybrid
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig, Predict, Process
from unclip_pl.diffusion.samplers import SAMPLERS
from unclip_pl.diffusion.schedule import Schedule, Spacing, check_spacing
from unclip_pl.networks.embedding import EmbeddingNormalizer
from unclip_pl.networks.long_text import caption_of
from unclip_pl.networks.text import TextConfig, TextContext
from unclip_pl.networks.unet import UNet, UNetConfig
from unclip_pl.stages.base import (
    OptimizerConfig,
    Stage,
    as_config,
    check_clip,
    check_own_tokens,
    empty_caption,
)
from unclip_pl.utils.errors import UserError


@dataclass(frozen=True)
class DropoutConfig:
    """What is left out in training so that guidance has a null branch: both independently (unCLIP 2.1)."""

    embed: float = 0.1
    text: float = 0.5
    null_embed: Literal["learned", "zeros"] = "learned"
    """What stands in the place of a dropped embedding."""


@dataclass(frozen=True)
class SamplingConfig:
    """How to draw; every value can be changed after training."""

    sampler: str = "ddpm"
    steps: Spacing = 250
    """A number, numbers for equal sections, "fast27" or "ddimK"; see `Schedule.respaced`."""
    guidance_scale: float = 1.0
    """s of eps_null + s (eps_cond - eps_null); 1 is no guidance and costs one pass instead of two."""
    eta: float = 0.0
    """Noise of DDIM: 0 deterministic, 1 as DDPM. Other samplers do not use it."""
    threshold: Literal["static", "dynamic"] | None = "static"
    """Keep x_0 in [-1, 1] at each step: clamp, Imagen's dynamic thresholding, or nothing."""

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(
                f'There is no sampler "{self.sampler}" for the decoder: choose one of {", ".join(SAMPLERS)}.'
            )
        check_spacing(self.steps, "The decoder")
        if not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(
                f"The decoder's guidance_scale is {self.guidance_scale}: give 1 (none) or more, or 0 for the null branch alone."
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(
                f"eta of the decoder's sampler is {self.eta}: give 0 (deterministic) to 1 (as much noise as DDPM)."
            )


class Decoder(Stage):
    """Trains on `image`, `image_embed` and `tokens` (or `text_states`, `text_embed`) of a batch; see `TextConfig` for the caption.

    With `condition: text` the caption's CLIP embedding, `text_embed`, trains and conditions it in the place of `image_embed`: the paper's baseline
    without a prior (section 5.1).

    Args:
        net: the U-Net; `embed_dim` must be the CLIP's, `out_channels` follows from `diffusion`.
        text: how the caption becomes context; `kind: none` leaves it out.
        normalizer: scale of the embedding as the network sees it: "unit" (norm 0.5375 sqrt(D), the paper's 17.2 at D = 1024), "none".
        condition: of which embedding of CLIP it draws: "image" or "text".
    """

    def __init__(
        self,
        net: UNetConfig = UNetConfig(),
        text: TextConfig = TextConfig(),
        diffusion: DiffusionConfig = DiffusionConfig(),
        dropout: DropoutConfig = DropoutConfig(),
        sampling: SamplingConfig = SamplingConfig(),
        normalizer: Literal["unit", "none"] = "unit",
        optimizer: OptimizerConfig = OptimizerConfig(lr=1.2e-4),
        condition: Literal["image", "text"] = "image",
    ) -> None:
        super().__init__()
        if condition not in ("image", "text"):
            raise ValueError(
                f'The decoder knows no condition "{condition}": choose "image" or "text".'
            )
        self.condition = condition
        self.remember(
            optimizer,
            net=net,
            text=text,
            diffusion=diffusion,
            dropout=dropout,
            sampling=sampling,
            normalizer=normalizer,
            condition=condition,
        )
        self.net_config, self.text_config = as_config(UNetConfig, net), as_config(TextConfig, text)
        self.dropout, self.sampling = (
            as_config(DropoutConfig, dropout),
            as_config(SamplingConfig, sampling),
        )
        self.process = Process(as_config(DiffusionConfig, diffusion))
        self.process.schedule.respaced(
            self.sampling.steps
        )  # refuses what cannot be drawn before training rather than after
        self.normalizer = EmbeddingNormalizer(self.net_config.embed_dim, normalizer)
        width = self.net_config.width
        self.text = TextContext(
            self.text_config, self.net_config.context_width, 4 * width, self.net_config.embed_dim
        )
        self.net = UNet(self.net_config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.net_config.out_channels != self.process.out_channels(3):
            raise ValueError(
                f"model.net.out_channels is {self.net_config.out_channels}, and diffusion.variance {self.process.config.variance} needs "
                f"{self.process.out_channels(3)}: set it to that."
            )
        learned = self.dropout.null_embed == "learned"
        null = (
            torch.randn(self.net_config.embed_dim) * 0.5375
            if learned
            else torch.zeros(self.net_config.embed_dim)
        )
        self.null_embed = nn.Parameter(null) if learned else nn.Buffer(null)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and self.text_config.null == "empty" and hasattr(data, "clip"):
            self.text.set_null(*empty_caption(data.clip))

    def check_data(self, data: Any) -> None:
        check_clip(data, self.net_config.embed_dim, self.text_config)
        check_own_tokens(data, self.text_config)
        if data.image_size != self.net_config.image_size:
            raise UserError(
                f"data.image_size is {data.image_size} and model.net.image_size {self.net_config.image_size}: make them equal."
            )

    def conditions(
        self, batch: dict, size: int, keep_embed: Tensor, keep_text: Tensor
    ) -> dict[str, Tensor | None]:
        """The U-Net's conditions for `size` samples; where `keep_*` (B,) is False, or the batch has no such entry, the null stands."""
        embed = batch["embed"] if "embed" in batch else batch.get(f"{self.condition}_embed")
        null = self.null_embed.expand(size, -1)
        embed = (
            null
            if embed is None
            else torch.where(keep_embed[:, None], self.normalizer.normalize(embed), null)
        )
        caption = caption_of(batch, self.text_config)
        context = self.text(**caption, text_embed=batch.get("text_embed"), keep=keep_text)
        return {
            "embed": embed,
            "context": context.context,
            "context_mask": context.mask,
            "pooled": context.pooled,
        }

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Also `val/loss_captioned`: of the same noise, with no caption dropped."""
        super().validation_step(batch, batch_idx)
        if self.text_config.kind == "none":
            return
        generator = torch.Generator().manual_seed(batch_idx)
        loss = self.loss(batch, generator, text_dropout=0.0)["loss"]
        self.log("val/loss_captioned", loss, batch_size=len(batch["key"]), sync_dist=True)

    def loss(
        self,
        batch: dict,
        generator: torch.Generator | None = None,
        text_dropout: float | None = None,
    ) -> dict[str, Tensor]:
        """See `Stage.loss`; `text_dropout` in place of `dropout.text`."""
        text_dropout = self.dropout.text if text_dropout is None else text_dropout
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        size, device = len(image), image.device
        where = generator.device if generator else device
        t = torch.randint(
            self.process.config.timesteps, (size,), generator=generator, device=where
        ).to(device)
        noise = torch.randn(image.shape, generator=generator, device=where).to(device)
        keep = torch.rand(2, size, generator=generator, device=where).to(device)
        conditions = self.conditions(
            batch, size, keep[0] >= self.dropout.embed, keep[1] >= text_dropout
        )
        x_t = self.process.diffuse(image, t, noise)
        losses = hybrid(self.net(x_t, t, **conditions), image, x_t, t, noise, self.process)
        scalars = {"loss": losses.loss, "mse": losses.mse} | (
            {} if losses.vb is None else {"vb": losses.vb}
        )
        return {name: value.mean() for name, value in scalars.items()} | {
            "t": t,
            "per_sample": losses.mse,
        }

    def predictor(
        self, batch: dict, size: int, schedule: Schedule, settings: SamplingConfig
    ) -> Predict:
        """predict(x, t) for the conditions in `batch` (see `sample`) of `size` images, guided and thresholded, for a sampler that walks `schedule`."""
        use_guidance = settings.guidance_scale != 1
        keep = torch.ones(size, dtype=torch.bool, device=self.device)
        if use_guidance:  # first the conditional rows, then the same rows with everything dropped
            keep = torch.cat([keep, ~keep])
            batch = {
                key: torch.cat([value, value]) if torch.is_tensor(value) else value
                for key, value in batch.items()
            }
        conditions = self.conditions(batch, len(keep), keep, keep)
        encoded = self.net.encode_context(**conditions)  # once, not at each step
        predict = self.process.adapt(lambda x, t: self.net(x, t, encoded=encoded), schedule)
        if use_guidance:
            predict = guided(halves(predict), settings.guidance_scale)
        return self.with_cuda_graph(thresholded(predict, self.process, settings.threshold))

    @torch.no_grad()
    def sample(
        self,
        batch: dict,
        noise: Noise,
        sampling: SamplingConfig | None = None,
        callback: Any = None,
        x_T: Tensor | None = None,
    ) -> Tensor:
        """Draw images for the conditions in `batch`.

        Args:
            batch: any of `image_embed` (B, D) and the caption's entries (`tokens`, `text_mask`, `text_embed`, `text_states`); what is
                missing is taken as dropped. An entry `embed` (B, D), or None for the null, stands before the embedding of its `condition`.
            noise: one generator an image; their number is B.
            sampling: settings other than the stage's own.
            callback: called with (step, steps) after each step.
            x_T: where to start, (B, 3, H, W); None draws it from `noise`.

        Returns:
            float32 (B, 3, H, W) in [-1, 1]; without a threshold the ends of the range are not kept.
        """
        settings = sampling or self.sampling
        schedule = self.process.schedule.respaced(settings.steps)
        x = noise(self.shape, self.device) if x_T is None else x_T.to(self.device)
        predict = self.predictor(batch, len(noise), schedule, settings)
        return SAMPLERS[settings.sampler](
            predict, x, schedule, noise=noise, eta=settings.eta, callback=callback
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, H, W) of an image."""
        return 3, self.net_config.image_size, self.net_config.image_size
