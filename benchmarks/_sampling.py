"""Drawing with a stage of random weights: `sample` as the pipeline calls it."""

import argparse
import dataclasses
from typing import Any

from _common import (  # sets what must be set before torch
    flops_of,
    peak_mib,
    report,
    sampling_options,
    timed,
)

# isort: split
from unclip_pl.diffusion.noise import Noise
from unclip_pl.networks.compilation import compile_blocks
from unclip_pl.utils.precision import autocast


def options(arguments: argparse.ArgumentParser, steps: int) -> None:
    """Add how to draw."""
    arguments.add_argument("--steps", type=int, default=steps)
    arguments.add_argument("--guidance-scale", type=float, default=2.0)
    sampling_options(arguments)


def measure(
    job: str,
    stage: Any,
    batch: dict[str, Any],
    given: argparse.Namespace,
    before: float,
    **settings: Any,
) -> None:
    """Time the draws for the conditions in `batch`, then count the operations of one, and print
    the line. `settings` replace those of the stage's own `sampling`."""
    stage.to(given.device).eval().requires_grad_(False)  # as a loaded stage is
    if given.compile:
        compile_blocks(stage, given.device)
    batch = {key: value.to(given.device) for key, value in batch.items()}
    sampling = dataclasses.replace(stage.sampling, **settings)

    def step() -> None:
        with autocast(given.dtype, given.device):
            stage.sample(batch, Noise(range(given.batch)), sampling)

    stage.cuda_graphs = given.cuda_graphs
    times = timed(step, given)
    peak = peak_mib()  # counting the operations takes memory of its own
    stage.cuda_graphs = False  # a replay hides its operations
    report(
        job, given, times, given.batch, before,
        params=sum(p.numel() for p in stage.parameters()), flops_per_step=flops_of(step),
        peak_rss_mib=peak, nfe=settings.get("steps"),
    )  # fmt: skip
