"""The folder of a run: it holds one run, whose files never mix with those of another."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from unclip_pl.cluster.checkpoint_io import newest_checkpoint, require_checkpoint, step_of
from unclip_pl.utils.errors import SharedError, UserError
from unclip_pl.utils.files import LockTimeout, atomic_file, file_lock
from unclip_pl.utils.remote_copies import local_path

CONFIG = "config.yaml"
OUTPUTS = (CONFIG, "hparams.yaml", "events.out.tfevents*", "pictures", "checkpoints")
"""What a run writes into its folder, as patterns."""
SEARCHES: dict[type, str] = {
    BatchSizeFinder: "data.loader.batch_size",
    LearningRateFinder: "model.optimizer.lr",
}
"""Callbacks that search for a setting before the first step."""
OWN_FOLDER_HINT = "give this run a folder of its own with --trainer.default_root_dir"


def find_checkpoint(option: str | None, folder: Path) -> Path | None:
    """The checkpoint that `--ckpt_path` or `--resume` names; None: the run starts from scratch.

    Args:
        option: a path, or the URL of a remote checkpoint, of which this is then the copy; "last" or
            "best" for the newest or the best checkpoint of the run's folder;
            "resume:auto" for the newest, if there is one; "resume:PATH".
        folder: of the run.

    Raises:
        UserError: there is no such checkpoint, or it is something else.
    """
    if option is None:
        return None
    value = option.removeprefix("resume:")
    if value == "auto" and value != option:
        return newest_checkpoint(folder)
    if value in ("last", "best") and not Path(value).exists():
        checkpoint = newest_checkpoint(folder, "best-" if value == "best" else "")
        if checkpoint is None:
            raise UserError(
                f"There is no {'best' if value == 'best' else 'whole'} checkpoint in {folder} for "
                f"{value}: name a file, or the run's folder with --trainer.default_root_dir."
            )
        return checkpoint
    if value in ("auto", "hpc") and not Path(value).exists():
        raise UserError(
            f"--ckpt_path takes no {value}: name a file, last or best; to go on where a run "
            "stopped, also on a cluster, give --resume auto."
        )
    checkpoint = local_path(value)
    require_checkpoint(checkpoint)
    return checkpoint


@contextlib.contextmanager
def claim_folder(folder: Path, checkpoint: Path | None, is_writer: bool) -> Iterator[None]:
    """A context in which `folder` belongs to this training run.

    Args:
        folder: of the run.
        checkpoint: the one that the run resumes from; None: it starts from scratch.
        is_writer: whether this rank writes the run's files.

    Raises:
        SharedError: the folder has checkpoints of another run, another run uses it right now,
            or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise SharedError(f"{folder} is a file: {OWN_FOLDER_HINT}.")
    check_same_run(folder, checkpoint)
    if not is_writer:
        yield
        return
    with _locked(folder):
        if newest_checkpoint(folder) is None:
            set_aside(folder)
        yield


def check_same_run(folder: Path, checkpoint: Path | None) -> None:
    """Check that the checkpoints in a folder are of the run that `checkpoint` continues.

    Args:
        folder: of the run.
        checkpoint: the one that the run resumes from; None: it starts from scratch.

    Raises:
        SharedError: they are of another run, or go on beyond `checkpoint`.
    """
    newest = newest_checkpoint(folder)
    if newest is None:
        return
    if checkpoint is None:
        raise SharedError(
            f"{folder} holds a run already ({newest.name}): go on with it by --resume auto, or "
            f"{OWN_FOLDER_HINT}."
        )
    inside = folder.resolve() in checkpoint.resolve().parents
    if not inside or step_of(checkpoint) < step_of(newest):
        raise SharedError(
            f"{folder} holds a run that goes on to {newest.name}, and this one starts from "
            f"{checkpoint}: go on with that run by --resume auto, or {OWN_FOLDER_HINT}."
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Refuse a second run in the same folder while this one is running."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(folder / ".lock", timeout=0))
        except LockTimeout:
            raise SharedError(
                f"Another run is at work in {folder}: wait for its end, or {OWN_FOLDER_HINT}."
            ) from None
        yield


def set_aside(folder: Path) -> None:
    """Move the files of an earlier run without a checkpoint out of the way of a new run.

    They go to `earlier-1` in the folder, or the next free number, so that curves and pictures of
    both runs do not mix.
    """
    if not ((folder / CONFIG).exists() or (folder / "pictures").exists()):
        return
    names = [path.name for path in folder.glob("earlier-*")]
    numbers = [int(match[1]) for name in names if (match := re.fullmatch(r"earlier-(\d+)", name))]
    target = folder / f"earlier-{max(numbers, default=0) + 1}"
    target.mkdir()
    for pattern in OUTPUTS:
        for path in folder.glob(pattern):
            path.rename(target / path.name)
    rank_zero_info(f"What an earlier run without a checkpoint left in {folder} is now in {target}.")


class RunConfig(SaveConfigCallback):
    """Writes the configuration of a training run, `config.yaml`, before its first step.

    The file names no checkpoint to resume from: that one is removed later, and without it the file
    can be used again.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet: a run that cannot start has nothing to record."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning sets `fast_dev_run` outside of the class
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        config = self.config.clone()
        config["ckpt_path"] = None
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # as above
            _record_search(callback, config, trainer)
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / CONFIG) as file:
            file.write(self.parser.dump(config, skip_none=False).encode())


def refuse_search(callbacks: Iterable[Callback], folder: Path) -> None:
    """Check that a run that is resumed does not search for settings that it has already.

    Raises:
        SharedError: one of its callbacks would.
    """
    for callback in callbacks:
        if option := SEARCHES.get(type(callback)):
            raise SharedError(
                f"trainer.callbacks has {type(callback).__name__}, and a run that is resumed has "
                f"its {option} already: leave it out, and give --{option} as in {folder / CONFIG}."
            )


def _record_search(callback: Callback, config: Any, trainer: Trainer) -> None:
    """Write what a search before the first step has found into the run's configuration."""
    option = SEARCHES.get(type(callback))
    if option is None:
        return
    found = (
        trainer.lightning_module.lr
        if isinstance(callback, LearningRateFinder)
        else trainer.datamodule.batch_size  # type: ignore[attr-defined]  # as above
    )
    part, _, rest = option.partition(".")
    if f"{part}.init_args.{rest}" in config:  # a user's own DataModule may have no such option
        config[f"{part}.init_args.{rest}"] = found
