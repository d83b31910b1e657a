"""Stop training after a step that all ranks agree on, with a checkpoint.

What each signal means is in `utils/signals.py`. Lightning's own requeueing is not used: its
handlers call collectives, so a rank that is signalled at another moment than the others hangs.
"""

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

MAX_STEPS_BETWEEN_POLLS = 1000


class Preemption(Callback):
    """Ctrl-C, SIGUSR1 and SIGTERM end training after the current step, on all ranks at once.

    `NewestCheckpoint` then saves at that step. No rank stops by itself, for the others would wait
    for it in a collective. So the ranks exchange their stop requests every so often.

    Args:
        ask_every: seconds between two exchanges; 0: after every step. The number of steps follows
            from the pace of the slowest rank, which is exchanged as well.
    """

    def __init__(self, ask_every: float = 2.0) -> None:
        if ask_every < 0:
            raise ValueError(
                f"preemption.ask_every is {ask_every}: give a number of seconds, 0 for every step."
            )
        self.ask_every = ask_every
        self._handlers: dict[int, Any] = {}
        self._step = 0
        self._last_poll_step = 0
        self._last_poll_time = 0.0
        self._next_poll_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning installs its own handlers after this hook.
        self._handlers = {signum: signal.getsignal(signum) for signum in REQUEST_OF_SIGNAL}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # `requested` is not reset: a signal may have come while torch was being imported.
        stop_state.agreed = StopRequest.NOTHING
        self._step = self._last_poll_step = trainer.global_step
        self._last_poll_time = time.monotonic()
        self._next_poll_step = trainer.global_step + 1
        if _in_main_thread():  # replaces Lightning's handlers
            for signum in REQUEST_OF_SIGNAL:
                signal.signal(signum, request_stop)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step = trainer.global_step
        if trainer.world_size > 1:
            request = self._poll_ranks(trainer, pl_module)
        else:
            request = stop_state.requested
        if request and self._step != trainer.max_steps:  # after the last step nothing is left to do
            stop_state.agreed = request
            trainer.should_stop = True
            # Otherwise Lightning validates first, for which there may be no time.
            trainer.limit_val_batches = 0

    def _poll_ranks(self, trainer: Trainer, pl_module: LightningModule) -> StopRequest:
        """The highest request of all ranks; NOTHING at steps without an exchange."""
        if self._step < self._next_poll_step:
            return StopRequest.NOTHING
        now = time.monotonic()
        seconds_per_step = (now - self._last_poll_time) / (self._step - self._last_poll_step)
        own = torch.tensor([float(stop_state.requested), seconds_per_step], device=pl_module.device)
        request, slowest = trainer.strategy.reduce(own, reduce_op="max").tolist()
        self._last_poll_step, self._last_poll_time = self._step, now
        steps = int(self.ask_every / max(slowest, 1e-9))
        self._next_poll_step = self._step + max(1, min(MAX_STEPS_BETWEEN_POLLS, steps))
        return StopRequest(int(request))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not stop_state.agreed:
            return
        if trainer.is_global_zero:
            write_exit_reason(stop_state.agreed)
        rank_zero_info(
            f"Stopped at step {trainer.global_step} ({stop_state.agreed.name.lower()}), exit code "
            f"{EXIT_CODES[stop_state.agreed]}: go on with --resume auto."
        )
        # srun may end all ranks as soon as the first has ended: not before the reason is written.
        trainer.strategy.barrier("preemption")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self.on_predict_start(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Nothing needs saving, and Lightning's handler would wait in a collective.
        if _in_main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        if _in_main_thread():
            for signum, handler in self._handlers.items():
                signal.signal(signum, handler)
        self._handlers = {}
        stop_state.requested = StopRequest.NOTHING


def _in_main_thread() -> bool:
    """Whether this thread may set signal handlers."""
    return threading.current_thread() is threading.main_thread()
