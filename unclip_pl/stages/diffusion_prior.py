"""The diffusion prior P(z_i | y, z_t): a CLIP image embedding from a caption (unCLIP section 2.2).

The caption's CLIP text embedding z_t is the other condition.

A causal Transformer predicts z_i itself, trained with mean squared error. Of two samples the one
closer to z_t is kept.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from unclip_pl.diffusion.analytic import ErrorByTimestep, with_analytic_variance
from unclip_pl.diffusion.guidance import classifier_free_guidance, thresholded
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig, Process
from unclip_pl.diffusion.sampler_config import SamplerConfig
from unclip_pl.diffusion.samplers import SAMPLERS
from unclip_pl.diffusion.schedule import Spacing
from unclip_pl.diffusion.training_draws import draw_keep_masks, draw_timesteps_and_noise
from unclip_pl.networks.embedding import EmbeddingNormalizer
from unclip_pl.networks.long_text import caption_inputs
from unclip_pl.networks.prior import (
    Prefix,
    PriorTextConfig,
    PriorTransformer,
    PriorTransformerConfig,
)
from unclip_pl.stages.base import OptimizerConfig, Stage
from unclip_pl.stages.data_checks import (
    check_captions,
    check_clip,
    check_length,
    check_tokens,
    empty_caption,
)

VARIANCE_BATCH = 16
"""Captions held at a time while the analytic variance is estimated: their keys and values take
100 MB at the paper's size."""


@dataclass(frozen=True)
class PriorSamplingConfig(SamplerConfig):
    """How the diffusion prior samples; every value can be changed after training."""

    owner: ClassVar[str] = "The prior"
    samplers: ClassVar[tuple[str, ...]] = ("analytic", *SAMPLERS)

    sampler: Literal["analytic", "ddpm", "ddim", "dpm_solver_pp"] = "analytic"
    """"analytic": DDPM with the analytic variance, and as "ddpm" until that has been estimated;
    "ddpm": with the variance of `diffusion`."""
    steps: Spacing = 64
    """A number, numbers for equal sections, "fast27" or "ddimK"; see `Schedule.respaced`."""
    guidance_scale: float = 1.0
    """s of uncond + s (cond - uncond); 1 is no guidance and costs one pass instead of two."""
    num_candidates: int = 2
    """Embeddings drawn per caption, of which the one with the highest cosine to z_t is kept."""
    threshold: float | None = None
    """Keeps the predicted z_i within +- this on the network's scale at each step (Karlo: 10); null:
    no threshold."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.guidance_scale < math.inf:
            raise ValueError(
                f"The prior's guidance_scale is {self.guidance_scale}: give 1 (none) or more."
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
    """Trains on `image_embed`, `text_embed` and the caption of a batch.

    The caption is `tokens` (or `text_states`, `text_mask`, or `text_tokens` that are longer).

    Args:
        net: the Transformer; `embed_dim` must be the CLIP's.
        text: how the caption enters the sequence.
        cond_dropout: share of samples that lose caption and z_t, always both together (10 % in the
            paper).
        normalizer: scale of the embeddings in the network: "unit" (norm 0.5375 sqrt(D), the paper's
            17.2 at D = 1024; z_t as well), "standard" (mean and std of the data; z_t as it is:
            Karlo) or "none".

    Raises:
        ValueError: settings that do not fit each other.
    """

    x0_error: Tensor
    """(T,): the mean squared error of the predicted z_i per timestep, NaN until it is estimated."""

    scalars = ("loss",)
    captioned_dropout = 0.0

    def __init__(
        self,
        net: PriorTransformerConfig = PriorTransformerConfig(),
        text: PriorTextConfig = PriorTextConfig(),
        diffusion: DiffusionConfig = DiffusionConfig(parametrization="x0", variance="fixed_small"),
        cond_dropout: float = 0.1,
        sampling: PriorSamplingConfig = PriorSamplingConfig(),
        normalizer: Literal["unit", "standard", "none"] = "unit",
        optimizer: OptimizerConfig = OptimizerConfig(
            lr=1.1e-4, betas=(0.9, 0.96), eps=1e-6, weight_decay=6e-2
        ),
    ) -> None:
        super().__init__(
            net=net,
            text=text,
            diffusion=diffusion,
            cond_dropout=cond_dropout,
            sampling=sampling,
            normalizer=normalizer,
            optimizer=optimizer,
        )
        self.net_config: PriorTransformerConfig = self.config.net
        self.text_config: PriorTextConfig = self.config.text
        self.sampling: PriorSamplingConfig = self.config.sampling
        self.cond_dropout = cond_dropout
        self.process = Process(self.config.diffusion)
        self.count_steps()  # refuses what is impossible at once
        if self.process.config.variance == "learned_range":
            raise ValueError(
                "The diffusion prior has no learned variance: set model.diffusion.variance to "
                "fixed_small or fixed_large."
            )
        if not 0 <= cond_dropout < 1:
            raise ValueError(
                f"model.cond_dropout is {cond_dropout}: give a share from 0 to below 1."
            )
        self.normalizer = EmbeddingNormalizer(self.net_config.embed_dim, normalizer)
        self.net = PriorTransformer(self.net_config, self.text_config)
        self.register_buffer("x0_error", torch.full((self.process.config.timesteps,), math.nan))

    def use_data(self, data: Any) -> None:
        super().use_data(data)
        # Weights that training starts from (--init) keep the scale that they were trained on.
        if hasattr(data, "statistics") and not self.normalizer.fitted:
            statistics = data.statistics()
            self.normalizer.fit(statistics.mean, statistics.std)
        if self.text_config.null == "empty" and hasattr(data, "clip"):
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
        check_tokens(data, self.text_config)
        check_captions(data)

    def conditions(self, batch: dict) -> dict[str, Tensor | None]:
        """The caption as arguments of the network.

        What the batch lacks is None and counts as dropped.
        """
        embed = batch.get("text_embed")
        if embed is not None:
            embed = self.on_network_scale(embed)
        return caption_inputs(batch, self.text_config) | {"text_embed": embed}

    def encode_text(self, batch: dict, size: int, null: bool = False) -> Prefix:
        """Read the captions of a batch once, for all steps.

        Args:
            batch: the captions; see `sample`.
            size: how many there are.
            null: append one row with a dropped caption.
        """
        conditions = self.conditions(batch)
        keep = torch.ones(size, dtype=torch.bool, device=self.device)
        if null:
            keep = torch.cat([keep, ~keep[:1]])
            for name, value in conditions.items():
                if value is not None:
                    conditions[name] = torch.cat([value, value[:1]])
        return self.net.encode_text(keep, **conditions)

    def loss(
        self,
        batch: dict,
        generator: torch.Generator | None = None,
        cond_dropout: float | None = None,
    ) -> dict[str, Tensor]:
        """See `Stage.loss`; `cond_dropout` replaces the stage's own."""
        dropout = self.cond_dropout if cond_dropout is None else cond_dropout
        z = self.normalizer.normalize(batch["image_embed"])
        t, noise = draw_timesteps_and_noise(z, self.process.config.timesteps, generator)
        (keep,) = draw_keep_masks(len(z), [dropout], z.device, generator)
        noised = self.process.diffuse(z, t, noise)
        output = self.net(noised, t, **self.conditions(batch), keep=keep)
        mse = (output.float() - self.process.target(z, t, noise)).square().mean(1)
        return {"loss": mse.mean(), "t": t, "per_sample": mse}

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
                is missing counts as dropped. Without `text_embed` there is nothing to compare
                candidates with, and one is drawn.
            noise: one generator per caption; their number is B.
            sampling: settings in place of the stage's own.
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
        use_guidance = settings.guidance_scale != 1
        rows = torch.arange(size, device=self.device).repeat_interleave(count)
        if use_guidance:  # the last row of the prefix is the dropped caption
            rows = torch.cat([rows, torch.full_like(rows, size)])
        prefix = self.encode_text(batch, size, null=use_guidance).index_select(rows)

        def denoise(x: Tensor, t: Tensor) -> Tensor:  # candidates are further rows: x (N, C, D)
            z = self.net.denoise(x.flatten(0, 1), t.repeat_interleave(count), prefix)
            return z.unflatten(0, x.shape[:2])

        predict = self.process.adapt(denoise, schedule)
        if use_guidance:
            predict = classifier_free_guidance(predict, settings.guidance_scale)
        if settings.threshold is not None:
            predict = thresholded(predict, self.process, "static", settings.threshold)
        predict = self.wrap_predict(predict)
        if settings.sampler == "analytic" and not bool(self.x0_error.isnan().any()):
            predict = with_analytic_variance(predict, schedule, self.x0_error)
        sampler = SAMPLERS["ddpm" if settings.sampler == "analytic" else settings.sampler]
        x = noise((count, self.net_config.embed_dim), self.device)
        z = sampler(predict, x, schedule, noise=noise, eta=settings.eta, callback=callback)
        z = self.normalizer.denormalize(z)
        if count == 1 or embed is None:
            return z[:, 0]
        best = F.cosine_similarity(z, embed.float()[:, None], dim=-1).argmax(1)
        return z[torch.arange(size, device=self.device), best]

    @torch.no_grad()
    def estimate_variance(self, batches: Sequence[dict], draws: int = 10) -> None:
        """Estimate the error of the predicted z_i per timestep, which the "analytic" sampler needs.

        Args:
            batches: of training data, on the stage's device; a few hundred captions are enough.
            draws: how often each timestep is visited.
        """
        errors = ErrorByTimestep(self.process.config.timesteps, draws, self.device)
        generator = torch.Generator().manual_seed(0)
        passes = math.ceil(errors.total / sum(len(batch["image_embed"]) for batch in batches))
        parts = [part for batch in batches for part in split_batch(batch, VARIANCE_BATCH)]
        bar = tqdm(
            total=len(parts) * passes,
            desc="analytic variance",
            unit=" passes",
            file=sys.stderr,
            disable=self.global_rank != 0,
        )
        for part in parts:
            z = self.normalizer.normalize(part["image_embed"])
            prefix = self.encode_text(part, len(z))
            for _ in range(passes):
                bar.update()
                t = errors.timesteps(len(z))
                noise = torch.randn(z.shape, generator=generator).to(z.device)
                x_t = self.process.diffuse(z, t, noise)
                output = self.net.denoise(x_t, t, prefix).float()
                errors.add(t, z, self.process.to_x0(output, x_t, t))
        bar.close()
        self.x0_error.copy_(errors.mean())


def split_batch(batch: dict, size: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of a batch in parts of at most `size` rows."""
    for start in range(0, len(batch["image_embed"]), size):
        rows = slice(start, start + size)
        yield {name: value[rows] for name, value in batch.items() if torch.is_tensor(value)}
