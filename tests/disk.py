"""Small file systems for tests, full or read-only as a user's disk is: mounted where this process may, else an fsync that fails as on a full disk."""

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

limits: dict[Path, int] = {}  # bytes that a folder may hold, of those that stand for a disk


def mount(*arguments: str) -> bool:
    program = shutil.which("mount")
    return (
        program is not None
        and subprocess.run([program, *arguments], capture_output=True).returncode == 0
    )


def unmount(folder: Path) -> None:
    if program := shutil.which("umount"):
        subprocess.run([program, "-l", str(folder)], check=False, capture_output=True)


def in_bytes(size: str) -> int:
    return int(size[:-1]) * {"k": 2**10, "m": 2**20}[size[-1]]


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """`folder` as an empty disk of so many bytes ("64k", "1m"); where nothing can be mounted an fsync tells that it is full, as network disks do."""
    folder.mkdir(exist_ok=True)
    if mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)):
        try:
            yield folder
        finally:
            unmount(folder)
        return
    sync = os.fsync

    def fsync(handle: int) -> None:
        taken = sum(
            -(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file()
        )
        if taken > limits[folder]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    limits[folder] = in_bytes(size)
    try:
        with mock.patch("os.fsync", fsync):
            yield folder
    finally:
        del limits[folder]


def enlarge(folder: Path, size: str) -> None:
    """More room on a `small_disk`."""
    if folder in limits:
        limits[folder] = in_bytes(size)
    elif not mount("-o", f"remount,size={size}", str(folder)):
        pytest.skip("the tmpfs cannot be enlarged here")


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """`folder` as it is, and nobody may write to it."""
    if os.getuid() != 0:
        folder.chmod(0o555)
        try:
            yield folder
        finally:
            folder.chmod(0o755)
        return
    if not (
        mount("--bind", str(folder), str(folder)) and mount("-o", "remount,ro,bind", str(folder))
    ):
        unmount(folder)
        pytest.skip("nothing can be mounted read-only here")
    try:
        yield folder
    finally:
        unmount(folder)
