"""Lightning's trainer, with options that mean what they say."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, StochasticWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import DISK_ERRORS
from unclip_pl.utils.precision import training_precision


class Trainer(pl.Trainer):
    """The trainer of `lightning fit`; all other options are those of `lightning.pytorch.Trainer`.

    Whole numbers of batches come first in the types: Lightning's own are read as fractions where
    another package names the two the other way round, so that 1 would mean all batches.

    Args:
        limit_train_batches, limit_val_batches, limit_test_batches, limit_predict_batches: a number
            of batches, or a fraction (1.0: all).
        overfit_batches: train on the first so many batches again and again, the same at each pass;
            0: on all.

    Raises:
        UserError: an option has no effect here, or does not fit.
    """

    def __init__(
        self,
        *,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0,
        **options: Any,
    ) -> None:
        if overfit_batches != int(overfit_batches) or overfit_batches < 0:
            raise UserError(
                f"trainer.overfit_batches is {overfit_batches}: give a whole number of batches."
            )
        refuse(options)
        devices = options.get("devices", "auto")
        on_cpu = options.get("accelerator") == "cpu" or not torch.accelerator.is_available()
        sharded = isinstance(options.get("strategy"), ModelParallelStrategy)
        if on_cpu and options.get("accelerator") in ("gpu", "cuda", "mps"):
            raise UserError(
                f"trainer.accelerator is {options['accelerator']}, and there is no GPU that torch "
                "can use here: leave lightning_config/gpu.yaml out, or give "
                "--trainer.accelerator cpu."
            )
        if on_cpu and str(devices) != "auto" and not _counts(devices):
            raise UserError(
                f"trainer.devices is {devices}: on a CPU give a number of processes, 1 or more."
            )
        options["precision"] = training_precision(options.get("precision"), on_cpu, sharded)
        self.held_batches = int(overfit_batches)
        if self.held_batches:
            limit_train_batches = self.held_batches
            if limit_val_batches is None:
                limit_val_batches = self.held_batches
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            **options,
        )


def refuse(options: dict[str, Any]) -> None:
    """UserError for the first option of the trainer that has no effect here, or does not work."""
    for name in ("gradient_clip_val", "gradient_clip_algorithm"):
        if options.get(name) is not None:
            raise UserError(
                f"trainer.{name} has no effect here: the norm of the gradients is held to "
                "model.optimizer.clip_norm, set that instead."
            )
    if options.get("enable_checkpointing") is False:
        raise UserError(
            "trainer.enable_checkpointing is false, and a run here always writes checkpoints: for "
            "one that writes nothing give --trainer.fast_dev_run 2."
        )
    if not _counts(options.get("accumulate_grad_batches", 1)):
        given = options["accumulate_grad_batches"]
        raise UserError(f"trainer.accumulate_grad_batches is {given}: give 1 or more.")
    if str(options.get("strategy")).endswith(("_spawn", "_fork", "_notebook")):
        raise UserError(
            f"trainer.strategy is {options['strategy']}, which cannot start this program: give ddp."
        )
    for callback in options.get("callbacks") or []:
        if isinstance(callback, StochasticWeightAveraging):
            raise UserError(
                "trainer.callbacks has StochasticWeightAveraging, and every run averages its "
                "weights already: leave it out, and see ema.decay."
            )
        if isinstance(callback, BatchSizeFinder):
            raise UserError(
                "trainer.callbacks has BatchSizeFinder, and the data are shared out for one batch "
                "size: leave it out, and try values of data.loader.batch_size with "
                "lightning_config/debug.yaml."
            )


def _counts(value: Any) -> bool:
    """Whether an option is a whole number from 1."""
    return str(value).isdecimal() and int(value) >= 1


def of_others(error: Exception) -> str | None:
    """One sentence for what Lightning says of the trainer's options, and the system of the files
    that others write (logs, the saved configuration); None: it is none of these."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return (
            f"{error.filename or 'A file of this run'} cannot be opened or written "
            f"({DISK_ERRORS[error.errno]}): free space or choose another --trainer.default_root_dir."
        )
    said = " ".join(str(error).replace("Timer(duration=", "Trainer(max_time=").split())
    own = said.startswith(("`val_check_interval`", "Early stopping conditioned on metric"))
    if own or isinstance(error, MisconfigurationException):
        return f"The run's settings do not fit: {said}"
    return None


class FirstBatches:
    """The first batches of a loader, kept in memory: the same ones at each pass.

    Args:
        loader: of batches; resumed runs need one that begins with the same ones each time.
        count: how many of them.
    """

    def __init__(self, loader: Any, count: int) -> None:
        self.loader, self.count = loader, count
        self._held: list[Any] = []
        self._next = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        self._held = self._held or list(islice(iter(self.loader), self.count))
        if len(self._held) < self.count:
            raise UserError(
                f"trainer.overfit_batches is {self.count}, and there are {len(self._held)} batches "
                "to train on: give a smaller number."
            )
        self._next %= self.count  # a whole pass may end without asking for more
        while self._next < self.count:
            self._next += 1
            yield self._held[self._next - 1]

    def rank_summary(self) -> dict[str, Any]:
        """As the loader's own: what the ranks compare before the first step."""
        return self.loader.rank_summary()

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next % self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["next"]


def hold_first(data: Any, count: int) -> None:
    """Make a DataModule train on its first `count` batches alone."""
    own = data.train_dataloader

    def train_dataloader() -> FirstBatches:
        return FirstBatches(own(), count)

    data.train_dataloader = train_dataloader
