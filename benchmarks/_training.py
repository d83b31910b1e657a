"""A training step of a stage, under our trainer and in a plain loop: the real module, optimiser, clipping and EMA in both."""

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

from _common import begin, flops_of, peak_mib, report, timed, wait  # sets what must be set before torch

# isort: split
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from unclip_pl.precision import autocast, usable
from unclip_pl.stages.base import Stage
from unclip_pl.training.ema import EMA
from unclip_pl.training.progress import LossByTimestep, Progress


class Clock(Callback):
    """Seconds from the end of one step to the end of the next; the first ones belong to the warm-up."""

    def __init__(self, device: str) -> None:
        self.device, self.ends = device, []

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        wait(self.device)
        self.ends.append(time.perf_counter())


def on_device(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def trained(module: Stage, batch: dict[str, Any], given: Any) -> list[float]:
    """Seconds a step under a trainer with what `lightning fit` does at each step: EMA, progress bar, monitors, TensorBoard. No checkpoints, no validation."""
    clock, steps = Clock(given.device), given.warmup + given.repeats + 1
    batch = on_device(batch, given.device)  # as in the other systems' scripts: the loader has its own benchmark
    precision: Any = {"bf16": "bf16-mixed", "fp32": "32-true"}[usable(given.dtype, given.device)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=steps, accelerator=given.device.split(":")[0], devices=1, precision=precision,
            callbacks=[EMA(0.9999), Progress(), LossByTimestep(), clock], logger=TensorBoardLogger(folder, name="", version=""),
            enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=25, default_root_dir=folder, use_distributed_sampler=False,
        )
        trainer.fit(module, DataLoader([batch] * steps, batch_size=None))
    return [b - a for a, b in zip(clock.ends[given.warmup :], clock.ends[given.warmup + 1 :])]


def plain_step(module: Stage, batch: dict[str, Any], given: Any) -> Callable[[], None]:
    """A training step of the module with its optimiser and EMA, without a trainer."""
    module.to(given.device)
    batch = on_device(batch, given.device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=module.optimizer_config.weight_decay, fused=True)
    averages = [p.detach().clone() for p in module.parameters()]

    def step() -> None:
        with autocast(given.dtype, given.device):
            loss = module.loss(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(averages, [p.detach() for p in module.parameters()], 1e-4)

    return step


def bare(module: Stage, batch: dict[str, Any], given: Any) -> list[float]:
    """Seconds a step of the same module, optimiser and EMA in a plain loop."""
    return timed(plain_step(module, batch, given), given)


def measure(job: str, module: Stage, batch: dict[str, Any], given: argparse.Namespace, before: float) -> None:
    """Time the steps, then count the operations of one, and print the line."""
    times = {"trainer": trained, "bare": bare}[given.mode](module.train(), batch, given)
    peak = peak_mib()  # counting the operations takes memory of its own
    batch = on_device(batch, module.device)

    def both_ways() -> None:
        module.loss(batch)["loss"].backward()

    report(
        job, given, times, given.batch, before, f"unclip_pl/{given.mode}",
        params=sum(p.numel() for p in module.parameters()), flops_per_step=flops_of(both_ways), peak_rss_mib=peak,
    )


def arguments_of(arguments: argparse.ArgumentParser) -> tuple[argparse.Namespace, float]:
    """Parse, with `--mode`; seed, and return the memory of the imports as well."""
    arguments.add_argument("--mode", choices=["trainer", "bare"], default="trainer", help="bare: a plain loop; what the trainer costs is the difference")
    given = arguments.parse_args()
    before = begin(given)
    seed_everything(0, verbose=False)
    return given, before
