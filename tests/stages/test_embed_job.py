"""The embedding job over several ranks: one that is killed loses the others nothing, and the store ends up as one process makes it."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.forks import Ranks
from tests.data.shardkit import write_shards


def arguments(folder, store):
    return ["predict", "-c", "stages/embed.yaml", "--data.train", str(folder / "{00000..00007}.tar"), "--data.val", "null", "--data.store", str(store),
            "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_store_of_four_ranks_of_which_one_was_killed_is_that_of_one_process(tmp_path):
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", [6] * 8)
    killed = Ranks(tmp_path / "killed", arguments(tmp_path / "shards", tmp_path / "four"), 4)
    killed.until(lambda: len(list((tmp_path / "four").glob("*.safetensors"))) >= 1, 400)
    os.kill(killed.pids[3], signal.SIGKILL)
    codes = killed.wait(400)
    assert codes[3] == -signal.SIGKILL and not (tmp_path / "four" / "manifest.json").exists()
    assert (
        Ranks(tmp_path / "again", arguments(tmp_path / "shards", tmp_path / "four"), 4).wait(400)
        == [0] * 4
    )
    alone = Ranks(tmp_path / "alone", arguments(tmp_path / "shards", tmp_path / "one"))
    assert alone.wait(400) == [0], alone.output()[-3000:]
    ours, theirs = (
        sorted(path.name for path in (tmp_path / name).iterdir() if not path.name.startswith("."))
        for name in ("four", "one")
    )
    assert ours == theirs and len([name for name in ours if name.endswith(".safetensors")]) == 8
    for name in ours:
        if name.endswith(".safetensors"):
            a, b = load_file(tmp_path / "four" / name), load_file(tmp_path / "one" / name)
            assert all(torch.equal(a[key], b[key]) for key in b)
    assert (tmp_path / "four" / "manifest.json").read_text() == (
        tmp_path / "one" / "manifest.json"
    ).read_text()
