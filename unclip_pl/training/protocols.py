"""What callbacks need of a stage, for the type checker.

Callbacks do not import the stages, so that a stage of one's own can use them.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import Process


class SupportsSampling(Protocol):
    """A stage that can be sampled."""

    def sample(self, batch: dict, noise: Noise) -> Tensor: ...


class SupportsUpsampling(Protocol):
    """A stage that is conditioned on an image of lower resolution."""

    def enlarged(self, low_res: Tensor) -> Tensor: ...


class SupportsEmbedding(Protocol):
    """A CLIP: images (N, 3, H, W) and tokens (N, T) to unit embeddings, (N, D) each."""

    def embed(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]: ...


class SupportsDiffusion(Protocol):
    """A stage with a diffusion process."""

    process: Process


class SupportsAnalyticVariance(Protocol):
    """A stage whose sampler can use the analytic variance of Analytic-DPM."""

    x0_error: Tensor

    def estimate_variance(self, batches: Sequence[dict], draws: int = 10) -> None: ...
