"""Ranks for tests that cost no import of torch: forks of this process that meet over gloo.

Each has an output file of its own. They compute on the CPU: a CUDA context does not survive a fork.
"""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from unclip_pl.cli.lightning import main


class Ranks:
    """`count` forks that run `lightning` or a function.

    `pids` are their process ids, and `output(rank)` is what a rank has printed.

    Args:
        folder: for the outputs, `rank-K.txt`.
        work: arguments of `lightning`; or a function, whose result is the exit code (None: 0).
        count: how many; 1 is a run without a process group.
        strategy: of the trainer for several ranks; None: that of the arguments.
        environment: variables that the forks have on top of ours.
    """

    def __init__(
        self,
        folder: Path,
        work: list[str] | Callable[[], int | None],
        count: int = 1,
        strategy: str | None = "ddp",
        **environment: str,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = []
        if count > 1:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment = {**address, "WORLD_SIZE": str(count), "NODE_RANK": "0", **environment}
            flags = ["--trainer.devices", str(count)]
            flags += ["--trainer.strategy", strategy] if strategy else []
        run = work if callable(work) else partial(main, [*work, *flags])
        self.pids = []
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            self.pids.append(self._start(rank, run, environment | own))

    def _start(self, rank: int, run: Callable[[], int | None], environment: dict[str, str]) -> int:
        if pid := os.fork():
            return pid
        code = 99
        try:
            file = self.folder / f"rank-{rank}.txt"
            output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
            os.environ.update(environment)
            torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: 0
            torch.set_num_threads(1)
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(signum, signal.SIG_DFL)
            code = run() or 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def output(self, rank: int = 0) -> str:
        return (self.folder / f"rank-{rank}.txt").read_text()

    def until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Wait for a condition while all ranks run."""
        end = time.monotonic() + seconds
        while not condition():
            ended = any(os.waitpid(pid, os.WNOHANG)[0] for pid in self.pids)
            assert time.monotonic() < end and not ended, self.output()[-3000:]
            time.sleep(0.05)

    def wait(self, seconds: float = 120) -> list[int]:
        """The exit codes; for a rank that was killed, minus the number of the signal."""
        end, codes = time.monotonic() + seconds, {}
        while len(codes) < len(self.pids):
            for pid in self.pids:
                if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(done[1])
            if time.monotonic() > end:
                for pid in self.pids:
                    if pid not in codes:
                        os.kill(pid, signal.SIGKILL)
                output = self.output()[-3000:]
                raise AssertionError(f"still running after {seconds} s: {output}")
            time.sleep(0.05)
        return [codes[pid] for pid in self.pids]
