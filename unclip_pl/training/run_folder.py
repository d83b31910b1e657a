"""A run's folder holds one run: its checkpoints, configuration, pictures and logs never mix with those of another."""

import contextlib
import errno
import fcntl
import re
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from unclip_pl.cluster.checkpoint_io import newest_checkpoint, step_of
from unclip_pl.utils.errors import SharedError, UserError
from unclip_pl.utils.files import NO_LOCKS, atomic_file

CONFIG = "config.yaml"
LEFT = (CONFIG, "hparams.yaml", "events.out.tfevents*", "pictures", "checkpoints")
"""What a run leaves in its folder, as patterns."""
ELSEWHERE = "give this run a folder of its own with --trainer.default_root_dir"


def find_checkpoint(given: str | None, folder: Path) -> Path | None:
    """The checkpoint that `--ckpt_path` or `--resume` means; None: the run starts from scratch.

    Args:
        given: a path; "last" and "best" for the newest and the best of the run's folder;
            "resume:auto" for the newest, if there is one, and "resume:PATH".
        folder: the run's.

    Raises:
        UserError: there is no such checkpoint.
    """
    if given is None:
        return None
    value = given.removeprefix("resume:")
    if value == "auto" and value != given:
        return newest_checkpoint(folder)
    if value in ("last", "best") and not Path(value).exists():
        found = newest_checkpoint(folder, "best-" if value == "best" else "")
        if found is None:
            raise UserError(
                f"There is no {'best' if value == 'best' else 'whole'} checkpoint in {folder} for "
                f"{value}: name a file, or the run's folder with --trainer.default_root_dir."
            )
        return found
    if value in ("auto", "hpc") and not Path(value).exists():
        raise UserError(
            f"--ckpt_path takes no {value}: name a file, last or best; to go on where a run "
            "stopped, also on a cluster, give --resume auto."
        )
    if not Path(value).exists():
        raise UserError(
            f"There is no checkpoint {value}: check the path, or leave it out to start from "
            "scratch."
        )
    return Path(value)


@contextlib.contextmanager
def claimed(folder: Path, checkpoint: Path | None, leader: bool) -> Iterator[None]:
    """For the time of a training run: `folder` is its own.

    Args:
        folder: the run's.
        checkpoint: what it goes on from; None: it starts from scratch.
        leader: of all ranks the one that writes.

    Raises:
        SharedError: another run has its checkpoints there, or is at work there.
    """
    refuse_another(folder, checkpoint)
    if not leader:
        yield
        return
    with _locked(folder):
        if newest_checkpoint(folder) is None:
            set_aside(folder)
        yield


def refuse_another(folder: Path, checkpoint: Path | None) -> None:
    """SharedError where `folder` holds checkpoints of a run that `checkpoint` is not the end of."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return
    if checkpoint is None:
        raise SharedError(
            f"{folder} holds a run already ({newest.name}): go on with it by --resume auto, or "
            f"{ELSEWHERE}."
        )
    inside = folder.resolve() in checkpoint.resolve().parents
    if not inside or step_of(checkpoint) < step_of(newest):
        raise SharedError(
            f"{folder} holds a run that goes on to {newest.name}, and this one starts from "
            f"{checkpoint}: go on with that run by --resume auto, or {ELSEWHERE}."
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Refuses a second run that is started in the same folder while this one is at work."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:  # of this process alone: forked workers that outlive it do not hold it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                raise SharedError(
                    f"Another run is at work in {folder}: wait for its end, or {ELSEWHERE}."
                ) from None
        yield


def set_aside(folder: Path) -> None:
    """Move what a run that took steps and left no whole checkpoint has written into `folder`/earlier-1, or
    the next free number; so its curves and pictures do not mix with those of the run to come."""
    if not ((folder / CONFIG).exists() or (folder / "pictures").exists()):
        return
    taken = [
        int(found[1])
        for path in folder.glob("earlier-*")
        if (found := re.fullmatch(r"earlier-(\d+)", path.name))
    ]
    aside = folder / f"earlier-{max(taken, default=0) + 1}"
    aside.mkdir()
    for pattern in LEFT:
        for path in folder.glob(pattern):
            path.rename(aside / path.name)
    rank_zero_info(f"What an earlier run without a checkpoint left in {folder} is now in {aside}.")


class RunConfig(SaveConfigCallback):
    """Writes the configuration of a training run, `config.yaml`, at its first step.

    It names no checkpoint to go on from: that one is removed later, and the file can be used again.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Not yet: a run that cannot start has nothing to record."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it outside of the class
            return
        config = self.config.clone()
        config["ckpt_path"] = None
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / CONFIG) as file:
            file.write(self.parser.dump(config, skip_none=False).encode())
