"""GroupNorm, FiLM and SiLU in one, enlarging and convolution in one: values and gradients as one after the other, with less kept or done; layouts."""

import pytest
import torch
import torch.nn.functional as F

from unclip_pl.networks.layers import GroupNorm32, image_format, norm_silu, upsampled_conv


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


def test_enlarging_and_convolving_takes_four_products_a_pixel():
    from torch.utils.flop_counter import FlopCounterMode

    conv = torch.nn.Conv2d(8, 16, 3, padding=1)
    with FlopCounterMode(display=False) as counter:
        upsampled_conv(conv, torch.zeros(1, 8, 6, 6))
    assert counter.get_total_flops() == 2 * 4 * 8 * 16 * 12 * 12


@pytest.mark.parametrize(("capability", "device", "training", "last"), [
    ("AVX2", "cpu", True, False), ("AVX2", "cpu", False, True), ("AVX512", "cpu", True, True), ("DEFAULT", "cpu", True, True), ("AVX2", "cuda", True, True),
])  # fmt: skip
def test_only_training_on_a_cpu_with_avx2_alone_is_not_channels_last(monkeypatch, capability, device, training, last):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert image_format(torch.device(device), training) == (torch.channels_last if last else torch.contiguous_format)
