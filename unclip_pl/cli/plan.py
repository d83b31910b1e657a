"""`unclip plan`: what a run of a stage needs on so many GPUs, memory and time, before one of them
is paid for."""

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

from unclip_pl.cli.options import Command
from unclip_pl.utils.errors import UserError

COLUMNS = (
    "GPUs|strategy|weights|gradients|optimiser|EMA|CLIP|gathered|activations|total GB|"
    "samples x passes|steps/h|days|GPU hours"
)


def add(command: Command) -> None:
    """The command."""
    plan = command(
        "plan",
        run_plan,
        "Memory of each GPU and time of a training run, counted without one: parameters, "
        "operations, activations.",
    )
    plan.add_argument(
        "stage",
        nargs="?",
        help="a stage's YAML, such as stages/paper/decoder.yaml, which goes over its small stage",
    )
    plan.add_argument(
        "-c",
        "--config",
        action="append",
        default=[],
        help="a further YAML to lay over it; may be repeated",
    )
    plan.add_argument("--all", action="store_true", help="all the paper's stages")
    plan.add_argument(
        "--gpus", type=int, nargs="+", default=[8], help="how many; several numbers give a row each"
    )
    plan.add_argument(
        "--batch",
        type=int,
        help="samples a step, over all GPUs; by default data.loader.batch_size",
    )
    plan.add_argument(
        "--mfu", type=float, default=0.4, help="share of the GPUs' peak that is reached"
    )
    plan.add_argument(
        "--peak-tflops",
        type=float,
        default=989.0,
        help="of one GPU: 989 is an H100 SXM in dense bfloat16",
    )
    plan.add_argument(
        "--gpu-memory",
        type=float,
        default=80.0,
        help="GB of one GPU, of which nine tenths are used",
    )
    plan.add_argument(
        "--checkpointing",
        choices=["none", "selective", "full"],
        default="full",
        help="which activations are computed again in the backward pass",
    )


def run_plan(arguments: argparse.Namespace) -> None:
    from unclip_pl.cli.lightning import config_folder

    if bool(arguments.stage) == arguments.all:
        raise UserError(
            "unclip plan takes a stage's YAML, such as stages/paper/decoder.yaml, or --all: give "
            "one of the two."
        )
    if (
        min(arguments.gpus) < 1
        or not 0 < arguments.mfu <= 1
        or min(arguments.peak_tflops, arguments.gpu_memory, arguments.batch or 1) <= 0
    ):
        raise UserError(
            "unclip plan needs --gpus of at least 1, an --mfu above 0 and up to 1, and a "
            "--peak-tflops, --gpu-memory and --batch above 0."
        )
    papers = sorted(
        f"stages/paper/{path.name}" for path in (config_folder("stages") / "paper").glob("*.yaml")
    )
    for stage in papers if arguments.all else [arguments.stage]:
        print(report(stage, arguments))


def report(stage: str, arguments: argparse.Namespace) -> str:
    """The stage's paragraph and table, as Markdown."""
    from unclip_pl import planner as plan

    model, data, steps = configured(stage, arguments.config)
    if steps < 1:
        raise UserError(
            f"{stage} does not say how long it trains: lay a file with trainer.max_steps over it "
            "with -c."
        )
    clip = data.clip.config if getattr(data, "text_states", False) else None
    needs = plan.count(model, getattr(data, "crop", None), clip)
    batch = arguments.batch or data.config.batch_size
    megabytes = {kind: f"{size / 1e6:,.0f} MB" for kind, size in needs.activations.items()}
    lines = [
        f"**{Path(stage).stem}**: {needs.parameters / 1e6:,.0f} M parameters; "
        f"{needs.flops / 1e9:,.0f} GFLOP per sample in training; activations per sample "
        f"{megabytes['none']}, {megabytes['selective']} with selective and {megabytes['full']} "
        f"with full checkpointing; {steps:,} steps of {batch:,}.\n",
        "| " + COLUMNS.replace("|", " | ") + " |", "|---" * (COLUMNS.count("|") + 1) + "|",
    ]  # fmt: skip
    for gpus in arguments.gpus:
        for strategy in ("ddp", "fsdp") if gpus > 1 else ("ddp",):
            row = plan.row(
                needs,
                gpus,
                strategy,
                batch,
                steps,
                mfu=arguments.mfu,
                peak=arguments.peak_tflops * 1e12,
                memory=0.9e9 * arguments.gpu_memory,
                checkpointing=arguments.checkpointing,
            )
            held = [row.weights, row.gradients, row.optimizer, row.ema, row.clip, row.gathered]
            passes = f"{row.micro_batch} x {row.accumulate}" if row.micro_batch else "does not fit"
            memory = [f"{value / 1e9:.2f}" for value in (*held, row.activations, row.total)]
            time = [
                f"{row.steps_an_hour:,.0f}",
                f"{row.hours / 24:,.1f}",
                f"{row.hours * gpus:,.0f}",
            ]
            lines.append("| " + " | ".join([str(gpus), strategy, *memory, passes, *time]) + " |")
    return "\n".join([*lines, ""])


def configured(stage: str, overlays: list[str]) -> tuple[Any, Any, int]:
    """The stage on the meta device, its DataModule, and the optimiser steps of its run; nothing is
    read and nothing drawn."""
    from unclip_pl.cli.lightning import build_cli, find_config, find_configs
    from unclip_pl.stages.base import Stage

    find_config(stage)
    path = Path(stage)
    files = [str(path.parent.parent / path.name), stage] if path.parent.name == "paper" else [stage]
    files += overlays
    import torch

    here = {
        "accelerator": "cpu",
        "devices": "1",
        "num_nodes": "1",
        "strategy": "auto",
        "precision": "32-true",
    }
    flags = [word for key, value in here.items() for word in (f"--trainer.{key}", value)]
    loggers = {
        logging.getLogger(name): logging.getLogger(name).level
        for name in ("lightning.pytorch", "lightning.fabric")
    }
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            cli = build_cli(
                [*find_configs([part for file in files for part in ("-c", file)]), *flags],
                run=False,
            )
        finally:
            for logger, level in loggers.items():
                logger.setLevel(level)
    if not isinstance(cli.model, Stage) or not hasattr(cli.model, "net_config"):
        raise UserError(
            f"{stage} trains a {type(cli.model).__name__}, which cannot be planned: give a "
            "prior's, the decoder's or an upsampler's."
        )
    return cli.model, cli.datamodule, cli.trainer.max_steps
