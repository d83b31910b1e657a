"""A run that goes on from a checkpoint: its own settings win over what was saved."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def use_own_settings(
    optimizer: Optimizer, scheduler: LambdaLR, own: Sequence[dict[str, Any]]
) -> None:
    """Give a restored optimizer and its schedule the settings of this run.

    Args:
        optimizer: its groups hold the settings of the checkpoint.
        scheduler: of the optimizer; stays at its step.
        own: each group's settings in this run's configuration, with "lr" at its highest.
    """
    for group, settings in zip(optimizer.param_groups, own):
        group.update(settings, initial_lr=settings["lr"])
    scheduler.base_lrs = [settings["lr"] for settings in own]
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)
    ]
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    scheduler._last_lr = rates


def keep_own_limits(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let this run's limits of patience and of time hold, and not those of the checkpoint.

    Lightning would count the time of all starts together: of a job that `max_time` has ended, the
    next one would end before its first step.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set outside of the class
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if isinstance(callback, EarlyStopping) and state:
            state["patience"] = callback.patience
        if isinstance(callback, Timer) and state:
            del checkpoint["callbacks"][callback.state_key]
