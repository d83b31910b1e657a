"""Compare all ranks before the first step, and check that checkpoints can be written.

Each rank sends the others one small message about its data, versions, clock and CLIP. If they do
not fit together, the run ends with one sentence that names rank and host.
"""

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
CHECKPOINTS_ON_DISK = 3  # at the same time: the newest, the one being written, the best
OWN_KEYS = {"rank", "world", "ranks", "missing"}
"""What may differ between ranks in the `rank_summary()` of a loader."""
Report = dict[str, Any]


class StartupCheck(Callback):
    """End a run before its first step if its ranks do not fit together.

    All ranks must read the same data, no two of them the same part, with equal CLIPs, versions,
    seeds and steps, and with clocks that agree. The first rank must have room for checkpoints.

    Args:
        clock_seconds: how far the clocks of two machines may differ.
    """

    def __init__(self, clock_seconds: float = 30.0) -> None:
        if clock_seconds <= 0:
            raise ValueError(f"startup.clock_seconds is {clock_seconds}: give more than 0.")
        self.clock_seconds = clock_seconds

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier("startup")  # so that all ranks read their clocks at one moment
        own = make_report(trainer, pl_module)
        reports: list[Report] = [own] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(reports, own)
        if problems := find_problems(reports, self.clock_seconds):
            raise SharedError("The run cannot start: " + " ".join(problems))


def make_report(trainer: Trainer, pl_module: LightningModule) -> Report:
    """What this rank has, as plain values.

    It raises nothing, because the other ranks wait for it; the key `failed` holds an error.
    """
    report: Report = {
        "rank": trainer.global_rank,
        "host": socket.gethostname(),
        "clock": time.time(),
        "step": trainer.global_step,
    }
    try:
        versions = {"python": platform.python_version(), "unclip_pl": __version__}
        report["versions"] = versions | {name: version(name) for name in PACKAGES}
        report["seed"] = os.environ.get("PL_GLOBAL_SEED")
        report["clip"] = getattr(pl_module, "clip_fingerprint", None)
        share = getattr(trainer.train_dataloader, "rank_summary", None)
        report["data"] = share() if share else None
        # Lightning sets `fast_dev_run` outside of the class
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            needed = CHECKPOINTS_ON_DISK * checkpoint_bytes(pl_module)
            report["disk"] = find_disk_problem(checkpoint_folder(trainer), needed)
    except Exception as error:
        report["failed"] = f"{type(error).__name__}: {error}"
    return report


def checkpoint_bytes(module: torch.nn.Module) -> int:
    """About the size of one checkpoint in bytes.

    It has the weights and the buffers and, for each weight that is trained, its average and AdamW's
    two moments.
    """
    total = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    for parameter in module.parameters():
        copies = 4 if parameter.requires_grad else 1
        total += copies * parameter.numel() * parameter.element_size()
    return total


def find_disk_problem(folder: Path, needed: int) -> str | None:
    """Why checkpoints cannot be written into a folder, as a sentence; None: they can.

    Args:
        folder: created if missing.
        needed: bytes. Files that are in the folder already count as room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".startup."):
            pass
        room = shutil.disk_usage(folder).free
        room += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        reason = DISK_ERRORS.get(error.errno or 0) or error.strerror
        return (
            f"checkpoints cannot be written to {folder} ({reason}): choose another "
            "--trainer.default_root_dir."
        )
    if room < needed:
        return (
            f"{folder} has room for {room / 1e9:.3g} GB of checkpoints and they take up to "
            f"{needed / 1e9:.3g} GB: free space or choose another --trainer.default_root_dir."
        )
    return None


def _name(report: Report) -> str:
    return f"rank {report['rank']} on {report['host']}"


def find_problems(reports: list[Report], clock_seconds: float) -> list[str]:
    """One sentence for each problem; empty if all ranks fit together.

    Args:
        reports: of all ranks, see `make_report`. Each is compared with the first.
        clock_seconds: how far the clocks may differ.
    """
    failed = [
        f"{_name(report)} failed to look at what it has ({report['failed']})."
        for report in reports
        if "failed" in report
    ]
    if failed:
        return failed
    first = reports[0]
    problems = [f"{_name(first)}: {first['disk']}"] if first.get("disk") else []
    for report in reports[1:]:
        problems += _compare(first, report, clock_seconds)
    return problems + find_data_problems([(_name(report), report["data"]) for report in reports])


def _compare(first: Report, other: Report, clock_seconds: float) -> list[str]:
    """What differs between the first rank and another one, apart from the data."""
    name, first_name = _name(other), _name(first)
    problems = []
    differing = [
        f"{key} {value} and not {first['versions'][key]}"
        for key, value in other["versions"].items()
        if value != first["versions"][key]
    ]
    if differing:
        problems.append(
            f"{name} has {', '.join(differing)} as {first_name}: install the same versions on all "
            "nodes."
        )
    offset = other["clock"] - first["clock"]
    if abs(offset) > clock_seconds:
        direction = "ahead of" if offset > 0 else "behind"
        problems.append(
            f"The clock of {name} is {abs(offset):.0f} s {direction} that of {first_name}: set it "
            "right."
        )
    if other["seed"] != first["seed"]:
        problems.append(
            f"{name} has the seed {other['seed']} and {first_name} {first['seed']}: give the same "
            "--seed_everything to all."
        )
    if other["step"] != first["step"]:
        problems.append(
            f"{name} starts at step {other['step']} and {first_name} at step {first['step']}: "
            "--trainer.default_root_dir must be one folder that all nodes share."
        )
    if (other["clip"] is None) != (first["clip"] is None):
        problems.append(
            f"Only one of {name} and {first_name} knows its CLIP: start all ranks with the same "
            "configuration."
        )
    elif other["clip"] is not None:
        try:
            require_same(first["clip"], other["clip"], f"On {first_name} the run")
        except UserError as error:
            problems.append(f"{name}: {error}")
    return problems


def find_data_problems(shares: list[tuple[str, dict[str, Any] | None]]) -> list[str]:
    """One sentence for each problem with the data that the ranks read.

    Args:
        shares: for each rank its name and the `rank_summary()` of its loader; None: its data
            cannot be compared.
    """
    first_name, first = shares[0]
    problems = []
    for name, share in shares:
        if (share is None) != (first is None):
            problems.append(
                f"Only one of {name} and {first_name} has training data that can be compared: "
                "start all ranks with the same configuration."
            )
        elif share is not None and first is not None:
            problems += _compare_shares(name, share, first_name, first)
    known = [share for _, share in shares if share is not None]
    for place, count in Counter(share["rank"] for share in known).items():
        if count > 1:
            problems.append(f"{count} ranks would read the same part {place} of the data.")
    worlds = {share["world"] for share in known}
    if worlds and worlds != {len(shares)}:
        problems.append(
            f"The data are shared out among {sorted(worlds)} ranks and {len(shares)} run."
        )
    return problems


def _compare_shares(
    name: str, share: dict[str, Any], first_name: str, first: dict[str, Any]
) -> list[str]:
    """What is wrong with the data of one rank, next to those of the first."""
    if share["missing"]:
        return [
            f"{name} cannot see {len(share['missing'])} of the shards to train on, the first being "
            f"{share['missing'][0]}."
        ]
    differing = [
        f"{key} {share[key]} and not {first[key]}"
        for key in share.keys() - OWN_KEYS
        if share[key] != first[key]
    ]
    if differing:
        return [
            f"{name} would read other data than {first_name} ({', '.join(differing)}): all nodes "
            "must see the same files."
        ]
    return []
