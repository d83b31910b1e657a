"""Adapters (LoRA) of every kind of stage: merged by whatever reads a checkpoint, and exported
alone, in peft's layout."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from tests import factories
from unclip_pl.cli.unclip import main
from unclip_pl.pipeline.adapters import digest_of
from unclip_pl.pipeline.interop.adapters import KINDS
from unclip_pl.pipeline.weights import load_pretrained, load_stage, read_weights
from unclip_pl.stages.base import Stage
from unclip_pl.stages.clip import CLIP
from unclip_pl.stages.decoder import Decoder
from unclip_pl.training.lora import LoRA
from unclip_pl.training.variance import add_variance
from unclip_pl.utils.errors import UserError

peft = pytest.importorskip("peft", reason="adapters are peft's")


def adapters_for(name: str) -> LoRA:
    targets = ("conv1", "conv2") if name == "upsampler" else ("qkv", "context_kv", "proj")
    return LoRA(rank=4, alpha=6, targets=targets)


def fine_tuned(name: str, base: Path, file: Path) -> Path:
    """A checkpoint of a run with adapters from the weights in `base`."""
    stage, lora = factories.tiny_stage(name), adapters_for(name)
    load_pretrained(stage, base)
    lora.setup(None, stage, "fit")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in stage.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
        stage.skipped_steps += 1
    factories.write_checkpoint(file, stage)
    checkpoint = torch.load(file, weights_only=True)
    lora.on_save_checkpoint(None, stage, checkpoint)
    torch.save(checkpoint, file)
    return file


def merged_by_peft(stage: Stage, folder: Path) -> dict:
    """The network's weights as a user of peft gets them."""
    net = peft.PeftModel.from_pretrained(stage.net, folder).merge_and_unload()
    return {f"net.{name}": value for name, value in net.state_dict().items()}


def written(tmp_path: Path, name: str) -> tuple[Path, Path, Path]:
    """(base, checkpoint, adapters) of a stage."""
    base = factories.write_release(tmp_path / "base", factories.tiny_stage(name))
    checkpoint = fine_tuned(name, base, tmp_path / "tuned.ckpt")
    out = tmp_path / "adapters"
    assert main(["export", str(checkpoint), "--adapters", str(base), "--out", str(out)]) == 0
    return base, checkpoint, out


@pytest.mark.parametrize("name", factories.STAGES)
def test_they_stand_for_the_stage_that_was_fine_tuned(name, tmp_path, capsys):
    base, checkpoint, out = written(tmp_path, name)
    assert f"adapters of a {type(factories.tiny_stage(name)).__name__}" in capsys.readouterr().out
    assert (out / "adapter_model.safetensors").stat().st_size < checkpoint.stat().st_size / 4
    expected, again = read_weights(checkpoint), read_weights(out)
    assert again.hyper_parameters == expected.hyper_parameters and again.steps == 7
    assert again.tensors.keys() == expected.tensors.keys()
    for key, value in expected.tensors.items():
        torch.testing.assert_close(again.tensors[key], value, rtol=0, atol=0, equal_nan=True)
    changed = load_stage(out, *KINDS).state_dict(), load_stage(base, *KINDS).state_dict()
    assert any(not torch.equal(changed[0][key], changed[1][key]) for key in changed[0])
    by_peft = merged_by_peft(load_stage(base, *KINDS), out)
    for key, value in by_peft.items():
        torch.testing.assert_close(value, expected.tensors[key], rtol=1e-5, atol=1e-6)
    stage = factories.tiny_stage(name)  # --init
    load_pretrained(stage, out)
    held = expected.tensors | {"skipped_steps": stage.skipped_steps}  # which starts from 0
    assert digest_of(stage.state_dict()) == digest_of(held)


def test_the_overlay_adapts_a_decoders_thumbnail_too():
    tiny = factories.tiny_stage("decoder")
    net = replace(tiny.net_config, thumbnail=4, thumbnail_width=16)
    stage = Decoder(net, tiny.text_config)
    overlay = yaml.safe_load(Path("lightning_config/lora.yaml").read_text())
    (callback,) = overlay["trainer"]["callbacks+"]
    LoRA(**callback["init_args"]).setup(None, stage, "fit")
    stage.loss(factories.tiny_batch("decoder", 4))["thumbnail_mse"].backward()
    layers = [f"blocks.{block}.linear{layer}" for block in (0, 1) for layer in (1, 2)]
    names = [f"net.clip_to_thumbnail.{layer}.lora_B.default.weight" for layer in layers]
    parameters = dict(stage.named_parameters())
    assert {*names} <= parameters.keys()
    assert {name for name, weight in parameters.items() if weight.grad is not None} > {*names}
    assert all(weight.requires_grad == ("lora_" in name) for name, weight in parameters.items())


@pytest.mark.parametrize("name", factories.STAGES)
def test_a_release_of_them_is_whole(name, tmp_path):
    _, checkpoint, out = written(tmp_path, name)
    for source in (checkpoint, out):
        folder = tmp_path / f"release of {source.name}"
        assert main(["export", str(source), "--out", str(folder)]) == 0
        assert digest_of(read_weights(folder).tensors) == digest_of(read_weights(source).tensors)


def test_the_variance_of_a_prior_is_of_the_merged_weights(tmp_path):
    base, checkpoint, _ = written(tmp_path, "diffusion_prior")
    batches = [factories.tiny_batch("diffusion_prior", 8)]
    add_variance(checkpoint, factories.tiny_stage("diffusion_prior"), batches, draws=1)
    held = torch.load(checkpoint, weights_only=True)
    assert any(".lora_A." in name for name in held["state_dict"])  # they are still there
    tuned = load_stage(checkpoint, *KINDS)
    expected = tuned.x0_error.clone()
    tuned.estimate_variance(batches, draws=1)
    torch.testing.assert_close(expected, tuned.x0_error)
    plain = load_stage(base, *KINDS)
    plain.estimate_variance(batches, draws=1)
    assert not torch.allclose(expected, plain.x0_error)
    again = tmp_path / "with variance"
    assert main(["export", str(checkpoint), "--adapters", str(base), "--out", str(again)]) == 0
    assert torch.equal(read_weights(again).tensors["x0_error"], expected)


def test_the_base_may_lie_elsewhere_but_must_be_the_same(tmp_path):
    base, _, out = written(tmp_path, "decoder")
    moved = shutil.move(base, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="which is not there"):
        read_weights(out)
    config = json.loads((out / "adapter_config.json").read_text())

    def point_to(place: str) -> None:
        held = config | {"base_model_name_or_path": place}
        (out / "adapter_config.json").write_text(json.dumps(held))

    point_to("../elsewhere")
    expected = read_weights(tmp_path / "tuned.ckpt")
    assert digest_of(read_weights(out).tensors) == digest_of(expected.tensors)
    other = factories.tiny_stage("decoder")
    other.load_state_dict(read_weights(moved).tensors)
    with torch.no_grad():
        other.net.conv_in.bias.add_(0.1)
    factories.write_release(tmp_path / "other", other)
    point_to("../other")
    with pytest.raises(UserError, match="were trained on other weights"):
        read_weights(out)
    point_to(".")
    with pytest.raises(UserError, match="which holds adapters as well"):
        read_weights(out)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("another base", "were not trained on the weights in"),
        ("another stage", "were not trained on the weights in"),
        ("adapters", "holds adapters as well"),
        ("no adapters", "has no adapters"),
        ("a release", "has no adapters"),
        ("diffusers", "two kinds of export"),
        ("there already", "exists already"),
    ],
)
def test_what_cannot_be_exported_is_a_sentence(case, said, tmp_path, capsys):
    base, checkpoint, out = written(tmp_path, "diffusion_prior")
    words, target = ["export", str(checkpoint)], tmp_path / "new"
    if case == "another base":
        other = factories.tiny_stage("diffusion_prior")
        factories.randomise(other)
        base = factories.write_release(tmp_path / "b", other)
    elif case == "another stage":
        base = factories.write_release(tmp_path / "b", factories.tiny_stage("decoder"))
    elif case == "adapters":
        base = out
    elif case == "no adapters":
        plain = factories.tiny_stage("diffusion_prior")
        words[1] = str(factories.write_checkpoint(tmp_path / "plain.ckpt", plain))
    elif case == "a release":
        words[1] = str(base)
    elif case == "diffusers":
        words += ["--to", "diffusers"]
    else:
        target = out
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main([*words, "--adapters", str(base), "--out", str(target)]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("damage", ["no weights", "cut off", "no digest", "newer", "not json"])
def test_damaged_adapters_are_a_sentence(damage, tmp_path):
    *_, out = written(tmp_path, "decoder")
    weights, config = out / "adapter_model.safetensors", out / "config.json"
    held = json.loads(config.read_text())
    if damage == "no weights":
        weights.unlink()
    elif damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "no digest":
        del held["base_sha256"]
    elif damage == "newer":
        held["format"] = 2
    config.write_text("{" if damage == "not json" else json.dumps(held))
    with pytest.raises(UserError, match="adapters") as error:
        read_weights(out)
    assert "\n" not in str(error.value)


def test_layers_that_are_not_called_get_no_adapters():
    """torch's attention takes the weights of `out_proj`, and lookups are no products."""
    for name in ("out_proj", "attn", "token_embedding"):
        with pytest.raises(UserError, match="set targets to some of c_fc, c_proj, conv1"):
            LoRA(targets=[name]).setup(None, CLIP(), "fit")
    stage = CLIP()
    LoRA(targets=["c_fc", "out_proj"]).setup(None, stage, "fit")
    batch = {"image": torch.rand(2, 3, 64, 64), "tokens": torch.randint(1, 9, (2, 32))}
    stage.contrast(batch).backward()
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)
