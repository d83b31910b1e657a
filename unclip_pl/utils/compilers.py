"""What torch.compile needs of a machine: a compiler, and a cache without broken libraries."""

import logging
import os
import shutil
import struct
import sys
from pathlib import Path

from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import LockTimeout, file_lock

log = logging.getLogger(__name__)


def require_cpp_compiler() -> None:
    """UserError where torch finds no C++ compiler, which compiling for CPUs needs."""
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        names = ", ".join(name for name in config.cpp.cxx if name)
        raise UserError(
            f"compile needs a C++ compiler, and none was found ({names}): install g++, set CXX to "
            "one, or leave compile out."
        ) from None


def require_c_compiler() -> None:
    """UserError where Triton finds no C compiler, with which it makes the launchers of kernels."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise UserError(
            "compile on a GPU needs a C compiler, and none was found (gcc, clang): install gcc, "
            "set CC to one, or leave compile out."
        )


def remove_broken_libraries() -> None:
    """Remove from torch's cache the libraries that killed compilers left there.

    torch takes any file of the right name for a whole one, and each later start would fail at it.
    """
    from torch._inductor.codecache import cache_dir, get_lock_dir

    for path in Path(cache_dir()).glob("*/*.so"):
        if is_whole_library(path):
            continue
        lock = Path(get_lock_dir()) / f"{path.name.partition('.')[0]}.lock"
        try:
            with file_lock(lock, timeout=0):
                if not is_whole_library(path):
                    path.unlink(missing_ok=True)
                    log.warning("%s was cut off when a job was killed: compiling again.", path)
        except LockTimeout:  # another process is compiling it
            pass


def is_whole_library(path: Path) -> bool:
    """Whether a shared library, of ELF with 64 bits on Linux, is there up to its last table.

    One that is gone is not broken.
    """
    try:
        with path.open("rb") as file:
            header = file.read(64)
        size = path.stat().st_size
    except FileNotFoundError:
        return True
    if sys.platform != "linux":
        return size > 0
    if len(header) < 64 or not header.startswith(b"\x7fELF"):
        return False
    (start,) = struct.unpack_from("<Q", header, 40)
    width, count = struct.unpack_from("<HH", header, 58)
    return 0 < start + width * count <= size
