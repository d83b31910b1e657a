"""End a rank that makes no progress, with the stacks of all its threads, so that the job ends."""

import faulthandler
import os
import socket
import threading
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

EXIT_CODE = 70  # EX_SOFTWARE
STDERR = 2  # the file descriptor: `sys.stderr` may be an object without one
MAX_INTERVAL = 5.0
"""Seconds between two looks at the progress, at most."""


class Watchdog(Callback):
    """A thread that ends this process if training hangs.

    Training steps, validation batches and checkpoints count as progress. Time is counted in the
    watchdog thread's own intervals, so that a process that was suspended is not taken for one that
    hangs. If the interpreter itself is stuck and no thread runs, `faulthandler` does the same from
    outside of it, with exit code 1.

    Args:
        minutes: how long a rank may go without progress; 0: for ever.
    """

    def __init__(self, minutes: float = 30.0) -> None:
        if minutes < 0:
            raise ValueError(
                f"watchdog.minutes is {minutes}: give a number of minutes, or 0 for no watchdog."
            )
        self.minutes = minutes
        self._idle_intervals = 0
        self._last_progress = ""
        self._ended = threading.Event()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning sets `fast_dev_run` outside of the class
        if not self.minutes or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._ended.clear()
        self._record_progress(trainer)
        threading.Thread(
            target=self._watch,
            args=(trainer.global_rank, 60 * self.minutes),
            name="watchdog",
            daemon=True,
        ).start()

    def _record_progress(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._idle_intervals = 0
        self._last_progress = f"step {trainer.global_step}"

    on_train_batch_start = on_train_batch_end = _record_progress
    on_validation_start = on_validation_batch_end = on_validation_end = _record_progress
    on_save_checkpoint = _record_progress

    def _watch(self, rank: int, seconds: float) -> None:
        interval = min(MAX_INTERVAL, seconds / 10)
        while not self._ended.wait(interval):
            # Each call puts the dump off again; it happens only if this thread no longer runs.
            faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)
            self._idle_intervals += 1
            if self._idle_intervals * interval >= seconds:
                message = (
                    f"\nlightning: rank {rank} on {socket.gethostname()} has made no progress for "
                    f"{self.minutes:g} minutes since {self._last_progress} and ends. Its threads:\n"
                )
                os.write(STDERR, message.encode())
                faulthandler.dump_traceback(file=STDERR, all_threads=True)
                os._exit(EXIT_CODE)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, *_: Any, **__: Any) -> None:
        self._ended.set()

    on_train_end = on_exception = teardown = _end
