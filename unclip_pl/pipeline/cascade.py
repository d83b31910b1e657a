"""Upsamplers in a row: pictures of any size and shape, 4 times as large with each, in batches that fit, one stage on the device at a time if wished."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from unclip_pl.diffusion.noise import Noise
from unclip_pl.networks.compilation import compile_blocks
from unclip_pl.stages.base import Stage
from unclip_pl.stages.upsampler import Upsampler, Upsampler1024, UpsamplingConfig
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.precision import Precision, autocast, usable

SEEDS = 1 << 30
"""Added to a seed for the first upsampler's draws, three times for the second's: all stages share the 32 bits that a generator reads of a seed."""
BATCH_PIXELS = 1 << 20
FINEST_MAPS = 10
"""A U-Net's forward pass holds at least so many maps of its finest level at one time."""
Callback = Callable[[str, int, int], Any]


@contextmanager
def at_work(
    part: Any, device: torch.device | str, offload: bool, precision: str = "fp32"
) -> Iterator[None]:
    """`part` (a stage, or a CLIP) on the device while the body runs, in that precision; with `offload`, back in the CPU's memory after it."""
    if part.device != torch.device(device):
        part.to(device)
    try:
        with autocast(precision, device):
            yield
    finally:
        if offload:
            part.to("cpu")


def resolved(device: torch.device | str) -> torch.device:
    """A device with its number: "cuda" is the current one."""
    device = torch.device(device)
    return (
        torch.device("cuda", torch.cuda.current_device())
        if device.type == "cuda" and device.index is None
        else device
    )


def source_side(stage: Upsampler) -> int:
    """Side of the pictures that a stage was made to enlarge."""
    return stage.net_config.image_size // stage.factor


def check_order(sides: Sequence[tuple[int, int]], before: int | None = None) -> None:
    """UserError unless each of the (source, target) sides begins where the one before it ends, the first one at `before` if that is given."""
    ends = [(before, before)] if before is not None else []
    for (_, given), (source, target) in pairwise([*ends, *sides]):
        if given != source:
            raise UserError(
                f"The upsampler from {source} to {target} pixels cannot follow a stage that draws {given}: give the upsamplers in the order of their sizes, "
                f"and here one from {given}."
            )


def accelerate_stages(
    stages: Sequence[Stage], device: torch.device, compile: bool, cuda_graphs: bool
) -> None:
    """Compile the blocks of stages that will run on `device`, and let them record CUDA graphs."""
    for stage in stages:
        stage.cuda_graphs = cuda_graphs
        if compile:
            compile_blocks(stage, device)


class Cascade:
    """Upsamplers, each of which goes on where the one before ends.

    Args:
        stages: in order (64 to 256, then 256 to 1024); one alone will do.
        device: where they run.
        offload: keep on the device only the stage that works; the others wait in the CPU's memory.
        batch_pixels: pictures are drawn together as long as their results have no more pixels than this; one picture always is.
        precision: "bf16": networks compute in bfloat16 (autocast) on devices that have it.
        compile, cuda_graphs: as in `UnCLIP.accelerate`.

    Raises:
        UserError: the sizes do not follow each other.
    """

    def __init__(
        self,
        stages: Sequence[Upsampler],
        device: str | torch.device = "cpu",
        offload: bool = False,
        batch_pixels: int = BATCH_PIXELS,
        precision: Precision = "fp32",
        compile: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        check_order([(source_side(stage), stage.net_config.image_size) for stage in stages])
        self.device, self.offload, self.batch_pixels = resolved(device), offload, batch_pixels
        self.precision = usable(precision, self.device)
        self.stages = [stage.to("cpu" if offload else device).eval() for stage in stages]
        accelerate_stages(self.stages, self.device, compile, cuda_graphs)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Target sides of the stages."""
        return tuple(stage.net_config.image_size for stage in self.stages)

    def route(self, side: int, times: int | None = None) -> list[Upsampler]:
        """The stages that make a picture with longer side `side` `times` as large: from that made for the nearest side on; None: to the last one.

        Raises:
            UserError: there are too few stages.
        """
        count, reached = 0, 1
        while times is not None and reached < times and count < len(self.stages):
            reached *= self.stages[count].factor
            count += 1
        if not self.stages or (times is not None and reached != times):
            have = f"those to {' and '.join(map(str, self.sizes))}" if self.stages else "none"
            raise UserError(
                f"There are no upsamplers that make pictures {times or 4} times as large ({have} loaded): load them, or ask for less."
            )
        nearest = min(
            range(len(self.stages)),
            key=lambda k: max(
                side / source_side(self.stages[k]), source_side(self.stages[k]) / side
            ),
        )
        first = nearest if times is None else min(nearest, len(self.stages) - count)
        return self.stages[first : None if times is None else first + count]

    @torch.no_grad()
    def upsample(
        self,
        images: Tensor,
        seeds: Sequence[int],
        times: int | None = None,
        sampling: Mapping[int, UpsamplingConfig] | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Draw each picture larger.

        Args:
            images: (B, 3, h, w) in [-1, 1], of any h and w.
            seeds: B of them; picture k depends on picture and seed k alone, and shares no random numbers with the stages before.
            times: 4, 16 ...; None: through all stages from that made for pictures of this size on. See `route`.
            sampling: by the target side of a stage (256, 1024), other settings than its own.
            callback: called with ("upsampler 256", step, steps), steps of all batches together.

        Returns:
            float32 (B, 3, H, W) in [-1, 1] on the device.

        Raises:
            UserError: there are too few stages, or too little memory.
        """
        if len(images) != len(seeds):
            raise ValueError(
                f"{len(images)} pictures and {len(seeds)} seeds were given: give one seed a picture."
            )
        route, (height, width) = self.route(max(images.shape[-2:]), times), images.shape[-2:]
        for stage in route:  # before any is drawn
            height, width = height * stage.factor, width * stage.factor
            count = min(len(images), self._at_once(height, width))
            self._require_memory(stage, height, width, count)
        for stage in route:
            images = self._enlarged(
                stage, images, seeds, (sampling or {}).get(stage.net_config.image_size), callback
            )
        return images

    def _enlarged(
        self,
        stage: Upsampler,
        images: Tensor,
        seeds: Sequence[int],
        sampling: UpsamplingConfig | None,
        callback: Callback | None,
    ) -> Tensor:
        """All pictures through one stage, as many at a time as `batch_pixels` allows."""
        height, width = (stage.factor * side for side in images.shape[-2:])
        size = self._at_once(height, width)
        parts = range(0, len(images), size)
        steps = stage.count_steps(sampling) * len(parts)
        offset = SEEDS * (3 if isinstance(stage, Upsampler1024) else 1)
        done, drawn = 0, []

        def told(*_: int) -> None:
            nonlocal done
            done += 1
            if callback is not None:
                callback(f"upsampler {stage.net_config.image_size}", done, steps)

        with at_work(stage, self.device, self.offload, self.precision):
            for first in parts:
                batch = {"low_res": images[first : first + size].to(self.device)}
                noise = Noise([seed + offset for seed in seeds[first : first + size]])
                try:
                    drawn.append(stage.sample(batch, noise, sampling, told))
                except torch.OutOfMemoryError:
                    raise UserError(
                        f"The upsampler to {stage.net_config.image_size} pixels has too little memory on {self.device} for {len(noise)} pictures of "
                        f"{width}x{height} at a time: draw fewer together, or keep only the stage that works on the device (offload)."
                    ) from None
        return torch.cat(drawn)

    def _at_once(self, height: int, width: int) -> int:
        """How many pictures of this size are drawn together."""
        return max(1, self.batch_pixels // (height * width))

    def _require_memory(self, stage: Upsampler, height: int, width: int, count: int) -> None:
        """UserError where `count` pictures certainly need more memory than this machine has.

        Only on CPUs, where the system would kill the program. A GPU says itself what is missing.
        """
        if self.device.type != "cpu" or not hasattr(os, "sysconf"):
            return
        config, bytes_per_number = stage.net_config, 2 if self.precision == "bf16" else 4
        numbers = FINEST_MAPS * config.width * count * height * width / config.patch_size**2
        needed = bytes_per_number * numbers
        if needed > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
            pictures = "1 picture takes" if count == 1 else f"{count} pictures take"
            raise UserError(
                f"{pictures} at least {needed / 1e9:.0f} GB of memory at {width}x{height} pixels, "
                f"and this machine has {memory / 1e9:.0f} GB: give a smaller one, or cut it into "
                "parts."
            )
