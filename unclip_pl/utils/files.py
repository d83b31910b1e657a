"""Files and folders that are either complete or absent, locks, and the cache folder.

A writer works on a temporary file next to the target, calls fsync and renames it at the end.
"""

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
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import filelock

from unclip_pl.utils.errors import UserError

log = logging.getLogger(__name__)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What Lustre and some NFS mounts without locks answer."""
DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
}


class LockTimeout(UserError):
    """Another process holds a lock for longer than this one wanted to wait."""


def cache_dir() -> Path:
    """The folder of files that can be made again, created if missing.

    It is `$UNCLIP_CACHE`, or else `~/.cache/unclip_pl`.

    Raises:
        UserError: the folder cannot be created.
    """
    folder = Path(os.environ.get("UNCLIP_CACHE") or "~/.cache/unclip_pl").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The cache folder {folder} cannot be created ({error.strerror}): set UNCLIP_CACHE to "
            "a folder that you can write to."
        ) from error
    return folder


def underlying_os_error(error: BaseException | None) -> OSError | None:
    """The OSError that `error` is or was caused by, or None.

    torch, for example, turns a failed write of its zip file into a RuntimeError.
    """
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


@contextlib.contextmanager
def explain_disk_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turn a full disk, a read-only file system or a missing permission into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(
            f"{path} cannot be written ({DISK_ERRORS[error.errno]}): free space, or choose another "
            "folder with --out, data.store, --trainer.default_root_dir or the environment variable "
            "UNCLIP_CACHE."
        ) from error


def _host_name() -> str:
    """This machine's name in characters that a file name may have."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]


def _temporary_prefix(path: Path) -> str:
    """How the names of this process's temporary files for `path` begin."""
    return f".{path.name}.{_host_name()}.{os.getpid()}."


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove the temporary files and folders in `folder` whose writer was killed.

    What is still being written stays. Only temporary files of this host are looked at, because
    locks and process ids of another host may not be visible here. Where the file system has no
    locks, the process id decides.

    Args:
        folder: where to look.
        name: of the target that was being written, as a glob pattern.
    """
    for path in folder.glob(f".{name}.{_host_name()}.*.tmp"):
        with contextlib.suppress(OSError), _open_descriptor(path) as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                pid = path.name.split(".")[-3]
                if error.errno not in NO_LOCKS or _may_be_running(pid):
                    continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _open_descriptor(path: Path) -> Iterator[int]:
    """Open a file or folder in order to lock it.

    Files are opened for writing: some file systems lock no others.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        yield handle
    finally:
        os.close(handle)


def _may_be_running(pid: str) -> bool:
    """Whether a process with this id may be running on this host."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        pass
    return True


def _create_temporary_file(path: Path) -> tuple[int, str]:
    """Create and lock a temporary file next to `path`: (descriptor, name).

    The name holds the host and the process id, for `remove_leftovers`.
    """
    while True:
        handle, temporary = tempfile.mkstemp(
            prefix=_temporary_prefix(path), suffix=".tmp", dir=path.parent
        )
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_nlink:
                return handle, temporary
        except BlockingIOError:
            pass  # another process is removing it as a leftover, because it had no lock yet
        except OSError:
            return handle, temporary  # not every file system has locks
        os.close(handle)
        Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file for writing that appears as `path` only when it is complete.

    The block writes to a temporary file. If the block succeeds, that file is synced and renamed to
    `path`; otherwise it is removed. So a reader sees either the old file or the complete new one,
    even after a crash or on a full disk.

    Args:
        path: the target; missing parent folders are created.
        mode: as for `open`, "w" or "wb".

    Raises:
        UserError: the disk is full or read-only, or the permission is missing.
    """
    path = Path(path)
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _create_temporary_file(path)
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
    """Yield a temporary folder that appears as `path` only when it is complete.

    If the block succeeds, the folder is synced and renamed to `path`; otherwise it is removed.

    Args:
        path: the target; missing parent folders are created.
        replace: what to do if `path` exists by then. True: replace it. False: keep it and discard
            the new folder, because another process was faster.

    Raises:
        UserError: the disk is full or read-only, or the permission is missing.
    """
    path = Path(path)
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _create_temporary_folder(path)
    with explain_disk_errors(path), contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        # The lock tells `remove_leftovers` that the writer lives. Not every file system has locks.
        with contextlib.suppress(OSError):
            handle = stack.enter_context(_open_descriptor(temporary))
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        temporary.chmod(0o755)
        yield temporary
        _sync_files(temporary)
        if replace and path.exists():
            remove(path)
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
        sync_folder(path.parent)


def _create_temporary_folder(path: Path) -> Path:
    """An empty folder next to `path`, named as temporary files are."""
    return Path(tempfile.mkdtemp(prefix=_temporary_prefix(path), suffix=".tmp", dir=path.parent))


def _sync_files(folder: Path) -> None:
    """Make all files in `folder` readable by all users and sync them to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def remove(path: Path) -> None:
    """Remove a file or a folder; a folder's name disappears first, then what is in it.

    So a process that is killed halfway leaves no incomplete folder of that name.
    """
    if path.is_dir():
        temporary = _create_temporary_folder(path)
        path.rename(temporary)  # allowed, because `temporary` is empty
        shutil.rmtree(temporary)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def file_lock(path: str | os.PathLike, timeout: float = 3600.0) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which is created if missing.

    The lock ends with its holder, however that ends; forked children do not hold it. Where the file
    system has no locks, one warning says so and nobody waits: files stay complete thanks to
    renames, and at worst the same work is done twice.

    Args:
        path: the lock file; missing parent folders are created.
        timeout: how many seconds to wait for another holder.

    Raises:
        LockTimeout: another process still holds the lock after `timeout`.
    """
    path = Path(path)
    lock = filelock.FileLock(path, poll_interval=0.1, fallback_to_soft=False)
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=timeout)
        except filelock.Timeout:
            raise LockTimeout(
                f"Another process has held {path} for {timeout:.0f} s: end it, or delete the file "
                "if no such process runs."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            _warn_of_no_locks(str(path.parent))
    try:
        yield
    finally:
        lock.release()


@functools.cache
def _warn_of_no_locks(folder: str) -> None:
    log.warning(
        f"The file system of {folder} has no locks: start one job at a time there, or several may "
        "do the same work."
    )


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the file system can sync folders."""
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
