"""What differs between ranks is named before the first step, with rank and host; a rank that hangs says where."""

import copy
import errno
import json
import threading

import pytest
import torch

from tests.disk import read_only
from tests.training.forks import Ranks
from tests.training.toy import Toy, ToyRows, command, trainer
from unclip_pl.cluster import startup
from unclip_pl.cluster.startup import StartupCheck, checkpoint_bytes, disk, faults
from unclip_pl.cluster.watchdog import Watchdog
from unclip_pl.training.checkpoints import NewestCheckpoint
from unclip_pl.utils.errors import UserError

CLIP = {
    "config": {"model": "openmoji", "pretrained": None, "precision": "fp32"}, "embed_dim": 2, "states_width": 2, "context_length": 3, "image_size": 4,
    "activation": "GELU", "preprocessing": {"mean": [0.5]}, "image": "ADwAPA==", "text": "ADwAPA==",
}  # fmt: skip


def reports():
    """Of two ranks that fit together."""
    share = {"shards": "0a1b", "seed": 0, "world": 2, "missing": []}
    one = {
        "rank": 0,
        "host": "n1",
        "clock": 1000.0,
        "step": 40,
        "versions": {"torch": "2.6.0"},
        "seed": "0",
        "clip": CLIP,
        "data": share | {"rank": 0},
    }
    return [
        one,
        copy.deepcopy(one)
        | {"rank": 1, "host": "n2", "clock": 1001.0, "data": share | {"rank": 1}},
    ]


def test_ranks_that_fit_together_have_no_fault():
    assert faults(reports(), 30) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"versions": {"torch": "2.5.1"}},
            "rank 1 on n2 has torch 2.5.1 and not 2.6.0 as rank 0 on n1",
        ),
        ({"clock": 940.0}, "The clock of rank 1 on n2 is 60 s behind that of rank 0 on n1"),
        ({"seed": "7"}, "rank 1 on n2 has the seed 7 and rank 0 on n1 0"),
        (
            {"step": 0},
            "rank 1 on n2 starts at step 0 and rank 0 on n1 at step 40: --trainer.default_root_dir must be one folder that all nodes share",
        ),
        (
            {"clip": CLIP | {"activation": "QuickGELU"}},
            "rank 1 on n2: On rank 0 on n1 the run was made with the CLIP openmoji",
        ),
        ({"clip": None}, "Only one of rank 1 on n2 and rank 0 on n1 knows its CLIP"),
        (
            {"data": {"shards": "0a1b", "seed": 0, "world": 2, "missing": [], "rank": 0}},
            "2 ranks would read the same part 0 of the data",
        ),
        (
            {"data": {"shards": "ffff", "seed": 0, "world": 2, "missing": [], "rank": 1}},
            "rank 1 on n2 would read other data than rank 0 on n1 (shards",
        ),
        (
            {"data": {"shards": "ffff", "seed": 0, "world": 2, "missing": ["/a/7.tar"], "rank": 1}},
            "rank 1 on n2 cannot see 1 of the shards",
        ),
        (
            {"data": {"shards": "0a1b", "seed": 0, "world": 4, "missing": [], "rank": 1}},
            "The data are shared out among [2, 4] ranks and 2 run",
        ),
        (
            {"failed": "OSError: no such device"},
            "rank 1 on n2 failed to look at what it has (OSError: no such device)",
        ),
    ],
)
def test_what_differs_is_named_with_rank_and_host(change, said):
    both = reports()
    both[1] |= change
    found = faults(both, 30)
    assert len(found) == 1 and found[0].startswith(said), found


def test_a_checkpoint_is_as_large_as_the_check_thinks(tmp_path):
    class Wide(Toy):
        def __init__(self):
            super().__init__()
            self.more = torch.nn.Linear(4, 40_000)

        def loss(self, batch, generator=None):
            losses = super().loss(batch, generator)
            return losses | {"loss": losses["loss"] + self.more(batch["x"]).mean()}

    from unclip_pl.training.ema import EMA

    module = Wide()
    trainer(tmp_path, EMA(), NewestCheckpoint(2), steps=2).fit(module, ToyRows())
    size = (tmp_path / "checkpoints" / "newest-step=2.ckpt").stat().st_size
    assert abs(checkpoint_bytes(module) / size - 1) < 0.05


def test_a_folder_without_room_or_rights_is_a_sentence(tmp_path, monkeypatch):
    folder = tmp_path / "run" / "checkpoints"
    assert disk(folder, 1000) is None and list(folder.iterdir()) == []
    assert "has room for" in disk(folder, 10**18)
    (folder / "newest-step=1.ckpt").write_bytes(b"x" * 10**6)
    free = startup.shutil.disk_usage(folder)
    monkeypatch.setattr(startup.shutil, "disk_usage", lambda _: free._replace(free=10))
    assert disk(folder, 900_000) is None  # what lies there makes room
    with read_only(folder):
        assert "the file system is read-only" in disk(folder, 0) or "no permission" in disk(
            folder, 0
        )


def test_a_run_whose_checkpoints_have_no_room_ends_before_the_first_step(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(startup.tempfile, "NamedTemporaryFile", full)
    run = trainer(tmp_path, StartupCheck(), NewestCheckpoint(2))
    with pytest.raises(
        UserError, match=r"rank 0 on .*: checkpoints cannot be written to .* \(the disk is full\)"
    ):
        run.fit(Toy(), ToyRows())
    assert run.global_step == 0


def fit(folder, callback, *flags, ranks=1):
    """Exit codes and the ranks of a toy run with a callback of tests/training/toy.py."""
    name, given = callback
    callback = json.dumps({"class_path": f"tests.training.toy.{name}", "init_args": given})
    flags = ("--trainer.logger", "false", "--trainer.callbacks+", callback, *flags)
    arguments = command(folder, *flags, steps=20)
    run = Ranks(folder, arguments, ranks)
    return run.wait(), run


def test_a_rank_with_another_version_ends_the_run_with_one_sentence(tmp_path):
    codes, run = fit(tmp_path, ("OtherVersion", {"rank": 1}), ranks=2)
    assert codes == [1, 1] and "cannot start" not in run.said(1)
    said = run.said(0).strip().splitlines()[-1]
    assert (
        said.startswith("lightning (rank 0 on ")
        and "The run cannot start: rank 1 on " in said
        and "has torch 0.0.1 and not" in said
    )
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_rank_that_hangs_says_where_and_ends(tmp_path):
    codes, run = fit(tmp_path, ("Hang", {"step": 5}), "--watchdog.minutes", "0.03")
    assert (
        codes == [70]
        and "has made no progress for 0.03 minutes since step 5 and ends" in run.said()
    )
    assert (
        "toy.py" in run.said()
        and "in hang_here" in run.said()
        and run.said().count("hread 0x") >= 2
    )


@pytest.mark.slow
def test_ranks_that_wait_for_one_that_hangs_end_as_well(tmp_path):
    codes, run = fit(
        tmp_path, ("Hang", {"step": 5, "rank": 1}), "--watchdog.minutes", "0.1", ranks=2
    )
    assert codes[1] == 70 and codes[0] != 0
    assert (
        "rank 1 on" in run.said(1)
        and "in hang_here" in run.said(1)
        and "in hang_here" not in run.said(0)
    )


@pytest.mark.slow
def test_a_run_in_which_every_step_is_slow_goes_on(tmp_path):
    codes, run = fit(
        tmp_path, ("Slow", {"seconds": 0.3}), "--watchdog.minutes", "0.08"
    )  # the run takes longer than that, no step does
    assert codes == [0] and "no progress" not in run.said()


def test_a_run_that_fails_leaves_no_watchdog_behind(tmp_path):
    class Fails(Toy):
        def training_step(self, *_):
            raise ValueError("as it happens")

    with pytest.raises(ValueError, match="as it happens"):
        trainer(tmp_path, Watchdog(0.05)).fit(Fails(), ToyRows())
    for thread in [thread for thread in threading.enumerate() if thread.name == "watchdog"]:
        thread.join(5)
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())
