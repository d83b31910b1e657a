"""Half precision: in bfloat16 where the processor has it, in float32 and with a sentence where it has not."""

import logging

import pytest
import torch

from unclip_pl import UnCLIP, precision
from unclip_pl.cli import build_cli, find_configs
from unclip_pl.clip import CLIPConfig, FrozenCLIP

KINDS = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[False, True], ids=["without", "with"])
def instructions(request, monkeypatch):
    """Processors without and with instructions for the half types."""
    precision._cpu_has.cache_clear()
    monkeypatch.setattr(precision, "HALF", {kind: (name, f"_{name}") for kind, (name, _) in precision.HALF.items()})
    for name, _ in precision.HALF.values():
        monkeypatch.setattr(torch.ops.mkldnn, f"_{name}", lambda: request.param, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    yield request.param
    precision._cpu_has.cache_clear()


def test_what_is_usable_is_told_once(instructions, caplog):
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        assert precision.usable("bf16") == ("bf16" if instructions else "fp32")
        assert precision.usable("bf16-mixed", "cpu", "32-true") == ("bf16-mixed" if instructions else "32-true")
    assert precision.usable("fp32") == "fp32" and precision.usable("bf16", "cuda:1") == "bf16" and precision.usable("16-mixed") == "16-mixed"
    said = [line for line in caplog.messages if "This CPU has no instructions for bfloat16" in line]
    assert len(said) == (0 if instructions else 1)


def test_autocast_is_on_only_where_it_is_usable(instructions):
    for asked in ("fp32", "bf16"):
        with precision.autocast(asked, "cpu"):
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == (torch.bfloat16 if asked == "bf16" and instructions else torch.float32)


@pytest.mark.parametrize("kind", ["bf16", "pure_bf16", "fp16"])
def test_a_clip_of_rounded_weights_computes_in_what_is_fast(instructions, kind):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    exact, rounded = FrozenCLIP(), FrozenCLIP(CLIPConfig("openmoji", precision=kind))
    embedding = rounded.embed_images(images)
    torch.testing.assert_close(embedding, exact.embed_images(images), atol=0.05 * exact.embed_images(images).abs().max().item(), rtol=0)
    weight = rounded.model.visual.transformer.resblocks[0].mlp.c_fc.weight
    assert (weight.dtype == torch.float32) != instructions
    assert torch.equal(weight, weight.to(torch.float16 if kind == "fp16" else torch.bfloat16).to(weight.dtype))  # rounded in either case
    text, theirs = (clip.embed_text(clip.tokenize(["a red apple"])).embed for clip in (rounded, exact))
    torch.testing.assert_close(text, theirs, atol=0.05 * theirs.abs().max().item(), rtol=0)


def test_a_clip_that_moves_to_a_device_with_the_type_computes_in_it(monkeypatch):
    monkeypatch.setattr("unclip_pl.clip.has_instructions", lambda kind, device: torch.device(device).type != "cpu")
    clip = FrozenCLIP(CLIPConfig("openmoji", precision="bf16"))
    assert clip.model.visual.proj.dtype == torch.float32
    weight = clip.to("meta").model.visual.proj
    assert weight.dtype == torch.bfloat16 and weight.is_meta


def test_pictures_in_bfloat16_are_near_those_in_float32(instructions):
    conditions = {"image_embed": torch.randn(1, 256, generator=torch.Generator().manual_seed(0))}
    pictures = []
    for kind in ("fp32", "bf16"):
        unclip = UnCLIP.load(precision=kind)
        assert unclip.precision == unclip.cascade.precision == (kind if instructions else "fp32")  # said when it is loaded, not on the bar's line
        settings = type(unclip.decoder.sampling)(**vars(unclip.decoder.sampling) | {"steps": 3})
        pictures.append(unclip.decode(conditions["image_embed"], [0], None, settings))
    assert torch.equal(*pictures) != instructions
    assert (pictures[0] - pictures[1]).abs().mean() < 0.05


def test_a_training_on_a_processor_without_bfloat16_is_in_float32(instructions, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    cli = build_cli(find_configs(["-c", "stages/decoder.yaml", "--trainer.precision", "bf16-mixed", "--trainer.default_root_dir", str(tmp_path)]), run=False)
    assert cli.trainer.precision == ("bf16-mixed" if instructions else "32-true")
