"""torch.compile for the repeated blocks of a network ("regional compilation").

Each block is compiled in place by `nn.Module.compile`, so that names in checkpoints do not change.
Blocks of the same shape share the compiled code; the first call of each shape takes seconds to
minutes. Transformer blocks are compiled for changing lengths, U-Net blocks for each shape.
"""

import warnings

import torch
from torch import nn

from unclip_pl.networks.layers import Block
from unclip_pl.utils.errors import UserError

MAX_VARIANTS = 256
"""Compiled versions per block class: a U-Net has up to 30 shapes, with and without gradients."""


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
        UserError: inductor on a CPU, and there is no C++ compiler.
    """
    blocks = [block for block in module.modules() if isinstance(block, Block)]
    if backend == "inductor" and torch.device(device).type == "cpu":
        require_cpp_compiler()
    # A note for selective checkpointing on what torch does by design.
    warnings.filterwarnings(
        "ignore", "Detected that context_fn is passed to torch.utils.checkpoint"
    )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)
    for block in blocks:
        block.compile(backend=backend, dynamic=block.compile_dynamic)
    return len(blocks)


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
