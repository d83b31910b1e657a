"""AdamW whose state takes 8 bits per number, by bitsandbytes (Dettmers et al. 2022).

The paper is arXiv 2110.02861. Tensors of fewer than 4096 numbers keep a float32 state. Weights lose
the channels_last format.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unclip_pl.utils.errors import UserError

SMALLEST = 4096
"""Numbers of a tensor that gets an 8-bit state; bitsandbytes' default."""
BLOCK = 256
"""Numbers that share one float32 scale."""


def adamw_8bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit, which changes nothing in a step with `found_inf` set.

    `found_inf` is looked up on the host, which a GPU waits for once per step.

    Args:
        groups: of parameters, each with "params".
        settings: lr, betas, eps, weight_decay.

    Raises:
        UserError: bitsandbytes is missing, or does not work here.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:  # it loads libraries of its own
        said = str(error).strip().partition("\n")[0]
        raise UserError(
            f"optimizer.name adamw8bit needs the package bitsandbytes ({said}): pip install "
            "bitsandbytes, or set it to adamw."
        ) from None

    class SkippingAdamW8bit(AdamW8bit):
        found_inf: Tensor | None = None

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if self.found_inf is None or not bool(self.found_inf):
                super().step()
            return loss

    return SkippingAdamW8bit(groups, **settings)


def bytes_8bit(numbers: int) -> float:
    """Bytes of the state of a tensor of so many numbers: two of each, with their scales."""
    if numbers < SMALLEST:
        return 8.0 * numbers
    return 2.0 * numbers + 8.0 * -(-numbers // BLOCK)
