"""Blocks of the U-Net: values against float64, and that they are ordinary modules.

Hooks, wrappers, forward-mode AD, second derivatives and outside checkpointing act on them as on any
other module, the same in training and in inference.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from tests.oracles.networks import attention_block, res_block
from unclip_pl.networks.blocks import Attention, ResBlock, UNetBlock
from unclip_pl.networks.unet import UNet, UNetConfig


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def differentiable_attention():
    """torch's fused attention has no forward-mode and no second derivative; its plain one has."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


def small_unet(**changes) -> UNet:
    sizes = {"image_size": 8, "width": 32, "mults": (1, 2), "depth": 1, "attention": (4,)}
    config = UNetConfig(**sizes | {"head_width": 16, "dropout": 0.0, "context_width": 12} | changes)
    return randomised(UNet(config))


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, 8, 8), torch.tensor([7, 900])[:batch], torch.randn(batch, 3, 12)


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("resample", ["none", "up", "down"])
@pytest.mark.parametrize("channels", [(32, 32), (32, 64)])
def test_res_block_against_float64(channels, resample, film, device, exact_float32):
    block = randomised(ResBlock(*channels, 24, film=film, resample=resample)).to(device)
    x, emb = torch.randn(2, channels[0], 6, 4, device=device), torch.randn(2, 24, device=device)
    expected = res_block(block, x, emb, resample, film)
    torch.testing.assert_close(block(x, emb).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("context", [False, True])
def test_attention_against_float64(context, masked, device, exact_float32):
    block = randomised(Attention(64, 16, context_width=12 if context else 0)).to(device)
    x = torch.randn(2, 64, 3, 5, device=device)
    tokens = torch.randn(2, 4, 12, device=device) if context else None
    mask = torch.tensor([[True, False, True, True], [True] * 4], device=device)
    mask = mask if masked and context else None
    out = block(x, tokens, mask)
    torch.testing.assert_close(
        out.double(), attention_block(block, x, tokens, mask), rtol=1e-4, atol=1e-4
    )
    if context:
        projected = block.project_context(tokens)
        torch.testing.assert_close(block(x, projected, mask), out, rtol=0, atol=0)


def test_a_skip_is_joined_behind():
    block = UNetBlock(randomised(ResBlock(96, 32, 24)))
    x, skip, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 64, 4, 4), torch.randn(2, 24)
    assert torch.equal(block(x, skip, emb), block.res1(torch.cat([x, skip], dim=1), emb))


@pytest.mark.parametrize("training", [False, True])
def test_every_module_with_weights_is_called(training):
    net = small_unet(embed_dim=6).train(training)
    called = set()
    for name, module in net.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    x, t, context = inputs()
    with torch.set_grad_enabled(training):
        net(x, t, context=context, embed=torch.randn(2, 6))
    owners = {name.rpartition(".")[0] for name, _ in net.named_parameters()}
    assert called == owners


class LoRA(nn.Module):
    """A low-rank addition to a convolution, as adapters wrap it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.down = nn.Conv2d(conv.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + self.up(self.down(x))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("wrapper", ["hook", "LoRA"])
def test_hooks_and_adapters_act_the_same_in_training_and_inference(wrapper, checkpointing):
    net = small_unet(checkpointing=checkpointing)
    x, t, context = inputs()
    with torch.no_grad():
        before = net(x, t, context=context)
    res = net.middle_block.res1
    if wrapper == "hook":
        res.conv2.register_forward_hook(lambda module, args, out: 2 * out)
    else:
        res.conv2 = LoRA(res.conv2)
    trained = net.train()(x, t, context=context)
    with torch.no_grad():
        drawn = net.eval()(x, t, context=context)
    torch.testing.assert_close(trained, drawn)
    assert (drawn - before).abs().max() > 1e-3
    trained.square().sum().backward()
    if wrapper == "LoRA":
        assert res.conv2.up.weight.grad.any() and res.conv2.down.weight.grad.any()


def test_forward_mode_derivative_is_that_of_finite_differences(differentiable_attention):
    net = small_unet().double()
    x, t, context = inputs()
    x, context, direction = x.double(), context.double(), torch.randn(2, 3, 8, 8).double()
    out, tangent = torch.func.jvp(lambda x: net(x, t, context=context), (x,), (direction,))
    step = 1e-3  # norms are float32 inside
    ahead, behind = (net(x + s * step * direction, t, context=context) for s in (1, -1))
    expected = (ahead - behind) / (2 * step)
    assert (tangent - expected).norm() < 1e-3 * expected.norm()
    torch.testing.assert_close(out, net(x, t, context=context))


def test_second_derivative_is_that_of_finite_differences(differentiable_attention):
    net = small_unet().double()
    x, t, context = inputs(1)
    x, context, direction = x.double(), context.double(), torch.randn(1, 3, 8, 8).double()

    def gradient(x: torch.Tensor, create_graph: bool = False) -> torch.Tensor:
        x = x.requires_grad_()
        loss = net(x, t, context=context).square().sum()
        return torch.autograd.grad(loss, x, create_graph=create_graph)[0]

    x = x.requires_grad_()
    (second,) = torch.autograd.grad((gradient(x, create_graph=True) * direction).sum(), x)
    step = 1e-3  # norms are float32 inside
    ahead, behind = (gradient(x.detach() + s * step * direction) for s in (1, -1))
    expected = (ahead - behind) / (2 * step)
    assert (second - expected).norm() < 1e-3 * expected.norm()


def test_checkpointing_from_outside_frees_what_is_inside():
    block = randomised(Attention(64, 16, context_width=12))
    x, context = torch.randn(2, 64, 8, 8, requires_grad=True), torch.randn(2, 4, 12)
    kept = []

    def saved_bytes(run) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            run()
        weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
        return sum(size for place, size in storages.items() if place not in weights)

    plain = saved_bytes(lambda: block(x, context))
    outside = saved_bytes(lambda: checkpoint(block, x, context, use_reentrant=False))
    assert outside <= x.untyped_storage().nbytes() + context.untyped_storage().nbytes() < plain / 3
    F.mse_loss(checkpoint(block, x, context, use_reentrant=False), torch.zeros_like(x)).backward()
    assert x.grad.any()
