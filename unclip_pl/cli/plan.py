"""`unclip plan`: what a run of a stage needs on so many GPUs, before one of them is paid for."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from unclip_pl.cli.configs import config_folder, find_config, find_configs
from unclip_pl.utils.commands import Option
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import Count

if TYPE_CHECKING:
    from unclip_pl.planner import RunEstimate

Checkpointing = Literal["none", "selective", "full"]
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


GPU = Literal["H100", "H200", "A100", "A100-40", "L40S", "RTX-4090"]
GPUS: dict[GPU, tuple[float, float]] = {
    "H100": (989, 80),
    "H200": (989, 141),
    "A100": (312, 80),
    "A100-40": (312, 40),
    "L40S": (362, 48),
    "RTX-4090": (165, 24),
}
"""Of each GPU, the SXM module where there is one: TFLOPS in dense bfloat16, and GB of memory. From
NVIDIA's data sheets."""


@dataclass(frozen=True)
class HardwareOptions:
    """The machine.

    Args:
        gpus: how many; several numbers give a row each
        gpu: which, for its peak and its memory as the data sheet has them
        mfu: share of the GPUs' peak that is reached
        peak_tflops: of one GPU in dense bfloat16, in place of that of --gpu
        gpu_memory: GB of one GPU, of which nine tenths are used, in place of those of --gpu
    """

    gpus: Sequence[int] = (8,)
    gpu: GPU = "H100"
    mfu: float = 0.4
    peak_tflops: float | None = None
    gpu_memory: float | None = None

    def __post_init__(self) -> None:
        if min(self.gpus) < 1 or not 0 < self.mfu <= 1 or min(self.peak, self.memory) <= 0:
            raise UserError(
                "unclip plan needs --gpus of at least 1, an --mfu above 0 and up to 1, and a "
                "--peak-tflops and --gpu-memory above 0."
            )

    @property
    def peak(self) -> float:
        """TFLOPS of one GPU."""
        return GPUS[self.gpu][0] if self.peak_tflops is None else self.peak_tflops

    @property
    def memory(self) -> float:
        """GB of one GPU."""
        return GPUS[self.gpu][1] if self.gpu_memory is None else self.gpu_memory

    def __str__(self) -> str:
        own = self.peak_tflops is not None or self.gpu_memory is not None
        others = ", ".join(name for name in GPUS if own or name != self.gpu)
        kind = "" if own else f" is of the type {self.gpu} and"
        return (
            f"Assumed, not measured: each GPU{kind} has a peak of {self.peak:g} TFLOPS, of which "
            f"{self.mfu:.0%} are reached (--mfu), and {self.memory:g} GB. Choose another with "
            f"--gpu ({others}), or with --peak-tflops and --gpu-memory."
        )


def plan(
    stage: str | None = None,
    *,
    config: Annotated[Sequence[str], Option(alias="-c", repeat=True)] = (),
    all: bool = False,
    batch: Count | None = None,
    checkpointing: Checkpointing = "full",
    hardware: HardwareOptions,
) -> None:
    """Memory of each GPU and time of a training run, counted without one.

    It counts parameters, operations and activations.

    Args:
        stage: a stage's YAML, such as stages/paper/decoder.yaml, which goes over its small stage
        config: a further YAML to lay over it; may be repeated
        all: all the paper's stages
        batch: samples per step, over all GPUs; by default data.loader.batch_size
        checkpointing: which activations are computed again in the backward pass
        hardware: the GPUs
    """
    if bool(stage) == all:
        raise UserError(
            "unclip plan takes a stage's YAML, such as stages/paper/decoder.yaml, or --all: give "
            "one of the two."
        )
    stages = [stage] if stage else paper_stages()
    find_configs([word for path in (*stages, *config) for word in ("-c", path)])
    for number, path in enumerate(stages):
        text = report(path, config, batch, checkpointing, hardware)
        print(text if number else f"{hardware}\n\n{text}")


def paper_stages() -> list[str]:
    """The YAMLs of the paper's stages."""
    paths = sorted((config_folder("stages") / "paper").glob("*.yaml"))
    return [f"stages/paper/{path.name}" for path in paths]


def report(
    stage: str,
    overlays: Sequence[str],
    batch: int | None,
    checkpointing: Checkpointing,
    hardware: HardwareOptions,
) -> str:
    """The stage's paragraph and table, as Markdown."""
    from unclip_pl import planner
    from unclip_pl.stages import load_all

    load_all()
    model, data, steps = build_on_meta(stage, overlays)
    if steps < 1:
        raise UserError(
            f"{stage} does not say how long it trains: lay a file with trainer.max_steps over it "
            "with -c."
        )
    clip = data.clip.config if getattr(data, "text_states", False) else None
    estimate = planner.estimate_resources(model, getattr(data, "crop", None), clip)
    batch = batch or data.config.batch_size
    megabytes = {kind: f"{size / 1e6:,.0f} MB" for kind, size in estimate.activations.items()}
    lines = [
        f"**{Path(stage).stem}**: {estimate.parameters / 1e6:,.0f} M parameters; "
        f"{estimate.flops / 1e9:,.0f} GFLOP per sample in training; activations per sample "
        f"{megabytes['none']}, {megabytes['selective']} with selective and {megabytes['full']} "
        f"with full checkpointing; {steps:,} steps of {batch:,}.\n",
        table_line(COLUMNS),
        "|---" * len(COLUMNS) + "|",
    ]
    optimizer = model.optimizer_config.name
    shardable = optimizer == "adamw"  # `build_optimizer` refuses the others
    for gpus in hardware.gpus:
        for strategy in ("ddp", "fsdp") if gpus > 1 and shardable else ("ddp",):
            row = planner.estimate_run(
                estimate,
                gpus,
                strategy,
                batch,
                steps,
                mfu=hardware.mfu,
                peak=hardware.peak * 1e12,
                memory=0.9e9 * hardware.memory,
                checkpointing=checkpointing,
            )
            lines.append(table_line(cells(row)))
    if not shardable and max(hardware.gpus) > 1:
        lines.append(f"\nfsdp is left out: optimizer.name {optimizer} needs whole weights.")
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


def build_on_meta(stage: str, overlays: Sequence[str]) -> tuple[Any, Any, int]:
    """The stage on the meta device, its DataModule, and the optimiser steps of its run.

    A YAML of `stages/paper/`, `karlo/` or `glide/` is laid over the small stage of the same name.
    Nothing is read and nothing allocated.

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
    if path.parent.name in ("paper", "karlo", "glide"):
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
