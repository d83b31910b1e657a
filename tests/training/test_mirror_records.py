"""A mirror has a run's configuration, pictures and curves, too, and checkpoints come first."""

import logging

import pytest

from tests.remotekit import BUCKET, names_below
from tests.training.mirrorkit import URL, named, quick, save, train  # noqa: F401  a fixture
from tests.training.toy import command
from unclip_pl.cli.lightning import main
from unclip_pl.cluster.checkpoint_io import newest_checkpoint
from unclip_pl.training import mirror, mirror_records
from unclip_pl.training.mirror import Mirror, mirrored
from unclip_pl.utils import remote
from unclip_pl.utils.errors import SharedError
from unclip_pl.utils.signals import StopRequest

pytestmark = pytest.mark.timeout(60)
RECORDS = f"s3://{BUCKET}/run/records"


def draw(folder, *steps: int, size: int = 9) -> None:
    """Write what a run shows of itself."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("model: Toy\n")
    (folder / "events.out.tfevents.1").write_bytes(b"e" * size * len(steps))
    for step in steps:
        (folder / "pictures" / f"step-{step}.png").write_bytes(b"p" * size)


def asked(faults) -> list[str]:
    """The requests but for those that renew the lease, which come at any time."""
    return [line for line in faults.requests if ".lease" not in line]


def puts(faults) -> list[str]:
    """The records that were written since `faults.requests` was emptied."""
    paths = [line.split()[1] for line in faults.requests if line.startswith("PUT")]
    return sorted(path.partition("/records/")[2] for path in paths if "/records/" in path)


def test_only_what_is_new_or_changed_is_copied(faults, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "LOOK_EVERY", 60.0)
    draw(tmp_path, 1, 2)
    (tmp_path / "pictures" / ".step-3.png.part").touch()
    train(tmp_path, 2)
    pictures = ["pictures/step-1.png", "pictures/step-2.png"]
    assert names_below("run/records") == ["config.yaml", "events.out.tfevents.1", *pictures]
    faults.requests.clear()
    draw(tmp_path, 1, 2, 4)
    train(tmp_path, 4)  # a new process, which knows only what the bucket says
    assert puts(faults) == ["config.yaml", "events.out.tfevents.1", "pictures/step-4.png"]
    run = Mirror(URL, tmp_path)
    with run.lease.held():
        run.require_own()
        run.copy(is_last=True)
        faults.requests.clear()
        run.copy(is_last=True)
        assert not asked(faults)
        draw(tmp_path, 1, size=8)
        run.copy()
        assert not asked(faults)  # not yet
        run.copy(is_last=True)
    assert "pictures/step-1.png" in puts(faults) and "pictures/step-2.png" not in puts(faults)
    assert remote.read(f"{RECORDS}/pictures/step-1.png") == b"p" * 8


def test_settings_of_one_length_are_copied_again(faults, tmp_path):
    for step, rate in ((1, "1.0e-4"), (2, "3.0e-4")):
        (tmp_path / "config.yaml").write_text(f"lr: {rate}\n")
        train(tmp_path, step)  # each is a new process
        assert remote.read(f"{RECORDS}/config.yaml") == f"lr: {rate}\n".encode()


def test_checkpoints_come_first_and_without_one_there_is_no_record(faults, tmp_path, monkeypatch):
    draw(tmp_path / "a", 1)
    with mirrored(Mirror(URL, tmp_path / "a"), True):
        pass
    assert names_below("run") == ["mirror.json"]
    draw(tmp_path / "b", 2)  # an empty place belongs to no run
    train(tmp_path / "b", 2)
    assert "pictures/step-2.png" in names_below("run/records")
    with pytest.raises(SharedError, match="holds a run already"):
        train(tmp_path / "a", 1)
    assert "pictures/step-1.png" not in names_below("run/records")
    draw(tmp_path / "b", 2, 3, 4)
    copy_file = mirror_records.RecordCopies._copy_file

    def copy_and_save(self, path, sizes):
        copy_file(self, path, sizes)
        monkeypatch.setattr(mirror_records.RecordCopies, "_copy_file", copy_file)
        faults.requests.clear()
        save(tmp_path / "b", "newest-step=9.ckpt")

    monkeypatch.setattr(mirror_records.RecordCopies, "_copy_file", copy_and_save)
    with mirrored(Mirror(URL, tmp_path / "b"), True):
        (tmp_path / "b" / "checkpoints" / "newest-step=2.ckpt").unlink()
        save(tmp_path / "b", "newest-step=5.ckpt")
        while "newest-step=9.ckpt" not in named():
            pass
    lines = [line.replace("%3D", "=") for line in faults.requests if line.startswith("PUT")]
    later = next(i for i, line in enumerate(lines) if "/records/" in line)
    assert any("newest-step=9" in line for line in lines[:later])


def test_a_record_that_is_lost_is_a_warning(faults, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(remote, "TRIES", 2)
    monkeypatch.setattr(mirror_records, "RECORDS_EVERY", 0.0)
    caplog.set_level(logging.WARNING)
    draw(tmp_path, 1)
    faults.of, faults.always = "/records/", "503"
    with mirrored(Mirror(URL, tmp_path), True):
        save(tmp_path, "newest-step=3.ckpt")
        while caplog.text.count("failed (") < 3:
            pass
    assert named() == ["newest-step=3.ckpt"] and names_below("run/records") == []
    assert caplog.text.count("lacks pictures or curves") == 1
    faults.always = None
    (tmp_path / "pictures" / "gone.png").symlink_to(tmp_path / "nowhere")
    with mirrored(Mirror(URL, tmp_path), True):
        pass
    assert "pictures/step-1.png" in names_below("run/records")


def test_a_run_that_is_asked_to_stop_does_not_wait_for_its_records(faults, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "LOOK_EVERY", 60.0)
    monkeypatch.setattr(mirror, "STOP_SECONDS", 0.0)
    monkeypatch.setattr(mirror.stop_state, "agreed", StopRequest.REQUEUE)
    draw(tmp_path, 1)
    train(tmp_path, 1)
    assert names_below("run") == ["mirror.json", "newest-step=1.ckpt"]


def test_who_was_taken_for_dead_writes_no_record(faults, tmp_path):
    train(tmp_path, 1)
    run = Mirror(URL, tmp_path)
    with run.lease.held():
        run.require_own()
        draw(tmp_path, 1)
        remote.upload(f"{URL}/.lease", b'{"id": "another"}')
        run.copy(is_last=True)
    assert names_below("run/records") == []


def test_a_run_leaves_its_curves_and_goes_on_elsewhere(faults, tmp_path):
    assert main(command(tmp_path / "a", "--mirror", URL, steps=2)) == 0
    first = names_below("run/records")
    assert [name.partition(".")[0] for name in first] == ["config", "events", "hparams"]
    config = remote.read(f"{RECORDS}/config.yaml")
    assert config == (tmp_path / "a" / "config.yaml").read_bytes()
    assert main(command(tmp_path / "b", "--mirror", URL, "--resume", "auto", steps=4)) == 0
    assert set(first) < set(names_below("run/records"))  # and the curve of the second part


def test_a_mirror_in_google_cloud_storage(gs, tmp_path, monkeypatch):
    url, folder = f"{gs.url}/run", tmp_path / "a"
    gs.faults.plan = ["", "503", "", "cut"] * 12
    for step in (2, 3):
        draw(folder, step)
        with mirrored(Mirror(url, folder), True):
            for old in (folder / "checkpoints").glob("*"):
                old.unlink()
            save(folder, f"newest-step={step}.ckpt")
    assert {"503", "cut"} <= set(gs.faults.seen)
    names = gs.names_below("run")
    assert [name for name in names if "/" not in name] == ["mirror.json", "newest-step=3.ckpt"]
    assert "records/pictures/step-3.png" in names
    Mirror(url, tmp_path / "b").fetch_newest()
    assert newest_checkpoint(tmp_path / "b").name == "newest-step=3.ckpt"
    with (
        mirrored(Mirror(url, tmp_path / "b"), True),
        pytest.raises(SharedError, match="Another run"),
        mirrored(Mirror(url, folder), True),
    ):
        pass
