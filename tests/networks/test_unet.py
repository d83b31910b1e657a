"""The U-Net: parameter counts of published shapes, gradients, masks, cached context, patches,
memory format and types.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unclip_pl.networks.layers import GroupNorm32, attention, timestep_embedding
from unclip_pl.networks.unet import UNet, UNetConfig

SMALL = UNetConfig(
    image_size=16,
    width=32,
    mults=(1, 2),
    depth=1,
    attention=(8,),
    head_width=32,
    dropout=0.0,
    embed_dim=12,
    context_width=24,
)
PLAIN = replace(SMALL, embed_dim=0, context_width=0)


@pytest.fixture(autouse=True)
def _one_thread(_threads_and_argv):
    torch.set_num_threads(1)
    torch.manual_seed(0)


def randomised(module: nn.Module) -> nn.Module:
    """Zero initialisation undone, so that every path counts."""
    for name, parameter in module.named_parameters():
        if not parameter.any():
            nn.init.normal_(
                parameter, std=0.05 if name.endswith("bias") else parameter[0].numel() ** -0.5
            )
    return module


def conditions(batch: int = 2, length: int = 5) -> dict:
    return {
        "embed": torch.randn(batch, 12),
        "pooled": torch.randn(batch, 128),
        "context": torch.randn(batch, length, 24),
        "context_mask": torch.arange(length) < torch.tensor([[3], [length]])[:batch],
    }


def inputs(batch: int = 2, side: int = 16):
    return torch.randn(batch, 3, side, side), torch.randint(1000, (batch,))


ADM = UNetConfig()
UPSAMPLER = replace(ADM, low_res_channels=3, attention=(), head_width=64)


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (replace(ADM, width=512), 2097.586694),
        (replace(UPSAMPLER, width=320), 736.272006),
        (
            replace(UPSAMPLER, width=192, image_size=256, mults=(1, 1, 2, 2, 4, 4), depth=2),
            284.42823,
        ),
    ],
    ids=[
        "512 channels 64 px, attention 32 16 8",
        "320 channels, only middle attention",
        "192 channels 256 px, only middle attention",
    ],
)
def test_parameters_are_as_many_as_guided_diffusion_has(config, millions):
    with torch.device("meta"):
        net = UNet(config)
    assert sum(p.numel() for p in net.parameters()) == round(millions * 1e6)


def test_no_attention_at_all():
    net = UNet(replace(PLAIN, attention=(), middle_attention=False))
    assert not [
        module
        for module in net.modules()
        if isinstance(module, nn.Linear) and module.out_features == 3 * 64
    ]
    x, t = inputs()
    assert net(x, t).shape == (2, 6, 16, 16)
    assert net(F.pad(x, (0, 16)), t).shape == (2, 6, 16, 32)  # fully convolutional


def test_starts_as_zero():
    x, t = inputs()
    assert not UNet(SMALL)(x, t, **conditions()).any()


VARIANTS = {
    "all": SMALL,
    "patches": replace(SMALL, patch_size=2, image_size=32),
    "additive time": replace(SMALL, scale_shift=False),
    "no tokens of the embedding": replace(SMALL, embed_tokens=0),
    "selective checkpointing": replace(SMALL, checkpointing="selective"),
    "full checkpointing": replace(SMALL, checkpointing="full"),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_parameter_gets_a_gradient(config):
    net = randomised(UNet(config))
    x, t = inputs(side=config.image_size)
    net(x, t, **conditions()).square().mean().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_plain_upsampler_gets_all_gradients_and_reads_low_res():
    net = randomised(UNet(replace(PLAIN, low_res_channels=3, attention=(), middle_attention=False)))
    x, t = inputs()
    low = torch.randn_like(x).requires_grad_()
    net(x, t, low_res=low).square().mean().backward()
    assert all(p.grad.any() for p in net.parameters()) and low.grad.any()


def test_hidden_tokens_have_no_influence():
    net = randomised(UNet(SMALL)).eval()
    x, t = inputs()
    given = conditions()
    base = net(x, t, **given)
    changed = given["context"].clone()
    changed[0, 3:] += 100
    torch.testing.assert_close(net(x, t, **(given | {"context": changed})), base, rtol=0, atol=0)
    changed[0, 2] += 1
    assert (net(x, t, **(given | {"context": changed})) - base)[0].abs().max() > 1e-4
    shorter = {
        "context": given["context"][:1, :3],
        "context_mask": None,
        "embed": given["embed"][:1],
        "pooled": given["pooled"][:1],
    }
    torch.testing.assert_close(net(x[:1], t[:1], **shorter), base[:1], rtol=1e-4, atol=1e-5)


def test_each_condition_counts():
    net = randomised(UNet(SMALL)).eval()
    x, t = inputs()
    given = conditions()
    base = net(x, t, **given)
    for name in ("embed", "pooled", "context"):
        assert (net(x, t, **(given | {name: given[name] + 1})) - base).abs().amax(
            dim=(1, 2, 3)
        ).min() > 1e-4, name
    assert (net(x, (t + 500) % 1000, **given) - base).abs().max() > 1e-4


@pytest.mark.parametrize("image_tokens_alone", [False, True])
@pytest.mark.parametrize("thumbnail", [0, 4])
def test_encoded_context_equals_plain(image_tokens_alone, thumbnail):
    net = randomised(UNet(replace(SMALL, thumbnail=thumbnail))).eval()
    x, t = inputs()
    given = {"embed": torch.randn(2, 12)} if image_tokens_alone else conditions()
    with torch.no_grad():
        encoded = net.encode_context(**given)
        assert len(encoded.context) == 1 + 1 + 2
        for step in (t, t // 2):
            assert torch.equal(net(x, step, encoded=encoded), net(x, step, **given))


def test_encode_context_without_context():
    net = randomised(UNet(replace(SMALL, context_width=0))).eval()
    x, t = inputs()
    embed = torch.randn(2, 12)
    assert torch.equal(net(x, t, encoded=net.encode_context(embed=embed)), net(x, t, embed=embed))


def test_patches_round_trip_and_place():
    """With identity instead of the body the image comes back: a patch sees the same pixels on the
    way in and out."""
    net = UNet(replace(PLAIN, patch_size=2, image_size=32, out_channels=3)).eval()
    assert net.conv_in.in_channels == 12 and net.conv_out.out_channels == 12
    nn.init.dirac_(net.conv_in.weight)
    nn.init.zeros_(net.conv_in.bias)
    nn.init.dirac_(net.conv_out.weight)
    seen = []
    net.conv_in.register_forward_hook(lambda module, args, out: seen.append(out))
    net.conv_out.register_forward_pre_hook(lambda module, args: (seen[-1],))
    x, t = inputs(side=32)
    assert torch.equal(net(x, t), x)


@pytest.mark.parametrize("thumbnail", [0, 4])
def test_feature_maps_are_channels_last_if_images_or_weights_are(thumbnail):
    net = randomised(UNet(replace(SMALL, thumbnail=thumbnail, thumbnail_width=16))).eval()
    x, t = inputs()
    given = conditions()
    formats = []
    for block in [*net.down_blocks, net.middle_block, *net.up_blocks]:
        block.register_forward_hook(
            lambda module, args, out: formats.append(
                out.is_contiguous(memory_format=torch.channels_last)
            )
        )
    weights_of_loss = [p for name, p in net.named_parameters() if "thumbnail" not in name]
    found = []
    for images in (torch.contiguous_format, torch.channels_last):
        for weights in (torch.contiguous_format, torch.channels_last):
            formats.clear()
            net = net.to(memory_format=weights)
            out = net(x.contiguous(memory_format=images), t, **given)
            gradients = torch.autograd.grad(out.square().sum(), weights_of_loss)
            found.append((out, torch.cat([gradient.flatten() for gradient in gradients])))
            assert set(formats) == {torch.channels_last in (images, weights)}
    for out, gradient in found[1:]:
        torch.testing.assert_close(out, found[0][0], rtol=1e-4, atol=1e-5)
        assert (gradient - found[0][1]).norm() < 1e-5 * found[0][1].norm()


def test_inference_equals_training_mode():
    net = randomised(UNet(SMALL))
    x, t = inputs()
    given = conditions()
    kept = x.clone()
    with torch.no_grad():
        quiet = net(x, t, **given)
    torch.testing.assert_close(quiet, net(x, t, **given), rtol=1e-5, atol=1e-6)
    assert torch.equal(x, kept)


def test_bfloat16_autocast_is_near_and_keeps_the_type():
    net = randomised(UNet(SMALL)).eval()
    x, t = inputs()
    given = conditions()
    exact = net(x, t, **given)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, t, **given)
        half.square().mean().backward()
    assert half.dtype == torch.float32
    assert (half - exact).norm() / exact.norm() < 0.03
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_group_norm_of_large_bfloat16_is_float32_inside():
    x = (torch.randn(2, 32, 16, 16) + 300).bfloat16()
    norm = GroupNorm32(32)
    exact = F.group_norm(x.double(), 32, eps=1e-5)
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x).double() - exact).abs().max() < 0.02


def test_timestep_embedding():
    found = timestep_embedding(torch.tensor([0, 7, 999]), 64)
    assert found.shape == (3, 64) and torch.equal(
        found[0], torch.cat([torch.ones(32), torch.zeros(32)])
    )
    frequency = 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    exact = torch.cat([(999 * frequency).cos(), (999 * frequency).sin()])
    torch.testing.assert_close(found[2].double(), exact, rtol=0, atol=2e-4)


def test_attention_against_a_slow_one():
    q, kv = torch.randn(2, 3, 2, 8), torch.randn(2, 5, 2, 2, 8)
    mask = torch.tensor([[True, False, True, True, False], [True] * 5])
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), kv[:, :, 0].double()) / 8**0.5
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    exact = torch.einsum("bhnm,bmhd->bnhd", weights, kv[:, :, 1].double()).flatten(2)
    torch.testing.assert_close(
        attention(q, *kv.unbind(2), mask).double(), exact, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 15}, "multiple of 2"),
        ({"width": 48}, "multiple of 32"),
        ({"head_width": 48}, "head_width 48"),
        ({"attention": (), "middle_attention": False}, "no attention to read it"),
        ({"dropout": 1.0}, "dropout"),
        ({"depth": 0}, "at least 1"),
        ({"embed_tokens": -1}, r"UNetConfig\.embed_tokens is -1: give 0 or more"),
        ({"out_channels": 0}, r"UNetConfig\.out_channels is 0: give 1 or more"),
        ({"thumbnail": -1}, r"UNetConfig\.thumbnail is -1: give 0 or more"),
        ({"thumbnail": 5}, "thumbnail is 5: .*an image_size that it divides .here 16"),
        ({"thumbnail": 4, "embed_dim": 0}, "thumbnail is 4: it needs an embedding"),
        ({"thumbnail": 4, "thumbnail_width": 0}, "thumbnail_width of at least 1"),
    ],
)
def test_impossible_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **change)


def test_missing_and_surplus_conditions_are_refused():
    x, t = inputs()
    with pytest.raises(ValueError, match="embed_dim 12"):
        UNet(SMALL)(x, t, context=torch.randn(2, 5, 24))
    with pytest.raises(ValueError, match="embed_dim 0"):
        UNet(PLAIN)(x, t, embed=torch.randn(2, 12))
    with pytest.raises(ValueError, match="context_width 0"):
        UNet(PLAIN)(x, t, context=torch.randn(2, 5, 24))
    with pytest.raises(ValueError, match="no `context`"):
        UNet(replace(SMALL, embed_dim=0))(x, t)
    with pytest.raises(ValueError, match="low_res_channels"):
        UNet(PLAIN)(x, t, low_res=x)
