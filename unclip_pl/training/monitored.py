"""Checks that what a callback watches is logged in a run, before it trains."""

import difflib
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from unclip_pl.utils.errors import SharedError

SILENT = ("lightning.pytorch.", "unclip_pl.")
"""Packages whose callbacks log nothing that others can watch, unless they have `logged_names`."""


def require_logged(trainer: Trainer, stage: LightningModule, validates: bool) -> None:
    """Check the `monitor` of each callback.

    If the stage or a callback does not declare what it logs (`logged_names`), nothing is checked.

    Args:
        trainer: with the callbacks of the run.
        stage: what it trains.
        validates: whether there are data for validation.

    Raises:
        SharedError: a callback watches a name that is never logged.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning has it
    names = logged_names(stage, callbacks)
    if names is None:
        return
    for callback in callbacks:
        if not isinstance(callback, EarlyStopping | ModelCheckpoint):
            continue
        monitor = callback.monitor
        if monitor is None or not getattr(callback, "strict", True):
            continue
        where = f"{type(callback).__name__} has the monitor {monitor}"
        if monitor not in names:
            raise SharedError(f"{where}, which this run does not log: {_advice(monitor, names)}")
        stops = isinstance(callback, EarlyStopping)
        if stops and not validates and not monitor.startswith("train/"):
            raise SharedError(
                f"{where}, and there is no validation: give data.val and "
                "trainer.limit_val_batches, or the monitor train/loss."
            )


def logged_names(stage: Any, callbacks: Iterable[Callback]) -> set[str] | None:
    """All names that a stage and the callbacks log; None: one of them does not declare any."""
    names: set[str] | None = stage.logged_names() if hasattr(stage, "logged_names") else None
    for callback in callbacks:
        if names is None:
            return None
        if hasattr(callback, "logged_names"):
            names = names | callback.logged_names(stage)
        elif not type(callback).__module__.startswith(SILENT) or isinstance(
            callback, LearningRateMonitor
        ):
            return None
    return names


def _advice(monitor: str, names: set[str]) -> str:
    similar = difflib.get_close_matches(monitor, sorted(names), 1, 0.5)
    return f"did you mean {similar[0]}?" if similar else f"give one of {', '.join(sorted(names))}."
