"""`unclip plan`: what a run of a stage needs on so many GPUs, before one of them is paid for."""

import argparse
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip_pl.cli.configs import config_folder, find_config, find_configs
from unclip_pl.cli.options import AddCommand
from unclip_pl.utils.errors import UserError

if TYPE_CHECKING:
    from unclip_pl.planner import RunEstimate

COLUMNS = (
    "GPUs",
    "strategy",
    "weights",
    "gradients",
    "optimiser",
    "EMA",
    "CLIP",
    "gathered",
    "activations",
    "total GB",
    "samples x passes",
    "steps/h",
    "days",
    "GPU hours",
)
HERE = {
    "accelerator": "cpu",
    "devices": "1",
    "num_nodes": "1",
    "strategy": "auto",
    "precision": "32-true",
}
"""Settings of the trainer with which a stage is built on this machine, without training it."""


def add(command: AddCommand) -> None:
    parser = command(
        "plan",
        run,
        "Memory of each GPU and time of a training run, counted without one: parameters, "
        "operations, activations.",
    )
    parser.add_argument(
        "stage",
        nargs="?",
        help="a stage's YAML, such as stages/paper/decoder.yaml, which goes over its small stage",
    )
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        default=[],
        help="a further YAML to lay over it; may be repeated",
    )
    parser.add_argument("--all", action="store_true", help="all the paper's stages")
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[8], help="how many; several numbers give a row each"
    )
    parser.add_argument(
        "--batch",
        type=int,
        help="samples per step, over all GPUs; by default data.loader.batch_size",
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the GPUs' peak that is reached"
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=989.0,
        help="of one GPU: 989 is an H100 SXM in dense bfloat16",
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        default=80.0,
        help="GB of one GPU, of which nine tenths are used",
    )
    parser.add_argument(
        "--checkpointing",
        choices=["none", "selective", "full"],
        default="full",
        help="which activations are computed again in the backward pass",
    )


def run(arguments: argparse.Namespace) -> None:
    if bool(arguments.stage) == arguments.all:
        raise UserError(
            "unclip plan takes a stage's YAML, such as stages/paper/decoder.yaml, or --all: give "
            "one of the two."
        )
    positive = (arguments.peak_tflops, arguments.gpu_memory, arguments.batch or 1)
    if min(arguments.gpus) < 1 or not 0 < arguments.mfu <= 1 or min(positive) <= 0:
        raise UserError(
            "unclip plan needs --gpus of at least 1, an --mfu above 0 and up to 1, and a "
            "--peak-tflops, --gpu-memory and --batch above 0."
        )
    stages = [arguments.stage]
    if arguments.all:
        paths = sorted((config_folder("stages") / "paper").glob("*.yaml"))
        stages = [f"stages/paper/{path.name}" for path in paths]
    for stage in stages:
        print(report(stage, arguments))


def report(stage: str, arguments: argparse.Namespace) -> str:
    """The stage's paragraph and table, as Markdown."""
    from unclip_pl.stages import load_all

    load_all()  # first, so that lightning can import torchvision
    from unclip_pl import planner

    model, data, steps = build_on_meta(stage, arguments.config)
    if steps < 1:
        raise UserError(
            f"{stage} does not say how long it trains: lay a file with trainer.max_steps over it "
            "with -c."
        )
    clip = data.clip.config if getattr(data, "text_states", False) else None
    estimate = planner.estimate_resources(model, getattr(data, "crop", None), clip)
    batch = arguments.batch or data.config.batch_size
    megabytes = {kind: f"{size / 1e6:,.0f} MB" for kind, size in estimate.activations.items()}
    lines = [
        f"**{Path(stage).stem}**: {estimate.parameters / 1e6:,.0f} M parameters; "
        f"{estimate.flops / 1e9:,.0f} GFLOP per sample in training; activations per sample "
        f"{megabytes['none']}, {megabytes['selective']} with selective and {megabytes['full']} "
        f"with full checkpointing; {steps:,} steps of {batch:,}.\n",
        table_line(COLUMNS),
        "|---" * len(COLUMNS) + "|",
    ]
    for gpus in arguments.gpus:
        for strategy in ("ddp", "fsdp") if gpus > 1 else ("ddp",):
            row = planner.estimate_run(
                estimate,
                gpus,
                strategy,
                batch,
                steps,
                mfu=arguments.mfu,
                peak=arguments.peak_tflops * 1e12,
                memory=0.9e9 * arguments.gpu_memory,
                checkpointing=arguments.checkpointing,
            )
            lines.append(table_line(cells(row)))
    return "\n".join([*lines, ""])


def table_line(cells: tuple[str, ...] | list[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def cells(row: "RunEstimate") -> list[str]:
    """A row of the table, in the order of COLUMNS."""
    sizes = [
        row.weights,
        row.gradients,
        row.optimizer,
        row.ema,
        row.clip,
        row.gathered,
        row.activations,
        row.total,
    ]
    return [
        str(row.gpus),
        row.strategy,
        *(f"{size / 1e9:.2f}" for size in sizes),
        f"{row.micro_batch} x {row.accumulate}" if row.micro_batch else "does not fit",
        f"{row.steps_per_hour:,.0f}",
        f"{row.hours / 24:,.1f}",
        f"{row.hours * row.gpus:,.0f}",
    ]


def build_on_meta(stage: str, overlays: list[str]) -> tuple[Any, Any, int]:
    """The stage on the meta device, its DataModule, and the optimiser steps of its run.

    A YAML of `stages/paper/` is laid over the small stage of the same name. Nothing is read and
    nothing allocated.

    Raises:
        UserError: the YAML does not exist, or is not of a stage that can be planned.
    """
    import torch

    from unclip_pl.cli.lightning_cli import build_cli
    from unclip_pl.stages.base import Stage
    from unclip_pl.training.lora import LoRA

    find_config(stage)
    path = Path(stage)
    files = [stage, *overlays]
    if path.parent.name in ("paper", "karlo"):
        files.insert(0, str(path.parent.parent / path.name))
    words = find_configs([word for file in files for word in ("-c", file)])
    for key, value in HERE.items():
        words += [f"--trainer.{key}", value]
    with quiet(), torch.device("meta"):
        cli = build_cli(words, run=False)
        for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]  # set outside of it
            if isinstance(callback, LoRA):  # decides what is trained
                callback.setup(cli.trainer, cli.model, "fit")
    if not isinstance(cli.model, Stage) or not hasattr(cli.model, "net_config"):
        raise UserError(
            f"{stage} trains a {type(cli.model).__name__}, which cannot be planned: give a "
            "prior's, the decoder's or an upsampler's."
        )
    return cli.model, cli.datamodule, cli.trainer.max_steps


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning reports neither warnings nor its devices while the body runs."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
