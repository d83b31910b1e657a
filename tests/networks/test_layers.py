"""GroupNorm, FiLM and SiLU in one, enlarging and convolution in one: values and gradients as one after the other, with less kept or done."""

import pytest
import torch
import torch.nn.functional as F

from unclip_pl.networks import norm_silu as half
from unclip_pl.networks.layers import GroupNorm32, halved, upsampled_conv
from unclip_pl.networks.norm_silu import norm_silu


@pytest.fixture(autouse=True, params=["cpu", "gpu"])
def way(request, monkeypatch):
    """The norm by torch's kernel, as training has it on CPUs, and by formulas, as on GPUs."""
    if request.param == "gpu":
        monkeypatch.setattr(half, "NATIVE", ())


def plain(norm: GroupNorm32, x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None) -> torch.Tensor:
    """One after the other, in float64."""
    y = F.group_norm(x.double(), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    return F.silu(y if scale is None else shift.double() + y * (1 + scale.double()))


def inputs(film: bool, dtype: torch.dtype = torch.float32) -> tuple[GroupNorm32, list[torch.Tensor]]:
    torch.manual_seed(0)
    norm = GroupNorm32(64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (torch.randn(3, 64, 4, 5) * 2 + 1).to(dtype).to(memory_format=torch.channels_last)
    return norm, [tensor.requires_grad_() for tensor in (x, *(torch.randn(2, 3, 64, 1, 1).to(dtype).unbind() if film else ()))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("film", [False, True])
def test_values_and_gradients_against_float64(film, dtype):
    norm, given = inputs(film, dtype)
    weigh = torch.randn(3, 64, 4, 5, dtype=torch.float64)
    found = []
    for function in (norm_silu, lambda norm, x, scale=None, shift=None: plain(norm, x, scale, shift)):
        out = function(norm, *given)
        gradients = torch.autograd.grad((out.double() * weigh).sum(), [*given, norm.weight, norm.bias])
        found.append([out.double(), *(gradient.double() for gradient in gradients)])
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() < limit * exact.norm()
    with torch.no_grad():
        torch.testing.assert_close(norm_silu(norm, *given).double(), found[0][0], rtol=3 * limit, atol=3 * limit)  # rounds after each stage


def test_means_of_four_pixels_keep_nothing_and_have_the_gradient_of_torch():
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        found = halved(x)
    exact = F.avg_pool2d(x, 2)
    weigh = torch.randn_like(exact)
    assert not kept and torch.equal(found, exact)
    ours, theirs = (torch.autograd.grad((out * weigh).sum(), [x])[0] for out in (found, exact))
    assert torch.equal(ours, theirs) and ours.is_contiguous(memory_format=torch.channels_last)


def test_only_the_input_is_kept_of_the_feature_maps():
    norm, given = inputs(film=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        norm_silu(norm, *given)
    assert kept.count(given[0].shape) == 1


def test_parameters_without_gradients_are_left_alone():
    norm, (x, *_) = inputs(film=False)
    norm.requires_grad_(False)
    norm_silu(norm, x).sum().backward()
    assert x.grad is not None and norm.weight.grad is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8)])
def test_an_enlarged_convolution_equals_enlarging_and_convolving(size, layout):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(5, 7, 3, padding=1).to(memory_format=layout)
    x = torch.randn(2, 5, *size).contiguous(memory_format=layout).requires_grad_()
    exact, wide, found = torch.nn.Conv2d(5, 7, 3, padding=1).double(), x.detach().double().requires_grad_(), []
    exact.load_state_dict(conv.state_dict())
    slow = exact(F.interpolate(wide, scale_factor=2.0, mode="nearest"))
    for module, given, out in ((conv, x, upsampled_conv(conv, x)), (exact, wide, slow)):
        found.append([out, *torch.autograd.grad((out * out.detach().cos()).sum(), [given, module.weight, module.bias])])
    for ours, slow in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), slow, rtol=1e-5, atol=1e-5)


def test_the_kernel_of_an_enlarged_convolution_is_not_kept():
    conv, kept = torch.nn.Conv2d(5, 7, 3, padding=1), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        upsampled_conv(conv, torch.zeros(1, 5, 6, 6))
        assert kept == []  # by hooks of its own
        upsampled_conv(conv, torch.zeros(1, 5, 6, 6), checkpointing=True)
    assert kept == [(1, 5, 6, 6), (5, 7, 4, 4)] or kept == [(5, 7, 4, 4), (1, 5, 6, 6)]


def test_enlarging_and_convolving_takes_four_products_a_pixel():
    from torch.utils.flop_counter import FlopCounterMode

    conv = torch.nn.Conv2d(8, 16, 3, padding=1)
    with FlopCounterMode(display=False) as counter:
        upsampled_conv(conv, torch.zeros(1, 8, 6, 6))
    assert counter.get_total_flops() == 2 * 4 * 8 * 16 * 12 * 12


def half_block(dtype: torch.dtype, dropout: float = 0.0, size: tuple[int, int] = (8, 8)) -> tuple[GroupNorm32, torch.nn.Conv2d, list[torch.Tensor]]:
    norm, given = inputs(film=True, dtype=dtype)
    conv = torch.nn.Conv2d(64, 32, 3, padding=1)
    given[0] = (torch.randn(3, 64, *size) * 2 + 1).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    return norm, conv, given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(4, 5), (16, 16)])  # by torch's convolution; by tiles where the CPU suits them
def test_a_convolution_behind_it_gives_the_values_and_gradients_of_one_after_the_other(size, dtype):
    norm, conv, given = half_block(dtype, size=size)
    leaves = [*given, norm.weight, norm.bias, conv.weight, conv.bias]
    x, scale, shift = given
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = norm_silu(norm, *given, conv=conv)
    assert out.dtype == dtype
    slow = F.conv2d(plain(norm, x, scale, shift), conv.weight.double(), conv.bias.double(), padding=1)
    weigh = torch.randn(out.shape, dtype=torch.float64)
    limit = 2e-5 if dtype == torch.float32 else 1e-2
    found = [[y.double(), *(g.double() for g in torch.autograd.grad((y.double() * weigh).sum(), leaves))] for y in (out, slow)]
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() < limit * exact.norm()
    with torch.no_grad():
        assert (norm_silu(norm, *given, conv=conv.to(dtype)).double() - slow).norm() < 2 * limit * slow.norm()


def test_of_the_feature_maps_only_the_input_is_kept_and_the_places_that_dropout_kept():
    norm, conv, given = half_block(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.shape, t.dtype)) or t, lambda t: t):
        norm_silu(norm, *given, conv=conv, dropout=0.5)
    shape = given[0].shape
    assert sorted(str(dtype) for size, dtype in kept if size == shape) == ["torch.bool", "torch.float32"]


def test_dropout_drops_the_same_forward_and_backward_and_keeps_the_mean():
    norm, conv, (x, *_) = half_block(torch.float32, size=(32, 32))
    torch.nn.init.dirac_(conv.weight)  # the first 32 channels come out as they went in
    torch.nn.init.zeros_(conv.bias)
    torch.manual_seed(0)
    out = norm_silu(norm, x, conv=conv, dropout=0.25)
    whole = norm_silu(norm, x)[:, :32]
    mask = (out != 0) / 0.75
    torch.testing.assert_close(out, whole * mask, rtol=1e-4, atol=1e-5)
    assert abs((mask == 0).float().mean() - 0.25) < 0.01
    weigh = torch.randn_like(out)
    for leaf in (x, norm.weight):
        ours, = torch.autograd.grad((out * weigh).sum(), [leaf], retain_graph=True)
        exact, = torch.autograd.grad((whole * mask * weigh).sum(), [leaf], retain_graph=True)
        assert (ours - exact).norm() < 1e-5 * exact.norm()
    grad_kernel, = torch.autograd.grad((out * weigh).sum(), [conv.weight])
    exact = (whole * mask * weigh).sum((0, 2, 3))
    assert (grad_kernel[range(32), range(32), 1, 1] - exact).norm() < 1e-4 * exact.norm()


def test_a_frozen_convolution_is_left_alone():
    norm, conv, given = half_block(torch.float32)
    conv.requires_grad_(False)
    norm_silu(norm, *given, conv=conv).sum().backward()
    assert given[0].grad is not None and conv.weight.grad is None and conv.bias.grad is None


@pytest.mark.parametrize(("part", "count"), [(1, 3), (64 * 64, 3), (2 * 64 * 64, 2)])
def test_samples_worked_on_apart_give_the_same(part, count, monkeypatch):
    norm, conv, given = half_block(torch.float32)
    found = []
    for numbers in (2**20, part):
        monkeypatch.setattr(half, "PART", numbers)
        assert len(half._parts(given[0])) == (1 if numbers == 2**20 else count)
        torch.manual_seed(0)
        out = norm_silu(norm, *given, conv=conv)
        gradients = torch.autograd.grad((out * torch.randn(out.shape)).sum(), [*given, norm.weight, norm.bias, conv.weight, conv.bias])
        found.append([out, *gradients])
    for whole, apart in zip(*found, strict=True):
        torch.testing.assert_close(apart, whole, rtol=1e-4, atol=1e-5)
        assert apart.stride() == whole.stride()


@pytest.mark.parametrize("part", [1, 2**20])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_skip_behind_counts_as_if_joined_and_has_a_gradient_of_its_own(layout, part, monkeypatch):
    monkeypatch.setattr(half, "PART", part)
    norm, conv, given = half_block(torch.float32)
    whole, *film = given
    whole = whole.detach().contiguous(memory_format=layout).requires_grad_()
    maps = [some.detach().contiguous(memory_format=layout).requires_grad_() for some in whole.split((40, 24), dim=1)]
    weigh = torch.randn(3, 32, 8, 8)
    leaves = [*film, norm.weight, norm.bias, conv.weight, conv.bias]
    found = []
    for x, skip, mine in ((maps[0], maps[1], maps), (whole, None, [whole])):
        torch.manual_seed(0)
        out = norm_silu(norm, x, *film, conv=conv, dropout=0.25, skip=skip)
        gradients = torch.autograd.grad((out * weigh).sum(), [*mine, *leaves])
        found.append([out, torch.cat(gradients[: len(mine)], dim=1), *gradients[len(mine) :]])
        assert all(gradient.untyped_storage().nbytes() == 4 * gradient.numel() for gradient in gradients[: len(mine)])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(norm_silu(norm, maps[0], *film, conv=conv, skip=maps[1]), norm_silu(norm, whole, *film, conv=conv))


def test_a_batch_of_none_goes_through():
    norm, conv, _ = half_block(torch.float32)
    x = torch.zeros(0, 64, 8, 8, requires_grad=True)
    norm_silu(norm, x, conv=conv).sum().backward()
    assert x.grad.shape == x.shape and not conv.weight.grad.any()
