"""Small and read-only file systems for tests.

They are mounted where this process may mount. Elsewhere a small disk is imitated by an fsync that
fails as on a full network disk, and a read-only folder by its permissions.
"""

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

limits: dict[Path, int] = {}  # size in bytes of each imitated disk


def mount(*arguments: str) -> bool:
    """Run `mount`; False if that is not possible here."""
    program = shutil.which("mount")
    if program is None:
        return False
    return subprocess.run([program, *arguments], capture_output=True).returncode == 0


def unmount(folder: Path) -> None:
    if program := shutil.which("umount"):
        subprocess.run([program, "-l", str(folder)], check=False, capture_output=True)


def in_bytes(size: str) -> int:
    """ "64k" -> 65536."""
    return int(size[:-1]) * {"k": 2**10, "m": 2**20}[size[-1]]


def disk_usage(folder: Path) -> int:
    """Bytes of all files in a folder, in blocks of 4096."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(-(-size // 4096) * 4096 for size in sizes)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """`folder` as an empty disk of this size, such as "64k" or "1m"."""
    folder.mkdir(exist_ok=True)
    if mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)):
        try:
            yield folder
        finally:
            unmount(folder)
        return
    real_fsync = os.fsync

    def fsync(handle: int) -> None:
        if disk_usage(folder) > limits[folder]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(handle)

    limits[folder] = in_bytes(size)
    try:
        with mock.patch("os.fsync", fsync):
            yield folder
    finally:
        del limits[folder]


def enlarge(folder: Path, size: str) -> None:
    """Give a `small_disk` a new size."""
    if folder in limits:
        limits[folder] = in_bytes(size)
    elif not mount("-o", f"remount,size={size}", str(folder)):
        pytest.skip("the tmpfs cannot be enlarged here")


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """`folder` with its content, and nobody may write to it."""
    if os.getuid() != 0:
        folder.chmod(0o555)
        try:
            yield folder
        finally:
            folder.chmod(0o755)
        return
    bound = mount("--bind", str(folder), str(folder))
    if not (bound and mount("-o", "remount,ro,bind", str(folder))):
        unmount(folder)
        pytest.skip("nothing can be mounted read-only here")
    try:
        yield folder
    finally:
        unmount(folder)
