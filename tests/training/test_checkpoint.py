"""Checkpoints are complete or absent and hold plain values only; the newest one is found."""

import contextlib
import pickle
import shutil

import pytest
import torch

from tests.disk import small_disk
from tests.training.toy import Toy, loader, trainer
from unclip_pl.cluster import checkpoint_io as module
from unclip_pl.cluster.checkpoint_io import AtomicCheckpointIO, newest_checkpoint, read_checkpoint
from unclip_pl.stages.base import Stage
from unclip_pl.training.checkpoints import BestCheckpoint, NewestCheckpoint
from unclip_pl.utils.errors import UserError


def test_newest_replaces_the_one_before_and_best_stays(tmp_path):
    callbacks = NewestCheckpoint(2), BestCheckpoint()
    validation = {"val_check_interval": 3, "check_val_every_n_epoch": None}
    trainer(tmp_path, *callbacks, steps=7, **validation).fit(Toy(), loader(), loader())
    best, newest = sorted(path.name for path in tmp_path.rglob("*.ckpt"))
    assert newest == "newest-step=7.ckpt"  # the step at which training ended
    assert best in ("best-step=3.ckpt", "best-step=6.ckpt")


def test_a_run_resumed_from_another_folder_leaves_that_folder_as_it_is(tmp_path):
    trainer(tmp_path / "source", NewestCheckpoint(2), steps=2).fit(Toy(), loader())
    source = newest_checkpoint(tmp_path / "source")
    for _ in range(2):  # the second time there is a checkpoint of its own to replace
        run = trainer(tmp_path / "own", NewestCheckpoint(2), steps=5)
        run.fit(Toy(), loader(), ckpt_path=source)
        names = [path.name for path in (tmp_path / "own").rglob("*.ckpt")]
        assert source.is_file() and names == ["newest-step=5.ckpt"]


def test_a_checkpoint_that_a_kill_orphaned_goes_with_the_next_save(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    monkeypatch.setattr(module, "remove", lambda path: None)  # it was killed before it removed it
    trainer(tmp_path, NewestCheckpoint(2), steps=4).fit(Toy(), loader())
    monkeypatch.undo()
    for name in ("newest-step=3.ckpt", "newest-step=90.ckpt", "newest-mine.ckpt"):  # of others
        shutil.copy(folder / "newest-step=4.ckpt", folder / name)
    source = folder / "newest-step=4.ckpt"
    trainer(tmp_path, NewestCheckpoint(2), steps=6).fit(Toy(), loader(), ckpt_path=source)
    names = ["newest-mine.ckpt", *(f"newest-step={step}.ckpt" for step in (3, 6, 90))]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_a_run_removes_no_checkpoint_of_another_in_its_folder(tmp_path):
    folder = tmp_path / "checkpoints"
    trainer(tmp_path, NewestCheckpoint(2), steps=3).fit(Toy(), loader())
    trainer(tmp_path, NewestCheckpoint(2), steps=6).fit(Toy(), loader())
    names = ["newest-step=3.ckpt", "newest-step=6.ckpt"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_checkpoints_in_folders_below_are_those_of_other_runs(tmp_path):
    trainer(tmp_path / "other", NewestCheckpoint(2), steps=4).fit(Toy(), loader())
    assert newest_checkpoint(tmp_path) is None
    trainer(tmp_path, NewestCheckpoint(2), steps=2).fit(Toy(), loader())
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "newest-step=2.ckpt"


def test_a_direct_construction_loads_with_weights_only_and_rebuilds(tmp_path):
    trainer(tmp_path, NewestCheckpoint(4), steps=4).fit(Toy(width=4), loader())
    path = newest_checkpoint(tmp_path)
    hparams = read_checkpoint(path)["hyper_parameters"]
    assert hparams["optimizer"]["betas"] == [0.9, 0.999] and hparams["width"] == 4
    again = Toy.load_from_checkpoint(path)
    assert again.optimizer_config.betas == (0.9, 0.999)


def test_write_that_fails_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "newest-step=1.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(3)}, path)

    def half(obj, file):
        file.write(b"PK half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch, "save", half)
    with pytest.raises(UserError, match="the disk is full"):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(3)}, path)
    assert torch.equal(read_checkpoint(path)["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["newest-step=1.ckpt"]


@pytest.mark.parametrize("may_mount", [True, False])
def test_full_disk_gives_a_sentence_and_keeps_the_previous_file(tmp_path, monkeypatch, may_mount):
    if not may_mount:
        monkeypatch.setattr("tests.disk.mount", lambda *_: False)
    with small_disk(tmp_path / "disk", "1m") as disk:
        path = disk / "newest-step=1.ckpt"
        AtomicCheckpointIO().save_checkpoint({"a": torch.ones(1000)}, path)
        with pytest.raises(UserError, match="the disk is full"):
            AtomicCheckpointIO().save_checkpoint({"a": torch.ones(1_000_000)}, path)
        assert torch.equal(read_checkpoint(path)["a"], torch.ones(1000))
        assert [p.name for p in disk.iterdir()] == ["newest-step=1.ckpt"]


class Evil:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_pickle_with_code_is_refused_by_one_sentence(tmp_path, capsys):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(UserError, match="would run code") as error:
        read_checkpoint(path)
    plain = tmp_path / "plain.ckpt"
    plain.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError):
        read_checkpoint(plain)
    assert "never be printed" not in capsys.readouterr().out and "\n" not in str(error.value)


def test_truncated_and_missing_files_are_sentences(tmp_path):
    path = tmp_path / "newest-step=5.ckpt"
    torch.save({"a": torch.ones(10_000)}, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="newest-step=5"):
        read_checkpoint(path)
    with pytest.raises(UserError, match="gone"):
        read_checkpoint(tmp_path / "gone.ckpt")


def test_bytes_that_a_disk_changed_are_not_loaded(tmp_path):
    path, weight = tmp_path / "newest-step=3.ckpt", torch.arange(1000.0)
    torch.save({"global_step": 3, "state_dict": {"weight": weight}}, path)
    assert read_checkpoint(path)["state_dict"]["weight"].equal(weight)
    content = path.read_bytes()
    place = content.index(weight.numpy().tobytes()) + 800
    path.write_bytes(content[:place] + bytes(64) + content[place + 64 :])
    with pytest.raises(UserError, match="not those that were written.*--resume auto"):
        read_checkpoint(path)
    directory = content.rindex(b"PK\1\2")  # of the table of contents, which has names and sizes
    for changed in range(directory, directory + 60):
        byte = bytes([content[changed] ^ 0xFF])
        path.write_bytes(content[:changed] + byte + content[changed + 1 :])
        with contextlib.suppress(UserError):  # some bytes mean nothing
            read_checkpoint(path)


def test_the_search_for_the_newest_skips_incomplete_files(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    torch.save({}, tmp_path / "newest-step=5.ckpt")
    torch.save({}, tmp_path / "best-step=20.ckpt")
    shutil.copy(tmp_path / "newest-step=5.ckpt", tmp_path / ".newest-step=99.ckpt.tmp")
    incomplete = (tmp_path / "newest-step=5.ckpt").read_bytes()[:200]
    (tmp_path / "newest-step=30.ckpt").write_bytes(incomplete)
    assert newest_checkpoint(tmp_path).name == "best-step=20.ckpt"


def test_checkpoint_of_another_stage_is_refused(tmp_path):
    class Other(Toy):
        pass

    trainer(tmp_path, NewestCheckpoint(4), steps=4).fit(Toy(), loader())
    with pytest.raises(UserError, match="Toy"):
        trainer(tmp_path, steps=8).fit(Other(), loader(), ckpt_path=newest_checkpoint(tmp_path))


def test_stage_is_abstract():
    with pytest.raises(NotImplementedError):
        Stage().loss({})
