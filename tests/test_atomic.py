"""Files and folders are whole or not there, whoever fails in between."""

import threading
import time

import pytest

from unclip_pl.atomic import atomic_file, atomic_folder, cache_dir, file_lock
from unclip_pl.errors import UserError


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
    assert (tmp_path / "f" / "a").read_text() == "theirs" and [p.name for p in tmp_path.iterdir()] == ["f"]
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
    with file_lock(tmp_path / "lock"), pytest.raises(UserError, match="Another process has held"), file_lock(tmp_path / "lock", timeout=0.2):
        pass


def test_cache_that_cannot_be_made_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set UNCLIP_CACHE"):
        cache_dir()
