"""Convolution by tiles: values and gradients against float64, where it is used and where not, that it saves what it says."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from unclip_pl.networks import winograd
from unclip_pl.networks.unet import UNet, UNetConfig
from unclip_pl.networks.winograd import Conv3x3

LEAST = winograd.CHANNELS, winograd.TILES


@pytest.fixture
def capability(monkeypatch):
    """What the CPU is said to have, on any machine."""

    def named(name: str) -> None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)

    named("AVX2")
    return named


def problem(size=(3, 16, 20), channels=(96, 128)) -> tuple[Conv3x3, torch.Tensor]:
    torch.manual_seed(0)
    batch, *sides = size
    return Conv3x3(*channels).to(memory_format=torch.channels_last), torch.randn(batch, channels[0], *sides).to(memory_format=torch.channels_last)


def tiled(function) -> bool:
    """Whether the function multiplies stacks of matrices and convolves nothing."""
    with FlopCounterMode(display=False) as counter:
        function()
    counted = {str(name) for name in counter.get_flop_counts()["Global"]}
    assert counted
    return not any("convolution" in name for name in counted)


def both(conv: Conv3x3, x: torch.Tensor) -> list[list[torch.Tensor]]:
    """Output and gradients of x, weight and bias, ours and in float64."""
    exact = torch.nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None).double()
    exact.load_state_dict(conv.state_dict())
    found = []
    for module, given in ((conv, x.clone().requires_grad_()), (exact, x.double().requires_grad_())):
        out = module(given)
        weigh = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view_as(out)
        found.append([out, *torch.autograd.grad((out * weigh).sum(), [given, *module.parameters()])])
    return found


@pytest.mark.parametrize("slices", [1, 2, 3])
@pytest.mark.parametrize(("size", "channels"), [((3, 16, 20), (96, 128)), ((1, 64, 32), (256, 64)), ((60, 4, 4), (96, 96)), ((2, 32, 32), (48, 48))])
def test_values_and_gradients_against_float64(capability, monkeypatch, size, channels, slices):
    conv, x = problem(size, channels)
    monkeypatch.setattr(winograd, "SLICE", int(size[0] * size[1] * size[2] * 2.25 * max(channels) / slices) + 1)
    for ours, exact in zip(*both(conv, x), strict=True):
        assert (ours - exact).abs().max() < 2e-5 * exact.abs().max()


def test_no_bias_and_the_other_layout(capability):
    conv, x = problem()
    conv.bias = None
    for layout in (torch.contiguous_format, torch.channels_last):
        for ours, exact in zip(*both(conv.to(memory_format=layout), x.contiguous(memory_format=layout)), strict=True):
            assert (ours - exact).abs().max() < 2e-5 * exact.abs().max()


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_one_gradient_alone_is_the_same(capability, wanted):
    conv, x = problem()
    _, gradient_x, gradient_weight, gradient_bias = both(conv, x)[0]
    conv.requires_grad_(False)
    leaf = {"x": x, "weight": conv.weight, "bias": conv.bias}[wanted].requires_grad_()
    out = conv(x)
    (out * torch.linspace(-1, 1, out.numel()).sin().view_as(out)).sum().backward()
    assert torch.equal(leaf.grad, {"x": gradient_x, "weight": gradient_weight, "bias": gradient_bias}[wanted])


def test_a_pixel_takes_a_quarter_of_the_products(capability):
    conv, x = problem((4, 32, 32), (256, 256))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        conv(x)
    direct = 2 * 9 * 256 * 256 * 4 * 32 * 32
    transforms = sum(2 * n for n in (6**3 * 2 * 256 * 256, 6**3 * 2 * 256 * 256, (6 * 6 * 4 + 4 * 6 * 4) * 256 * 256, (6 * 3 * 3 + 6 * 3 * 6) * 256 * 256))
    products = 2 * 36 * 256 * 256 * 256
    assert products == direct / 4
    assert products < counter.get_total_flops() < products + transforms


def test_where_it_is_used(capability):
    channels, tiles = LEAST
    conv, x = problem((tiles, 4, 4), (channels, channels))
    assert tiled(lambda: conv(x))
    assert not tiled(lambda: conv(x[1:]))  # a tile too few
    assert not tiled(lambda: conv(x[..., :3]))
    narrow = Conv3x3(channels, channels - 1)
    assert not tiled(lambda: narrow(x))
    assert not tiled(lambda: conv.bfloat16()(x.bfloat16()))


@pytest.mark.parametrize("why", ["AVX512", "autocast", "sides", "meta"])
def test_elsewhere_it_is_the_plain_convolution(capability, why):
    conv, x = problem((4, 16, 18) if why == "sides" else (4, 16, 16))
    if why == "AVX512":
        capability("AVX512")
    device = "meta" if why == "meta" else "cpu"
    conv, x = conv.to(device), x.to(device)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        assert not tiled(lambda: conv(x))
        out, plain = conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1)
    assert out.dtype == plain.dtype and out.shape == plain.shape
    assert why == "meta" or torch.equal(out, plain)


def test_keys_and_first_weights_are_those_of_a_plain_convolution():
    conv, _ = problem()
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(96, 128, 3, padding=1)
    assert all(torch.equal(conv.state_dict()[key], value) for key, value in plain.state_dict().items())


def test_a_unet_by_tiles_is_the_same_network(capability):
    torch.manual_seed(0)
    net = UNet(UNetConfig(image_size=32, width=96, mults=(1, 2), depth=1, attention=(), dropout=0.0, middle_attention=False))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x, t = torch.randn(4, 3, 32, 32), torch.arange(4) * 100
    found = []
    for name in ("AVX2", "AVX512"):
        capability(name)
        out = net(x, t)
        found.append([out, torch.cat([gradient.flatten() for gradient in torch.autograd.grad(out.square().sum(), list(net.parameters()))])])
    assert not torch.equal(found[0][0], found[1][0])
    for ours, plain in zip(*found, strict=True):
        assert (ours - plain).norm() < 1e-5 * plain.norm()


def test_the_same_from_run_to_run(capability):
    conv, x = problem()
    assert all(torch.equal(one, other) for one, other in zip(both(conv, x)[0], both(conv, x)[0], strict=True))
