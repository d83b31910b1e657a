"""The thumbnail is a first guess of the image that the U-Net reads as a low-resolution image."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from tests.factories import randomise
from unclip_pl.networks.thumbnail import Thumbnail
from unclip_pl.networks.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    image_size=16, width=32, mults=(1, 2), depth=1, attention=(8,), head_width=32, patch_size=2,
    dropout=0.0, embed_dim=12, context_width=24, thumbnail=4, thumbnail_width=16,
)  # fmt: skip


def test_unet_reads_it_as_an_upsampler_reads_its_low_res_image():
    net = UNet(CONFIG).eval()
    randomise(net)
    upsampler = UNet(replace(CONFIG, thumbnail=0, low_res_channels=3)).eval()
    weights = {name: w for name, w in net.state_dict().items() if "thumbnail" not in name}
    upsampler.load_state_dict(weights)
    x, t, embed = torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), torch.randn(2, 12)
    guess = net.clip_to_thumbnail(embed)
    assert guess.shape == (2, 3, 4, 4) and guess.std() > 0.01
    low_res = F.interpolate(guess, scale_factor=4, mode="bilinear")
    expected = upsampler(x, t, embed=embed, low_res=low_res)
    torch.testing.assert_close(net(x, t, embed=embed), expected)


def test_unet_leaves_it_to_its_own_loss_and_that_leaves_the_embedding():
    net = UNet(CONFIG)
    randomise(net)
    embed = torch.randn(2, 12, requires_grad=True)
    net(torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), embed=embed).square().sum().backward()
    assert all(parameter.grad is None for parameter in net.clip_to_thumbnail.parameters())
    embed.grad = None
    net.clip_to_thumbnail.loss(embed, torch.rand(2, 3, 16, 16)).backward()
    assert embed.grad is None
    assert all(parameter.grad.any() for parameter in net.clip_to_thumbnail.parameters())


def test_it_learns_layouts_that_no_linear_map_of_the_embedding_holds():
    torch.manual_seed(0)
    embed, image = torch.randn(64, 8), torch.rand(64, 3, 8, 8).round() * 2 - 1
    small = F.avg_pool2d(image, 2)
    linear = torch.linalg.lstsq(F.pad(embed, (0, 1), value=1.0), small.flatten(1)).solution
    of_linear = F.mse_loss(F.pad(embed, (0, 1), value=1.0) @ linear, small.flatten(1))
    thumbnail = Thumbnail(8, 3, 4, 64)
    assert not thumbnail(embed).any()  # grey at first
    optimizer = torch.optim.AdamW(thumbnail.parameters(), 3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        thumbnail.loss(embed, image).backward()
        optimizer.step()
    assert thumbnail.eval().loss(embed, image) < 0.2 * of_linear


def test_a_part_of_the_embedding_is_left_out_in_training_only():
    thumbnail = Thumbnail(40, 3, 4, 16)
    randomise(thumbnail)
    embed = torch.randn(1, 40).expand(50, -1)
    assert thumbnail(embed).std(0).amax() > 1e-3
    rows = thumbnail.eval()(embed)
    torch.testing.assert_close(rows, rows[:1].expand_as(rows))
