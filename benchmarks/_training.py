"""A training step of a stage, under our trainer or in a plain loop.

Both have the real module, optimiser, clipping and EMA.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

from _common import (
    begin,
    compile_option,
    flops_of,
    peak_mib,
    report,
    timed,
    wait,
)

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from unclip_pl.networks.checkpointing import Checkpointing, apply_checkpointing
from unclip_pl.networks.compilation import compile_blocks
from unclip_pl.stages.base import Stage
from unclip_pl.training.ema import EMA
from unclip_pl.training.progress import LossByTimestep, Progress
from unclip_pl.utils.precision import autocast, supported_precision


class Clock(Callback):
    """Seconds from the end of one step to the end of the next; the first belong to the warm-up."""

    def __init__(self, device: str) -> None:
        self.device, self.start, self.ends = device, 0.0, []

    def on_train_start(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        wait(self.device)
        self.ends.append(time.perf_counter())


def on_device(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def trained(module: Stage, batch: dict[str, Any], arguments: argparse.Namespace) -> list[float]:
    """Seconds per step under a trainer that does what `lightning fit` does at each step.

    That is EMA, progress bar, monitors and TensorBoard. There are no checkpoints and no validation.
    """
    clock, steps = Clock(arguments.device), arguments.warmup + arguments.repeats + 1
    batch = on_device(batch, arguments.device)  # the loader has a benchmark of its own
    precisions: Any = {"bf16": "bf16-mixed", "fp32": "32-true"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=steps,
            accelerator=arguments.device.split(":")[0],
            devices=1,
            precision=precisions[supported_precision(arguments.dtype, arguments.device)],
            callbacks=[EMA(0.9999), Progress(), LossByTimestep(), clock],
            logger=TensorBoardLogger(folder, name="", version=""),
            enable_checkpointing=False,
            enable_model_summary=False,
            log_every_n_steps=25,
            default_root_dir=folder,
            use_distributed_sampler=False,
        )
        trainer.fit(module, DataLoader([batch] * steps, batch_size=None))
    arguments.first_s = clock.ends[0] - clock.start
    ends = clock.ends[arguments.warmup :]
    return [later - earlier for earlier, later in pairwise(ends)]


def plain_step(
    module: Stage, batch: dict[str, Any], arguments: argparse.Namespace
) -> Callable[[], None]:
    """A training step of the module with its optimiser and EMA, without a trainer."""
    module.to(arguments.device)
    batch = on_device(batch, arguments.device)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=1e-4, weight_decay=module.optimizer_config.weight_decay, fused=True
    )
    averages = [p.detach().clone() for p in module.parameters()]

    def step() -> None:
        with autocast(arguments.dtype, arguments.device):
            loss = module.loss(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(averages, [p.detach() for p in module.parameters()], 1e-4)

    return step


def bare(module: Stage, batch: dict[str, Any], arguments: argparse.Namespace) -> list[float]:
    """Seconds per step of the same module, optimiser and EMA in a plain loop."""
    return timed(plain_step(module, batch, arguments), arguments)


def measure(
    job: str,
    module: Stage,
    batch: dict[str, Any],
    arguments: argparse.Namespace,
    before: float,
    **more: Any,
) -> None:
    """Time the steps, count the operations of one unless `more` has them, and print the line."""
    if arguments.compile:
        compile_blocks(module, arguments.device)
    times = {"trainer": trained, "bare": bare}[arguments.mode](module.train(), batch, arguments)
    peak = peak_mib()  # counting the operations takes memory of its own
    if "flops_per_step" not in more:
        more["flops_per_step"] = training_flops(module, batch)
    report(
        job, arguments, times, arguments.batch, before, f"unclip_pl/{arguments.mode}",
        params=sum(p.numel() for p in module.parameters()), peak_rss_mib=peak, **more,
    )  # fmt: skip


def training_flops(module: Stage, batch: dict[str, Any]) -> int:
    """Operations of a forward and a backward pass in which nothing is computed again."""
    apply_checkpointing(module, "none")
    batch = on_device(batch, module.device)

    def both_ways() -> None:
        module.loss(batch)["loss"].backward()

    return flops_of(both_ways)


def training_options(parser: argparse.ArgumentParser) -> None:
    """Add how to train."""
    parser.add_argument(
        "--mode", choices=["trainer", "bare"], default="trainer",
        help="bare: a plain loop; what the trainer costs is the difference",
    )  # fmt: skip
    parser.add_argument(
        "--checkpointing", choices=get_args(Checkpointing), default="none",
        help="which activations are computed again in the backward pass",
    )  # fmt: skip
    compile_option(parser)


def parse_arguments(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, float]:
    """Add how to train, and parse; seed, and return the memory of the imports as well."""
    training_options(parser)
    arguments = parser.parse_args()
    before = begin(arguments)
    seed_everything(0, verbose=False)
    return arguments, before
