"""`lightning fit` from end to end on a few drawings: pictures, logs and checkpoints appear, and a run cut in two equals one that was not."""

import random

import pytest
import torch
from PIL import Image

from unclip_pl.cli import build_cli, main, resume
from unclip_pl.data import openmoji
from unclip_pl.training.checkpoint import newest_checkpoint, read_checkpoint

TINY = [
    "--model.net", '{"width": 32, "mults": [1, 2], "depth": 1, "patch_size": 8, "attention": [4], "head_width": 16}', "--data.loader.batch_size", "4",
    "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "1", "--model.sampling.steps", "2",
    "--pictures.count", "3", "--trainer.log_every_n_steps", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """24 drawings to train on and 6 held out, as shards."""
    train, val = openmoji.composition_split(openmoji.records())
    folder = tmp_path_factory.mktemp("drawings")
    draw = random.Random(0)
    openmoji.write_shards(folder, draw.sample(train, 24), draw.sample(val, 6), 64, progress=False)
    return folder


def fit(root, shards, steps: int, *flags: str):
    return build_cli(resume([
        "fit", "-c", "stages/decoder.yaml", *TINY, "--data.train", str(shards / "train-*.tar"), "--data.val", str(shards / "val-*.tar"),
        "--data.store", str(shards / "store"), "--trainer.default_root_dir", str(root), "--trainer.max_steps", str(steps),
        "--trainer.val_check_interval", "4", "--newest.every_n_train_steps", "2", *flags,
    ]))  # fmt: skip


@pytest.fixture(scope="module", params=[0, 2], ids=["0 workers", "2 workers"])
def runs(request, shards, tmp_path_factory):
    """Folders of a run of 9 steps, and of one that was cut after 4 of them; an epoch has 6."""
    torch.set_num_threads(1)
    flags = ("--data.loader.num_workers", str(request.param), "--model.optimizer.decay", "constant")
    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    straight = fit(whole, shards, 9, *flags)
    fit(cut, shards, 4, *flags)
    assert newest_checkpoint(cut).name == "newest-step=4.ckpt"
    fit(cut, shards, 9, *flags, "--resume", "auto")
    return whole, cut, straight


def test_a_run_cut_in_two_equals_the_whole_one_bit_for_bit(runs):
    whole, cut = (read_checkpoint(newest_checkpoint(folder)) for folder in runs[:2])
    assert whole["global_step"] == cut["global_step"] == 9
    for part in ("state_dict", "current_model_state"):
        for name, value in whole[part].items():
            assert torch.equal(value, cut[part][name]), (part, name)
    assert not torch.equal(whole["state_dict"]["net.exit.weight"], whole["current_model_state"]["net.exit.weight"])


def test_pictures_logs_and_configuration_lie_in_the_run_folder(runs):
    folder, _, cli = runs
    pictures = sorted(path.name for path in (folder / "pictures").iterdir())
    assert pictures == ["step-0000004.png", "step-0000008.png"]
    with Image.open(folder / "pictures" / pictures[0]) as picture:
        assert picture.height >= 2 * 64 and picture.width >= 3 * 64 and len(set(picture.getdata())) > 20
    assert (folder / "config.yaml").is_file() and list(folder.glob("events.out.tfevents*"))
    logged = cli.trainer.logged_metrics
    assert {"train/loss", "train/mse", "train/vb", "train/grad_norm", "train/skipped_steps", "train/loss_q0", "train/loss_q3"} <= set(logged)
    assert logged["train/skipped_steps"] == 0 and all(torch.isfinite(value) for value in logged.values())
    assert "val/loss" in cli.trainer.callback_metrics


def test_checkpoint_knows_its_clip_and_stage(runs):
    checkpoint = read_checkpoint(newest_checkpoint(runs[0]))
    assert checkpoint["stage"] == "Decoder" and checkpoint["clip_fingerprint"]["config"]["model"] == "openmoji"
    assert checkpoint["hyper_parameters"]["net"]["embed_dim"] == 256


def test_saved_configuration_runs_again(runs, shards, tmp_path):
    cli = build_cli(["fit", "-c", str(runs[0] / "config.yaml"), "--trainer.default_root_dir", str(tmp_path), "--trainer.max_steps", "1"])
    assert cli.trainer.global_step == 1


def test_width_that_does_not_fit_the_clip_is_a_sentence(shards, tmp_path, capsys):
    arguments = ["fit", "-c", "stages/decoder.yaml", *TINY, "--data.train", str(shards / "train-*.tar"), "--data.val", "null",
                 "--data.store", str(shards / "store"), "--trainer.default_root_dir", str(tmp_path), "--model.net.embed_dim", "512"]  # fmt: skip
    assert main(arguments) == 1
    assert "gives embeddings of 256 numbers and model.net.embed_dim is 512" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.train", "nowhere/*.tar"], "There is no shard nowhere"),
        (["--data.clip.model", "ViT-L-14-quickgelu"], "needs weights"),
        (["--resume", "gone.ckpt"], "There is no checkpoint gone.ckpt"),
        (["--data.text_states", "false"], "set data.text_states to true"),
        (["--trainer.max_steps", "-1"], r"give --trainer.max_steps"),
    ],
)
def test_what_cannot_run_is_one_sentence(flags, words, shards, tmp_path, capsys):
    arguments = ["fit", "-c", "stages/decoder.yaml", *TINY, "--data.train", str(shards / "train-*.tar"), "--data.val", "null",
                 "--data.store", str(shards / "store"), "--trainer.default_root_dir", str(tmp_path), "--trainer.max_steps", "2", *flags]  # fmt: skip
    assert main(arguments) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lightning: ") and words in last
