"""Files and folders are complete or absent, whatever fails in between; locks keep others out."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.disk import read_only, small_disk
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import (
    DISK_ERRORS,
    LockTimeout,
    atomic_file,
    atomic_folder,
    cache_dir,
    file_lock,
    remove_leftovers,
)


def test_failure_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "a" / "file.txt"
    with atomic_file(path, "w") as file:
        file.write("old")
    with pytest.raises(RuntimeError), atomic_file(path, "w") as file:
        file.write("half of the new")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_file_has_no_name_before_it_is_whole(tmp_path):
    with atomic_file(tmp_path / "x", "w") as file:
        file.write("1")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_folder_appears_whole_and_the_first_one_stays(tmp_path):
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "a").write_text("mine")
        assert not (tmp_path / "f").exists()
        with atomic_folder(tmp_path / "f") as other:
            (other / "a").write_text("theirs")
    assert (tmp_path / "f" / "a").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "g"):
        raise RuntimeError
    assert not (tmp_path / "g").exists()


def test_lock_lets_one_in_at_a_time_and_says_when_it_gives_up(tmp_path):
    entered = []

    def work(name):
        with file_lock(tmp_path / "lock"):
            entered.append(name)
            time.sleep(0.2)
            entered.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert entered in (list("aabb"), list("bbaa"))
    with (
        file_lock(tmp_path / "lock"),
        pytest.raises(LockTimeout, match="lock"),
        file_lock(tmp_path / "lock", timeout=0.2),
    ):
        pass


def test_cache_that_cannot_be_made_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set UNCLIP_CACHE"):
        cache_dir()


@pytest.mark.parametrize("number", DISK_ERRORS)
def test_a_disk_that_cannot_take_it_is_one_sentence(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    for use in (atomic_file, atomic_folder):
        with pytest.raises(UserError, match=DISK_ERRORS[number]) as error, use(tmp_path / "x"):
            pass
        assert str(tmp_path / "x") in str(error.value) and "\n" not in str(error.value)


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "x"):
        raise FileNotFoundError(errno.ENOENT, "something else is gone")


@pytest.mark.parametrize("may_mount", [True, False])
def test_a_full_disk_keeps_the_old_file_and_folder(tmp_path, monkeypatch, may_mount):
    if not may_mount:
        monkeypatch.setattr("tests.disk.mount", lambda *_: False)
    with small_disk(tmp_path / "disk", "64k") as disk:
        with atomic_file(disk / "file") as file:
            file.write(b"old")
        with pytest.raises(UserError, match="the disk is full"), atomic_file(disk / "file") as file:
            file.write(bytes(100_000))
        with (
            pytest.raises(UserError, match="the disk is full"),
            atomic_folder(disk / "folder") as folder,
        ):
            (folder / "a").write_bytes(bytes(100_000))
        assert (disk / "file").read_bytes() == b"old"
        assert [path.name for path in disk.iterdir()] == ["file"]


def test_a_read_only_folder_is_a_sentence(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with read_only(folder):
        for use in (atomic_file, atomic_folder, file_lock):
            with pytest.raises(UserError, match="read-only|no permission"), use(folder / "x"):
                pass


def test_leftovers_of_a_killed_writer_go_and_what_is_being_written_stays(tmp_path):
    leftover_of_a_killed_writer(tmp_path, "a.ckpt")
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_file(tmp_path / "b.ckpt", "w") as file:
        remove_leftovers(tmp_path, "*.ckpt")
        assert [path.name[:7] for path in tmp_path.iterdir()] == [".b.ckpt"]
        file.write("whole")
    assert (tmp_path / "b.ckpt").read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_one_warning_tells_of_a_file_system_without_locks(tmp_path, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    leftover = leftover_of_a_killed_writer(tmp_path, "b")
    monkeypatch.setattr("fcntl.flock", refuse)
    for _ in range(2):
        with file_lock(tmp_path / "lock"), atomic_file(tmp_path / "a", "w") as file:
            remove_leftovers(tmp_path, "*")
            assert len(list(tmp_path.glob(".a.*.tmp"))) == 1  # its process runs
            file.write("whole")
    assert (tmp_path / "a").read_text() == "whole" and not leftover.exists()
    assert len(caplog.messages) == 1 and "no locks" in caplog.messages[0]


def test_a_lock_that_fails_otherwise_says_why(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), file_lock(tmp_path / "lock"):
        pass


def test_a_forked_child_does_not_keep_a_lock_that_its_parent_has_released(tmp_path):
    with file_lock(tmp_path / "lock"):
        child = os.fork()
        if child == 0:  # pragma: no cover
            signal.pause()
    try:
        with file_lock(tmp_path / "lock", timeout=0):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def leftover_of_a_killed_writer(folder, name):
    """The file that a killed writer of `name` leaves."""
    code = f"""
import os, signal
from unclip_pl.utils.files import atomic_file
with atomic_file({str(folder / name)!r}) as file:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    (path,) = folder.glob(f".{name}.*.tmp")
    return path


def test_leftovers_of_another_host_stay(tmp_path, monkeypatch):
    path = leftover_of_a_killed_writer(
        tmp_path, "a"
    )  # its lock, if it still runs there, is not seen from here
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    remove_leftovers(tmp_path, "a")
    assert path.exists()
    monkeypatch.undo()
    remove_leftovers(tmp_path, "a")
    assert not path.exists()


@pytest.mark.parametrize("moment", ["before the lock", "under the lock"])
def test_a_file_removed_between_its_making_and_its_lock_is_made_again(
    tmp_path, monkeypatch, moment
):
    lock, took, held = fcntl.flock, [], contextlib.ExitStack()

    def meanwhile(file, operation):
        if not took:
            (path,) = tmp_path.glob(".a.*.tmp")
            took.append(path)
            if moment == "before the lock":
                remove_leftovers(tmp_path, "a")
                assert not path.exists()
            else:
                lock(held.enter_context(path.open("r+b")), fcntl.LOCK_EX)
        return lock(file, operation)

    monkeypatch.setattr("fcntl.flock", meanwhile)
    with held, atomic_file(tmp_path / "a", "w") as file:
        assert [path != took[0] for path in tmp_path.iterdir()] == [True]
        file.write("whole")
    assert (tmp_path / "a").read_text() == "whole" and len(list(tmp_path.iterdir())) == 1
