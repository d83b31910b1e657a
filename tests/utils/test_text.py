"""Text from outside that is not valid Unicode is repaired before anything is computed.

So no picture is lost while it is written.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.data.shardkit import FakeCLIP, picture, write_tar
from unclip_pl.cli.generate import read_prompts
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.loader import TrainLoader
from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.data.reader import ShuffledShards
from unclip_pl.data.shards import raw_samples
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.verify import verify
from unclip_pl.datamodules.image_embedding import default_store
from unclip_pl.utils.images import grid, save_png

BROKEN = "caf\udce9"  # as Python has the argument that a Latin-1 terminal gives


def test_a_picture_is_written_whatever_its_metadata(tmp_path):
    metadata = {"prompt": f"{BROKEN} \0", "other": "\ud83d"}
    path = save_png(torch.zeros(3, 8, 8), tmp_path / f"{BROKEN}.png", **metadata)
    with Image.open(path) as image:
        assert image.text["prompt"] == "café  " and image.text["other"] == "\ufffd"
    images = [torch.zeros(1, 3, 8, 8)]
    assert grid(images, [BROKEN]).size == grid(images, ["café"]).size


def test_a_broken_caption_has_the_tokens_of_the_repaired_one():
    clip = FrozenCLIP()
    assert torch.equal(clip.tokenize([BROKEN]), clip.tokenize(["café"]))


def test_names_in_a_tar_and_of_a_tar_need_not_be_unicode(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/sch\xf6n.tar")
    names = [f"{BROKEN}{n}.{kind}" for n in range(4) for kind in ("png", "txt")]
    files = {name: picture(1) if name.endswith("png") else b"x" for name in names}
    shard = write_tar(path, files)
    keys = [f"café{n}" for n in range(4)]
    assert [sample["key"] for sample in raw_samples(shard, BadSampleCounter(0))] == keys
    store = EmbeddingStore(tmp_path / "store")
    store.ensure([shard], FakeCLIP(), progress=False)
    assert store.shard(shard).keys == keys and verify(store.folder) == []
    assert default_store([shard], FrozenCLIP().config) != default_store(["a"], FrozenCLIP().config)
    samples = ShuffledShards(
        [shard], 8, LoaderConfig(batch_size=4, num_workers=0), lambda sample, _: sample
    )
    (batch,) = TrainLoader(samples, 1)
    assert sorted(batch["key"]) == keys


@pytest.mark.parametrize("argument", [b"caf\xe9", "café".encode(), b"nul in a \x01 file"])
def test_prompts_are_repaired_when_they_are_read(argument, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\0b\n\nfox\n")
    prompts = read_prompts([os.fsdecode(argument)], tmp_path / "prompts.txt")
    assert prompts[1:] == ["a b", "fox"]
    assert "".join(prompts).encode() and all(c.isprintable() for c in "".join(prompts))


@pytest.mark.slow
def test_drawings_with_any_prompt_into_any_folder_are_written_and_named(tmp_path):
    out = os.fsencode(tmp_path) + b"/sch\xf6n"
    prompts = [b"caf\xe9", ("火" * 100).encode(), "😀 dog".encode()]
    options = b"--num-images 1 --steps 1 --prior-steps 1 --grid".split()
    arguments = [b"generate", *prompts, *options, b"--out", out]
    code = b"import sys; from unclip_pl.cli.unclip import main; sys.exit(main())"
    command = [os.fsencode(sys.executable), b"-c", code, *arguments]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    names = [os.fsencode(path.name) for path in Path(os.fsdecode(out)).iterdir()]
    assert len(names) == 4 and sum(name.endswith(b"-0.png") for name in names) == 3
    assert done.stdout.count(b".png") == 4
