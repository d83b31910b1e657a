"""What cannot be imported as GLIDE: one sentence says why, nothing runs, nothing is left."""

import gzip
import json

import pytest
import torch

from tests.interop import glide_kit
from tests.interop.broken import Touch, cut
from unclip_pl.cli.unclip import main


@pytest.fixture
def folder(tmp_path):
    return glide_kit.write(tmp_path / "in", glide_kit.weights())


@pytest.fixture
def refused(tmp_path, capsys):
    """Asserts that an import is refused in one sentence and leaves nothing; returns it."""

    def check(weights, *options):
        out = tmp_path / "out" / "glide"
        assert main(["import", "glide", str(weights), "--out", str(out), *options]) == 1
        said = capsys.readouterr().err
        assert said.startswith("unclip: ") and said.count("\n") == 1 and "Traceback" not in said
        assert not out.parent.exists() or not list(out.parent.iterdir())
        return said

    return check


def change(folder, **changes):
    """base.pt with other tensors; None takes one away."""
    held = torch.load(folder / "base.pt") | {k.replace("__", "."): v for k, v in changes.items()}
    torch.save({k: v for k, v in held.items() if v is not None}, folder / "base.pt")


def test_a_file_that_is_missing_cut_off_or_holds_code(folder, refused, tmp_path):
    assert "There is no" in refused(tmp_path / "nowhere.pt")
    cut(folder / "base.pt")
    assert "base.pt" in refused(folder)
    torch.save({"out.2.bias": Touch(tmp_path / "ran")}, folder / "base.pt")
    assert "could run code when loaded" in refused(folder)
    assert not (tmp_path / "ran").exists()
    (folder / "base.pt").write_bytes(b"")
    assert "base.pt" in refused(folder)
    (folder / "base.pt").unlink()
    assert "must have one file base*.pt" in refused(folder)


def test_a_folder_with_two_models_is_refused(folder, refused):
    torch.save({}, folder / "base-inpaint.pt")
    assert "base-inpaint.pt, base.pt: give the file itself" in refused(folder)


@pytest.mark.parametrize("held", [[1, 2], {"state_dict": {"a": torch.ones(2)}}, {"a": 1}, {}])
def test_a_file_of_another_kind(held, folder, refused):
    torch.save(held, folder / "base.pt")
    assert "another model" in refused(folder)


def test_a_file_of_another_model(folder, refused):
    first = torch.ones(64, 7, 3, 3)
    change(folder, input_blocks__0__0__weight=first)
    assert "takes pictures of 7 channels" in refused(folder)
    change(folder, input_blocks__0__0__weight=first[:, :3], unemb__weight=torch.ones(300, 64))
    assert "unemb.weight" in refused(folder)
    change(folder, unemb__weight=None, final_ln__weight=None)
    assert "no tensor final_ln.weight" in refused(folder)
    change(folder, final_ln__weight=torch.ones(32))
    assert "final_ln.weight of shape (32,)" in refused(folder)
    change(folder, final_ln__weight=torch.ones(64), positional_embedding=torch.ones(8, 65))
    assert "heads of 64 do not divide" in refused(folder)
    change(folder, positional_embedding=torch.ones(8))
    assert "another model" in refused(folder)


def test_a_tokenizer_that_is_missing(folder, refused, tmp_path):
    (folder / "merges.txt").unlink()
    assert f"{folder} has no tokenizer of GPT-2" in refused(folder)
    assert "--tokenizer" in refused(folder / "base.pt", "--tokenizer", str(tmp_path / "nowhere"))


def test_a_tokenizer_of_another_model(folder, refused, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    glide_kit.write_tokenizer(other, 301)
    said = refused(folder, "--tokenizer", str(other))
    assert "has 301 tokens and the weights know 300" in said
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    first, second, *_ = vocabulary
    swapped = vocabulary | {first: 1, second: 0}
    (folder / "vocab.json").write_text(json.dumps(swapped), encoding="utf-8")
    assert "numbers its tokens otherwise" in refused(folder)
    (folder / "vocab.json").write_text("[]", encoding="utf-8")
    assert "numbers its tokens otherwise" in refused(folder)


@pytest.mark.parametrize("lines", ["#version: 0.2\nt h e\n", "zz top\n", "th e\n", "", "\u2028 a"])
def test_merges_that_join_nothing(lines, folder, refused):
    (folder / "merges.txt").write_text(lines, encoding="utf-8")
    said = refused(folder)
    assert "merges.txt" in said and "another tokenizer" in said


def test_tokenizer_files_that_are_damaged(folder, refused, tmp_path):
    (folder / "vocab.json").write_bytes(b"\xff\xfe")
    assert "vocab.json cannot be read" in refused(folder)
    (folder / "vocab.json").write_text("{", encoding="utf-8")
    assert "vocab.json is not JSON" in refused(folder)
    own = tmp_path / "own"
    own.mkdir()
    glide_kit.write_tokenizer(own, 300, "glide")
    whole = (own / "vocab.bpe.gz").read_bytes()
    for bad in (whole[: len(whole) // 2], b"no gzip", whole[:20] + b"?" * 40):
        (own / "vocab.bpe.gz").write_bytes(bad)
        assert "vocab.bpe.gz cannot be read" in refused(folder, "--tokenizer", str(own))
    (own / "vocab.bpe.gz").write_bytes(whole)
    (own / "encoder.json.gz").write_bytes(gzip.compress(b"{}"))
    assert "encoder.json.gz numbers" in refused(folder, "--tokenizer", str(own))


def test_a_folder_that_exists_is_kept(folder, tmp_path, capsys):
    words = ["import", "glide", str(folder), "--out", str(folder)]
    assert main(words) == 1
    assert "exists already" in capsys.readouterr().err and (folder / "base.pt").exists()
