"""The embedding job on several ranks: a killed rank costs the others nothing, and the store becomes
the same as with one process.
"""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.forks import Ranks
from tests.data.shardkit import write_shards


def arguments(folder, store):
    shards = str(folder / "{00000..00007}.tar")
    return [
        *("predict", "-c", "stages/embed.yaml", "--data.train", shards, "--data.val", "null"),
        *("--data.store", str(store), "--trainer.accelerator", "cpu"),
        *("--trainer.enable_progress_bar", "false"),
    ]


def visible(folder):
    """The names of a store's files, without its locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_store_of_four_ranks_of_which_one_was_killed_is_that_of_one_process(tmp_path):
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", [6] * 8)
    four, one = tmp_path / "four", tmp_path / "one"
    killed = Ranks(tmp_path / "killed", arguments(tmp_path / "shards", four), 4)
    killed.until(lambda: len(list(four.glob("*.safetensors"))) >= 1, 400)
    os.kill(killed.pids[3], signal.SIGKILL)
    codes = killed.wait(400)
    assert codes[3] == -signal.SIGKILL and not (four / "manifest.json").exists()
    again = Ranks(tmp_path / "again", arguments(tmp_path / "shards", four), 4)
    assert again.wait(400) == [0] * 4
    single = Ranks(tmp_path / "single", arguments(tmp_path / "shards", one))
    assert single.wait(400) == [0], single.output()[-3000:]

    assert visible(four) == visible(one)
    shards = [name for name in visible(one) if name.endswith(".safetensors")]
    assert len(shards) == 8
    for name in shards:
        ours, theirs = load_file(four / name), load_file(one / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (four / "manifest.json").read_text() == (one / "manifest.json").read_text()
