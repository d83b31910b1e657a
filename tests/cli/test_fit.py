"""`lightning fit` from end to end on a few drawings.

Pictures, logs and checkpoints appear. A run that was killed three times equals one that was not.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tests.cluster.forks import Ranks
from tests.conftest import ROOT
from tests.disk import read_only
from unclip_pl.cli.lightning import expand_resume, main
from unclip_pl.cli.lightning_cli import build_cli
from unclip_pl.cluster.checkpoint_io import newest_checkpoint, read_checkpoint
from unclip_pl.data import openmoji

LAST = 40  # steps; an epoch has 6
# All in mid-epoch. With a checkpoint every 4 steps the runs go on from 4, 8 and 16.
KILLS = {5: "step", 11: "step", 20: "save"}
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
        *("fit", "-c", "stages/decoder.yaml", *TINY, *data_flags(shards)),
        *("--trainer.default_root_dir", str(root), "--trainer.max_steps", str(LAST)),
        *("--trainer.val_check_interval", "12", "--newest.every_n_train_steps", "4"),
        *("--model.optimizer.decay", "cosine", *flags),
    ]


def data_flags(shards, validate: bool = True) -> list[str]:
    """The drawings as flags, with or without those that are held out."""
    val = str(shards / "val-*.tar") if validate else "null"
    train, store = str(shards / "train-*.tar"), str(shards / "store")
    return ["--data.train", train, "--data.val", val, "--data.store", store]


def diary(root, **kill: int) -> list[str]:
    """Flags that write each step's keys and loss into `root`; see tests/training/diary.py.

    `kill` names a step at which the process ends by SIGKILL.
    """
    options = {
        "class_path": "tests.training.diary.Diary",
        "init_args": {"path": str(root / "diary.jsonl"), **kill},
    }
    return ["--trainer.callbacks+", json.dumps(options)]


def read_diary(folder: Path) -> list[dict]:
    """What the diary says of each step."""
    return [json.loads(line) for line in (folder / "diary.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=[0, 2], ids=["0 workers", "2 workers"])
def whole(request, shards, tmp_path_factory):
    """(folder, command line, number of workers) of a run that nobody interrupted."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    flags = ["--data.loader.num_workers", str(request.param), *diary(folder)]
    return folder, build_cli(arguments(folder, shards, *flags)), request.param


@pytest.fixture(scope="module")
def killed(whole, shards, tmp_path_factory):
    """Folder of a run that was killed in mid-epoch at three steps and resumed each time.

    The second part is a process of its own, the others are forks, which need not import torch.
    """
    folder, environment = tmp_path_factory.mktemp("killed"), os.environ | {"OMP_NUM_THREADS": "1"}
    flags = ["--data.loader.num_workers", str(whole[2]), "--resume", "auto"]
    for part, (step, when) in enumerate(KILLS.items()):
        kill = diary(folder, **{f"kill_at_{when}": step})
        words, output = arguments(folder, shards, *flags, *kill), folder / "rank-0.txt"
        if part == 1:
            command = [sys.executable, "-m", "unclip_pl", *words]
            options = {"cwd": ROOT, "env": environment, "timeout": 200}
            with output.open("a") as file:  # a pipe would be held open by workers of a killed run
                code = subprocess.run(command, stdout=file, stderr=file, **options).returncode
        else:
            (code,) = Ranks(folder, words).wait(200)
        assert code == -signal.SIGKILL, output.read_text()[-3000:]
        unfinished = [path.name[:20] for path in (folder / "checkpoints").glob(".*.tmp")]
        assert unfinished == ([".newest-step=20.ckpt"] if when == "save" else [])
        assert newest_checkpoint(folder).name == f"newest-step={(step - 1) // 4 * 4}.ckpt"
    build_cli(expand_resume(arguments(folder, shards, *flags, *diary(folder))))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the fixtures train, also on a busy machine
def test_a_run_killed_three_times_sees_the_same_samples_and_has_the_same_losses(whole, killed):
    straight, pieces = read_diary(whole[0]), read_diary(killed)
    assert [line["step"] for line in straight] == list(range(1, LAST + 1))
    parts = range(1, 6), range(5, 12), range(9, 21), range(17, LAST + 1)
    assert [line["step"] for line in pieces] == [step for part in parts for step in part]
    assert [straight[line["step"] - 1] for line in pieces] == pieces
    assert len({line["loss"] for line in straight}) == LAST
    assert len({tuple(line["keys"]) for line in straight}) > LAST // 2


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
    names = [path.name for path in (killed / "checkpoints").iterdir() if "newest" in path.name]
    assert names == [f"newest-step={LAST}.ckpt"]  # and nothing that the kills left behind


@pytest.mark.timeout(1200)
def test_pictures_logs_and_configuration_lie_in_the_run_folder(whole):
    folder, cli, _ = whole
    pictures = sorted(path.name for path in (folder / "pictures").iterdir())
    assert pictures == ["step-0000012.png", "step-0000024.png", "step-0000036.png"]
    with Image.open(folder / "pictures" / pictures[0]) as picture:
        assert picture.height >= 2 * 64 and picture.width >= 3 * 64
        assert len(set(picture.getdata())) > 20
    assert (folder / "config.yaml").is_file() and list(folder.glob("events.out.tfevents*"))
    logged = cli.trainer.logged_metrics
    names = ("loss", "mse", "vb", "grad_norm", "skipped_steps", "loss_q0", "loss_q3")
    assert {f"train/{name}" for name in names} <= set(logged)
    assert logged["train/skipped_steps"] == 0
    assert all(torch.isfinite(value) for value in logged.values())
    assert "val/loss" in cli.trainer.callback_metrics


@pytest.mark.timeout(1200)
def test_checkpoint_knows_its_clip_and_stage(whole):
    checkpoint = read_checkpoint(newest_checkpoint(whole[0]))
    assert checkpoint["stage"] == "Decoder"
    assert checkpoint["clip_fingerprint"]["config"]["model"] == "openmoji"
    assert checkpoint["hyper_parameters"]["net"]["embed_dim"] == 256


@pytest.mark.timeout(1200)
def test_saved_configuration_runs_again(whole, shards, tmp_path):
    flags = ["--trainer.default_root_dir", str(tmp_path), "--trainer.max_steps", "1"]
    cli = build_cli(["fit", "-c", str(whole[0] / "config.yaml"), *flags])
    assert cli.trainer.global_step == 1


@pytest.mark.timeout(1200)
def test_fine_tuning_starts_from_the_averaged_weights_and_goes_on_where_it_stopped(
    whole, shards, tmp_path
):
    weights = newest_checkpoint(whole[0])
    flags = ["--model.optimizer.lr", "0", "--model.optimizer.muon_lr", "0"]
    flags += ["--model.condition", "text", "--trainer.max_steps"]
    build_cli(arguments(tmp_path, shards, "--init", str(weights), *flags, "1"))
    ours, theirs = read_checkpoint(newest_checkpoint(tmp_path)), read_checkpoint(weights)
    assert ours["global_step"] == 1 and ours["optimizer_states"][0]["state"][0]["step"] == 1
    for name in theirs["state_dict"]:  # at a learning rate of 0 a step leaves what it began with
        assert torch.equal(ours["state_dict"][name], theirs["state_dict"][name]), name
    # now the weights come from the run
    more = ["--init", "gone.ckpt", *flags, "2", "--resume", "auto"]
    build_cli(expand_resume(arguments(tmp_path, shards, *more)))
    assert read_checkpoint(newest_checkpoint(tmp_path))["global_step"] == 2


@pytest.mark.timeout(1200)
def test_validate_needs_no_more_than_the_stage_and_a_checkpoint(whole, shards, capsys):
    words = ["validate", "-c", "stages/decoder.yaml", *data_flags(shards)]
    words += ["--trainer.accelerator", "cpu", "--ckpt_path", str(newest_checkpoint(whole[0]))]
    assert build_cli(words).trainer.callback_metrics["val/loss"].isfinite()
    assert main([*words, "--model.diffusion.schedule", "linear"]) == 1
    assert "model.diffusion.schedule" in last_line(capsys)


def test_the_debug_overlay_does_two_steps_of_everything_on_the_device(shards, tmp_path, device):
    data = [*data_flags(shards), "--data.loader.num_workers", "0"]
    folder = ["--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", device]
    overlay = str(ROOT / "lightning_config" / "debug.yaml")
    cli = build_cli(["fit", "-c", "stages/decoder.yaml", "-c", overlay, *SMALL, *data, *folder])
    assert cli.trainer.global_step == 2 and cli.trainer.callback_metrics["val/loss"].isfinite()
    assert (tmp_path / "pictures" / "step-0000002.png").is_file()
    assert newest_checkpoint(tmp_path).name == "newest-step=2.ckpt"


def test_width_that_does_not_fit_the_clip_is_a_sentence(shards, tmp_path, capsys):
    words = ["fit", "-c", "stages/decoder.yaml", *TINY, *data_flags(shards, validate=False)]
    words += ["--trainer.default_root_dir", str(tmp_path), "--model.net.embed_dim", "512"]
    assert main(words) == 1
    assert "model.net.embed_dim is 512" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("finder", "options", "part", "keys"),
    [
        ("BatchSizeFinder", {"max_trials": 3}, "data", ("loader", "batch_size")),
        ("LearningRateFinder", {"num_training_steps": 20}, "model", ("optimizer", "lr")),
    ],
)
def test_what_a_search_found_is_recorded_and_not_searched_again(
    finder, options, part, keys, shards, tmp_path, capsys
):
    callback = json.dumps({"class_path": finder, "init_args": options})
    words = [*arguments(tmp_path, shards, "--trainer.max_steps", "1"), "--data.val", "null"]
    words += ["--data.loader.num_workers", "0", "--trainer.callbacks+", callback]
    cli = build_cli(words)
    recorded = yaml.safe_load((tmp_path / "config.yaml").read_text())[part]["init_args"]
    found = {"data": cli.datamodule.batch_size, "model": cli.model.lr}[part]
    assert recorded[keys[0]][keys[1]] == found not in (4, 1e-3)
    assert main([*words, "--resume", "auto", "--trainer.max_steps", "2"]) == 1
    assert f"--{part}.{'.'.join(keys)}" in last_line(capsys)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--data.train", "nowhere/*.tar"], "nowhere"),
        (["--data.clip.model", "ViT-L-14-quickgelu"], "needs weights"),
        (["--resume", "gone.ckpt"], "gone.ckpt"),
        (["--init", "gone.ckpt"], "gone.ckpt"),
        (["--data.text_states", "false"], "data.text_states"),
        (["--trainer.max_steps", "-1"], "--trainer.max_steps"),
        (["--best.monitor", "val/lss"], "did you mean val/loss?"),
    ],
)
def test_what_cannot_run_is_one_sentence(flags, named, shards, tmp_path, capsys):
    words = ["fit", "-c", "stages/decoder.yaml", *TINY, *data_flags(shards, validate=False)]
    folder = ["--trainer.default_root_dir", str(tmp_path), "--trainer.max_steps", "2"]
    assert main([*words, *folder, *flags]) == 1
    last = last_line(capsys)
    assert last.startswith("lightning: ") and named in last


def test_a_run_folder_that_cannot_be_written_is_one_sentence(shards, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    with read_only(tmp_path / "runs"):
        assert main(arguments(tmp_path / "runs" / "mine", shards)) == 1
    last = last_line(capsys)
    assert last.startswith("lightning: ")
    assert "written (" in last and "--trainer.default_root_dir" in last


def last_line(capsys) -> str:
    """The last line on stderr."""
    return capsys.readouterr().err.strip().splitlines()[-1]
