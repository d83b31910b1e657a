"""A rank that makes no step for too long says where all its threads are and ends, so that the job ends instead of waiting for ever."""

import faulthandler
import os
import socket
import threading
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

EXIT_CODE = 70  # EX_SOFTWARE
STDERR = 2  # the file itself: `sys.stderr` may be an object without one


class Watchdog(Callback):
    """Looks at the rank's progress from a thread of its own; training steps, validation batches and checkpoints count as progress.

    Time is counted in looks of that thread, so that a process that was suspended is not taken for one that hangs. Where the interpreter itself is
    stuck and no thread gets a turn, `faulthandler` does the same from outside of it, with exit code 1.

    Args:
        minutes: without progress until the rank ends; 0: for ever.
    """

    def __init__(self, minutes: float = 30.0) -> None:
        if minutes < 0:
            raise ValueError(
                f"watchdog.minutes is {minutes}: give a number of minutes, or 0 for no watchdog."
            )
        self.minutes = minutes
        self._looks = 0
        self._place = ""
        self._ended = threading.Event()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.minutes and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it outside of the class
            self._ended.clear()
            self._progress(trainer)
            threading.Thread(
                target=self._watch,
                args=(trainer.global_rank, 60 * self.minutes),
                name="watchdog",
                daemon=True,
            ).start()

    def _progress(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._looks, self._place = 0, f"step {trainer.global_step}"

    on_train_batch_start = on_train_batch_end = on_validation_start = on_validation_batch_end = (
        on_validation_end
    ) = on_save_checkpoint = _progress

    def _watch(self, rank: int, seconds: float) -> None:
        every = min(5.0, seconds / 10)
        while not self._ended.wait(every):
            faulthandler.dump_traceback_later(
                seconds, exit=True, file=STDERR
            )  # put off with every look
            self._looks += 1
            if self._looks * every >= seconds:
                os.write(STDERR, (
                    f"\nlightning: rank {rank} on {socket.gethostname()} has made no progress for {self.minutes:g} minutes since {self._place} and ends. "
                    "Its threads:\n"
                ).encode())  # fmt: skip
                faulthandler.dump_traceback(file=STDERR, all_threads=True)
                os._exit(EXIT_CODE)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, *_: Any, **__: Any) -> None:
        self._ended.set()

    on_train_end = on_exception = teardown = _end
