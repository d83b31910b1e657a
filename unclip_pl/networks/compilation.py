"""torch.compile for the repeated blocks of a network ("regional compilation").

Each block is compiled in place by `nn.Module.compile`, so that names in checkpoints do not change.
Blocks of the same shape share the compiled code; the first call of each shape takes seconds to
minutes. Transformer blocks are compiled for changing lengths, U-Net blocks for each shape but not
for each length of captions, those of open_clip's CLIP for each shape.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from unclip_pl.networks.layers import Block
from unclip_pl.utils.compilers import (
    remove_broken_libraries,
    require_c_compiler,
    require_cpp_compiler,
)

MAX_VARIANTS = 256
"""Compiled versions per block class: a U-Net has up to 30 shapes, with and without gradients."""
CAPTIONS = ("context", "mask")
"""Inputs of U-Net blocks whose axis 1 is as long as the longest caption of a batch on a CPU.
inductor may compile a block once more when a caption is longer than all before."""


def compile_blocks(
    module: nn.Module,
    device: str | torch.device = "cpu",
    backend: str = "inductor",
    kind: type[nn.Module] = Block,
) -> int:
    """Compile every block within a module at its first call, in training and in sampling.

    Args:
        module: a network or a stage.
        device: where it will run.
        backend: of torch.compile; "aot_eager" traces without generating code.
        kind: the class of its blocks.

    Returns:
        the number of blocks.

    Raises:
        UserError: inductor without the compiler that it calls, on a CPU or a GPU.
    """
    blocks = [block for block in module.modules() if isinstance(block, kind)]
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
    for block in blocks:
        block.compile(backend=backend, dynamic=getattr(block, "compile_dynamic", False))
        compiled = cast(Callable, block._compiled_call_impl)
        block._compiled_call_impl = partial(_call, compiled)
    return len(blocks)


def _call(compiled: Callable, *inputs: Any, **kwargs: Any) -> Any:
    """Call a compiled block under the limit that it needs, which torch keeps for each thread."""
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_VARIANTS)
    for name in CAPTIONS:
        tensor = kwargs.get(name)
        if tensor is not None and tensor.device.type == "cpu":  # see `trim_padding`
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
    return compiled(*inputs, **kwargs)
