"""Stop requests from signals, which the training loop reads at the end of a step.

The handlers only record the request; `cluster/preemption.py` acts on it. This module imports no
torch, because a signal may arrive while torch is being imported.

    SIGINT   Ctrl-C: stop with a checkpoint; a second Ctrl-C stops at once
    SIGUSR1  the time limit is near, or another job takes the node: stop with a checkpoint and be
             started again
    SIGTERM  the job was cancelled: stop with a checkpoint and stay stopped

How a run ended reaches the job script as one word, "requeue" or "stop", in the file
`$UNCLIP_ENDED`. After a failure there is no such file.
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


class StopRequest(enum.IntEnum):
    """How a process was asked to stop.

    The highest of several requests counts, so that a cancelled job stays cancelled.
    """

    NOTHING = 0
    INTERRUPT = 1
    REQUEUE = 2
    STOP = 3


EXIT_CODES = {
    StopRequest.NOTHING: 0,
    StopRequest.INTERRUPT: 0,
    StopRequest.REQUEUE: os.EX_TEMPFAIL,
    StopRequest.STOP: 128 + signal.SIGTERM,
}
EXIT_REASONS = {StopRequest.REQUEUE: "requeue", StopRequest.STOP: "stop"}
REQUEST_OF_SIGNAL = {
    signal.SIGINT: StopRequest.INTERRUPT,
    signal.SIGUSR1: StopRequest.REQUEUE,
    signal.SIGTERM: StopRequest.STOP,
}


class StopState:
    """The stop requests of this process."""

    requested = StopRequest.NOTHING
    """What this process was asked since training last began."""
    agreed = StopRequest.NOTHING
    """The request that all ranks agreed on, which ended training."""


stop_state = StopState()


def request_stop(signum: int, frame: FrameType | None = None) -> None:
    """Signal handler during training: record the request."""
    stop_state.requested = max(stop_state.requested, REQUEST_OF_SIGNAL[signal.Signals(signum)])
    if signum == signal.SIGINT:
        os.write(2, b"\nStopping after this step with a checkpoint (Ctrl-C again: at once).\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_now(signum: int, frame: FrameType | None = None) -> NoReturn:
    """Handler of SIGUSR1 where nothing is trained: finished work is on disk, so exit at once."""
    write_exit_reason(StopRequest.REQUEUE)
    raise SystemExit(EXIT_CODES[StopRequest.REQUEUE])


def install_handlers(training: bool) -> None:
    """Handle SIGUSR1 from now on; to be called in the first lines of a program.

    Without a handler SIGUSR1 kills the process. Other signals keep their default until training
    starts, because nothing can be lost before.

    Args:
        training: record the signal for the training loop; False: exit on it.
    """
    stop_state.requested = stop_state.agreed = StopRequest.NOTHING
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, request_stop if training else exit_now)


def write_exit_reason(request: StopRequest) -> None:
    """Tell the job script how this run ended, if `$UNCLIP_ENDED` names a file for it.

    The file is written atomically. INTERRUPT and NOTHING write none.
    """
    if (path := os.environ.get("UNCLIP_ENDED")) and request in EXIT_REASONS:
        temporary = Path(f"{path}.{socket.gethostname()}.{os.getpid()}")
        temporary.write_text(EXIT_REASONS[request] + "\n", encoding="utf-8")
        temporary.replace(path)


def ignore_signals_in_worker(worker: int) -> None:
    """`worker_init_fn` of a data loader: only the main process may stop the worker.

    A batch system signals workers too. If they obeyed, the step under way would fail before the
    checkpoint is written.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait_for_parent() -> None:
        process = multiprocessing.parent_process()
        parent = process.pid if process else os.getppid()
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()
