"""Ranks for tests that cost no import of torch: forks of this process, each with an output file of its own, that meet over gloo on this machine."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from unclip_pl.cli import main


class Ranks:
    """`count` forks that run `lightning` with these arguments; `pids`, and `said(rank)`, what it printed.

    Args:
        folder: for the outputs, `rank-K.txt`.
        arguments: of `lightning`.
        count: how many; 1 is a run without a process group.
        environment: variables that the forks have on top of ours.
    """

    def __init__(self, folder: Path, arguments: list[str], count: int = 1, **environment: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.codes = folder, {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "NODE_RANK": "0"} if count > 1 else {}
        flags = ["--trainer.devices", str(count), "--trainer.strategy", "ddp"] if count > 1 else []
        self.pids = [self._start(rank, [*arguments, *flags], several | environment, count) for rank in range(count)]

    def _start(self, rank: int, arguments: list[str], environment: dict[str, str], count: int) -> int:
        if pid := os.fork():
            return pid
        code = 99
        try:
            output = os.open(self.folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
            os.environ.update(environment | ({"LOCAL_RANK": str(rank)} if count > 1 else {}))
            torch.set_num_threads(1)
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(signum, signal.SIG_DFL)
            code = main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def said(self, rank: int = 0) -> str:
        return (self.folder / f"rank-{rank}.txt").read_text()

    def until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Wait for a condition while all ranks run."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and not any(os.waitpid(pid, os.WNOHANG)[0] for pid in self.pids), self.said()[-3000:]
            time.sleep(0.05)

    def wait(self, seconds: float = 120) -> list[int]:
        """The exit codes, minus the signal where one killed a rank."""
        end, codes = time.monotonic() + seconds, {}
        while len(codes) < len(self.pids):
            for pid in self.pids:
                if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(done[1])
            if time.monotonic() > end:
                for pid in self.pids:
                    if pid not in codes:
                        os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"still running after {seconds} s: {self.said()[-3000:]}")
            time.sleep(0.05)
        return [codes[pid] for pid in self.pids]
