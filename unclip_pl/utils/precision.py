"""Half precision where the machine has instructions for it; where it has none, float32 and a sentence that says so.

torch computes in bfloat16 and float16 on any CPU. On one with AVX2 alone it converts number by number, and a step takes six to ten times as long as in float32.
"""

import functools
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from unclip_pl.utils.errors import UserError

log = logging.getLogger(__name__)
Precision = Literal["fp32", "bf16"]
HALF = {
    torch.bfloat16: ("bfloat16", "_is_mkldnn_bf16_supported"),
    torch.float16: ("float16", "_is_mkldnn_fp16_supported"),
}
"""Their names, and what asks torch's kernels for CPUs whether this one has the instructions."""


def has_instructions(dtype: torch.dtype, device: str | torch.device = "cpu") -> bool:
    """Whether a device computes in this type: always, but for the half types on some CPUs."""
    return torch.device(device).type != "cpu" or dtype not in HALF or _cpu_has(dtype)


@functools.cache
def _cpu_has(dtype: torch.dtype) -> bool:
    if torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, HALF[dtype][1])()):
        return True
    log.warning(
        f"This CPU has no instructions for {HALF[dtype][0]}, which would be several times as slow as float32: computing in float32."
    )
    return False


def usable(precision: str, device: str | torch.device = "cpu", full: str = "fp32") -> str:
    """`precision`, or where it is one of bfloat16 ("bf16", "bf16-mixed") that the device has no instructions for, `full` and a warning."""
    return (
        precision
        if not precision.startswith("bf16") or has_instructions(torch.bfloat16, device)
        else full
    )


def trainable(precision: str | int | None, on_cpu: bool, sharded: bool) -> str:
    """The precision that a run computes in, by the full name that the trainer knows.

    Args:
        precision: as the user gave it; None: 32-true.
        on_cpu: there bfloat16 becomes float32 where the processor has no instructions for it.
        sharded: the weights are in parts.

    Raises:
        UserError: nothing here trains in it.
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
    return usable(name, "cpu", "32-true") if on_cpu else name


def autocast(precision: str, device: str | torch.device) -> AbstractContextManager:
    """ "bf16": torch's autocast to bfloat16 if it is `usable`; "fp32": nothing."""
    return (
        torch.autocast(torch.device(device).type, torch.bfloat16)
        if usable(precision, device) == "bf16"
        else nullcontext()
    )
