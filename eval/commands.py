"""What the commands of `eval` share: options, ranks, a progress bar, and how figures are printed.

Figures appear as a table and, at the end, as one JSON line.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

from unclip_pl.utils.commands import CommandParser, Option, exit_code
from unclip_pl.utils.devices import announce_compiling, pick_device
from unclip_pl.utils.distributed import local_rank, rank, world_size
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import Count, Seed, whole
from unclip_pl.utils.outputs import OutputFolder
from unclip_pl.utils.precision import Precision

Figures = dict[str, Any]
"""Figures by name, with what they were computed from: plain values that JSON can hold."""
RANK_TIMEOUT = timedelta(days=1)
"""How long ranks that have drawn their images wait for the others."""


@dataclass(frozen=True)
class RunOptions:
    """Where and how it runs.

    Args:
        device: cpu, cuda, cuda:1 ...; with several ranks each takes its own GPU
        precision: of the networks; distances are always float64
        compile: compile the networks that draw (torch.compile): minutes at first, meant for GPUs
        batch_size: images per batch, on each rank
        seed: image k is drawn with seed + k; also of random subsets
        out: a folder for the figures as a file; by default they are only printed
        overwrite: replace reports and figures of the same name in --out; else they are kept, and
            new ones get a number
    """

    device: str = "auto"
    precision: Precision = "fp32"
    compile: bool = False
    batch_size: Count = 64
    seed: Seed = 0
    out: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.overwrite and self.out is None:
            raise UserError(
                "--overwrite is for files in --out: name that folder, or leave --overwrite out."
            )

    def open_out(self) -> OutputFolder | None:
        """The folder --out; a UserError if nothing can be written there."""
        return None if self.out is None else OutputFolder(self.out, self.overwrite)


@dataclass(frozen=True)
class ReportOptions(RunOptions):
    """Where and how it runs.

    Args:
        out: a folder for the report, the figures and the images
    """

    batch_size: Count = 32
    out: Path = Path("out")

    def open_out(self) -> OutputFolder:
        """The folder --out; a UserError if nothing can be written there."""
        return OutputFolder(self.out, self.overwrite)


def clip_name(value: Any) -> str:
    """The name of a CLIP that scores: one in the package, NAME/TAG of open_clip, or a folder."""
    return _network_name(str(value), "openmoji-judge", "openmoji")


def features_name(value: Any) -> str:
    """The name of a network for the distances: as `clip_name`, or Inception."""
    return _network_name(str(value), "inception", "openmoji-judge", "clip", "openmoji")


def _network_name(text: str, *names: str) -> str:
    if text in names or "/" in text or text.startswith("local-dir:"):
        return text
    raise ValueError(
        f"{text} is none of {', '.join(names)}: give one of these, NAME/TAG of open_clip, or "
        "local-dir:/folder"
    )


@dataclass(frozen=True)
class FeatureOptions:
    """How images are compared with real ones.

    Args:
        features: of the distances: inception (clean-fid's, for FID), openmoji-judge (the embedded
            CLIP that scores), clip (the embedded one that conditions), NAME/TAG of open_clip, or
            local-dir:/folder; by default openmoji-judge for the embedded drawings (captions
            openmoji) and inception for everything else
        reference_size: side of the real images in pixels: the short side is resized to it and the
            centre is cut out; by default the side of the images that are evaluated
    """

    features: Annotated[str, features_name] | None = None
    reference_size: Count | None = None


def resamples(value: Any) -> int:
    """A number of random subsets that have a spread, or 0."""
    if whole(value) < 0 or whole(value) == 1:
        raise ValueError(f"{value} gives no interval: give 2 or more, or 0 for none")
    return int(value)


Resamples = Annotated[int, resamples, Option(renamed="--bootstrap")]
"""How many random subsets the interval of the Frechet distance is from; 0: no interval."""


def choose_features(features: str | None, captions: str | None) -> str:
    """The name of the network for the distances.

    Args:
        features: of the option --features; None: not given.
        captions: what the evaluated images are drawn for; None: they are not drawn.
    """
    return features or ("openmoji-judge" if captions == "openmoji" else "inception")


def run_command(command: Callable[..., Figures], prog: str, words: list[str] | None = None) -> int:
    """Run a command on all ranks, and print what it returns as one JSON line.

    It is the last line of the output.
    With --out the same line is written to OUT/NAME.json, NAME being the command's, by the rule of
    `OutputFolder`. A UserError is one sentence on stderr.

    Args:
        command: a function of `options: RunOptions` and others, see `unclip_pl.utils.commands`.
        prog: its module, such as "eval.fid".
        words: of the command line; None: those of the process.

    Returns:
        The exit code.
    """
    name = prog.rpartition(".")[2]

    def run() -> None:
        bound = CommandParser(command, f"python -m {prog}").bind(words)
        options: RunOptions = bound.keywords["options"]
        out = options.open_out() if rank() == 0 else None
        with process_group(options.device) as device:
            if options.compile and rank() == 0:
                announce_compiling(device)
            figures = bound(options=replace(options, device=device))
            if rank() == 0:
                line = json.dumps({"command": name, **finite(figures)}, allow_nan=False)
                if out:
                    out.write(f"{name}.json", f"{line}\n".encode())
                sys.stdout.flush()
                print(line, flush=True)

    return exit_code(f"python -m {prog}", run)


def finite(figures: Any) -> Any:
    """The same figures with None for numbers that are not finite: JSON has no NaN."""
    if isinstance(figures, dict):
        return {key: finite(value) for key, value in figures.items()}
    if isinstance(figures, list | tuple):
        return [finite(value) for value in figures]
    if isinstance(figures, float) and not math.isfinite(figures):
        return None
    return figures


@contextlib.contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join torch's process group if there are several ranks; yields this rank's device."""
    import torch
    from torch import distributed

    device = pick_device(device)
    if world_size() == 1 or distributed.is_initialized():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{local_rank() % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    if "MASTER_ADDR" not in os.environ:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        slurm = SLURMEnvironment(auto_requeue=False)
        os.environ["MASTER_ADDR"] = slurm.main_address
        os.environ["MASTER_PORT"] = str(slurm.main_port)
    distributed.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo",
        rank=rank(),
        world_size=world_size(),
        timeout=RANK_TIMEOUT,
    )
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def progress(batches: Iterable[Any], total: int | None, title: str) -> Iterator[Any]:
    """Yield the batches (dicts with `images`), and show a progress bar on rank 0.

    The bar, on stderr, shows the images done and the time left.
    """
    from tqdm import tqdm

    other = rank() != 0
    with tqdm(total=total, desc=title, unit="image", disable=other, mininterval=1.0) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch["images"]))


def aligned(rows: list[tuple[str, str]]) -> str:
    """Names and values, one pair per line, the values aligned."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
