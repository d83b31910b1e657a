"""Signals only leave a note, which the training run reads at the end of a step (`cluster/preemption.py`). No torch: they may come while it loads.

    SIGINT   Ctrl-C: end with a checkpoint; a second one ends at once
    SIGUSR1  the time is nearly over, or another job takes the place: end with a checkpoint and be started again
    SIGTERM  cancelled: end with a checkpoint and stay ended

The job script learns how a run ended from one word in the file `$UNCLIP_ENDED`: "requeue" or "stop"; it is not there after a failure.
"""

import enum
import multiprocessing
import os
import signal
import socket
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn


class Asked(enum.IntEnum):
    """What a process was asked; of several the highest counts, so that a cancelled job stays cancelled."""

    NOTHING = 0
    INTERRUPT = 1
    REQUEUE = 2
    STOP = 3


EXIT_CODES = {
    Asked.NOTHING: 0,
    Asked.INTERRUPT: 0,
    Asked.REQUEUE: os.EX_TEMPFAIL,
    Asked.STOP: 128 + signal.SIGTERM,
}
WORDS = {Asked.REQUEUE: "requeue", Asked.STOP: "stop"}
MEANING = {
    signal.SIGINT: Asked.INTERRUPT,
    signal.SIGUSR1: Asked.REQUEUE,
    signal.SIGTERM: Asked.STOP,
}


class Notes:
    """`asked`: of this process, since training was last begun; `agreed`: by all ranks, as that on which they ended."""

    asked = Asked.NOTHING
    agreed = Asked.NOTHING


notes = Notes()


def note(signum: int, frame: FrameType | None = None) -> None:
    """The handler during training."""
    notes.asked = max(notes.asked, MEANING[signal.Signals(signum)])
    if signum == signal.SIGINT:
        os.write(2, b"\nStopping after this step with a checkpoint (Ctrl-C again: at once).\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave(signum: int, frame: FrameType | None = None) -> NoReturn:
    """The handler of SIGUSR1 where nothing is trained: what is done is kept file by file, so the process may end at once."""
    leave_word(Asked.REQUEUE)
    raise SystemExit(EXIT_CODES[Asked.REQUEUE])


def listen(training: bool) -> None:
    """For the first lines of a program: from now on SIGUSR1 does not kill it. Other signals do as ever until training starts: nothing is lost yet."""
    notes.asked = notes.agreed = Asked.NOTHING
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, note if training else leave)


def leave_word(asked: Asked) -> None:
    """Tell the job script how this run ended, where it wants to know; the file is whole or not there."""
    if (path := os.environ.get("UNCLIP_ENDED")) and asked in WORDS:
        temporary = Path(f"{path}.{socket.gethostname()}.{os.getpid()}")
        temporary.write_text(WORDS[asked] + "\n", encoding="utf-8")
        temporary.replace(path)


def spare_worker(worker: int) -> None:
    """In a loader's worker: a batch system signals it as well, but only its main process may end it, or a step would die of the warning."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait_for_parent() -> None:
        parent = multiprocessing.parent_process()
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != (
            parent.pid if parent else os.getppid()
        ):
            pass
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def rank() -> int:
    """Of this process, from what torchrun, srun and Lightning set."""
    return int(
        os.environ.get("RANK")
        or os.environ.get("SLURM_PROCID")
        or os.environ.get("LOCAL_RANK")
        or 0
    )


def rank_and_host() -> str:
    """ " (rank 3 on node7)" in a job of several processes, else "", for error messages."""
    several = (
        os.environ.get("SLURM_NTASKS", "1") != "1" or "LOCAL_RANK" in os.environ
    )  # Lightning removes its WORLD_SIZE at a run's end
    return f" (rank {rank()} on {socket.gethostname()})" if several else ""
