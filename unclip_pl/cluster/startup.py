"""Before the first step every rank tells all others what it has, in one small message; what does not fit ends the run with rank and host named."""

import os
import platform
import shutil
import socket
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from unclip_pl import __version__
from unclip_pl.clip.fingerprint import require_same
from unclip_pl.cluster.checkpoint_io import checkpoint_folder
from unclip_pl.utils.errors import SharedError, UserError
from unclip_pl.utils.files import DISK_ERRORS

PACKAGES = ("torch", "lightning", "torchdata", "numpy", "open_clip_torch")
FILES = 3  # checkpoints that lie there at once: the newest, the one being written, the best
PLACE = {
    "rank",
    "world",
    "ranks",
    "missing",
}  # in `rank_summary()` of a loader: what is this rank's own
Report = dict[str, Any]


class StartupCheck(Callback):
    """All ranks read the same data and no two the same part; CLIPs, versions, clocks and steps agree; checkpoints can be written and have room.

    Args:
        clock_seconds: how far the clocks of two machines may be apart.
    """

    def __init__(self, clock_seconds: float = 30.0) -> None:
        if clock_seconds <= 0:
            raise ValueError(f"startup.clock_seconds is {clock_seconds}: give more than 0.")
        self.clock_seconds = clock_seconds

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier("startup")  # so that all read their clocks at one time
        mine = report(trainer, pl_module)
        reports: list[Report] = [mine] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(reports, mine)
        if wrong := faults(reports, self.clock_seconds):
            raise SharedError("The run cannot start: " + " ".join(wrong))


def report(trainer: Trainer, pl_module: LightningModule) -> Report:
    """What this rank has, in plain values; never raises, for the others wait for it."""
    mine: Report = {
        "rank": trainer.global_rank,
        "host": socket.gethostname(),
        "clock": time.time(),
        "step": trainer.global_step,
    }
    try:
        mine["versions"] = {"python": platform.python_version(), "unclip_pl": __version__} | {
            name: version(name) for name in PACKAGES
        }
        mine["seed"] = os.environ.get("PL_GLOBAL_SEED")
        mine["clip"] = getattr(pl_module, "clip_fingerprint", None)
        share = getattr(trainer.train_dataloader, "rank_summary", None)
        mine["data"] = share() if share else None
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it outside of the class
            mine["disk"] = disk(checkpoint_folder(trainer), FILES * checkpoint_bytes(pl_module))
    except Exception as error:
        mine["failed"] = f"{type(error).__name__}: {error}"
    return mine


def checkpoint_bytes(module: torch.nn.Module) -> int:
    """About the size of one checkpoint: weights, their average and AdamW's two moments; buffers."""
    trained = sum(
        4 * p.numel() * p.element_size() if p.requires_grad else p.numel() * p.element_size()
        for p in module.parameters()
    )
    return trained + sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())


def disk(folder: Path, need: int) -> str | None:
    """Why `need` bytes of checkpoints cannot be written into `folder`, which is made if missing; None where they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".startup."):
            pass
        free = shutil.disk_usage(folder).free + sum(
            file.stat().st_size for file in folder.rglob("*") if file.is_file()
        )  # they make room
    except OSError as error:
        return f"checkpoints cannot be written to {folder} ({DISK_ERRORS.get(error.errno or 0) or error.strerror}): choose another --trainer.default_root_dir."
    if free < need:
        return (
            f"{folder} has room for {free / 1e9:.3g} GB of checkpoints and they take up to {need / 1e9:.3g} GB: free space or choose another "
            "--trainer.default_root_dir."
        )
    return None


def faults(reports: list[Report], clock_seconds: float) -> list[str]:
    """One sentence for each thing that is wrong or differs from the first rank; [] where all is well."""

    def name(one: Report) -> str:
        return f"rank {one['rank']} on {one['host']}"

    first, found = (
        reports[0],
        [
            f"{name(one)} failed to look at what it has ({one['failed']})."
            for one in reports
            if "failed" in one
        ],
    )
    if found:
        return found
    if first.get("disk"):
        found.append(f"{name(first)}: {first['disk']}")
    for one in reports[1:]:
        differs = [
            f"{key} {value} and not {first['versions'][key]}"
            for key, value in one["versions"].items()
            if value != first["versions"][key]
        ]
        if differs:
            found.append(
                f"{name(one)} has {', '.join(differs)} as {name(first)}: install the same versions on all nodes."
            )
        if abs(off := one["clock"] - first["clock"]) > clock_seconds:
            found.append(
                f"The clock of {name(one)} is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} that of {name(first)}: set it right."
            )
        if one["seed"] != first["seed"]:
            found.append(
                f"{name(one)} has the seed {one['seed']} and {name(first)} {first['seed']}: give the same --seed_everything to all."
            )
        if one["step"] != first["step"]:
            found.append(
                f"{name(one)} starts at step {one['step']} and {name(first)} at step {first['step']}: --trainer.default_root_dir must be one "
                "folder that all nodes share."
            )
        if (one["clip"] is None) != (first["clip"] is None):
            found.append(
                f"Only one of {name(one)} and {name(first)} knows its CLIP: start all ranks with the same configuration."
            )
        elif one["clip"] is not None:
            try:
                require_same(first["clip"], one["clip"], f"On {name(first)} the run")
            except UserError as error:
                found.append(f"{name(one)}: {error}")
    return found + data_faults([(name(one), one["data"]) for one in reports])


def data_faults(shares: list[tuple[str, dict[str, Any] | None]]) -> list[str]:
    """The same of what each rank reads; `rank_summary()` of a loader gives `rank`, `world`, `missing` and what the order of its samples follows from."""
    (leader, first), found = shares[0], []
    for name, share in shares:
        if (share is None) != (first is None):
            found.append(
                f"Only one of {name} and {leader} has training data that can be compared: start all ranks with the same configuration."
            )
        elif share is not None and first is not None:
            if share["missing"]:
                found.append(
                    f"{name} cannot see {len(share['missing'])} of the shards to train on, the first being {share['missing'][0]}."
                )
            elif other := [
                f"{key} {share[key]} and not {first[key]}"
                for key in share.keys() - PLACE
                if share[key] != first[key]
            ]:
                found.append(
                    f"{name} would read other data than {leader} ({', '.join(other)}): all nodes must see the same files."
                )
    places = Counter(share["rank"] for _, share in shares if share is not None)
    found += [
        f"{count} ranks would read the same part {place} of the data."
        for place, count in places.items()
        if count > 1
    ]
    worlds = {share["world"] for _, share in shares if share is not None}
    if worlds and worlds != {len(shares)}:
        found.append(f"The data are shared out among {sorted(worlds)} ranks and {len(shares)} run.")
    return found
