"""Ctrl-C ends a command with one line in place of a traceback. No torch."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

EXIT_CODE = 128 + signal.SIGINT


def report(program: str) -> int:
    """Say on stderr that a command was interrupted; returns its exit code."""
    print(f"{program}: interrupted.", file=sys.stderr, flush=True)
    return EXIT_CODE


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Any error after Ctrl-C is a KeyboardInterrupt.

    An import that is cut off may swallow it, and then fail with another error.
    """
    seen = False

    def handler(signum: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen = True
        signal.default_int_handler(signum, frame)

    before = signal.getsignal(signal.SIGINT)
    is_ours = threading.current_thread() is threading.main_thread()
    is_ours = is_ours and before is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    except Exception:
        if seen:
            raise KeyboardInterrupt from None
        raise
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, before)


def program() -> str | None:
    """How this process was called, if that is a command of the project: "python -m eval.fid"."""
    # while a package of `python -m` is imported, sys.argv[0] is not its name yet
    words = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    if words[-2:-1] == ["-m"]:
        package = words[-1].partition(".")[0]
        return f"python -m {words[-1]}" if package in ("eval", "unclip_pl") else None
    name = Path(words[-1]).name if words else ""
    return name if name in ("unclip", "lightning") else None


def quiet_imports() -> None:
    """From now on Ctrl-C is one line outside of a command's function as well.

    To be called before the imports that take their time. It does nothing where the process is none
    of our commands.
    """
    if (name := program()) is None:
        return
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            report(name)  # Python then ends itself by the signal: 130 in a shell
        else:
            usual(kind, error, trace)

    sys.excepthook = hook
