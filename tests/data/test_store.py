"""The embedding store: whole, by key, never done twice, for one CLIP."""

import io
import logging
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.data.shardkit import FakeCLIP, picture, write_shards, write_tar
from tests.data.storekit import fill
from unclip_pl.clip.fingerprint import ClipMismatch
from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.decoding import decode
from unclip_pl.data.names import expand
from unclip_pl.data.shard_rows import ShardRows
from unclip_pl.data.shards import raw_samples
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.verify import verify
from unclip_pl.utils.errors import UserError


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path, [9, 4, 12])


def test_rows_are_what_clip_gives_for_each_key(tmp_path, shards):
    store, clip = fill(tmp_path / "store", shards), FakeCLIP()
    for shard in shards:
        rows = store.shard(shard)
        assert not rows.image_embed.flags.owndata and not rows.image_embed.flags.writeable
        assert rows.image_embed.dtype == np.float16 and rows.tokens.dtype == np.int32
        for sample in raw_samples(shard, BadSampleCounter(0)):
            i = rows.row_of_key[sample["key"]]
            tokens = clip.tokenize([sample["caption"]])
            assert np.array_equal(
                rows.image_embed[i],
                clip.embed_images(decode(sample["image"], 8)[None])[0].half().numpy(),
            )
            assert np.array_equal(
                rows.text_embed[i], clip.embed_text(tokens).embed[0].half().numpy()
            )
            assert np.array_equal(rows.tokens[i], tokens[0].numpy())
    assert store.manifest["rows"] == 25 and list(store.manifest["shards"]) == shards
    assert verify(store.folder) == verify(store.folder, shards, FakeCLIP()) == []


def test_the_files_are_plain_safetensors(tmp_path, shards):
    store = fill(tmp_path / "store", shards)
    with safe_open(store.path(shards[0]), "pt") as file:
        names = list(file.keys())
        assert {name: tuple(file.get_slice(name).get_shape()) for name in names} == {
            "image_embed": (9, 6),
            "text_embed": (9, 6),
            "tokens": (9, 12),
            "mean": (6,),
            "scatter": (6, 6),
        }


def test_what_is_done_is_not_done_again_and_what_changed_is(tmp_path, shards):
    fill(tmp_path / "store", shards)
    again = FakeCLIP()
    fill(tmp_path / "store", shards, again)
    assert again.seen == 0
    write_tar(tmp_path / "00001.tar", {"new.png": picture(77), "new.txt": b"new"})
    assert any("stale" in line for line in verify(tmp_path / "store"))
    store = fill(tmp_path / "store", shards, again)
    assert again.seen == 1 and store.shard(shards[1]).keys == ["new"] and verify(store.folder) == []


def test_a_file_cut_short_is_made_again(tmp_path, shards):
    store = fill(tmp_path / "store", shards)
    path = store.path(shards[0])
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises((OSError, ValueError, KeyError)):
            ShardRows.open(path)
        with pytest.raises(UserError, match="no whole rows"):
            EmbeddingStore(store.folder).shard(shards[0])
    assert any("cannot be checked" in line for line in verify(store.folder))
    fill(tmp_path / "store", shards)
    assert path.read_bytes() == whole


def test_a_second_call_with_other_shards_keeps_the_manifest_of_the_first(tmp_path, shards):
    fill(tmp_path / "store", shards[:2])
    assert list(fill(tmp_path / "store", shards[2:]).manifest["shards"]) == shards


def test_statistics_are_those_of_all_rows(tmp_path, shards):
    store = fill(tmp_path / "store", shards)
    for some in (shards, shards[:2]):
        rows = np.concatenate(
            [np.asarray(store.shard(shard).image_embed, np.float64) for shard in some]
        )
        found = store.statistics(some)
        assert found.count == len(rows) and found.mean.dtype == torch.float64
        np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.std, rows.std(0), rtol=1e-10)
        np.testing.assert_allclose(
            found.covariance, np.cov(rows.T, bias=True), rtol=1e-9, atol=1e-12
        )
    assert store.statistics().count == 25


def test_a_store_of_another_clip_is_refused_by_name(tmp_path, shards):
    fill(tmp_path / "store", shards[:1])
    for use in (
        lambda: fill(tmp_path / "store", shards, FakeCLIP(1)),
        lambda: verify(tmp_path / "store", clip=FakeCLIP(1)),
    ):
        with pytest.raises(
            ClipMismatch, match=r"The embedding store .* was made with the CLIP fake-0.* fake-1"
        ):
            use()
    (tmp_path / "store" / "clip.json").unlink()
    with pytest.raises(ClipMismatch):
        fill(tmp_path / "store", shards, FakeCLIP(1))
    (tmp_path / "store" / "manifest.json").unlink()
    with pytest.raises(UserError, match="to say of which CLIP"):
        fill(tmp_path / "store", shards)


def test_a_run_cut_short_before_the_manifest_is_claimed_too(tmp_path, shards):
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "store", shards, FakeCLIP(die_after=10))
    with pytest.raises(ClipMismatch):
        fill(tmp_path / "store", shards, FakeCLIP(1))


def test_bad_samples_have_no_row_and_are_counted(tmp_path, caplog):
    shards = write_shards(tmp_path, [60, 60], bad={7, 70})
    with pytest.raises(UserError, match="2 of 1"):
        fill(tmp_path / "store", shards, counter=BadSampleCounter(0.01))
    counter = BadSampleCounter(0.02)
    with caplog.at_level(logging.WARNING):
        store = fill(tmp_path / "other", shards, counter=counter)
    assert (counter.bad, counter.seen) == (2, 120) and store.manifest["rows"] == 118
    assert any("sample 000070" in line for line in caplog.messages)
    notes = []
    assert verify(store.folder, notes=notes) == [] and [
        "000007" in line and "cannot be decoded" in line for line in notes
    ] == [True, False]


def test_an_embedding_that_is_not_finite_gets_no_row(tmp_path, shards, caplog):
    clip = FakeCLIP()
    embed = clip.embed_images
    # too large for float16
    clip.embed_images = lambda images: embed(images).masked_fill(
        torch.arange(len(images))[:, None] == 1, 1e9
    )
    store = fill(tmp_path / "store", shards[1:2], clip)
    assert len(store.shard(shards[1]).keys) == 3 and any(
        "not finite" in line for line in caplog.messages
    )


def test_a_shard_without_a_sample_is_a_sentence(tmp_path):
    empty = write_tar(tmp_path / "empty.tar", {})
    with pytest.raises(UserError, match=r"empty\.tar has no usable sample"):
        fill(tmp_path / "store", [empty])
    with pytest.raises(UserError, match="cannot be read"):
        fill(tmp_path / "store", [str(tmp_path / "none.tar")])


def test_noto_is_embedded_by_key_though_tar_and_parquet_disagree(noto, tmp_path):
    shards = expand(str(noto))
    store = fill(tmp_path / "store", shards)
    assert store.row_counts(shards) == [145, 146, 109] and verify(store.folder) == []
    with tarfile.open(shards[0]) as tar:
        sample = tar.extractfile("00000002.jpg").read()
    row = store.shard(shards[0])
    clip = FakeCLIP()
    assert np.array_equal(
        row.image_embed[row.row_of_key["00000002"]],
        clip.embed_images(decode(io.BytesIO(sample).read(), 8)[None])[0].half().numpy(),
    )


def test_a_pipe_is_embedded_and_kept(tmp_path, shards):
    url = f"pipe:cat {shards[0]}"
    fill(tmp_path / "store", [url])
    again = FakeCLIP()
    assert fill(tmp_path / "store", [url], again).row_counts([url]) == [9] and again.seen == 0
    shutil.rmtree(tmp_path / "store")


FEW_FILES = """
import resource, sys
from pathlib import Path
import numpy as np
from tests.data.shardkit import FakeCLIP
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.embedding_loader import EmbeddingTable
from unclip_pl.data.verify import verify
from unclip_pl.utils.errors import UserError
folder, shards = sys.argv[1], sys.argv[2:]
store = EmbeddingStore(folder)
store.ensure(shards[:1], FakeCLIP(), progress=False)
spare = len(list(Path("/proc/self/fd").iterdir())) + 12
resource.setrlimit(resource.RLIMIT_NOFILE, (spare, spare))
store.ensure(shards, FakeCLIP(), progress=False)
assert sum(store.row_counts(shards)) == store.statistics().count == 2 * len(shards)
assert all(map(store.is_done, shards))
rows = EmbeddingTable(store, shards)
batch = rows[np.arange(len(rows))]
assert len(batch["key"]) == len(set(batch["key"])) == 2 * len(shards)
assert batch["image_embed"].isfinite().all()
assert verify(folder, shards) == []
held = []
uses = [
    store.is_done,
    lambda shard: EmbeddingStore(folder).shard(shard),
    lambda shard: store.ensure([shard], FakeCLIP(), progress=False),
]
for use in uses:
    try:
        while True:
            held.append(open(shards[0], "rb"))
    except OSError:
        pass
    try:
        use(shards[0])
    except UserError as error:
        assert "raise the limit with `ulimit -n`" in str(error), error
    else:
        raise AssertionError("nothing was said")
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files by /proc")
def test_a_store_of_many_shards_needs_few_open_files(tmp_path):
    shards = write_shards(tmp_path, [2] * 60)
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, str(tmp_path / "store"), *shards],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_url_that_breaks_off_is_not_taken_for_done(tmp_path, shards):
    source = tmp_path / "source.tar"
    whole = Path(shards[2]).read_bytes()
    source.write_bytes(whole[: len(whole) // 2])
    url, file = f"pipe:cat {source}", f"pipe:cat {shards[0]}"
    with pytest.raises(
        UserError,
        match=r"source\.tar broke off after \d samples .*: run again, finished shards are kept",
    ):
        fill(tmp_path / "store", [file, url], counter=BadSampleCounter(1.0))
    source.write_bytes(whole)
    again = FakeCLIP()
    assert fill(tmp_path / "store", [file, url], again).row_counts([file, url]) == [9, 12]
    assert again.seen == 12
    source.write_bytes(whole[: len(whole) // 2])
    # and no line on each row that lies behind
    assert ["broke off" in line for line in verify(tmp_path / "store")] == [True]
