"""The demo's pictures."""

import pytest
import torch
from PIL import Image

from tests.factories import tiny_stage, write_checkpoint
from unclip_pl.cli import demo
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import load_image


def test_captions_are_drawn_by_both_decoders(releases, tmp_path, monkeypatch):
    load, decoders = UnCLIP.load, []

    def load_tiny(decoder=None, prior=None):
        decoders.append(decoder)
        return load(releases["decoder"], prior)

    monkeypatch.setattr(UnCLIP, "load", load_tiny)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "RUN", tmp_path / "run")
    with pytest.raises(UserError, match="run the demo again"):
        demo.draw_prompts()
    checkpoint = tmp_path / "run" / "checkpoints" / "newest-step=150.ckpt"
    checkpoint.parent.mkdir(parents=True)
    write_checkpoint(checkpoint, tiny_stage("decoder"))
    assert "of 8 captions" in demo.draw_prompts()
    assert decoders[-2:] == [None, checkpoint]
    with Image.open(tmp_path / "prompts.png") as picture:
        assert picture.height >= 2 * 16 and "woman pilot" in picture.text["prompts"]


def test_the_demo_shows_three_sizes_next_to_each_other(releases, tmp_path, monkeypatch):
    """The same picture three times: blocks of 16, of 4 and of 1 pixel, each the file's pixels."""
    load = UnCLIP.load

    def load_tiny(prior, upsamplers):
        paths = [releases[name] for name in upsamplers]
        return load(releases["decoder"], prior, upsamplers=paths)

    monkeypatch.setattr(UnCLIP, "load", load_tiny)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    report = demo.draw_cascade("fox")
    assert all(f"{size} pixels in" in report for size in (64, 256, 1024))
    shown = load_image(tmp_path / "cascade.png")[:, 2:1026, 2:]
    panels = [shown[:, :, k * 1026 : k * 1026 + 1024] for k in range(3)]
    for panel, side in zip(panels, (16, 4)):
        blocks = panel.unfold(1, side, side).unfold(2, side, side).flatten(3)
        assert torch.equal(blocks.amin(-1), blocks.amax(-1))
        assert blocks.shape[1:3] == (1024 // side, 1024 // side)
    assert panels[2].unfold(1, 2, 2).std(-1).max() > 0
    expected = load(releases["decoder"], "diffusion").generate(["fox"], [0])[0]
    assert (panels[0][:, ::16, ::16] - expected).abs().max() <= 2 / 255
