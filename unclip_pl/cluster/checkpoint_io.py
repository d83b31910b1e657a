"""Checkpoints, files or folders of shards, that are whole or not there, read without executing code; the newest found for `--resume auto`."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from torch.distributed.checkpoint.api import CheckpointException

from unclip_pl.cluster.sharded_checkpoint import META, Target, is_whole, read_folder, whole
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import DISK_ERRORS, atomic_file, remove, underlying_os_error


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target, fsync, rename: a crash or a full disk leaves the previous checkpoint as it was. Reads files and folders."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        try:
            with atomic_file(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError, UserError) as error:
            raise unwritten(path, error) from error

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path, map_location)

    def remove_checkpoint(self, path: str | os.PathLike) -> None:
        remove(Path(path))


def unwritten(path: str | os.PathLike, error: BaseException) -> BaseException:
    """What to raise where a checkpoint could not be written: a sentence if the reason is the operating system's, else `error` itself."""
    failed = underlying_os_error(error)
    if failed is None:
        return error
    return UserError(
        f"The checkpoint {path} could not be written ({DISK_ERRORS.get(failed.errno or 0) or failed.strerror}): "
        "free space or choose another --trainer.default_root_dir, "
        "then go on with --resume auto. Earlier checkpoints are whole."
    )


def read_checkpoint(
    path: str | os.PathLike,
    map_location: Any = "cpu",
    target: Target = whole(),
    together: bool = False,
    mmap: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint, a file or a sharded folder, without executing what is in it: one that would run code on loading is refused with a sentence.

    Args:
        path: of either kind.
        map_location: as torch.load takes it; a folder is read to the CPU.
        target, together: of a folder, see `read_folder`; by default this process reads all of it.
        mmap: of a file, read tensors where they are first used.
    """
    try:
        if Path(path).is_dir():
            return read_folder(Path(path), target, together)
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(
            f"There is no checkpoint {path}: check the path, or leave it out to start from scratch."
        ) from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} was refused: it holds Python objects that would run code on loading, which no checkpoint of ours does. "
            "Do not load it with another tool unless you trust who made it."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, CheckpointException) as error:
        raise UserError(
            f"{path} is no whole checkpoint ({str(error).splitlines()[0]}): take an earlier one, or --resume auto."
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(
            f"{path} holds no checkpoint but a {type(checkpoint).__name__}: give a .ckpt file that `lightning fit` wrote."
        )
    return checkpoint


def read_settings(path: str | os.PathLike) -> tuple[str, dict[str, Any]]:
    """The stage of a checkpoint and its settings as plain values, without reading its weights."""
    file = Path(path) / META if Path(path).is_dir() else Path(path)
    checkpoint = read_checkpoint(file, mmap=True)
    return checkpoint.get("stage", ""), checkpoint.get("hyper_parameters", {})


def change_checkpoint(path: str | os.PathLike, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a checkpoint atomically after `change` of it; of a folder only what is not sharded can be changed."""
    file = Path(path) / META if Path(path).is_dir() else Path(path)
    checkpoint = read_checkpoint(file)
    change(checkpoint)
    AtomicCheckpointIO().save_checkpoint(checkpoint, file)


def newest_checkpoint(folder: str | os.PathLike, name: str = "") -> Path | None:
    """The whole checkpoint with the highest step, whatever the clock says, in a run's folder or its
    `checkpoints/`, and not in folders below; what is cut short is passed over.

    Args:
        folder: the run's.
        name: how the file's name begins.

    Returns:
        None: there is none.
    """
    found = []
    for path in [*Path(folder).glob("*.ckpt"), *Path(folder).glob("checkpoints/*.ckpt")]:
        hidden = path.name.startswith(".") or not path.name.startswith(name)
        if not hidden and (is_whole(path) if path.is_dir() else zipfile.is_zipfile(path)):
            newest = path.name.startswith("newest")
            found.append((step_of(path), newest, -len(path.parts), str(path)))
    return Path(max(found)[-1]) if found else None


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1: it has none."""
    digits = path.stem.partition("step=")[2].split("-")[0]
    return int(digits) if digits.isdigit() else -1


def checkpoint_folder(trainer: Trainer) -> Path:
    """`checkpoints/` in the run's folder, beside its logs, configuration and pictures."""
    return Path(trainer.default_root_dir) / "checkpoints"
