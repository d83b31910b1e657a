"""Drawing with a stage of random weights: `sample` as the pipeline calls it."""

import argparse
import dataclasses
from typing import Any

from _common import flops_of, peak_mib, report, timed  # sets what must be set before torch

# isort: split
from unclip_pl.diffusion.noise import Noise
from unclip_pl.precision import autocast


def options(arguments: argparse.ArgumentParser, steps: int) -> None:
    """Add how to draw."""
    arguments.add_argument("--steps", type=int, default=steps)
    arguments.add_argument("--guidance-scale", type=float, default=2.0)


def measure(job: str, stage: Any, batch: dict[str, Any], given: argparse.Namespace, before: float) -> None:
    """Time the draws for the conditions in `batch`, then count the operations of one, and print the line."""
    stage.to(given.device).eval()
    batch = {key: value.to(given.device) for key, value in batch.items()}
    sampling = dataclasses.replace(stage.sampling, steps=given.steps, guidance_scale=given.guidance_scale)

    def step() -> None:
        with autocast(given.dtype, given.device):
            stage.sample(batch, Noise(range(given.batch)), sampling)

    times = timed(step, given)
    peak = peak_mib()  # counting the operations takes memory of its own
    params = sum(p.numel() for p in stage.parameters())
    report(job, given, times, given.batch, before, params=params, flops_per_step=flops_of(step), peak_rss_mib=peak, nfe=given.steps)
