"""torch.compile for the repeated blocks of a network ("regional compilation").

Each block is compiled in place by `nn.Module.compile`, so that names in checkpoints do not change.
Blocks of the same shape share the compiled code; the first call of each shape takes seconds to
minutes. Transformer blocks are compiled for changing lengths, U-Net blocks for each shape but not
for each length of captions.
"""

import logging
import os
import shutil
import struct
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from unclip_pl.networks.layers import Block
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import LockTimeout, file_lock

log = logging.getLogger(__name__)
MAX_VARIANTS = 256
"""Compiled versions per block class: a U-Net has up to 30 shapes, with and without gradients."""
CAPTION_LENGTHS = r"L(\['kwargs'\])?\['(context|mask)'\]:1"
"""For torch: inputs of blocks whose axis 1 is as long as the longest caption of a batch. It varies
on a CPU only (`trim_padding`). Checkpointed blocks have them in `kwargs`. inductor may compile a
block once more when a caption is longer than all before."""


def compile_blocks(
    module: nn.Module, device: str | torch.device = "cpu", backend: str = "inductor"
) -> int:
    """Compile every `Block` within a module at its first call, in training and in sampling.

    Args:
        module: a network or a stage.
        device: where it will run.
        backend: of torch.compile; "aot_eager" traces without generating code.

    Returns:
        the number of blocks.

    Raises:
        UserError: inductor without the compiler that it calls, on a CPU or a GPU.
    """
    blocks = [block for block in module.modules() if isinstance(block, Block)]
    if backend == "inductor":
        remove_broken_libraries()
        if torch.device(device).type == "cpu":
            require_cpp_compiler()
        else:
            require_c_compiler()
    # A note for selective checkpointing on what torch does by design.
    warnings.filterwarnings(
        "ignore", "Detected that context_fn is passed to torch.utils.checkpoint"
    )
    sources = CAPTION_LENGTHS if torch.device(device).type == "cpu" else ""
    for block in blocks:
        block.compile(backend=backend, dynamic=block.compile_dynamic)
        compiled = cast(Callable, block._compiled_call_impl)
        block._compiled_call_impl = partial(_call, compiled, sources)
    return len(blocks)


def _call(compiled: Callable, dynamic_sources: str, *inputs: Any, **kwargs: Any) -> Any:
    """Call a compiled block under the limits that it needs, which torch keeps for each thread.

    Versions of torch that do not know `dynamic_sources` compile for each length of captions.
    """
    dynamo, compiler = torch._dynamo.config, torch.compiler.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_VARIANTS)
    known = getattr(compiler, "dynamic_sources", dynamic_sources)
    if dynamic_sources not in known:
        compiler.dynamic_sources = ",".join(filter(None, [known, dynamic_sources]))
    return compiled(*inputs, **kwargs)


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
