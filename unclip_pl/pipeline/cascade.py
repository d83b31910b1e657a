"""Upsamplers in a row: images of any size and shape, each stage 4 times as large as the one before.

Images are drawn in batches that fit into memory, and with `offload` only the stage that works is on
the device.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from unclip_pl.diffusion.noise import Noise
from unclip_pl.pipeline.devices import accelerate_stages, canonical_device, on_device
from unclip_pl.pipeline.seeds import UPSAMPLER_256_OFFSET, UPSAMPLER_1024_OFFSET
from unclip_pl.stages.upsampler import Upsampler, Upsampler1024, UpsamplingConfig
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import Images, as_tensor
from unclip_pl.utils.precision import Precision, supported_precision

BATCH_PIXELS = 1 << 20
FINEST_MAPS = 10
"""A U-Net's forward pass holds at least this many feature maps of its finest level at a time."""
Callback = Callable[[str, int, int], Any]
"""Called with (stage, step, steps) after each sampling step."""


class Cascade:
    """Upsamplers, each of which starts at the size that the one before reaches.

    Args:
        stages: in order (64 to 256, then 256 to 1024); a single one is enough.
        device: where they run.
        offload: keep only the stage that works on the device; the others wait in the CPU's memory.
        batch_pixels: images are drawn together as long as the results have no more pixels than
            this; a single image always is.
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
        check_sizes([(source_side(stage), stage.net_config.image_size) for stage in stages])
        self.device = canonical_device(device)
        self.offload = offload
        self.batch_pixels = batch_pixels
        self.precision = supported_precision(precision, self.device)
        home = "cpu" if offload else device
        self.stages = [stage.to(home).eval() for stage in stages]
        accelerate_stages(self.stages, self.device, compile, cuda_graphs)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Target sides of the stages."""
        return tuple(stage.net_config.image_size for stage in self.stages)

    def route(self, side: int, times: int | None = None) -> list[Upsampler]:
        """Choose the stages that enlarge an image.

        They start with the one that was made for the nearest size, or earlier if too few would
        follow it.

        Args:
            side: the longer side of the image, in pixels.
            times: how many times as large the image becomes; None: through the last stage.

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
                f"There are no upsamplers that make pictures {times or 4} times as large ({have} "
                "loaded): load them, or ask for less."
            )

        def ratio(index: int) -> float:
            source = source_side(self.stages[index])
            return max(side / source, source / side)

        nearest = min(range(len(self.stages)), key=ratio)
        if times is None:
            return self.stages[nearest:]
        first = min(nearest, len(self.stages) - count)
        return self.stages[first : first + count]

    @torch.no_grad()
    def upsample(
        self,
        images: Images,
        seeds: Sequence[int],
        times: int | None = None,
        sampling: Mapping[int, UpsamplingConfig] | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Draw each image larger.

        Args:
            images: (B, 3, h, w) in [-1, 1], of any h and w; or PIL images of one size.
            seeds: B seeds. Result k depends only on image and seed k. Its random numbers are not
                those of the stages before.
            times: 4, 16 ...; None: through all stages from the one made for images of this size.
                See `route`.
            sampling: other settings than the stages' own, by target side (256, 1024).
            callback: called with ("upsampler 256", step, steps); steps of all batches together.

        Returns:
            float32 (B, 3, H, W) in [-1, 1] on the device.

        Raises:
            UserError: there are too few stages, or too little memory.
        """
        images = as_tensor(images)
        if len(images) != len(seeds):
            raise ValueError(
                f"{len(images)} pictures and {len(seeds)} seeds were given: give one seed per "
                "picture."
            )
        height, width = images.shape[-2:]
        self.require_memory(len(images), (height, width), times)
        for stage in self.route(max(height, width), times):
            settings = (sampling or {}).get(stage.net_config.image_size)
            images = self._run_stage(stage, images, seeds, settings, callback)
        return images

    def require_memory(self, count: int, sides: tuple[int, int], times: int | None = None) -> None:
        """Raise a UserError if `count` images of `sides` (height, width) are certainly too large.

        It also raises one if there are too few stages. Nothing is drawn.
        """
        height, width = sides
        for stage in self.route(max(sides), times):
            height, width = height * stage.factor, width * stage.factor
            together = min(count, self._batch_size(height, width))
            self._require_memory(stage, height, width, together)

    def count_steps(
        self,
        count: int,
        sides: tuple[int, int],
        times: int | None = None,
        sampling: Mapping[int, UpsamplingConfig] | None = None,
    ) -> int:
        """How many steps `upsample` reports for `count` images of `sides` (height, width)."""
        steps, (height, width) = 0, sides
        for stage in self.route(max(sides), times):
            height, width = height * stage.factor, width * stage.factor
            settings = (sampling or {}).get(stage.net_config.image_size)
            batches = -(-count // self._batch_size(height, width))
            steps += batches * stage.count_steps(settings)
        return steps

    def _run_stage(
        self,
        stage: Upsampler,
        images: Tensor,
        seeds: Sequence[int],
        sampling: UpsamplingConfig | None,
        callback: Callback | None,
    ) -> Tensor:
        """All images through one stage, as many at a time as `batch_pixels` allows."""
        height, width = (stage.factor * side for side in images.shape[-2:])
        size = self._batch_size(height, width)
        starts = range(0, len(images), size)
        steps = stage.count_steps(sampling) * len(starts)
        is_last = isinstance(stage, Upsampler1024)
        offset = UPSAMPLER_1024_OFFSET if is_last else UPSAMPLER_256_OFFSET
        done = 0

        def report_step(*_: int) -> None:
            nonlocal done
            done += 1
            if callback is not None:
                callback(f"upsampler {stage.net_config.image_size}", done, steps)

        results = []
        with on_device(stage, self.device, self.offload, self.precision):
            for start in starts:
                batch = {"low_res": images[start : start + size].to(self.device)}
                noise = Noise([seed + offset for seed in seeds[start : start + size]])
                try:
                    results.append(stage.sample(batch, noise, sampling, report_step))
                except torch.OutOfMemoryError:
                    raise UserError(
                        f"The upsampler to {stage.net_config.image_size} pixels has too little "
                        f"memory on {self.device} for {len(noise)} pictures of {width}x{height} at "
                        "a time: draw fewer together, or keep only the stage that works on the "
                        "device (offload)."
                    ) from None
        return torch.cat(results)

    def _batch_size(self, height: int, width: int) -> int:
        """How many images of this size are drawn together."""
        return max(1, self.batch_pixels // (height * width))

    def _require_memory(self, stage: Upsampler, height: int, width: int, count: int) -> None:
        """Raise a UserError if `count` images certainly need more memory than this machine has.

        Only on CPUs, where the system would kill the program. A GPU says itself what is missing.
        """
        if self.device.type != "cpu" or not hasattr(os, "sysconf"):
            return
        config = stage.net_config
        bytes_per_number = 2 if self.precision == "bf16" else 4
        numbers = FINEST_MAPS * config.width * count * height * width / config.patch_size**2
        needed = bytes_per_number * numbers
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > memory:
            pictures = "1 picture takes" if count == 1 else f"{count} pictures take"
            raise UserError(
                f"{pictures} at least {needed / 1e9:.0f} GB of memory at {width}x{height} pixels, "
                f"and this machine has {memory / 1e9:.0f} GB: give a smaller one, or cut it into "
                "parts."
            )


def source_side(stage: Upsampler) -> int:
    """Side of the images that a stage was made to enlarge."""
    return stage.net_config.image_size // stage.factor


def check_sizes(sides: Sequence[tuple[int, int]], start: int | None = None) -> None:
    """Check that each upsampler starts at the size where the one before it ends.

    Args:
        sides: (source, target) side of each in pixels, in order.
        start: the side at which the first one must start; None: at any.

    Raises:
        UserError: they do not follow each other.
    """
    before = [] if start is None else [(start, start)]
    for (_, reached), (source, target) in pairwise([*before, *sides]):
        if reached != source:
            raise UserError(
                f"The upsampler from {source} to {target} pixels cannot follow a stage that draws "
                f"{reached}: give the upsamplers in the order of their sizes, and here one from "
                f"{reached}."
            )
