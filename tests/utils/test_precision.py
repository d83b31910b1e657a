"""Half precision: bfloat16 where the processor has it, else float32 and a warning."""

import logging

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from tests.training.toy import Toy, command, loader, trainer
from unclip_pl import UnCLIP
from unclip_pl.cli.configs import find_configs
from unclip_pl.cli.lightning import main
from unclip_pl.cli.lightning_cli import build_cli
from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.networks.layers import Block
from unclip_pl.stages.base import OptimizerConfig
from unclip_pl.utils import precision
from unclip_pl.utils.errors import UserError

KINDS = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[False, True], ids=["without", "with"])
def instructions(request, monkeypatch):
    """Processors without and with instructions for the half types."""
    precision._cpu_supports.cache_clear()
    half_types = {}
    for kind, (name, _) in precision.HALF_TYPES.items():
        half_types[kind] = (name, f"_{name}")
        monkeypatch.setattr(torch.ops.mkldnn, f"_{name}", lambda: request.param, raising=False)
    monkeypatch.setattr(precision, "HALF_TYPES", half_types)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    yield request.param
    precision._cpu_supports.cache_clear()


def test_a_missing_precision_is_replaced_with_one_warning(instructions, caplog):
    caplog.set_level(logging.WARNING)
    expected = ("bf16", "bf16-mixed") if instructions else ("fp32", "32-true")
    for _ in range(2):
        assert precision.supported_precision("bf16") == expected[0]
        assert precision.supported_precision("bf16-mixed", "cpu", "32-true") == expected[1]
    assert precision.supported_precision("fp32") == "fp32"
    assert precision.supported_precision("bf16", "cuda:1") == "bf16"
    assert precision.supported_precision("16-mixed") == "16-mixed"
    warnings = [line for line in caplog.messages if "bfloat16" in line]
    assert len(warnings) == (0 if instructions else 1)


def test_autocast_is_on_only_where_it_is_supported(instructions):
    for asked in ("fp32", "bf16"):
        with precision.autocast(asked, "cpu"):
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == (
            torch.bfloat16 if asked == "bf16" and instructions else torch.float32
        )


@pytest.mark.parametrize("kind", ["bf16", "pure_bf16", "fp16"])
def test_a_clip_of_rounded_weights_computes_in_what_is_fast(instructions, kind):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    exact, rounded = FrozenCLIP(), FrozenCLIP(CLIPConfig("openmoji", precision=kind))
    embedding, expected = rounded.embed_images(images), exact.embed_images(images)
    atol = 0.05 * expected.abs().max().item()
    torch.testing.assert_close(embedding, expected, atol=atol, rtol=0)
    weight = rounded.model.visual.transformer.resblocks[0].mlp.c_fc.weight
    assert (weight.dtype == torch.float32) != instructions
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    assert torch.equal(weight, weight.to(dtype).to(weight.dtype))  # rounded in either case
    text, theirs = (
        clip.embed_text(clip.tokenize(["a red apple"])).embed for clip in (rounded, exact)
    )
    torch.testing.assert_close(text, theirs, atol=0.05 * theirs.abs().max().item(), rtol=0)


def test_a_clip_that_moves_to_a_device_with_the_type_computes_in_it(monkeypatch):
    monkeypatch.setattr(
        "unclip_pl.clip.frozen.supports_dtype",
        lambda kind, device: torch.device(device).type != "cpu",
    )
    clip = FrozenCLIP(CLIPConfig("openmoji", precision="bf16"))
    assert clip.model.visual.proj.dtype == torch.float32
    weight = clip.to("meta").model.visual.proj
    assert weight.dtype == torch.bfloat16 and weight.is_meta


def test_pictures_in_bfloat16_are_near_those_in_float32(instructions):
    conditions = {"image_embed": torch.randn(1, 256, generator=torch.Generator().manual_seed(0))}
    pictures = []
    for kind in ("fp32", "bf16"):
        unclip = UnCLIP.load(precision=kind)
        expected = kind if instructions else "fp32"
        assert unclip.precision == unclip.cascade.precision == expected
        settings = type(unclip.decoder.sampling)(**vars(unclip.decoder.sampling) | {"steps": 3})
        pictures.append(unclip.decode(conditions["image_embed"], [0], None, settings))
    assert torch.equal(*pictures) != instructions
    assert (pictures[0] - pictures[1]).abs().mean() < 0.05


def test_a_training_on_a_processor_without_bfloat16_is_in_float32(
    instructions, monkeypatch, tmp_path
):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    arguments = ["-c", "stages/decoder.yaml", "--trainer.precision", "bf16-mixed"]
    arguments += ["--trainer.default_root_dir", str(tmp_path)]
    cli = build_cli(find_configs(arguments), run=False)
    assert cli.trainer.precision == ("bf16-mixed" if instructions else "32-true")


@pytest.mark.parametrize(
    ("name", "keyword"),
    [
        ("16-mixed", "CPU"),
        ("16", "CPU"),
        ("bf16-true", "32-true"),
        ("16-true", "32-true"),
        ("64-true", "64-true"),
        ("transformer-engine", "32-true"),
    ],
)
def test_a_precision_that_nothing_trains_in_is_one_sentence(name, keyword, tmp_path, capsys):
    assert main(command(tmp_path, "--trainer.precision", name)) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"lightning: trainer.precision is {name}") and keyword in last


def test_names_of_precisions(instructions):
    half = "bf16-mixed" if instructions else "32-true"
    names = {None: "32-true", 32: "32-true", "bf16": half, "bf16-mixed": half}
    for given, name in names.items():
        assert precision.training_precision(given, on_cpu=True, sharded=False) == name
    assert precision.training_precision("bf16", on_cpu=False, sharded=True) == "bf16-mixed"
    assert precision.training_precision(16, on_cpu=False, sharded=False) == "16-mixed"
    with pytest.raises(UserError, match="sharded"):
        precision.training_precision("16-mixed", on_cpu=False, sharded=True)


class LinearBlock(nn.Linear, Block):
    """A layer that Muon trains."""


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gradients_in_float16_are_clipped_as_they_are_and_not_as_they_are_scaled(name, tmp_path):
    norms, weights = [], []
    for half in (False, True):
        run = trainer(tmp_path, steps=3)
        if half:
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
            run.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
        module = Toy(optimizer=OptimizerConfig(name, lr=0.05, warmup_steps=0, clip_norm=0.5))
        module.net = LinearBlock(4, 1)
        torch.nn.init.ones_(module.net.weight)
        torch.nn.init.zeros_(module.net.bias)
        run.fit(module, loader())
        assert module.skipped_steps == 0
        norms.append(run.logged_metrics["train/grad_norm"])
        weights.append(module.net.weight.detach())
    torch.testing.assert_close(*norms, rtol=0.02, atol=0.01)
    torch.testing.assert_close(*weights, rtol=0.02, atol=0.01)


def test_a_step_that_float16_cannot_hold_is_skipped_and_counted(tmp_path):
    run, module = trainer(tmp_path, steps=6), Toy()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
    run.fit(module, loader(bad=9))
    assert module.skipped_steps == 1 and scaler.get_scale() == 2.0**9
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
