"""What the commands of `eval` share: options, ranks, a progress bar, and how figures are printed.

Figures appear as a table and, at the end, as one JSON line.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from unclip_pl.utils.devices import pick_device
from unclip_pl.utils.distributed import local_rank, rank, world_size
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_file
from unclip_pl.utils.options import HelpFormatter, add_renamed, positive_int, seed

Figures = dict[str, Any]
"""Figures by name, with what they were computed from: plain values that JSON can hold."""
RANK_TIMEOUT = timedelta(days=1)
"""How long ranks that have drawn their images wait for the others."""
Settings = TypeVar("Settings")


def command_parser(doc: str | None, prog: str, batch_size: int = 64) -> argparse.ArgumentParser:
    """Make a command's parser, with the options that all commands have.

    These are --device, --precision, --compile, --batch-size, --seed and --out.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {prog}", description=doc, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1 ...; with several ranks each takes its own GPU",
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="of the networks; distances are always float64",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the networks that draw (torch.compile): minutes at first, faster on GPUs",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=batch_size, help="images per batch, on each rank"
    )
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        help="image k is drawn with seed + k; also of random subsets",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="a folder for the figures as a file; by default they are only printed",
    )
    return parser


def add_features_options(parser: argparse.ArgumentParser) -> None:
    """How images are compared with real ones: --features and --reference-size."""
    parser.add_argument(
        "--features",
        help="of the distances: inception (clean-fid's, for FID), openmoji-judge (the embedded "
        "CLIP that scores), clip (the embedded one that conditions), NAME/TAG of open_clip, or "
        "local-dir:/folder; by default openmoji-judge for the embedded drawings (captions "
        "openmoji, openmoji-line) and inception for everything else",
    )
    parser.add_argument(
        "--reference-size",
        type=positive_int,
        help="side of the real images in pixels: the short side is resized to it and the centre "
        "is cut out; by default the side of the images that are evaluated",
    )


def add_resamples_option(parser: argparse.ArgumentParser, default: int) -> None:
    """How many random subsets the interval of the Frechet distance is from: --resamples."""
    parser.add_argument(
        "--resamples",
        type=int,
        default=default,
        help="random halves of the sets, for the interval of the Frechet distance; 0: no interval",
    )
    add_renamed(parser, "--bootstrap", "--resamples")


def choose_features(features: str | None, captions: str | None) -> str:
    """The name of the network for the distances.

    Args:
        features: of the option --features; None: not given.
        captions: what the evaluated images are drawn for; None: they are not drawn.
    """
    from unclip_pl.data.openmoji_drawings import STYLES

    return features or ("openmoji-judge" if captions in STYLES else "inception")


def settings_from(kind: type[Settings], arguments: argparse.Namespace, **values: Any) -> Settings:
    """The dataclass `kind` from the options with the names of its fields, and from `values`.

    Raises:
        UserError: the dataclass refuses a value.
    """
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    options = {name: value for name, value in vars(arguments).items() if name in names}
    try:
        return kind(**options | values)
    except ValueError as error:
        raise UserError(str(error)) from None


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], Figures],
    words: list[str] | None = None,
) -> int:
    """Parse the words, run on all ranks, and print what `run` returns as one JSON line.

    It is the last line of the output.

    With --out the same line is written to OUT/NAME.json, NAME being the command's. A UserError is
    one sentence on stderr.

    Returns:
        The exit code.
    """
    arguments = parser.parse_args(words)
    name = parser.prog.rpartition(".")[2]
    try:
        with process_group(arguments.device) as arguments.device:
            figures = run(arguments)
            if rank() == 0:
                line = json.dumps({"command": name, **finite(figures)}, allow_nan=False)
                if arguments.out:
                    with atomic_file(arguments.out / f"{name}.json", "w") as file:
                        file.write(line + "\n")
                sys.stdout.flush()
                print(line, flush=True)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"{parser.prog}: {error.filename or 'A file'} cannot be used "
            f"({error.strerror or error}): check the path and the rights to it.",
            file=sys.stderr,
        )
        return 1
    return 0


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
