"""A run that is asked to end does so after a step that all ranks agree on, with a checkpoint; what the signals mean stands in `signals.py`."""

import signal
import threading
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from unclip_pl.utils.signals import (
    EXIT_CODES,
    REQUEST_OF_SIGNAL,
    StopRequest,
    request_stop,
    stop_state,
    write_exit_reason,
)

MOST_STEPS = 1000  # between two questions


class Preemption(Callback):
    """Ctrl-C, SIGUSR1 and SIGTERM end training after the step under way; several ranks ask each other every so often and stop at one step.

    `NewestCheckpoint` saves at that step. A rank never acts alone: it would leave the others waiting in a collective for ever.

    Args:
        ask_every: seconds between two questions to all ranks. How many steps that is follows from the slowest rank, which all learn with the answer.
    """

    def __init__(self, ask_every: float = 2.0) -> None:
        if ask_every < 0:
            raise ValueError(
                f"preemption.ask_every is {ask_every}: give a number of seconds, 0 for every step."
            )
        self.ask_every = ask_every
        self._handlers: dict[int, Any] = {}
        self._step = self._asked_step = self._next_step = 0
        self._asked_at = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._handlers = {
            signum: signal.getsignal(signum) for signum in REQUEST_OF_SIGNAL
        }  # those of before Lightning's

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stop_state.agreed = (
            StopRequest.NOTHING
        )  # `asked` stays: a signal may have come while torch was loading
        self._step = self._asked_step = trainer.global_step
        self._next_step, self._asked_at = trainer.global_step + 1, time.monotonic()
        if (
            threading.current_thread() is threading.main_thread()
        ):  # over Lightning's own, which do collectives inside the handler
            for signum in REQUEST_OF_SIGNAL:
                signal.signal(signum, request_stop)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step = trainer.global_step
        asked = self._ask(trainer, pl_module) if trainer.world_size > 1 else stop_state.requested
        if (
            asked and self._step != trainer.max_steps
        ):  # at the last step there is nothing to go on with
            stop_state.agreed = asked
            trainer.should_stop = True
            trainer.limit_val_batches = (
                0  # else Lightning validates first, for which there may be no time
            )

    def _ask(self, trainer: Trainer, pl_module: LightningModule) -> StopRequest:
        """The highest that any rank was asked; NOTHING at the steps at which nobody is asked."""
        if self._step < self._next_step:
            return StopRequest.NOTHING
        now = time.monotonic()
        pace = (now - self._asked_at) / (self._step - self._asked_step)
        mine = torch.tensor([float(stop_state.requested), pace], device=pl_module.device)
        asked, pace = trainer.strategy.reduce(mine, reduce_op="max").tolist()
        self._asked_step, self._asked_at = self._step, now
        self._next_step = self._step + max(
            1, min(MOST_STEPS, int(self.ask_every / max(pace, 1e-9)))
        )
        return StopRequest(int(asked))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not stop_state.agreed:
            return
        if trainer.is_global_zero:
            write_exit_reason(stop_state.agreed)
        rank_zero_info(
            f"Stopped at step {trainer.global_step} ({stop_state.agreed.name.lower()}), exit code {EXIT_CODES[stop_state.agreed]}: go on with --resume auto."
        )
        trainer.strategy.barrier(
            "preemption"
        )  # srun may end all ranks with the first: not before the word is left

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self.on_predict_start(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Lightning's would wait in a collective, and nothing needs saving
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in self._handlers.items():
                signal.signal(signum, handler)
        self._handlers, stop_state.requested = {}, StopRequest.NOTHING
