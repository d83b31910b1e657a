"""Files that are either whole or not there: written beside the target, fsynced, renamed. And where the cache lives."""

import contextlib
import errno
import fcntl
import functools
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from unclip_pl.utils.errors import UserError

log = logging.getLogger(__name__)
NO_LOCKS = (
    errno.ENOSYS,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
)  # Lustre and some NFS, as they are mounted
REASONS = {
    errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission", errno.EPERM: "no permission",
}  # fmt: skip


def cache_dir() -> Path:
    """The folder of everything that can be made again: `$UNCLIP_CACHE`, else `~/.cache/unclip_pl`. Created on demand."""
    folder = Path(os.environ.get("UNCLIP_CACHE") or "~/.cache/unclip_pl").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The cache folder {folder} cannot be made ({error.strerror}): set UNCLIP_CACHE to a folder you can write to."
        ) from error
    return folder


def cause(error: BaseException | None) -> OSError | None:
    """The operating system's error that `error` is or arose from: torch turns a failed write of its zip file into a RuntimeError."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """A full disk, a read-only file system or a missing permission becomes a sentence about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in REASONS:
            raise
        raise UserError(
            f"{path} cannot be written ({REASONS[error.errno]}): free space, or choose another folder with data.store, "
            "--trainer.default_root_dir or the environment variable UNCLIP_CACHE."
        ) from error


def _host() -> str:
    """This machine's name, as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove the temporary files and folders that killed writers of `name` (a pattern) left in `folder`, and none that is being written.

    Only those of this host: a lock may be seen on one machine alone, and a process has its number there. Where there are no locks, the number decides.
    """
    for path in folder.glob(f".{name}.{_host()}.*.tmp"):
        with contextlib.suppress(OSError), _descriptor(path) as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in NO_LOCKS or _runs(path.name.split(".")[-3]):
                    continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    """A file or folder opened to be locked; some file systems lock only such files as are open for writing."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        yield handle
    finally:
        os.close(handle)


def _runs(pid: str) -> bool:
    """Whether a process of this number may be running on this host."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        pass
    return True


def _temporary_file(path: Path) -> tuple[int, str]:
    """A new locked file beside `path`: (descriptor, name). The name says whose it is, for `remove_leftovers`."""
    while True:
        handle, temporary = tempfile.mkstemp(
            prefix=f".{path.name}.{_host()}.{os.getpid()}.", suffix=".tmp", dir=path.parent
        )
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_nlink:
                return handle, temporary
        except BlockingIOError:
            pass  # it is just being removed as a leftover, because it had no lock yet
        except OSError:
            return handle, temporary  # not every file system has locks
        os.close(handle)
        Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; when the block ends well it is fsynced and takes the name `path`, else it is removed.

    A reader therefore sees the old file or the whole new one, also after a crash or on a full disk.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _temporary_file(path)
        try:
            os.fchmod(handle, 0o644)
            with os.fdopen(handle, mode) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                Path(temporary).replace(path)
            sync_folder(path.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; when the block ends well it takes the name `path`, else it is removed.

    If another process finished `path` in the meantime, that one stays and ours is discarded; with `replace` ours takes its place.
    """
    path = Path(path)
    prefix = f".{path.name}.{_host()}.{os.getpid()}."
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=path.parent))
    with writing(path), contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        with contextlib.suppress(
            OSError
        ):  # not every file system has locks; the lock tells `remove_leftovers` that a writer lives
            fcntl.flock(stack.enter_context(_descriptor(temporary)), fcntl.LOCK_EX | fcntl.LOCK_NB)
        temporary.chmod(0o755)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        sync_folder(temporary)
        if replace and path.exists():
            remove(path)
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
        sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file, or a folder in such a way that a kill in the middle leaves nothing of its name."""
    if path.is_dir():
        doomed = Path(
            tempfile.mkdtemp(
                prefix=f".{path.name}.{_host()}.{os.getpid()}.", suffix=".tmp", dir=path.parent
            )
        )
        path.rename(doomed)  # over an empty folder
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def file_lock(path: str | os.PathLike, timeout: float = 3600.0) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (made if missing); wait up to `timeout` seconds for another holder.

    The lock belongs to the open file: it is free again when its holder dies, however it dies. Where the file system has no locks, a warning says so
    once and nobody waits: renames keep files whole there too, and at worst a thing is made twice.
    """
    path = Path(path)
    deadline = time.monotonic() + timeout
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a")
    with opened as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"Another process has held {path} for {timeout:.0f} s: end it, or delete the file if none runs."
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                _warn_of_no_locks(str(path.parent))
                break
        yield


@functools.cache
def _warn_of_no_locks(folder: str) -> None:
    log.warning(
        "The file system of %s has no locks: start one job at a time there, or several may do the same work.",
        folder,
    )


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut (file systems without folder fsync are left alone)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
