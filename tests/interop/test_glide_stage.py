"""`stages/glide`: GLIDE's base model as a training configuration, and a run of imported weights."""

import random

import pytest
import torch
import yaml

from tests.interop import glide_kit
from tests.interop.same_stage import require_same_stage
from tests.oracles import glide
from unclip_pl.cli.configs import find_configs
from unclip_pl.cli.lightning import expand_resume, main
from unclip_pl.cli.lightning_cli import build_cli
from unclip_pl.cli.unclip import main as unclip
from unclip_pl.data import openmoji
from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline.interop.glide import glide_stage
from unclip_pl.pipeline.interop.importing import import_glide
from unclip_pl.pipeline.weights import load_stage, read_weights
from unclip_pl.stages.decoder import Decoder

OWN_SIZE = {
    "width": 192,
    "mults": (1, 2, 3, 4),
    "depth": 3,
    "attended": (False, True, True, True),
    "xf": 512,
    "layers": 16,
    "length": 128,
    "n": 50257,
}


def test_it_is_of_glides_size_and_takes_imported_weights():
    words = ["-c", "lightning_config/default.yaml", "-c", "stages/decoder.yaml"]
    words += ["-c", "stages/glide/decoder.yaml", "--trainer.accelerator", "cpu"]
    with torch.device("meta"):
        stage = build_cli(find_configs(words), run=False).model
        made = glide.random_weights(lambda shape, name: torch.empty(shape), **OWN_SIZE)
    net = UNetConfig(width=192, context_width=512)
    text = TextConfig(
        "transformer", vocab_size=50257, context_length=128, depth=16, tokenizer="gpt2"
    )
    imported = glide_stage(net, text)
    count = sum(parameter.numel() for parameter in stage.parameters())
    assert count == sum(tensor.numel() for tensor in made.values())
    require_same_stage(stage, imported)


def test_it_can_be_planned(capsys):
    assert unclip(["plan", "stages/glide/decoder.yaml", "--gpus", "1"]) == 0
    assert "**decoder**: 385 M parameters" in capsys.readouterr().out


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small GLIDE, imported; and shards of a few drawings."""
    folder = tmp_path_factory.mktemp("tune")
    import_glide(
        glide_kit.write(folder / "theirs", glide_kit.weights()), folder / "glide", precision="fp32"
    )
    train, val = openmoji.composition_split(openmoji.list_drawings())
    draw = random.Random(0)
    shards = (draw.sample(train, 12), draw.sample(val, 4))
    openmoji.write_shards(folder, *shards, 64, progress=False)
    return folder


def run(home, out, *flags):
    """The command line of a short run of the imported model."""
    overlay = out.parent / "glide.yaml"
    settings = read_weights(home / "glide").hyper_parameters
    changed = {"name": "adamw", "lr": 2e-3, "warmup_steps": 0, "decay": "constant"}
    settings |= {"optimizer": settings["optimizer"] | changed}
    settings |= {"sampling": settings["sampling"] | {"steps": 2}}
    overlay.write_text(yaml.safe_dump({"model": {"init_args": settings}}))
    return [
        *("fit", "-c", "stages/decoder.yaml", "-c", str(overlay), "--data.text_states", "false"),
        *("--data.train", str(home / "train-*.tar"), "--data.val", str(home / "val-*.tar")),
        *("--data.store", str(out.parent / "store"), "--data.loader.batch_size", "4"),
        *("--trainer.default_root_dir", str(out), "--trainer.val_check_interval", "4"),
        *("--trainer.limit_val_batches", "1", "--newest.every_n_train_steps", "2"),
        *("--ema.decay", "0", "--pictures.count", "1", "--trainer.accelerator", "cpu"),
        *("--trainer.enable_progress_bar", "false", "--trainer.logger", "false", *flags),
    ]


def loss(stage):
    """On fixed pictures and noise, with no caption dropped."""
    image = torch.full((4, 3, 64, 64), 0.9)
    batch = {"image": image, "caption": ["apple", "red cat", "car", "dog"]}
    return stage.loss(batch, torch.Generator().manual_seed(0))["loss"].item()


@pytest.mark.slow
def test_training_goes_on_from_the_imported_weights(home, tmp_path, capsys):
    words, init = run(home, tmp_path / "run"), ["--init", str(home / "glide")]
    build_cli(expand_resume(find_configs([*words, "--trainer.max_steps", "4", *init])))
    more = ["--trainer.max_steps", "6", "--resume", "auto"]
    build_cli(expand_resume(find_configs([*words, *more, *init])))
    (newest,) = (tmp_path / "run" / "checkpoints").glob("newest-step=6.ckpt")
    before, after = load_stage(home / "glide", Decoder), load_stage(newest, Decoder)
    assert loss(after) < 0.97 * loss(before)
    assert torch.equal(after.text.encoder.merges, before.text.encoder.merges)
    assert after.clip_fingerprint is None
    assert list((tmp_path / "run" / "pictures").glob("*.png"))

    out = tmp_path / "release"
    assert unclip(["export", str(newest), "--out", str(out)]) == 0
    drawn = ["generate", "a red apple", "--decoder", str(out), "--condition", "caption"]
    drawn += ["--num-images", "1", "--steps", "2", "--out", str(tmp_path / "drawn")]
    assert unclip(drawn) == 0
    assert (tmp_path / "drawn" / "a-red-apple-0.png").exists()


@pytest.mark.slow
def test_a_run_without_the_weights_has_no_tokenizer(home, tmp_path, capsys):
    assert main([*run(home, tmp_path / "run"), "--trainer.max_steps", "1"]) == 1
    assert "start from a release that has them (--init)" in capsys.readouterr().err
