"""A run's checkpoints are in a bucket, too: whole, of one run, and found on a new machine."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.remotekit import BUCKET, names_below
from tests.training.toy import command
from unclip_pl.cli.lightning import main
from unclip_pl.cluster.checkpoint_io import newest_checkpoint, read_checkpoint
from unclip_pl.cluster.sharded_checkpoint import META_FILE
from unclip_pl.training import mirror
from unclip_pl.training.mirror import Mirror, mirrored
from unclip_pl.utils import remote
from unclip_pl.utils.errors import SharedError, UserError

URL = f"s3://{BUCKET}/run"


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    for name, seconds in {"LOOK_EVERY": 0.05, "RENEW_EVERY": 0.1, "LEASE_ENDS": 1.0}.items():
        monkeypatch.setattr(mirror, name, seconds)


def train(folder, steps: int, kind: str = "newest") -> None:
    """What a run up to a step leaves in its folder, and copies at its end."""
    with mirrored(Mirror(URL, folder), True):
        for old in (folder / "checkpoints").glob(f"{kind}-*"):
            old.unlink()
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        torch.save({"global_step": steps}, folder / "checkpoints" / f"{kind}-step={steps}.ckpt")


def whole_checkpoints() -> list[str]:
    """The checkpoints that mirror.json names, each of which is there."""
    names = json.loads(remote.read(f"{URL}/mirror.json"))["checkpoints"]
    assert set(names) <= set(names_below("run"))
    return sorted(names)


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_killed_run_goes_on_on_another_machine(faults, tmp_path, capsys):
    words = command(tmp_path / "first", "--mirror", URL, "--newest.every_n_train_steps", "5")
    code = "import unclip_pl.utils.torchvision; from tests.training import test_mirror as t; t.go()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, "--trainer.max_steps", "1000000"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.DEVNULL,
    )
    while "mirror.json" not in names_below("run") or not whole_checkpoints():
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    remote.upload(f"{URL}/newest-step=9999.ckpt", b"a part")  # as one that was not yet named
    shutil.rmtree(tmp_path / "first")
    faults.plan = ["", "503", "cut", "slow"] * 9
    (before,) = whole_checkpoints()
    steps = int(before.partition("=")[2].partition(".")[0]) + 2
    flags = ["--mirror", URL, "--resume", "auto"]
    assert main(command(tmp_path / "second", *flags, steps=steps)) == 0
    assert before in capsys.readouterr().err and {"503", "cut", "slow"} <= set(faults.seen)
    ours = newest_checkpoint(tmp_path / "second")
    assert names_below("run") == ["mirror.json", *whole_checkpoints()]
    assert whole_checkpoints() == [ours.name] == [f"newest-step={steps}.ckpt"]
    assert remote.read(f"{URL}/{ours.name}") == ours.read_bytes()
    assert main(command(tmp_path / "straight", steps=steps)) == 0
    weights = read_checkpoint(newest_checkpoint(tmp_path / "straight"))["state_dict"]
    assert all(
        weights[name].equal(value) for name, value in read_checkpoint(ours)["state_dict"].items()
    )


def go() -> None:
    """The command in sys.argv, with a look at the run's folder ten times a second."""
    mirror.LOOK_EVERY = 0.1
    sys.exit(main(sys.argv[1:]))


def test_the_newest_and_the_best_are_there_and_older_ones_go_last(faults, tmp_path):
    train(tmp_path, 2)
    train(tmp_path, 1, "best")
    faults.requests.clear()
    train(tmp_path, 3)
    assert whole_checkpoints() == ["best-step=1.ckpt", "newest-step=3.ckpt"]
    lines = [line.replace("%3D", "=") for line in faults.requests]
    new = max(i for i, line in enumerate(lines) if "PUT" in line and "newest-step=3" in line)
    named = [i for i, line in enumerate(lines) if "PUT" in line and "mirror.json" in line]
    gone = min(i for i, line in enumerate(lines) if "DELETE" in line and "newest-step=2" in line)
    assert any(new < i < gone for i in named)


def test_two_runs_never_share_a_place(faults, tmp_path):
    train(tmp_path / "first", 2)
    before = whole_checkpoints()
    with pytest.raises(SharedError, match="holds a run already"):
        train(tmp_path / "second", 1)
    (tmp_path / "second").mkdir()
    torch.save({}, tmp_path / "second" / "newest-step=9.ckpt")
    with pytest.raises(SharedError, match="holds a run already"):
        Mirror(URL, tmp_path / "second").fetch_newest()
    shutil.rmtree(tmp_path / "first" / "checkpoints")
    with pytest.raises(SharedError, match=r"newest-step=2\.ckpt"):
        train(tmp_path / "first", 1)
    assert whole_checkpoints() == before


def test_two_at_one_time_are_refused_and_a_dead_one_is_not(faults, tmp_path):
    first, second = (Mirror(URL, tmp_path / name) for name in ("a", "b"))
    refused = pytest.raises(SharedError, match="Another run")
    with mirrored(first, True), refused, mirrored(second, True):
        pass
    dead = json.dumps({"id": "x", "host": "gone", "boot": "", "pid": 1}).encode()
    remote.upload(f"{URL}/.lease", dead)
    with pytest.raises(UserError, match="Another run writes"), mirrored(first, True):
        assert remote.read(f"{URL}/.lease") != dead
        while not first._lost:  # a renewal at the same moment may win
            remote.upload(f"{URL}/.lease", dead)  # as one would that took this run for dead
            time.sleep(0.3)
    assert remote.read(f"{URL}/.lease") == dead  # not ours to remove


def test_a_copy_that_fails_costs_nothing_and_is_named(faults, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 2)
    faults.always, faults.of, faults.methods = "503", "newest-", ("PUT",)
    with pytest.raises(UserError, match=r"lacks checkpoints .*newest-step=3\.ckpt.*--resume auto"):
        train(tmp_path, 3)
    assert newest_checkpoint(tmp_path).name == "newest-step=3.ckpt" and whole_checkpoints() == []
    faults.always = None
    with mirrored(Mirror(URL, tmp_path), True):
        pass
    assert whole_checkpoints() == ["newest-step=3.ckpt"]


def test_folders_of_shards_are_copied_and_found(faults, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "newest-step=7.ckpt"
    dcp.save({"weight": torch.ones(3)}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    torch.save({"global_step": 7}, folder / META_FILE)
    with mirrored(Mirror(URL, tmp_path / "run"), True):
        pass
    Mirror(URL, tmp_path / "new").fetch_newest()
    copy = newest_checkpoint(tmp_path / "new")
    assert copy.name == folder.name
    for path in folder.iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes()


def test_a_place_that_cannot_be_written_to_is_refused(faults, tmp_path, capsys):
    for url in ("https://host/run", "runs/local", "s3://nobody/run"):
        with (
            pytest.raises(UserError, match="cannot be written"),
            mirrored(Mirror(url, tmp_path), 1),
        ):
            pass
    assert main(["validate", *command(tmp_path, "--mirror", URL)[1:]]) == 1
    assert "--mirror is for" in capsys.readouterr().err
