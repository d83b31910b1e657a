"""The diffusion prior P(z_i | y, z_t): a CLIP image embedding from a caption and its CLIP text
embedding (unCLIP section 2.2).

A causal Transformer predicts z_i itself; mean squared error; of two draws the one nearer to z_t is
kept.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from unclip_pl.diffusion.analytic import ErrorByTimestep, with_analytic_variance
from unclip_pl.diffusion.guidance import guided, halves, thresholded
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig, Process
from unclip_pl.diffusion.samplers import SAMPLERS
from unclip_pl.diffusion.schedule import Spacing, check_spacing
from unclip_pl.networks.embedding import EmbeddingNormalizer
from unclip_pl.networks.long_text import caption_of
from unclip_pl.networks.prior import (
    Prefix,
    PriorTextConfig,
    PriorTransformer,
    PriorTransformerConfig,
)
from unclip_pl.stages.base import (
    OptimizerConfig,
    Stage,
    as_config,
    check_clip,
    check_length,
    check_own_tokens,
    empty_caption,
)

ROWS = 16
"""Captions that are held at a time while the analytic variance is estimated."""


@dataclass(frozen=True)
class PriorSamplingConfig:
    """How to draw; every value can be changed after training."""

    sampler: Literal["analytic", "ddpm", "ddim", "dpm_solver_pp"] = "analytic"
    """"analytic": DDPM with the analytic variance, and as "ddpm" while that has not been estimated;
    "ddpm": with the variance of `diffusion`."""
    steps: Spacing = 64
    """A number, numbers for equal sections, "fast27" or "ddimK"; see `Schedule.respaced`."""
    guidance_scale: float = 1.0
    """s of z_null + s (z_cond - z_null); 1 is no guidance and costs one pass instead of two."""
    num_candidates: int = 2
    """Embeddings drawn per caption, of which the one with the highest cosine to z_t is kept."""
    eta: float = 0.0
    """Noise of DDIM: 0 deterministic, 1 as DDPM. Other samplers do not use it."""
    threshold: float | None = None
    """Keep the predicted z_i within +- this on the network's scale at each step (Karlo: 10); null:
    do not."""

    def __post_init__(self) -> None:
        if self.sampler != "analytic" and self.sampler not in SAMPLERS:
            raise ValueError(
                f'There is no sampler "{self.sampler}" for a prior: choose one of analytic, '
                f"{', '.join(SAMPLERS)}."
            )
        check_spacing(self.steps, "The prior")
        if not 1 <= self.guidance_scale < math.inf:
            raise ValueError(
                f"The prior's guidance_scale is {self.guidance_scale}: give 1 (none) or more."
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(
                f"eta of the prior's sampler is {self.eta}: give 0 (deterministic) to 1 (as much "
                "noise as DDPM)."
            )
        if self.threshold is not None and not self.threshold > 0:
            raise ValueError(
                f"The prior's threshold is {self.threshold}: give a positive number, or null for "
                "none."
            )
        if self.num_candidates < 1:
            raise ValueError(
                f"The prior cannot choose among {self.num_candidates} candidates: ask for 1 or "
                "more."
            )


class DiffusionPrior(Stage):
    """Trains on `image_embed`, `text_embed` and `tokens` (or `text_states`, `text_mask`, or
    `text_tokens` that are longer) of a batch.

    Args:
        net: the Transformer; `embed_dim` must be the CLIP's.
        text: how the caption comes into the sequence.
        text_dropout: share of samples that lose caption and z_t, together and nothing else (10 % in
            the paper).
        normalizer: scale of the embeddings in the network: "unit" (norm 0.5375 sqrt(D), the paper's
            17.2 at D = 1024; z_t as well), "standard" (mean and std of the data; z_t as it is:
            Karlo) or "none".
    """

    x0_error: Tensor

    def __init__(
        self,
        net: PriorTransformerConfig = PriorTransformerConfig(),
        text: PriorTextConfig = PriorTextConfig(),
        diffusion: DiffusionConfig = DiffusionConfig(parametrization="x0", variance="fixed_small"),
        text_dropout: float = 0.1,
        sampling: PriorSamplingConfig = PriorSamplingConfig(),
        normalizer: Literal["unit", "standard", "none"] = "unit",
        optimizer: OptimizerConfig = OptimizerConfig(
            lr=1.1e-4, betas=(0.9, 0.96), eps=1e-6, weight_decay=6e-2
        ),
    ) -> None:
        super().__init__()
        self.remember(
            optimizer,
            net=net,
            text=text,
            diffusion=diffusion,
            text_dropout=text_dropout,
            sampling=sampling,
            normalizer=normalizer,
        )
        self.net_config, self.text_config = (
            as_config(PriorTransformerConfig, net),
            as_config(PriorTextConfig, text),
        )
        self.text_dropout, self.sampling = text_dropout, as_config(PriorSamplingConfig, sampling)
        self.process = Process(as_config(DiffusionConfig, diffusion))
        self.process.schedule.respaced(
            self.sampling.steps
        )  # refuses what cannot be drawn before training rather than after
        if self.process.config.variance == "learned_range":
            raise ValueError(
                "The diffusion prior has no learned variance: set model.diffusion.variance to "
                "fixed_small or fixed_large."
            )
        if not 0 <= text_dropout < 1:
            raise ValueError(
                f"model.text_dropout is {text_dropout}: give a share from 0 to below 1."
            )
        self.normalizer = EmbeddingNormalizer(self.net_config.embed_dim, normalizer)
        self.net = PriorTransformer(self.net_config, self.text_config)
        self.register_buffer("x0_error", torch.full((self.process.config.timesteps,), math.nan))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        # Weights that training starts from (--init) mean something on their own scale only.
        if stage == "fit" and hasattr(data, "statistics") and not self.normalizer.fitted:
            statistics = data.statistics()
            self.normalizer.fit(statistics.mean, statistics.std)
        if stage == "fit" and self.text_config.null == "empty" and hasattr(data, "clip"):
            states, embed = empty_caption(data.clip)
            self.net.set_null(states, self.on_network_scale(embed[None])[0])

    def on_network_scale(self, text_embed: Tensor) -> Tensor:
        """CLIP's text embeddings (B, D) as the network takes them."""
        if self.normalizer.mode == "unit":
            return self.normalizer.normalize(text_embed)
        return text_embed.float()

    def check_data(self, data: Any) -> None:
        check_clip(data, self.net_config.embed_dim, self.text_config)
        check_length(data, self.text_config)
        check_own_tokens(data, self.text_config)

    def conditions(self, batch: dict) -> dict[str, Tensor | None]:
        """The caption's part of the network's arguments; what the batch lacks is None and counts as
        dropped."""
        embed = batch.get("text_embed")
        if embed is not None:
            embed = self.on_network_scale(embed)
        return caption_of(batch, self.text_config) | {"text_embed": embed}

    def encode_text(self, batch: dict, size: int, null: bool = False) -> Prefix:
        """The `size` captions of a batch, read once; with `null` one more row, of a dropped
        caption."""
        given = self.conditions(batch)
        keep = torch.ones(size, dtype=torch.bool, device=self.device)
        if null:
            keep = torch.cat([keep, ~keep[:1]])
            given = {
                key: None if value is None else torch.cat([value, value[:1]])
                for key, value in given.items()
            }
        return self.net.encode_text(keep, **given)

    def loss(
        self,
        batch: dict,
        generator: torch.Generator | None = None,
        text_dropout: float | None = None,
    ) -> dict[str, Tensor]:
        """As every stage's; `text_dropout` stands in for the stage's own share."""
        share = self.text_dropout if text_dropout is None else text_dropout
        z = self.normalizer.normalize(batch["image_embed"])
        where = generator.device if generator else z.device
        t = torch.randint(
            self.process.config.timesteps, (len(z),), generator=generator, device=where
        ).to(z.device)
        noise = torch.randn(z.shape, generator=generator, device=where).to(z.device)
        keep = torch.rand(len(z), generator=generator, device=where).to(z.device) >= share
        output = self.net(self.process.diffuse(z, t, noise), t, **self.conditions(batch), keep=keep)
        mse = (output.float() - self.process.target(z, t, noise)).square().mean(1)
        return {"loss": mse.mean(), "t": t, "per_sample": mse}

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Also `val/loss_captioned`: of the same noise, with no caption dropped."""
        super().validation_step(batch, batch_idx)
        generator = torch.Generator().manual_seed(batch_idx)
        loss = self.loss(batch, generator, text_dropout=0.0)["loss"]
        self.log("val/loss_captioned", loss, batch_size=len(batch["key"]), sync_dist=True)

    @torch.no_grad()
    def sample(
        self,
        batch: dict,
        noise: Noise,
        sampling: PriorSamplingConfig | None = None,
        callback: Any = None,
    ) -> Tensor:
        """Draw an image embedding for each caption in `batch`.

        Args:
            batch: the caption's entries (`tokens`, `text_mask`, `text_embed`, `text_states`); what
                is missing is taken as dropped. Without `text_embed` there is nothing to choose by,
                and one candidate is drawn.
            noise: one generator a caption; their number is B.
            sampling: settings other than the stage's own.
            callback: called with (step, steps) after each step.

        Returns:
            float32 (B, D), on the scale of the CLIP.

        Raises:
            ValueError: more steps than the process has timesteps.
        """
        settings = sampling or self.sampling
        size, embed = len(noise), batch.get("text_embed")
        count = settings.num_candidates if embed is not None else 1
        schedule = self.process.schedule.respaced(settings.steps)
        guide = settings.guidance_scale != 1
        rows = torch.arange(size, device=self.device).repeat_interleave(count)
        if guide:  # the last row of the prefix is the dropped caption
            rows = torch.cat([rows, torch.full_like(rows, size)])
        prefix = self.encode_text(batch, size, null=guide).index_select(rows)

        def denoise(x: Tensor, t: Tensor) -> Tensor:  # candidates are further rows: x (N, C, D)
            z = self.net.denoise(x.flatten(0, 1), t.repeat_interleave(count), prefix)
            return z.unflatten(0, x.shape[:2])

        predict = self.process.adapt(denoise, schedule)
        if guide:
            predict = guided(halves(predict), settings.guidance_scale)
        if settings.threshold is not None:
            predict = thresholded(predict, self.process, "static", limit=settings.threshold)
        predict = self.with_cuda_graph(predict)
        if settings.sampler == "analytic" and not bool(self.x0_error.isnan().any()):
            predict = with_analytic_variance(predict, schedule, self.x0_error)
        draw = SAMPLERS["ddpm" if settings.sampler == "analytic" else settings.sampler]
        x = noise((count, self.net_config.embed_dim), self.device)
        z = self.normalizer.denormalize(
            draw(predict, x, schedule, noise=noise, eta=settings.eta, callback=callback)
        )
        if count == 1 or embed is None:
            return z[:, 0]
        best = F.cosine_similarity(z, embed.float()[:, None], dim=-1).argmax(1)
        return z[torch.arange(size, device=self.device), best]

    @torch.no_grad()
    def estimate_variance(self, batches: Sequence[dict], draws: int = 10) -> None:
        """Estimate what the "analytic" sampler needs, with the weights as they are: the error of
        the predicted z_i at each timestep.

        Args:
            batches: of training data, on the stage's device; a few hundred captions are enough.
            draws: how often each timestep is looked at.
        """
        errors = ErrorByTimestep(self.process.config.timesteps, draws, self.device)
        generator = torch.Generator().manual_seed(0)
        passes = math.ceil(errors.total / sum(len(batch["image_embed"]) for batch in batches))
        small = [
            {k: v[i : i + ROWS] for k, v in batch.items() if torch.is_tensor(v)}
            for batch in batches
            for i in range(0, len(batch["image_embed"]), ROWS)
        ]
        bar = tqdm(
            total=len(small) * passes,
            desc="analytic variance",
            unit=" passes",
            file=sys.stderr,
            disable=self.global_rank != 0,
        )
        for batch in small:  # the keys and values of a caption take 100 MB at the paper's size
            z = self.normalizer.normalize(batch["image_embed"])
            prefix = self.encode_text(batch, len(z))
            for _ in range(passes):
                bar.update()
                t = errors.timesteps(len(z))
                x_t = self.process.diffuse(
                    z, t, torch.randn(z.shape, generator=generator).to(z.device)
                )
                errors.add(
                    t, z, self.process.to_x0(self.net.denoise(x_t, t, prefix).float(), x_t, t)
                )
        bar.close()
        self.x0_error.copy_(errors.mean())
