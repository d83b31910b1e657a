"""Read and write checkpoints: files, or folders of shards.

A checkpoint is either complete or absent, and reading it executes no code.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from torch.distributed.checkpoint.api import CheckpointException

from unclip_pl.cluster.sharded_checkpoint import (
    META_FILE,
    Target,
    is_complete,
    read_folder,
    whole_tensors,
)
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import DISK_ERRORS, atomic_file, remove, underlying_os_error

RELEASE_FILE = "config.json"  # of a folder of `unclip export`


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's plugin for checkpoints, with atomic writes.

    After a crash or on a full disk the previous checkpoint is as it was. Files and folders of
    shards can be read.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        try:
            with atomic_file(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError, UserError) as error:
            raise explain_write_error(path, error) from error

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path, map_location)

    def remove_checkpoint(self, path: str | os.PathLike) -> None:
        remove(Path(path))


def explain_write_error(path: str | os.PathLike, error: BaseException) -> BaseException:
    """The error to raise if a checkpoint could not be written.

    It is a UserError if the operating system gave the reason; otherwise `error` itself.
    """
    os_error = underlying_os_error(error)
    if os_error is None:
        return error
    reason = DISK_ERRORS.get(os_error.errno or 0) or os_error.strerror
    return UserError(
        f"The checkpoint {path} could not be written ({reason}): free space or choose another "
        "--trainer.default_root_dir, then go on with --resume auto. Earlier checkpoints are whole."
    )


def read_checkpoint(
    path: str | os.PathLike,
    map_location: Any = "cpu",
    target: Target = whole_tensors(),
    all_ranks: bool = False,
    mmap: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint without executing code.

    Args:
        path: a file or a folder of shards.
        map_location: as for torch.load. Folders are always read to the CPU.
        target: see `read_folder`; for folders only.
        all_ranks: see `read_folder`; for folders only.
        mmap: read each tensor of a file only when it is used.

    Raises:
        UserError: there is no such checkpoint, it is incomplete, it is no checkpoint, or loading it
            would execute code.
    """
    require_checkpoint(Path(path))
    try:
        if Path(path).is_dir():
            _require_undamaged(unsharded_file(path))
            return read_folder(Path(path), target, all_ranks)
        if not mmap:
            _require_undamaged(path)
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} was refused: it holds Python objects that would run code on loading, which no "
            "checkpoint of ours does. Do not load it with another tool unless you trust who made "
            "it."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, CheckpointException) as error:
        reason = str(error).partition("\n")[0] or "it is cut off"
        raise UserError(
            f"{path} is no whole checkpoint ({reason}): move it away, and --resume auto "
            "takes the one before it."
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(
            f"{path} holds no checkpoint but a {type(checkpoint).__name__}: give a .ckpt file that "
            "`lightning fit` wrote."
        )
    return checkpoint


def _require_undamaged(path: str | os.PathLike) -> None:
    """Compare the checksums in a file, which torch writes and does not read.

    A file that was written without (`torch.serialization.set_crc32_options(False)`) is refused.

    Raises:
        ValueError: a disk or a copy has changed bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from None
    if damaged:
        raise ValueError(f"the bytes of {damaged} are not those that were written")


def require_checkpoint(path: Path) -> None:
    """Check that a path is a checkpoint, as far as can be seen without reading all of it.

    Raises:
        UserError: there is nothing, or it is something else.
    """
    if not path.exists():
        raise UserError(f"There is no checkpoint {path}: check the path.")
    if not path.is_dir():
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError):
            raise UserError(
                f"{path} is no whole checkpoint (it has another format, or it is cut off): give a "
                ".ckpt file that `lightning fit` wrote, an earlier one if this one is damaged."
            ) from None
        if not any(name.endswith("/data.pkl") for name in names):
            raise UserError(
                f"{path} is no checkpoint but another archive: give a .ckpt file that "
                "`lightning fit` wrote."
            )
    elif (path / META_FILE).exists():
        return
    elif newest := newest_checkpoint(path):
        raise UserError(
            f"{path} is the folder of a run and no checkpoint: give one of its files, such as "
            f"{newest}."
        )
    elif (path / RELEASE_FILE).exists():
        raise UserError(
            f"{path} is a release, from which no run can go on: give it to --init to start from "
            "its weights."
        )
    else:
        raise UserError(
            f"{path} is a folder without a checkpoint: give a .ckpt that `lightning fit` wrote."
        )


def unsharded_file(path: str | os.PathLike) -> Path:
    """The file of a checkpoint that holds all but the sharded tensors."""
    return Path(path) / META_FILE if Path(path).is_dir() else Path(path)


def read_settings(path: str | os.PathLike) -> tuple[str, dict[str, Any]]:
    """The name of a checkpoint's stage and its hyperparameters, without reading its weights."""
    checkpoint = read_checkpoint(unsharded_file(path), mmap=True)
    return checkpoint.get("stage", ""), checkpoint.get("hyper_parameters", {})


def change_checkpoint(path: str | os.PathLike, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a checkpoint atomically.

    Args:
        path: a file or a folder of shards. Of a folder only what is not sharded can be changed.
        change: called with the checkpoint, which it changes in place.
    """
    file = unsharded_file(path)
    checkpoint = read_checkpoint(file)
    change(checkpoint)
    AtomicCheckpointIO().save_checkpoint(checkpoint, file)


def newest_checkpoint(folder: str | os.PathLike, prefix: str = "") -> Path | None:
    """The complete checkpoint with the highest step in a run's folder; None: there is none.

    The step in the name decides, not the time of the file. Incomplete checkpoints are skipped.

    Args:
        folder: of the run. Only it and its `checkpoints/` are searched.
        prefix: how the name of the checkpoint must begin.
    """
    candidates = []
    for path in [*Path(folder).glob("*.ckpt"), *Path(folder).glob("checkpoints/*.ckpt")]:
        if path.name.startswith(".") or not path.name.startswith(prefix):
            continue
        if is_complete(path) if path.is_dir() else zipfile.is_zipfile(path):
            is_newest = path.name.startswith("newest")
            candidates.append((step_of(path), is_newest, -len(path.parts), str(path)))
    return Path(max(candidates)[-1]) if candidates else None


CHECKPOINT_NAME = re.compile(r"(newest|best)-step=\d+(-v\d+)?\.ckpt")
"""The names of the checkpoints that a run writes."""


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, as in `newest-step=500.ckpt`; -1: the name has none."""
    digits = path.stem.partition("step=")[2].split("-")[0]
    return int(digits) if digits.isdigit() else -1


def checkpoint_folder(trainer: Trainer) -> Path:
    """Where a run writes its checkpoints: `checkpoints/` in its folder."""
    return Path(trainer.default_root_dir) / "checkpoints"
