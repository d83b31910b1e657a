"""What the commands of `eval` share: the options, ranks, a progress bar with the time left, figures
as a table and as one JSON line at the end.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from unclip_pl.utils.devices import pick_device
from unclip_pl.utils.distributed import local_rank, rank, world_size
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_file
from unclip_pl.utils.options import HelpFormatter, positive_int, seed

Figures = dict[str, Any]
PATIENCE = timedelta(days=1)
"""How long ranks that have drawn their pictures wait for the others."""


def parser(doc: str | None, prog: str, batch_size: int = 64) -> argparse.ArgumentParser:
    """A command's parser with the options that all have: --device, --precision, --batch-size,
    --out, --seed.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m {prog}", description=doc, formatter_class=HelpFormatter
    )
    made.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1 ...; with several ranks each takes its own GPU",
    )
    made.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="of the networks; distances are always float64",
    )
    made.add_argument(
        "--compile",
        action="store_true",
        help="compile the networks that draw (torch.compile): minutes at first, faster on GPUs",
    )
    made.add_argument(
        "--batch-size", type=positive_int, default=batch_size, help="images a batch, on each rank"
    )
    made.add_argument(
        "--seed", type=seed, default=0, help="image k is drawn with seed + k; also of the bootstrap"
    )
    made.add_argument(
        "--out",
        type=Path,
        help="a folder for the figures as a file; by default they are only printed",
    )
    return made


def add_features(made: argparse.ArgumentParser) -> None:
    """The options of comparing with real pictures: --features, --reference-size."""
    made.add_argument(
        "--features",
        help="of the distances: inception (clean-fid's, for FID), openmoji-judge (the embedded "
        "CLIP that judges), clip (the embedded one that conditions), NAME/TAG of open_clip, or "
        "local-dir:/folder; by default openmoji-judge for the embedded drawings (captions "
        "openmoji, openmoji-line) and inception for all else",
    )
    made.add_argument(
        "--reference-size",
        type=positive_int,
        help="side of the real pictures in pixels: the short side is resized to it and the centre "
        "is cut out; by default the side of what is judged",
    )


def features_of(given: argparse.Namespace) -> str:
    """--features, or what it is by default: see `add_features`."""
    from unclip_pl.data.openmoji_drawings import STYLES

    drawn = not getattr(given, "images", None)
    embedded = drawn and (given.captions or "openmoji") in STYLES
    return given.features or ("openmoji-judge" if embedded else "inception")


def command(
    made: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], Figures],
    arguments: list[str] | None = None,
) -> int:
    """Parse, run over all ranks, and print what `run` returns as one JSON line, the last of the
    output; a UserError is a sentence and exit code 1.

    With --out the same is written to OUT/NAME.json, NAME being the command's.
    """
    # Before torch is imported: threads soon sleep while they wait (docs/cluster.md, "CPUs").
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    given = made.parse_args(arguments)
    name = made.prog.rpartition(".")[2]
    try:
        with ranks(given.device) as given.device:
            figures = run(given)
            if rank() == 0:
                line = json.dumps({"command": name, **finite(figures)}, allow_nan=False)
                if given.out:
                    with atomic_file(given.out / f"{name}.json", "w") as file:
                        file.write(line + "\n")
                sys.stdout.flush()
                print(line, flush=True)
    except UserError as error:
        print(f"{made.prog}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"{made.prog}: {error.filename or 'A file'} cannot be used "
            f"({error.strerror or error}): check the path and the rights to it.",
            file=sys.stderr,
        )
        return 1
    return 0


def finite(figures: Any) -> Any:
    """The same with None for what is not finite: JSON has no NaN."""
    if isinstance(figures, dict):
        return {key: finite(value) for key, value in figures.items()}
    if isinstance(figures, list | tuple):
        return [finite(value) for value in figures]
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures


@contextlib.contextmanager
def ranks(device: str) -> Iterator[str]:
    """Join the process group where there are several ranks; yields this rank's device."""
    import torch
    from torch import distributed

    picked = pick_device(device)
    size = world_size()
    if size == 1 or distributed.is_initialized():
        yield picked
        return
    if picked == "cuda":
        picked = f"cuda:{local_rank() % torch.cuda.device_count()}"
        torch.cuda.set_device(picked)
    if "MASTER_ADDR" not in os.environ:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        slurm = SLURMEnvironment(auto_requeue=False)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = (
            slurm.main_address,
            str(slurm.main_port),
        )
    distributed.init_process_group(
        "nccl" if picked.startswith("cuda") else "gloo",
        rank=rank(),
        world_size=size,
        timeout=PATIENCE,
    )
    try:
        yield picked
    finally:
        distributed.destroy_process_group()


def progress(batches: Iterable[Any], total: int | None, what: str) -> Iterator[Any]:
    """The batches (dicts with `images`), with a bar on stderr of images done and the time left; on
    rank 0 alone.
    """
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=what,
        unit="image",
        disable=rank() != 0 or None if sys.stderr.isatty() else rank() != 0,
        mininterval=1.0,
    ) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch["images"]))


def table(rows: list[tuple[str, str]]) -> str:
    """Names and values, one a line, aligned."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
