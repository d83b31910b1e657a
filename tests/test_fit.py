"""`lightning fit` from end to end on a few drawings: pictures, logs and checkpoints appear, and a run killed three times equals one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.disk import read_only
from tests.training.forks import Ranks
from unclip_pl.cli.lightning import build_cli, main, resume
from unclip_pl.cluster.checkpoint_io import newest_checkpoint, read_checkpoint
from unclip_pl.data import openmoji

ROOT = Path(__file__).resolve().parent.parent
LAST = 40  # steps; an epoch has 6
KILLS = {
    5: "step",
    11: "step",
    20: "save",
}  # all in mid-epoch; with a checkpoint every 4 steps the runs go on from 4, 8 and 16, and 20 steps follow
SHAPE = {"width": 32, "mults": [1, 2], "depth": 1, "patch_size": 8}
SHAPE |= {"attention": [4], "head_width": 16}
SMALL = [
    *("--model.net", json.dumps(SHAPE), "--data.loader.batch_size", "4"),
    *("--model.sampling.steps", "2", "--trainer.enable_progress_bar", "false"),
]
TINY = [
    *(*SMALL, "--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "1"),
    *("--pictures.count", "3", "--trainer.log_every_n_steps", "1"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """24 drawings to train on and 6 held out, as shards."""
    train, val = openmoji.composition_split(openmoji.list_drawings())
    folder = tmp_path_factory.mktemp("drawings")
    draw = random.Random(0)
    openmoji.write_shards(folder, draw.sample(train, 24), draw.sample(val, 6), 64, progress=False)
    return folder


def arguments(root, shards, *flags: str) -> list[str]:
    return [
        "fit", "-c", "stages/decoder.yaml", *TINY, "--data.train", str(shards / "train-*.tar"), "--data.val", str(shards / "val-*.tar"),
        "--data.store", str(shards / "store"), "--trainer.default_root_dir", str(root), "--trainer.max_steps", str(LAST),
        "--trainer.val_check_interval", "12", "--newest.every_n_train_steps", "4", "--model.optimizer.decay", "cosine", *flags,
    ]  # fmt: skip


def diary(root, **kill: int) -> list[str]:
    """Flags that write each step's keys and loss into `root` and end the process at a step by SIGKILL; see tests/training/diary.py."""
    options = {
        "class_path": "tests.training.diary.Diary",
        "init_args": {"path": str(root / "diary.jsonl"), **kill},
    }
    return ["--trainer.callbacks+", json.dumps(options)]


@pytest.fixture(scope="module", params=[0, 2], ids=["0 workers", "2 workers"])
def whole(request, shards, tmp_path_factory):
    """(folder, command line, number of workers) of a run that nobody interrupted."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    return (
        folder,
        build_cli(
            arguments(
                folder, shards, "--data.loader.num_workers", str(request.param), *diary(folder)
            )
        ),
        request.param,
    )


@pytest.fixture(scope="module")
def killed(whole, shards, tmp_path_factory):
    """Folder of a run that was killed in mid-epoch at three steps and resumed each time.

    The second part is a process of its own, the others are forks, which need not import torch.
    """
    folder, environment = tmp_path_factory.mktemp("killed"), os.environ | {"OMP_NUM_THREADS": "1"}
    flags = ["--data.loader.num_workers", str(whole[2]), "--resume", "auto"]
    for part, (step, when) in enumerate(KILLS.items()):
        kill = diary(folder, **{f"kill_at_{when}": step})
        given, said = arguments(folder, shards, *flags, *kill), folder / "rank-0.txt"
        if part == 1:
            command = [sys.executable, "-m", "unclip_pl", *given]
            with said.open("a") as file:  # a pipe would be held open by workers of a killed run
                code = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=200
                ).returncode
        else:
            (code,) = Ranks(folder, given).wait(200)
        assert code == -signal.SIGKILL, said.read_text()[-3000:]
        assert [path.name[:20] for path in (folder / "checkpoints").glob(".*.tmp")] == [
            ".newest-step=20.ckpt"
        ] * (when == "save")
        assert newest_checkpoint(folder).name == f"newest-step={(step - 1) // 4 * 4}.ckpt"
    build_cli(resume(arguments(folder, shards, *flags, *diary(folder))))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the fixtures train, also on a busy machine
def test_a_run_killed_three_times_sees_the_same_samples_and_has_the_same_losses(whole, killed):
    straight, pieces = (
        [json.loads(line) for line in (folder / "diary.jsonl").read_text().splitlines()]
        for folder in (whole[0], killed)
    )
    assert [line["step"] for line in straight] == list(range(1, LAST + 1))
    assert [line["step"] for line in pieces] == [
        *range(1, 6),
        *range(5, 12),
        *range(9, 21),
        *range(17, LAST + 1),
    ]
    assert [straight[line["step"] - 1] for line in pieces] == pieces
    assert (
        len({line["loss"] for line in straight}) == LAST
        and len({tuple(line["keys"]) for line in straight}) > LAST // 2
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the fixtures train, also on a busy machine
def test_a_run_killed_three_times_ends_with_the_same_weights_bit_for_bit(whole, killed):
    ours, theirs = (read_checkpoint(newest_checkpoint(folder)) for folder in (killed, whole[0]))
    assert ours["global_step"] == theirs["global_step"] == LAST
    for part in ("state_dict", "current_model_state"):
        assert ours[part].keys() == theirs[part].keys()
        for name, value in ours[part].items():
            assert torch.equal(value, theirs[part][name]), (part, name)
    assert not torch.equal(
        ours["state_dict"]["net.conv_out.weight"],
        ours["current_model_state"]["net.conv_out.weight"],
    )
    names = sorted(
        path.name for path in (killed / "checkpoints").iterdir() if "newest" in path.name
    )
    assert names == [f"newest-step={LAST}.ckpt"]  # and nothing of what the kills left behind


@pytest.mark.timeout(1200)
def test_pictures_logs_and_configuration_lie_in_the_run_folder(whole):
    folder, cli, _ = whole
    pictures = sorted(path.name for path in (folder / "pictures").iterdir())
    assert pictures == ["step-0000012.png", "step-0000024.png", "step-0000036.png"]
    with Image.open(folder / "pictures" / pictures[0]) as picture:
        assert (
            picture.height >= 2 * 64
            and picture.width >= 3 * 64
            and len(set(picture.getdata())) > 20
        )
    assert (folder / "config.yaml").is_file() and list(folder.glob("events.out.tfevents*"))
    logged = cli.trainer.logged_metrics
    assert {
        "train/loss",
        "train/mse",
        "train/vb",
        "train/grad_norm",
        "train/skipped_steps",
        "train/loss_q0",
        "train/loss_q3",
    } <= set(logged)
    assert logged["train/skipped_steps"] == 0 and all(
        torch.isfinite(value) for value in logged.values()
    )
    assert "val/loss" in cli.trainer.callback_metrics


@pytest.mark.timeout(1200)
def test_checkpoint_knows_its_clip_and_stage(whole):
    checkpoint = read_checkpoint(newest_checkpoint(whole[0]))
    assert (
        checkpoint["stage"] == "Decoder"
        and checkpoint["clip_fingerprint"]["config"]["model"] == "openmoji"
    )
    assert checkpoint["hyper_parameters"]["net"]["embed_dim"] == 256


@pytest.mark.timeout(1200)
def test_saved_configuration_runs_again(whole, shards, tmp_path):
    cli = build_cli(
        [
            "fit",
            "-c",
            str(whole[0] / "config.yaml"),
            "--trainer.default_root_dir",
            str(tmp_path),
            "--trainer.max_steps",
            "1",
        ]
    )
    assert cli.trainer.global_step == 1


@pytest.mark.timeout(1200)
def test_fine_tuning_starts_from_the_averaged_weights_with_a_new_optimiser_and_goes_on_where_it_stopped(
    whole, shards, tmp_path
):
    given = newest_checkpoint(whole[0])
    rates = ["--model.optimizer.lr", "0", "--model.optimizer.muon_lr", "0"]
    flags = ["--init", str(given), "--model.condition", "text", *rates, "--trainer.max_steps", "1"]
    build_cli(arguments(tmp_path, shards, *flags))
    ours, theirs = read_checkpoint(newest_checkpoint(tmp_path)), read_checkpoint(given)
    assert ours["global_step"] == 1 and ours["optimizer_states"][0]["state"][0]["step"] == 1
    for name in theirs["state_dict"]:  # at a learning rate of 0 a step leaves what it began with
        assert torch.equal(ours["state_dict"][name], theirs["state_dict"][name]), name
    build_cli(
        resume(
            arguments(
                tmp_path, shards, "--init", "gone.ckpt", *flags[2:-1], "2", "--resume", "auto"
            )
        )
    )  # now the weights come from the run
    assert read_checkpoint(newest_checkpoint(tmp_path))["global_step"] == 2


@pytest.mark.timeout(1200)
def test_validate_needs_no_more_than_the_stage_and_a_checkpoint(whole, shards, capsys):
    data = ["--data.val", str(shards / "val-*.tar"), "--data.store", str(shards / "store")]
    given = ["validate", "-c", "stages/decoder.yaml", *data, "--trainer.accelerator", "cpu"]
    given += ["--ckpt_path", str(newest_checkpoint(whole[0]))]
    given += ["--data.train", str(shards / "train-*.tar")]
    assert build_cli(given).trainer.callback_metrics["val/loss"].isfinite()
    assert main([*given, "--model.diffusion.schedule", "linear"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "trained with model.diffusion.schedule cosine, and this run has linear" in last


def test_the_debug_overlay_does_two_steps_of_everything_on_the_device(shards, tmp_path, device):
    data = ["--data.train", str(shards / "train-*.tar"), "--data.val", str(shards / "val-*.tar")]
    data += ["--data.store", str(shards / "store"), "--data.loader.num_workers", "0"]
    folder = ["--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", device]
    overlay = str(ROOT / "lightning_config" / "debug.yaml")
    cli = build_cli(["fit", "-c", "stages/decoder.yaml", "-c", overlay, *SMALL, *data, *folder])
    assert cli.trainer.global_step == 2 and cli.trainer.callback_metrics["val/loss"].isfinite()
    assert (tmp_path / "pictures" / "step-0000002.png").is_file()
    assert newest_checkpoint(tmp_path).name == "newest-step=2.ckpt"


def test_width_that_does_not_fit_the_clip_is_a_sentence(shards, tmp_path, capsys):
    given = ["fit", "-c", "stages/decoder.yaml", *TINY, "--data.train", str(shards / "train-*.tar"), "--data.val", "null",
                 "--data.store", str(shards / "store"), "--trainer.default_root_dir", str(tmp_path), "--model.net.embed_dim", "512"]  # fmt: skip
    assert main(given) == 1
    assert (
        "gives embeddings of 256 numbers and model.net.embed_dim is 512" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.train", "nowhere/*.tar"], "There is no shard nowhere"),
        (["--data.clip.model", "ViT-L-14-quickgelu"], "needs weights"),
        (["--resume", "gone.ckpt"], "There is no checkpoint gone.ckpt"),
        (["--init", "gone.ckpt"], "There is no checkpoint gone.ckpt"),
        (["--data.text_states", "false"], "set data.text_states to true"),
        (["--trainer.max_steps", "-1"], r"give --trainer.max_steps"),
    ],
)
def test_what_cannot_run_is_one_sentence(flags, words, shards, tmp_path, capsys):
    given = ["fit", "-c", "stages/decoder.yaml", *TINY, "--data.train", str(shards / "train-*.tar"), "--data.val", "null",
                 "--data.store", str(shards / "store"), "--trainer.default_root_dir", str(tmp_path), "--trainer.max_steps", "2", *flags]  # fmt: skip
    assert main(given) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lightning: ") and words in last


def test_a_run_folder_that_cannot_be_written_is_one_sentence(shards, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    with read_only(tmp_path / "runs"):
        assert main(arguments(tmp_path / "runs" / "mine", shards)) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        last.startswith("lightning: ")
        and "written (" in last
        and "--trainer.default_root_dir" in last
    )
