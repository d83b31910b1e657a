"""Tensors that the backward pass makes again in place of keeping them: what is made by little work and fills much, such as concatenations and projections.

torch's checkpoint runs a whole part again. Here the dear operation (attention, a convolution) runs once, and what led to its input is made again.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor


def keep(tensor: Tensor) -> Tensor:
    """What the backward pass keeps beside: as it is. `plan` counts here."""
    return tensor


class Recomputed:
    """Within it, the backward pass keeps neither what `make(*inputs)` returned nor views of it, but makes it again: for what costs less than it fills.

    The inputs are kept (None is passed on); `make` draws nothing at random, and works again under the autocast of the first time.
    """

    def __init__(self, make: Callable[..., tuple[Tensor, ...]], *inputs: Tensor | None) -> None:
        self.make, self.inputs = make, tuple(value if value is None else keep(value) for value in inputs)
        self.device = device = next(value.device.type for value in inputs if value is not None)
        self.half = torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None
        self.first: dict[int, int] | None = None  # storage of what was made -> place
        self.again: tuple[Tensor, ...] | None = None
        self.early: list[_Kept] = []
        self.uses = self.left = 0

    def __enter__(self) -> tuple[Tensor, ...]:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self.hooks.__enter__()
        try:
            made = self.make(*self.inputs)
        except BaseException:
            self.__exit__()  # else all that follows, elsewhere too, would be kept by these hooks
            raise
        self.first = {tensor.untyped_storage()._cdata: place for place, tensor in enumerate(made)}
        for kept in self.early:
            self._drop(kept)
        self.early.clear()
        return made

    def __exit__(self, *_: object) -> None:
        self.hooks.__exit__()
        del self.hooks  # else the two would hold each other, and the tensors, until the garbage is collected

    def _pack(self, tensor: Tensor) -> "_Kept":
        kept = _Kept(tensor)
        if self.first is None:
            self.early.append(kept)
        else:
            self._drop(kept)
        return kept

    def _drop(self, kept: "_Kept") -> None:
        tensor = cast(Tensor, kept.tensor)
        kept.place = cast(dict[int, int], self.first).get(tensor.untyped_storage()._cdata)
        if kept.place is None:
            kept.tensor = keep(tensor)
        else:
            kept.view, kept.tensor = (tensor.size(), tensor.stride(), tensor.storage_offset()), None
            self.uses += 1

    def _unpack(self, kept: "_Kept") -> Tensor:
        if kept.place is None:
            return cast(Tensor, kept.tensor)
        if self.again is None:
            with torch.no_grad(), torch.autocast(self.device, self.half, enabled=self.half is not None):
                self.again, self.left = self.make(*self.inputs), self.uses
        tensor = self.again[kept.place].as_strided(*kept.view)
        self.left -= 1
        if not self.left:
            self.again = None
        return tensor


class _Kept:
    """A tensor that the backward pass wants, or its place among those that are made again, and its view of that one."""

    place: int | None = None
    view: tuple[Any, ...] = ()

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor


def recomputed(make: Callable[..., tuple[Tensor, ...]], *inputs: Tensor | None, wanted: bool = True) -> AbstractContextManager[tuple[Tensor, ...]]:
    """`with recomputed(make, *inputs) as made:`; see `Recomputed`. Without a gradient, if not wanted, and for a compiler, just what `make` returns."""
    if wanted and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return Recomputed(make, *inputs)
    return nullcontext(make(*inputs))
