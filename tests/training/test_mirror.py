"""A run's checkpoints are in a bucket, too: whole, of one run, and found on a new machine."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.remotekit import names_below
from tests.training.mirrorkit import URL, named, quick, save, train  # noqa: F401  a fixture
from tests.training.toy import command
from unclip_pl.cli.lightning import main
from unclip_pl.cluster.checkpoint_io import newest_checkpoint, read_checkpoint
from unclip_pl.cluster.sharded_checkpoint import META_FILE
from unclip_pl.training import mirror
from unclip_pl.training.checkpoints import BestCheckpoint
from unclip_pl.training.mirror import Mirror, mirrored, progress_of
from unclip_pl.utils import remote, remote_lease
from unclip_pl.utils.errors import SharedError, UserError

pytestmark = pytest.mark.timeout(60)
DEAD = json.dumps({"id": "x", "host": "gone", "boot": "", "pid": 1}).encode()


def whole_checkpoints() -> list[str]:
    """The checkpoints that mirror.json names, each of which is there."""
    assert set(named()) <= set(names_below("run"))
    return named()


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_killed_run_goes_on_on_another_machine(faults, tmp_path, capsys):
    words = command(tmp_path / "first", "--mirror", URL, "--newest.every_n_train_steps", "5")
    code = "from tests.training import test_mirror as t; t.go()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, "--trainer.max_steps", "1000000"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.DEVNULL,
    )
    try:
        while "mirror.json" not in names_below("run") or not named():
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    remote.upload(f"{URL}/newest-step=9999.ckpt", b"a part")  # as one that was not yet named
    shutil.rmtree(tmp_path / "first")
    faults.plan = ["", "503", "cut", "slow"] * 9
    before = max(whole_checkpoints(), key=progress_of)
    steps = int(before.partition("=")[2].partition(".")[0]) + 2
    flags = ["--mirror", URL, "--resume", "auto"]
    assert main(command(tmp_path / "second", *flags, steps=steps)) == 0
    assert before in capsys.readouterr().err and {"503", "cut", "slow"} <= set(faults.seen)
    ours = newest_checkpoint(tmp_path / "second")
    others = [name for name in names_below("run") if not name.startswith("records/")]
    assert others == ["mirror.json", *whole_checkpoints()]
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


def test_two_at_one_time_are_refused_and_a_dead_one_is_not(faults, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_lease, "LEASE_ENDS", 2.0)
    first, second = (Mirror(URL, tmp_path / name) for name in ("a", "b"))
    refused = pytest.raises(SharedError, match="Another run")
    with mirrored(first, True), refused, mirrored(second, True):
        pass
    remote.upload(f"{URL}/.lease", DEAD)
    with pytest.raises(UserError, match="Another run writes"), mirrored(first, True):
        assert remote.read(f"{URL}/.lease") != DEAD
        while not first.lease.is_lost:  # a renewal at the same moment may win
            remote.upload(f"{URL}/.lease", DEAD)  # as one would that took this run for dead
            time.sleep(0.3)
    assert remote.read(f"{URL}/.lease") == DEAD  # not ours to remove


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


def save_shards(folder) -> None:
    dcp.save({"weight": torch.ones(3)}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    torch.save({"global_step": 7}, folder / META_FILE)


def test_folders_of_shards_are_copied_and_found(faults, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "newest-step=7.ckpt"
    save_shards(folder)
    with mirrored(Mirror(URL, tmp_path / "run"), True):
        pass
    Mirror(URL, tmp_path / "new").fetch_newest()
    copy = newest_checkpoint(tmp_path / "new")
    assert copy.name == folder.name
    for path in folder.iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes()


def test_a_folder_that_is_replaced_while_it_is_copied_is_named(
    faults, tmp_path, monkeypatch, caplog
):
    folder = tmp_path / "checkpoints" / "newest-step=7.ckpt"
    upload, run = mirror.upload, Mirror(URL, tmp_path)

    def slow_upload(url, source):
        upload(url, source)
        shutil.rmtree(folder)

    monkeypatch.setattr(mirror, "upload", slow_upload)
    with run.lease.held():
        for _ in range(2):
            save_shards(folder)
            run.copy()
        assert names_below("run") == [".lease"]
        run.lease.is_lost = True
        requests = len(faults.requests)
        run.copy()
        run.copy()
        assert len(faults.requests) == requests and "Another run" in run.error
    assert caplog.text.count("replaced while it was copied") == caplog.text.count("The copy") == 1


def test_a_place_that_cannot_be_written_to_is_refused(faults, tmp_path, capsys):
    for url in ("https://host/run", "runs/local", "s3://nobody/run"):
        with (
            pytest.raises(UserError, match="cannot be written"),
            mirrored(Mirror(url, tmp_path), 1),
        ):
            pass
    assert main(["validate", *command(tmp_path, "--mirror", URL)[1:]]) == 1
    assert "--mirror is for" in capsys.readouterr().err


@pytest.mark.parametrize("best", [900, 500])
def test_both_kinds_come_back_and_the_furthest_is_gone_on_from(faults, tmp_path, best):
    names = [f"best-step={best}.ckpt", "newest-step=600.ckpt"]
    with mirrored(Mirror(URL, tmp_path / "first"), True):
        save(tmp_path / "first", *names)
    Mirror(URL, tmp_path / "new").fetch_newest()
    assert newest_checkpoint(tmp_path / "new").name == max(names, key=progress_of)
    with mirrored(Mirror(URL, tmp_path / "new"), True):
        pass
    assert whole_checkpoints() == names
    states = BestCheckpoint(), BestCheckpoint(), BestCheckpoint()
    for state, folder in zip(states, ("first", "new", "other"), strict=True):
        state.dirpath = str(tmp_path / folder / "checkpoints")
    first, new, other = states
    first.best_model_path = f"{first.dirpath}/best-step={best}.ckpt"
    first.best_model_score = torch.tensor(0.1)
    new.load_state_dict(first.state_dict())
    path = f"{new.dirpath}/best-step={best}.ckpt"
    assert new.best_model_path == new.kth_best_model_path == path and new.best_model_score == 0.1
    assert new.best_k_models == {path: new.best_model_score}
    other.load_state_dict(first.state_dict())  # its best one is not there
    assert other.best_model_path == "" and other.best_k_models == {}


def test_only_checkpoints_of_runs_are_removed(faults, tmp_path):
    theirs = ["best-of-last-year/model.ckpt", "newest-data/1.tar", "newest-step=3.ckpt.txt"]
    train(tmp_path, 1)
    for name in [*theirs, "newest-step=9.ckpt", "best-step=9-v1.ckpt/meta.pt"]:
        remote.upload(f"{URL}/{name}", b"x")
    train(tmp_path, 2)
    assert names_below("run") == sorted([*theirs, "mirror.json", "newest-step=2.ckpt"])


def test_one_run_may_have_several_mirrors(faults, tmp_path, monkeypatch):
    train(tmp_path, 1)
    with mirrored(Mirror(f"{URL}2", tmp_path), True):
        pass
    train(tmp_path, 2)
    assert whole_checkpoints() == ["newest-step=2.ckpt"]
    monkeypatch.setattr(remote, "TRIES", 2)
    faults.always, faults.of, faults.methods = "503", "3/newest-", ("PUT",)
    third = f"{URL}3"
    with pytest.raises(UserError, match="lacks"), mirrored(Mirror(third, tmp_path), True):
        pass
    faults.always = None
    with mirrored(Mirror(third, tmp_path / "other"), True):  # an empty place belongs to no run
        save(tmp_path / "other", "newest-step=9.ckpt")
    with pytest.raises(SharedError, match="holds a run already"):
        Mirror(third, tmp_path).fetch_newest()


def test_what_is_written_again_is_copied_again(faults, tmp_path):
    path = tmp_path / "checkpoints" / "best-step=9.ckpt"
    with mirrored(Mirror(URL, tmp_path), True):
        save(tmp_path, path.name)
        while "mirror.json" not in names_below("run") or not named():
            time.sleep(0.05)
        torch.save({"global_step": 9, "x0_error": torch.ones(100)}, path)
    assert remote.read(f"{URL}/{path.name}") == path.read_bytes()


def test_who_was_taken_for_dead_changes_nothing(faults, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_lease, "RENEW_EVERY", 60.0)
    train(tmp_path / "a", 5)
    late = Mirror(URL, tmp_path / "a")
    upload = mirror.upload

    def slow_upload(url, source):
        upload(url, source)
        if "newest-step=6" in url:  # another one takes over, and ends
            monkeypatch.setattr(mirror, "upload", upload)
            remote.delete(late.lease.url)
            Mirror(URL, tmp_path / "b").fetch_newest()
            train(tmp_path / "b", 8)

    monkeypatch.setattr(mirror, "upload", slow_upload)
    monkeypatch.setattr(mirror, "LOOK_EVERY", 60.0)
    with pytest.raises(UserError, match="Another run writes"), mirrored(late, True):
        save(tmp_path / "a", "newest-step=6.ckpt")
    assert whole_checkpoints() == ["newest-step=8.ckpt"]
    late.lease._renewed = time.monotonic() - remote_lease.LEASE_ENDS
    with pytest.raises(UserError, match="not renewed"):
        late.lease.require()


@pytest.mark.parametrize("moment", ["delete", "create"])
def test_of_two_that_take_over_one_holds_the_lease(faults, tmp_path, monkeypatch, moment):
    monkeypatch.setattr(remote_lease, "LEASE_ENDS", 0.4)
    remote.upload(f"{URL}/.lease", DEAD)
    step, stack, other = getattr(remote, moment), ExitStack(), Mirror(URL, tmp_path).lease

    def step_of_the_slower_one(*arguments):
        result = step(*arguments)
        monkeypatch.setattr(remote_lease, moment, step)
        remote.delete(f"{URL}/.lease")  # the faster one saw the same dead holder
        stack.enter_context(other.held())
        return result

    monkeypatch.setattr(remote_lease, moment, step_of_the_slower_one)
    with stack:
        with pytest.raises(SharedError, match="Another run"), Mirror(URL, tmp_path).lease.held():
            raise AssertionError("both hold it")
        monkeypatch.setattr(remote_lease, "LEASE_ENDS", 60)  # a slow machine renews late
        other.require()
    assert names_below("run") == []


def test_a_dead_lease_that_another_removes_is_free(faults, tmp_path, monkeypatch):
    answers = [DEAD]

    def read(url):
        return answers.pop() if answers else remote.read(url)

    monkeypatch.setattr(remote_lease, "LEASE_ENDS", 0.0)
    monkeypatch.setattr(remote_lease, "read", read)
    with Mirror(URL, tmp_path).lease.held():
        assert names_below("run") == [".lease"]


def test_the_lease_ends_with_a_run_that_fails(faults, tmp_path):
    with pytest.raises(KeyboardInterrupt), mirrored(Mirror(URL, tmp_path), True):
        assert ".lease" in names_below("run")
        raise KeyboardInterrupt
    assert names_below("run") == ["mirror.json"]
    train(tmp_path / "a", 1)
    with pytest.raises(SharedError, match="holds a run already"):
        train(tmp_path / "b", 1)
    assert ".lease" not in names_below("run")


def test_a_fetch_that_is_killed_or_overtaken_is_repeated(faults, tmp_path, monkeypatch):
    train(tmp_path / "a", 1)
    fetch_one, download = Mirror._fetch_one, Mirror._download

    def fetch_and_die(*arguments):
        fetch_one(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Mirror, "_fetch_one", fetch_and_die)
    with pytest.raises(KeyboardInterrupt):
        Mirror(URL, tmp_path / "b").fetch_newest()
    monkeypatch.setattr(Mirror, "_fetch_one", fetch_one)
    train(tmp_path / "a", 2)

    def overtaken(self, name, file):
        monkeypatch.setattr(Mirror, "_download", download)
        train(tmp_path / "a", 3)
        download(self, name, file)

    monkeypatch.setattr(Mirror, "_download", overtaken)
    Mirror(URL, tmp_path / "b").fetch_newest()
    assert newest_checkpoint(tmp_path / "b").name == "newest-step=3.ckpt"
    remote.delete(f"{URL}/newest-step=3.ckpt")
    with pytest.raises(UserError, match=r"newest-step=3\.ckpt.*another run writes"):
        Mirror(URL, tmp_path / "c").fetch_newest()
