"""Lightning's trainer with checks of its options."""

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import DISK_ERRORS
from unclip_pl.utils.precision import training_precision
from unclip_pl.utils.remote import is_remote


class Trainer(pl.Trainer):
    """The trainer of `lightning fit`.

    The limits are declared here because `int` must come first in their types. Python caches unions,
    and another package may have declared `float | int` first; then 1 would be read as 1.0, which
    means all batches.

    Args:
        limit_train_batches: a number of batches, or a fraction of them (1.0: all).
        limit_val_batches: the same for validation.
        limit_test_batches: the same for testing.
        limit_predict_batches: the same for prediction.
        overfit_batches: train on this many batches only, the same at each pass; 0: on all.
        options: those of `lightning.pytorch.Trainer`.

    Raises:
        UserError: an option has no effect here, or a value is not possible.
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
        check_options(options)
        devices = options.get("devices", "auto")
        on_cpu = options.get("accelerator") == "cpu" or not torch.accelerator.is_available()
        sharded = isinstance(options.get("strategy"), ModelParallelStrategy)
        if on_cpu and options.get("accelerator") in ("gpu", "cuda", "mps"):
            raise UserError(
                f"trainer.accelerator is {options['accelerator']}, and there is no GPU that torch "
                "can use here: leave lightning_config/gpu.yaml out, or give "
                "--trainer.accelerator cpu."
            )
        if on_cpu and str(devices) != "auto" and not _is_positive_integer(devices):
            raise UserError(
                f"trainer.devices is {devices}: on a CPU give a number of processes, 1 or more."
            )
        interval = options.get("val_check_interval")
        if isinstance(interval, int):  # in steps; Lightning counts batches
            batches = int(options.get("accumulate_grad_batches", 1))
            options["val_check_interval"] = interval * batches
        options["precision"] = training_precision(options.get("precision"), on_cpu, sharded)
        self.fixed_batches = int(overfit_batches)
        if self.fixed_batches:
            limit_train_batches = self.fixed_batches
            if limit_val_batches is None:
                limit_val_batches = self.fixed_batches
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            **options,
        )


def check_options(options: dict[str, Any]) -> None:
    """Check options of Lightning's trainer.

    Raises:
        UserError: an option has no effect here, or does not work.
    """
    for name in ("gradient_clip_val", "gradient_clip_algorithm"):
        if options.get(name) is not None:
            raise UserError(
                f"trainer.{name} has no effect here: the norm of the gradients is held to "
                "model.optimizer.clip_norm, set that instead."
            )
    if is_remote(folder := options.get("default_root_dir") or "."):
        raise UserError(
            f"trainer.default_root_dir is {folder}, and a run works in a local folder: give one, "
            f"and --mirror {folder} for copies of its checkpoints there."
        )
    if options.get("enable_checkpointing") is False:
        raise UserError(
            "trainer.enable_checkpointing is false, and a run here always writes checkpoints: for "
            "one that writes nothing give --trainer.fast_dev_run 2."
        )
    if not _is_positive_integer(options.get("accumulate_grad_batches", 1)):
        value = options["accumulate_grad_batches"]
        raise UserError(f"trainer.accumulate_grad_batches is {value}: give 1 or more.")
    if options.get("val_check_interval") == 0:
        raise UserError("trainer.val_check_interval is 0: give 1 or more steps.")
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


def _is_positive_integer(value: Any) -> bool:
    """Whether an option is a whole number from 1 on, as a number or as text."""
    return str(value).isdecimal() and int(value) >= 1


def explain_error(error: Exception) -> str | None:
    """A sentence for an error that did not arise in this package but that the user can fix.

    Such are Lightning's errors about the trainer's options, and the operating system's about files
    that Lightning writes, such as logs. None: it is neither.
    """
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return (
            f"{error.filename or 'A file of this run'} cannot be opened or written "
            f"({DISK_ERRORS[error.errno]}): free space or choose another "
            "--trainer.default_root_dir."
        )
    if killed := re.search(
        r"DataLoader worker .*(killed by signal: \w+|exited unexpectedly)", str(error)
    ):
        return (
            f"A process that reads the data is gone ({killed[1]}), mostly for lack of memory: give "
            "fewer --data.loader.num_workers, and go on with --resume auto."
        )
    message = " ".join(str(error).replace("Timer(duration=", "Trainer(max_time=").split())
    is_about_options = message.startswith(
        ("`val_check_interval`", "Early stopping conditioned on metric")
    )
    if is_about_options or isinstance(error, MisconfigurationException):
        return f"The run's settings do not fit: {message}"
    return None


class FirstBatches:
    """The first batches of a loader, the same at each pass; they are kept in memory.

    Args:
        loader: of batches. For a run to be resumed it must begin with the same ones each time.
        count: how many batches.
    """

    def __init__(self, loader: Any, count: int) -> None:
        self.loader, self.count = loader, count
        self._batches: list[Any] = []
        self._next = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        self._batches = self._batches or list(islice(iter(self.loader), self.count))
        if len(self._batches) < self.count:
            raise UserError(
                f"trainer.overfit_batches is {self.count}, and there are {len(self._batches)} "
                "batches to train on: give a smaller number."
            )
        self._next %= self.count  # a whole pass may end without asking for more
        while self._next < self.count:
            self._next += 1
            yield self._batches[self._next - 1]

    def rank_summary(self) -> dict[str, Any]:
        """What the ranks compare before the first step; see the loader's own."""
        return self.loader.rank_summary()

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next % self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["next"]


def fix_train_batches(data: Any, count: int) -> None:
    """Make a DataModule train on its first `count` batches only."""
    make_loader = data.train_dataloader

    def train_dataloader() -> FirstBatches:
        return FirstBatches(make_loader(), count)

    data.train_dataloader = train_dataloader
