"""The settings that every stage with a diffusion process samples with."""

from dataclasses import dataclass, field
from typing import ClassVar

from unclip_pl.diffusion.samplers import SAMPLERS
from unclip_pl.diffusion.schedule import Spacing, check_spacing


@dataclass(frozen=True)
class SamplerConfig:
    """Sampler, steps and noise; stages extend it. Every value can be changed after training."""

    owner: ClassVar[str] = "The stage"
    """Begins the sentence of an error."""
    samplers: ClassVar[tuple[str, ...]] = tuple(SAMPLERS)

    sampler: str = "ddim"
    steps: Spacing = 50
    """A number, numbers for equal sections, "fast27" or "ddimK"; see `Schedule.respaced`."""
    eta: float = field(default=0.0, kw_only=True)
    """Noise of DDIM: 0 is deterministic, 1 as in DDPM. Other samplers do not use it."""

    def __post_init__(self) -> None:
        if self.sampler not in self.samplers:
            raise ValueError(
                f'{self.owner} has no sampler "{self.sampler}": choose one of '
                f"{', '.join(self.samplers)}."
            )
        check_spacing(self.steps, self.owner)
        if not 0 <= self.eta <= 1:
            raise ValueError(
                f"{self.owner} cannot sample with eta {self.eta}: give 0 (deterministic) to 1 (as "
                "much noise as DDPM)."
            )
