"""What differs between ranks is named before the first step; a rank that hangs says where."""

import copy
import errno
import json
import threading

import pytest
import torch

from tests.cluster.forks import Ranks
from tests.disk import read_only
from tests.training.toy import Toy, ToyRows, command, trainer
from unclip_pl.cluster import startup
from unclip_pl.cluster.startup import (
    StartupCheck,
    checkpoint_bytes,
    find_disk_problem,
    find_problems,
)
from unclip_pl.cluster.watchdog import Watchdog
from unclip_pl.training.checkpoints import NewestCheckpoint
from unclip_pl.training.ema import EMA
from unclip_pl.utils.errors import UserError

CLIP = {
    "config": {"model": "openmoji", "pretrained": None, "precision": "fp32"},
    "embed_dim": 2,
    "states_width": 2,
    "context_length": 3,
    "image_size": 4,
    "activation": "GELU",
    "preprocessing": {"mean": [0.5]},
    "image": "ADwAPA==",
    "text": "ADwAPA==",
}
SHARE = {"shards": "0a1b", "seed": 0, "world": 2, "missing": []}


def reports():
    """Reports of two ranks that fit together."""
    first = {
        "rank": 0,
        "host": "n1",
        "clock": 1000.0,
        "step": 40,
        "versions": {"torch": "2.6.0"},
        "seed": "0",
        "clip": CLIP,
        "data": SHARE | {"rank": 0},
    }
    own = {"rank": 1, "host": "n2", "clock": 1001.0, "data": SHARE | {"rank": 1}}
    return [first, copy.deepcopy(first) | own]


def test_ranks_that_fit_together_have_no_problem():
    assert find_problems(reports(), 30) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"versions": {"torch": "2.5.1"}}, ["rank 1 on n2", "torch 2.5.1", "2.6.0"]),
        ({"clock": 940.0}, ["clock of rank 1 on n2", "60 s behind", "rank 0 on n1"]),
        ({"seed": "7"}, ["rank 1 on n2", "seed 7", "rank 0 on n1 0"]),
        ({"step": 0}, ["rank 1 on n2", "step 0", "step 40", "--trainer.default_root_dir"]),
        ({"clip": CLIP | {"activation": "QuickGELU"}}, ["rank 1 on n2", "rank 0 on n1", "CLIP"]),
        ({"clip": None}, ["rank 1 on n2", "rank 0 on n1", "its CLIP"]),
        ({"data": SHARE | {"rank": 0}}, ["2 ranks", "the same part 0"]),
        ({"data": SHARE | {"rank": 1, "shards": "ffff"}}, ["rank 1 on n2", "other data", "ffff"]),
        (
            {"data": SHARE | {"rank": 1, "shards": "ffff", "missing": ["/a/7.tar"]}},
            ["rank 1 on n2", "1 of the shards", "/a/7.tar"],
        ),
        ({"data": SHARE | {"rank": 1, "world": 4}}, ["[2, 4] ranks", "2 run"]),
        ({"failed": "OSError: no such device"}, ["rank 1 on n2", "OSError: no such device"]),
    ],
)
def test_what_differs_is_named_with_rank_and_host(change, words):
    both = reports()
    both[1] |= change
    problems = find_problems(both, 30)
    assert len(problems) == 1 and all(word in problems[0] for word in words), problems


def test_a_checkpoint_is_as_large_as_the_check_estimates(tmp_path):
    class Wide(Toy):
        def __init__(self):
            super().__init__()
            self.more = torch.nn.Linear(4, 40_000)

        def loss(self, batch, generator=None):
            losses = super().loss(batch, generator)
            return losses | {"loss": losses["loss"] + self.more(batch["x"]).mean()}

    module = Wide()
    trainer(tmp_path, EMA(), NewestCheckpoint(2), steps=2).fit(module, ToyRows())
    size = (tmp_path / "checkpoints" / "newest-step=2.ckpt").stat().st_size
    assert abs(checkpoint_bytes(module) / size - 1) < 0.05


def test_a_folder_without_room_or_rights_is_a_sentence(tmp_path, monkeypatch):
    folder = tmp_path / "run" / "checkpoints"
    assert find_disk_problem(folder, 1000) is None and list(folder.iterdir()) == []
    assert "room" in find_disk_problem(folder, 10**18)
    (folder / "newest-step=1.ckpt").write_bytes(b"x" * 10**6)
    free = startup.shutil.disk_usage(folder)
    monkeypatch.setattr(startup.shutil, "disk_usage", lambda _: free._replace(free=10))
    assert find_disk_problem(folder, 900_000) is None  # the checkpoint that is there makes room
    with read_only(folder):
        problem = find_disk_problem(folder, 0)
    assert "read-only" in problem or "no permission" in problem


def test_a_run_whose_checkpoints_have_no_room_ends_before_the_first_step(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(startup.tempfile, "NamedTemporaryFile", full)
    run = trainer(tmp_path, StartupCheck(), NewestCheckpoint(2))
    with pytest.raises(UserError, match=r"rank 0 on .*the disk is full"):
        run.fit(Toy(), ToyRows())
    assert run.global_step == 0


def fit(folder, callback, *flags, ranks=1):
    """A toy run with a callback of tests/training/toy.py: (exit codes, ranks)."""
    name, init_args = callback
    callback = json.dumps({"class_path": f"tests.training.toy.{name}", "init_args": init_args})
    flags = ("--trainer.logger", "false", "--trainer.callbacks+", callback, *flags)
    arguments = command(folder, *flags, steps=20)
    run = Ranks(folder, arguments, ranks)
    return run.wait(), run


def test_a_rank_with_another_version_ends_the_run_with_one_sentence(tmp_path):
    codes, run = fit(tmp_path, ("OtherVersion", {"rank": 1}), ranks=2)
    assert codes == [1, 1] and "cannot start" not in run.output(1)
    message = run.output(0).strip().splitlines()[-1]
    assert message.startswith("lightning (rank 0 on ")
    assert "rank 1 on " in message and "torch 0.0.1" in message
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_rank_that_hangs_says_where_and_ends(tmp_path):
    codes, run = fit(tmp_path, ("Hang", {"step": 5}), "--watchdog.minutes", "0.03")
    output = run.output()
    assert codes == [70] and "no progress for 0.03 minutes since step 5" in output
    assert "toy.py" in output and "in hang_here" in output and output.count("hread 0x") >= 2


@pytest.mark.slow
def test_ranks_that_wait_for_one_that_hangs_end_as_well(tmp_path):
    hang = ("Hang", {"step": 5, "rank": 1})
    codes, run = fit(tmp_path, hang, "--watchdog.minutes", "0.1", ranks=2)
    assert codes[1] == 70 and codes[0] != 0
    assert "rank 1 on" in run.output(1) and "in hang_here" in run.output(1)
    assert "in hang_here" not in run.output(0)


@pytest.mark.slow
def test_a_run_in_which_every_step_is_slow_goes_on(tmp_path):
    # The run takes longer than the watchdog's time, no step does.
    codes, run = fit(tmp_path, ("Slow", {"seconds": 0.3}), "--watchdog.minutes", "0.08")
    assert codes == [0] and "no progress" not in run.output()


def test_a_run_that_fails_leaves_no_watchdog_behind(tmp_path):
    class Fails(Toy):
        def training_step(self, *_):
            raise ValueError("as it happens")

    with pytest.raises(ValueError, match="as it happens"):
        trainer(tmp_path, Watchdog(0.05)).fit(Fails(), ToyRows())
    for thread in [thread for thread in threading.enumerate() if thread.name == "watchdog"]:
        thread.join(5)
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())
