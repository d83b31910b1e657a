"""What lies in an output folder is kept, unless it is to be replaced."""

import pytest
import torch
from PIL import Image

from unclip_pl.utils import outputs
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.outputs import OutputFolder, require_new, require_writable


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_there_stays_and_the_new_file_gets_a_number(tmp_path, capsys):
    for data in (b"first", b"second", b"third"):
        OutputFolder(tmp_path).write("fox-0.png", data)
    kept = {"fox-0.png": b"first", "fox-0_2.png": b"second", "fox-0_3.png": b"third"}
    assert contents(tmp_path) == kept
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and "fox-0_2.png" in lines[0] and "--overwrite" in lines[0]


def test_the_same_content_again_is_the_same_file(tmp_path, capsys):
    for _ in range(2):
        out = OutputFolder(tmp_path / "new")
        paths = [out.write("a.png", b"a"), out.write("b.png", b"b")]
        assert [path.name for path in paths] == ["a.png", "b.png"]
    OutputFolder(tmp_path / "new").write("a.png", b"other")
    assert OutputFolder(tmp_path / "new").write("a.png", b"other").name == "a_2.png"
    assert contents(tmp_path / "new") == {"a.png": b"a", "b.png": b"b", "a_2.png": b"other"}
    assert len(capsys.readouterr().err.strip().splitlines()) == 2  # of the two others


def test_a_picture_that_was_only_rounded_otherwise_is_the_same(tmp_path):
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    for change, seed, name in (
        (0, "1", "fox.png"),
        (1 / 127.5, "1", "fox.png"),
        (0, "2", "fox_2.png"),
        (5 / 127.5, "1", "fox_3.png"),
    ):
        out = OutputFolder(tmp_path)
        assert out.write_picture("fox.png", image + change, seed=seed).name == name
    (tmp_path / "cut.png").write_bytes((tmp_path / "fox.png").read_bytes()[:60])
    assert OutputFolder(tmp_path).write_picture("cut.png", image, seed="1").name == "cut_2.png"


def test_two_commands_at_once_lose_nothing(tmp_path, monkeypatch):
    first, second = OutputFolder(tmp_path), OutputFolder(tmp_path)
    atomic = outputs.atomic_file

    def meanwhile(path):
        monkeypatch.setattr(outputs, "atomic_file", atomic)
        assert second.write("fox.png", b"two").name == "fox_2.png"
        return atomic(path)

    monkeypatch.setattr(outputs, "atomic_file", meanwhile)
    assert first.write("fox.png", b"one").name == "fox.png"
    assert contents(tmp_path) == {"fox.png": b"one", "fox_2.png": b"two"}


def test_two_files_of_one_run_never_share_a_name(tmp_path, capsys):
    for overwrite in (False, True):
        out = OutputFolder(tmp_path, overwrite)
        names = [out.write("a.b.png", data).name for data in (b"same", b"same", b"other")]
        assert names == ["a.b.png", "a.b_2.png", "a.b_3.png"]
    assert capsys.readouterr().err == ""


def test_overwriting_replaces(tmp_path, capsys):
    for value in (0.0, 1.0):
        out = OutputFolder(tmp_path, overwrite=True)
        path = out.write_picture("fox.png", torch.full((3, 4, 4), value), seed=f"{value:g}")
    with Image.open(path) as image:
        assert image.text["seed"] == "1" and image.getpixel((0, 0)) == (255, 255, 255)
    assert list(contents(tmp_path)) == ["fox.png"] and capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_written_is_refused_and_none_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "file" / "a" / "b"):
        with pytest.raises(UserError, match="--out"):
            OutputFolder(folder)
    require_writable(tmp_path / "a" / "b")
    OutputFolder(tmp_path / "a" / "b")
    assert list(contents(tmp_path)) == ["file"]


def test_a_new_folder_must_be_new(tmp_path):
    require_new(tmp_path / "new")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in (".", "link"):
        with pytest.raises(UserError, match="exists already"):
            require_new(tmp_path / name)
