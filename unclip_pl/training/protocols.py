"""What callbacks need of the stage that they watch, for the type checker: this room lies below the stages and cannot import them."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import Process


class Draws(Protocol):
    """Every stage that can be sampled."""

    def sample(self, batch: dict, noise: Noise) -> Tensor: ...


class Upsamples(Protocol):
    """A stage that draws from an image at a lower resolution."""

    def enlarged(self, low_res: Tensor) -> Tensor: ...


class Embeds(Protocol):
    """A CLIP."""

    def embed(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]: ...


class Diffuses(Protocol):
    """A stage with a diffusion process."""

    process: Process


class Estimates(Protocol):
    """A stage whose sampler has a use for the analytic variance."""

    x0_error: Tensor

    def estimate_variance(self, batches: Sequence[dict], draws: int = 10) -> None: ...
