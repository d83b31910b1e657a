"""Half precision where the processor has instructions for it, else float32 with a warning.

torch computes in bfloat16 and float16 on any CPU. On one that has only AVX2 it converts number by
number, and a step takes six to ten times as long as in float32.
"""

import functools
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from unclip_pl.utils.errors import UserError

log = logging.getLogger(__name__)
Precision = Literal["fp32", "bf16"]
HALF_TYPES = {
    torch.bfloat16: ("bfloat16", "_is_mkldnn_bf16_supported"),
    torch.float16: ("float16", "_is_mkldnn_fp16_supported"),
}
"""For each type its name, and the operator that says whether this CPU has instructions for it."""


def supports_dtype(dtype: torch.dtype, device: str | torch.device = "cpu") -> bool:
    """Whether a device has instructions for a type; only CPUs may lack them, for half types."""
    return torch.device(device).type != "cpu" or dtype not in HALF_TYPES or _cpu_supports(dtype)


@functools.cache
def _cpu_supports(dtype: torch.dtype) -> bool:
    name, operator = HALF_TYPES[dtype]
    if torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, operator)()):
        return True
    log.warning(
        f"This CPU has no instructions for {name}, which would be several times slower than "
        "float32: computing in float32."
    )
    return False


def supported_precision(
    precision: str, device: str | torch.device = "cpu", fallback: str = "fp32"
) -> str:
    """`precision`, or `fallback` with a warning if the device lacks bfloat16.

    Args:
        precision: "fp32", "bf16" or one of Lightning's names, such as "bf16-mixed".
        device: where to compute.
        fallback: what to use instead of a bfloat16 precision.
    """
    if precision.startswith("bf16") and not supports_dtype(torch.bfloat16, device):
        return fallback
    return precision


def training_precision(precision: str | int | None, on_cpu: bool, sharded: bool) -> str:
    """The precision of a training run, by its full Lightning name.

    Args:
        precision: as the user gave it, such as "bf16" or 32; None: "32-true".
        on_cpu: whether the run computes on a CPU, where bfloat16 becomes float32 if the processor
            has no instructions for it.
        sharded: whether FSDP shards the weights.

    Returns:
        "32-true", "bf16-mixed" or "16-mixed".

    Raises:
        UserError: stages cannot train in this precision.
    """
    short = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
    name = short.get(str(precision), str(precision))
    if name not in ("32-true", "bf16-mixed", "16-mixed"):
        raise UserError(
            f"trainer.precision is {precision}: a stage trains in 32-true, bf16-mixed or, on a "
            "GPU, 16-mixed."
        )
    if name == "16-mixed" and (on_cpu or sharded):
        where = "on a CPU" if on_cpu else "with sharded weights"
        raise UserError(
            f"trainer.precision is {precision}, which does not work {where}: give bf16-mixed or "
            "32-true."
        )
    return supported_precision(name, "cpu", "32-true") if on_cpu else name


def autocast_of(trainer: Any) -> AbstractContextManager:
    """A trainer's autocast, for its callbacks: Lightning calls them outside of it.

    With sharded weights of half precision a network does not run without it.
    """
    return trainer.precision_plugin.forward_context()


def autocast(precision: str, device: str | torch.device) -> AbstractContextManager:
    """torch's autocast to bfloat16 for "bf16" where the device supports it; else no autocast."""
    if supported_precision(precision, device) == "bf16":
        return torch.autocast(torch.device(device).type, torch.bfloat16)
    return nullcontext()
