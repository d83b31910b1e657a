"""Memory of a U-Net's forward pass before it is run: on the meta device, where tensors have sizes and no contents."""

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unclip_pl.networks.unet import UNet, UNetConfig


class _Living(TorchDispatchMode):
    """Adds up the storages that operators make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and (storage := value.untyped_storage()) not in self.seen:  # not a view, nor changed in place
                self.seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes of tensors, made while `call` runs, that live at one time; what kernels use inside is not seen."""
    with _Living() as living:
        call()
    return living.peak


@lru_cache
def forward_bytes(config: UNetConfig, height: int, width: int, batch: int = 1) -> int:
    """`peak_bytes` of an upsampler's U-Net that draws float32 images of height x width, without gradients and without its weights."""
    with torch.device("meta"), torch.no_grad():
        net = UNet(config).eval()

        def forward() -> None:
            x, low_res = (torch.empty(batch, channels, height, width) for channels in (config.in_channels, config.low_res_channels))
            net(x, torch.zeros(batch, dtype=torch.int64), low_res=low_res)

        return peak_bytes(forward)
