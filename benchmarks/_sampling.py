"""Drawing with a stage of random weights: `sample` as the pipeline calls it."""

import argparse
import dataclasses
from typing import Any

from _common import (
    flops_of,
    peak_mib,
    report,
    sampling_options,
    timed,
)

from unclip_pl.diffusion.noise import Noise
from unclip_pl.networks.compilation import compile_blocks
from unclip_pl.utils.precision import autocast


def options(parser: argparse.ArgumentParser, steps: int) -> None:
    """Add how to draw."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    sampling_options(parser)


def measure(
    job: str,
    stage: Any,
    batch: dict[str, Any],
    arguments: argparse.Namespace,
    before: float,
    **settings: Any,
) -> None:
    """Time the sampling for a batch of conditions, count its operations, and print the line.

    Args:
        job: its name.
        stage: to sample.
        batch: the conditions.
        arguments: of the command line.
        before: memory of the imports in MiB.
        settings: replace those of the stage's `sampling`.
    """
    stage.to(arguments.device).eval().requires_grad_(False)  # as a loaded stage is
    if arguments.compile:
        compile_blocks(stage, arguments.device)
    batch = {key: value.to(arguments.device) for key, value in batch.items()}
    sampling = dataclasses.replace(stage.sampling, **settings)

    def step() -> None:
        with autocast(arguments.dtype, arguments.device):
            stage.sample(batch, Noise(range(arguments.batch)), sampling)

    stage.cuda_graphs = arguments.cuda_graphs
    times = timed(step, arguments)
    peak = peak_mib()  # counting the operations takes memory of its own
    stage.cuda_graphs = False  # a replay hides its operations
    flops = None
    try:
        flops = flops_of(step)  # takes longer than the step itself
    finally:  # a count that is cut off or fails does not take the times with it
        report(
            job, arguments, times, arguments.batch, before,
            params=sum(p.numel() for p in stage.parameters()), flops_per_step=flops,
            peak_rss_mib=peak, nfe=settings.get("steps"),
        )  # fmt: skip
