"""What the backward pass makes again: the same gradients to the bit, nothing of it kept, and no more work than once."""

import gc
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import unclip_pl.networks.unet as unet
from unclip_pl.networks.norm_silu import norm_silu
from unclip_pl.networks.recompute import recomputed
from unclip_pl.networks.unet import UNet, UNetConfig


class Watched:
    """Doubles its inputs in memory whose end can be seen, and counts how often."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        self.inputs, self.calls, self.memory = inputs, 0, []

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.calls += 1
        made = [2 * tensor.detach().numpy() for tensor in inputs]
        self.memory = [weakref.ref(array) for array in made]
        return tuple(torch.from_numpy(array) for array in made)

    @property
    def alive(self) -> list[bool]:
        return [memory() is not None for memory in self.memory]


def use(make: Watched, weight: torch.Tensor, wanted: bool = True) -> torch.Tensor:
    with recomputed(make, *make.inputs, wanted=wanted) as (a, b):
        return ((weight * a).tanh() * b[1:].t()).sum() + (weight * a[:, :2].repeat(1, 2)).sum()


@pytest.fixture
def parts():
    torch.manual_seed(0)
    return Watched(torch.randn(4, 4), torch.randn(5, 4)), torch.randn(4, 4, requires_grad=True)


def test_what_was_made_is_not_kept_and_made_again_once(parts):
    make, weight = parts
    out = use(make, weight)
    assert make.calls == 1 and make.alive == [False, False]
    gradient, = torch.autograd.grad(out, weight, retain_graph=True)
    assert make.calls == 2 and make.alive == [False, False]
    kept = use(make, weight, wanted=False)
    assert make.alive == [True, True]
    exact, = torch.autograd.grad(kept, weight)
    assert torch.equal(gradient, exact)
    again, = torch.autograd.grad(out, weight)
    assert make.calls == 4 and torch.equal(again, exact)


def test_a_graph_that_is_dropped_frees_its_tensors_without_the_garbage_collector(parts):
    make, weight = parts
    array = np.ones((4, 4), dtype=np.float32)
    ends = weakref.ref(array)
    gc.disable()
    try:
        factor = torch.from_numpy(array)
        with recomputed(make, *make.inputs) as (a, _):
            out = (weight * factor * a).sum()
        del array, factor, a, _
        assert ends() is not None
        del out
        assert ends() is None
    finally:
        gc.enable()


def test_a_failure_leaves_no_hooks_behind(parts):
    _, weight = parts

    def fail(_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise ValueError("too large")

    with pytest.raises(ValueError, match="too large"), recomputed(fail, weight):
        pass
    with pytest.raises(RuntimeError, match="apart"), recomputed(lambda x: (2 * x.detach(),), weight):
        raise RuntimeError("apart")
    (weight * weight).grad_fn._raw_saved_self.register_hooks(lambda x: x, lambda x: x)  # an error where there are any


def test_without_a_gradient_nothing_is_made_twice(parts):
    make, weight = parts
    with torch.no_grad():
        use(make, weight)
    assert make.calls == 1


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("context", [0, 32])
def test_gradients_of_a_unet_are_the_same_to_the_bit(context, half, monkeypatch):
    torch.manual_seed(0)
    net = UNet(UNetConfig(image_size=16, width=32, mults=(1, 2), depth=1, attention=(16, 8), head_width=32, dropout=0.1, context_width=context))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(2, 3, 16, 16, requires_grad=True), torch.tensor([3, 500])
    given = {"context": torch.randn(2, 5, context), "context_mask": torch.arange(5) < torch.tensor([[2], [5]])} if context else {}

    def gradients() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = net(x, t, **given)
        return torch.autograd.grad(out.square().sum(), [x, *net.parameters()])

    ours = gradients()
    monkeypatch.setattr(unet, "recomputed", lambda make, *inputs, **_: nullcontext(make(*inputs)))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(ours, gradients(), strict=True))


def test_a_unet_keeps_neither_joined_maps_nor_projections():
    net = UNet(UNetConfig(image_size=16, width=32, mults=(1, 2), depth=1, attention=(8,), head_width=32, dropout=0.0))
    kept: list[torch.Size] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    def shapes() -> list[torch.Size]:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            net(torch.randn(1, 3, 16, 16), torch.zeros(1, dtype=torch.int64))
        return list(kept)

    def joined_first(norm, x, *film, skip=None, **more):
        return norm_silu(norm, x if skip is None else torch.cat([x, skip], dim=1), *film, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unclip_pl.networks.recompute.keep", note)
        ours = shapes()
        patch.setattr(unet, "norm_silu", joined_first)
        patch.setattr(unet, "recomputed", lambda make, *inputs, **_: nullcontext(make(*inputs)))
        plain = shapes()
    heads, joined = (1, 2, 64, 32), {(1, 128, 8, 8), (1, 96, 8, 8), (1, 96, 16, 16)}
    attentions = 4  # on the way down, in the middle, two on the way up: queries, keys, values and output of each
    assert plain.count(heads) == 4 * attentions and ours.count(heads) == attentions
    assert joined <= set(plain) and not joined & set(ours)
