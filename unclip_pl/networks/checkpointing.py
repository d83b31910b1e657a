"""Activation checkpointing, applied to a network's blocks from outside.

"selective" keeps the results of convolutions, matrix products and attention, and computes cheap
operations (norms, SiLU, concatenation, dropout) again in the backward pass. "full" keeps only the
inputs of each block. Modules, parameter names and results do not change.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from unclip_pl.networks.layers import Block

Checkpointing = Literal["none", "selective", "full"]

aten = torch.ops.aten
EXPENSIVE = {
    aten.convolution.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.linear.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_attention_math.default,
}
"""Operators whose results "selective" keeps."""


def apply_checkpointing(net: nn.Module, kind: Checkpointing) -> None:
    """Checkpoint every `Block` of a network in this way; may be called again with another way.

    Raises:
        ValueError: there is no such way.
    """
    if kind not in get_args(Checkpointing):
        ways = ", ".join(get_args(Checkpointing))
        raise ValueError(f"checkpointing is {kind!r}: choose one of {ways}.")
    for block in net.modules():
        if isinstance(block, Block):
            block.__dict__.pop("forward", None)
            if kind != "none":
                block.forward = partial(_checkpointed, block.forward, kind)


def _checkpointed(forward: Callable, kind: Checkpointing, *inputs: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **kwargs)
    if kind == "selective":
        kwargs["context_fn"] = _selective_contexts
    return checkpoint(forward, *inputs, use_reentrant=False, **kwargs)


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator in EXPENSIVE:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
