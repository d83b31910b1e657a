"""Activation checkpointing changes only memory: gradients stay equal, with dropout too."""

import copy
import pickle

import pytest
import torch
from torch import nn

from unclip_pl.networks.checkpointing import apply_checkpointing
from unclip_pl.networks.prior import PriorTextConfig, PriorTransformer, PriorTransformerConfig
from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.transformer import Transformer
from unclip_pl.networks.unet import UNet, UNetConfig

KINDS = ["none", "selective", "full"]


def unet(checkpointing: str) -> UNet:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "width": 32, "mults": (1, 2), "depth": 1, "attention": (4,)}
    config = UNetConfig(**sizes, head_width=16, dropout=0.3, checkpointing=checkpointing)
    net = UNet(config)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


def step(net: UNet, device: str = "cpu") -> list[torch.Tensor]:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
    torch.manual_seed(2)  # dropout
    loss = net(x, torch.tensor([3, 700], device=device)).square().mean()
    return [loss, *torch.autograd.grad(loss, list(net.parameters()))]


def saved_bytes(net: nn.Module, run) -> int:
    """Bytes that autograd saves for the backward pass, the weights excepted."""
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_gradients_are_equal_to_the_bit(kind, device, exact_float32):
    for plain, ours in zip(
        step(unet("none").to(device), device), step(unet(kind).to(device), device), strict=True
    ):
        if device == "cpu":
            assert torch.equal(plain, ours)
        else:
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_under_autocast_too():
    found = []
    for kind in KINDS:
        with torch.autocast("cpu", torch.bfloat16):
            found.append(step(unet(kind)))
    for plain, selective, full in zip(*found, strict=True):
        assert torch.equal(plain, selective) and torch.equal(plain, full)


def test_full_keeps_no_activation_inside_of_blocks():
    run = lambda net: saved_bytes(net, lambda: step_forward(net))
    plain, full = run(unet("none")), run(unet("full"))
    assert full < plain / 3


def step_forward(net: UNet) -> torch.Tensor:
    return net(torch.ones(2, 3, 8, 8), torch.tensor([3, 700]))


def test_selective_runs_no_convolution_or_product_twice():
    from torch.utils.flop_counter import FlopCounterMode

    flops = {}
    for kind in KINDS:
        with FlopCounterMode(display=False) as counter:
            step(unet(kind))
        flops[kind] = counter.get_total_flops()
    assert flops["selective"] == flops["none"] < 0.85 * flops["full"]


def test_names_and_state_do_not_change():
    plain, checkpointed = unet("none"), unet("selective")
    assert list(plain.state_dict()) == list(checkpointed.state_dict())
    assert dict(plain.named_modules()).keys() == dict(checkpointed.named_modules()).keys()


def test_it_can_be_changed_and_a_copy_has_its_own_weights():
    net = unet("full")
    twin = copy.deepcopy(net)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    expected = step(unet("none"))
    assert torch.equal(step(net)[0], expected[0]) and not torch.equal(step(twin)[0], expected[0])
    again = pickle.loads(pickle.dumps(net))
    assert torch.equal(step(again)[0], expected[0])
    apply_checkpointing(net, "none")
    assert "forward" not in vars(net.middle_block)
    assert torch.equal(step(net)[0], expected[0])


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_have_it_too(kind):
    torch.manual_seed(0)
    plain = Transformer(16, 2, 2, causal=True)
    ours = Transformer(16, 2, 2, causal=True, checkpointing=kind)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 16)
    gradients = [
        torch.autograd.grad(net(x, last=1).square().sum(), list(net.parameters()))
        for net in (plain, ours)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    config = PriorTransformerConfig(8, 16, 1, 2, checkpointing=kind)
    net = PriorTransformer(config, PriorTextConfig("states", states_width=4, context_length=3))
    assert ("forward" in vars(net.transformer.blocks[0])) == (kind != "none")


def test_an_unknown_kind_is_a_sentence():
    for make in (
        lambda: UNetConfig(checkpointing="some"),
        lambda: PriorTransformerConfig(checkpointing=True),
        lambda: TextConfig(checkpointing="all"),
        lambda: apply_checkpointing(nn.Identity(), "some"),
    ):
        with pytest.raises(ValueError, match="checkpointing"):
            make()
