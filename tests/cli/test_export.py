"""`unclip export`: releases from checkpoints of every stage that draws."""

import pytest

from tests.cli.shell import error_of, run_unclip
from tests.factories import write_checkpoint
from unclip_pl.pipeline.weights import load_stage, read_weights


@pytest.mark.parametrize("index", range(3))
def test_export_makes_a_release_of_a_checkpoint(three, index, tmp_path):
    stage, out = three[index], tmp_path / "mine"
    checkpoint = write_checkpoint(tmp_path / "a.ckpt", stage)
    assert run_unclip("export", checkpoint, "--out", out) == 0
    assert read_weights(out).stage == type(stage).__name__
    assert load_stage(out, type(stage)).net_config == stage.net_config


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("export gone.ckpt --out x", "gone.ckpt"),
        ("export here.ckpt --out .", "exists already"),
        ("export here.ckpt --out x --card gone.md", "gone.md"),
        ("export here.ckpt --out here.ckpt/x", "here.ckpt"),
        ("export run --out x", "run is the folder of a run: give one of its checkpoints, such as"),
        ("export here.ckpt --adapters run --out x", "run is the folder of a run"),
        ("data verify gone", "no whole embedding store"),
        ("data verify a.tar", "--shards a.tar"),
    ],
)
def test_bad_input_is_one_sentence(command, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.ckpt").write_text("")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "newest-step=3.ckpt").write_text("")
    assert run_unclip(command) == 1
    assert named in error_of(capsys)
