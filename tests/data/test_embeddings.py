"""The embedding store: whole, by key, never done twice, for one CLIP; what is wrong with it is named."""

import io
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.data.shardkit import FakeCLIP, picture, write_shards, write_tar
from unclip_pl.cli import unclip as app
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


def fill(folder, shards, clip=None, **kwargs) -> EmbeddingStore:
    store = EmbeddingStore(folder)
    store.ensure(shards, clip or FakeCLIP(), 5, progress=False, **kwargs)
    return store


def spoil(store: EmbeddingStore, shard: str, change) -> None:
    """Rewrite a file of the store with `change(tensors, metadata)` applied."""
    path = store.path(shard)
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)


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
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {  # noqa: SIM118
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


def test_a_killed_run_goes_on_and_gives_the_same_rows(tmp_path, shards):
    fresh = fill(tmp_path / "fresh", shards)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "store", shards, FakeCLIP(die_after=15))
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 2 and not list(
        (tmp_path / "store").glob(".*.tmp")
    )
    with pytest.raises(UserError, match="no whole embedding store"):
        verify(tmp_path / "store")
    second = FakeCLIP()
    store = fill(tmp_path / "store", shards, second)
    assert second.seen == 12
    for shard in shards:
        assert (
            store.path(shard).read_bytes() == (fresh.folder / store.path(shard).name).read_bytes()
        )
    assert store.manifest == fresh.manifest


def test_a_file_cut_short_is_made_anew(tmp_path, shards):
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


class Logging(FakeCLIP):
    """Writes into a file how many images it has seen; ends its process by SIGKILL at a batch, or just before a shard's file gets its name."""

    def __init__(self, log, batch: int | None, write: int | None) -> None:
        super().__init__()
        self.log, self.batch, self.write = log, batch, write

    def embed_images(self, images):
        with self.log.open("a") as file:
            print(len(images), file=file)
        if self.batch is not None:
            self.batch -= 1
            if self.batch < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().embed_images(images)


def _fill_and_die(folder, shards, log, batch, write) -> None:
    torch.set_num_threads(1)
    if write is not None:
        names = iter(range(write))

        def replace(self, target, real=Path.replace):
            if target.suffix == ".safetensors" and next(names, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, target)

        Path.replace = replace
    fill(folder, shards, Logging(log, batch, write))


@pytest.mark.slow
def test_a_store_killed_three_times_ends_whole_and_does_no_shard_twice(tmp_path):
    shards = write_shards(tmp_path, [20] * 12)  # four batches a shard
    fresh = fill(tmp_path / "fresh", shards)
    store, log, done = EmbeddingStore(tmp_path / "store"), tmp_path / "seen.txt", 0
    context = multiprocessing.get_context("spawn")
    for batch, write, whole in ((6, None, 1), (None, 3, 4), (13, None, 7), (None, None, 12)):
        log.write_text("")
        process = context.Process(
            target=_fill_and_die, args=(store.folder, shards, log, batch, write)
        )
        process.start()
        process.join(120)
        assert process.exitcode == (0 if whole == 12 else -signal.SIGKILL)
        assert [store.is_done(shard) for shard in shards] == [True] * whole + [False] * (12 - whole)
        embedded = sum(map(int, log.read_text().split()))
        assert embedded <= 20 * (
            min(whole + 1, 12) - done
        )  # the shards that were done already were left alone
        assert len(list(store.folder.glob(".*.tmp"))) == (write is not None)
        done = whole
    for shard in shards:
        assert (
            store.path(shard).read_bytes() == (fresh.folder / store.path(shard).name).read_bytes()
        )
    assert store.manifest == fresh.manifest and verify(store.folder, shards, FakeCLIP()) == []


def _ensure(folder, shards, queue) -> None:
    clip = FakeCLIP()
    fill(folder, shards, clip)
    queue.put(clip.seen)


@pytest.mark.slow
def test_two_processes_fill_one_store_and_share_the_work(tmp_path):
    shards = write_shards(tmp_path, [20] * 12)
    context = multiprocessing.get_context("spawn")  # torch threads do not survive a fork
    queue = context.Queue()
    processes = [
        context.Process(target=_ensure, args=(tmp_path / "store", shards, queue)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    seen = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sum(seen) == 240
    assert verify(tmp_path / "store", shards) == []


def test_ranks_take_disjoint_shards_and_one_finishes(tmp_path, shards):
    clips = [FakeCLIP(), FakeCLIP()]
    for rank, clip in enumerate(clips):
        store = EmbeddingStore(tmp_path / "store")
        store.embed(shards[rank::2], clip, progress=False)
    assert [clip.seen for clip in clips] == [21, 4]
    assert not (tmp_path / "store" / "manifest.json").exists()
    store.finish(shards, clips[0])
    assert verify(store.folder, shards) == []


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


def test_verify_names_missing_doubled_and_non_finite_rows(tmp_path, shards):
    store = fill(tmp_path / "store", shards)

    def change(tensors, metadata):
        rows = json.loads(metadata["rows"])
        rows["keys"][1:3] = [rows["keys"][0], "stranger"]
        metadata["rows"] = json.dumps(rows)
        tensors["text_embed"][3, 2] = float("nan")
        tensors["image_embed"][4, 0] = float("inf")

    spoil(store, shards[0], change)
    store.path(shards[1]).unlink()
    extra = write_tar(tmp_path / "extra.tar", {"x.png": picture(0)})
    problems = "\n".join(verify(store.folder, [*shards, extra]))
    for line in [
        "key 000000 is doubled, it has 2 rows",
        "key 000001 is missing",
        "key 000002 is missing",
        "the row of key stranger has no image",
        "key 000003 has a text_embed that is not finite",
        "key 000004 has a image_embed that is not finite",
        f"{store.path(shards[1])}: the rows of",
        f"{store.path(extra)}: the rows of",
    ]:
        assert line in problems, line
    assert "00002.tar" not in problems and len(problems.splitlines()) == 8


def test_verify_names_rows_that_are_too_few(tmp_path, shards):
    store = fill(tmp_path / "store", shards)
    spoil(
        store,
        shards[0],
        lambda tensors, _: tensors.update(image_embed=tensors["image_embed"][:8].clone()),
    )
    assert verify(store.folder) == [
        f"{store.path(shards[0])}: 8 rows of image_embed for 9 keys (of {shards[0]})"
    ]


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
    clip.embed_images = lambda images: embed(images).masked_fill(
        torch.arange(len(images))[:, None] == 1, 1e9
    )  # too large for float16
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
assert sum(store.row_counts(shards)) == store.statistics().count == 2 * len(shards) and all(map(store.is_done, shards))
rows = EmbeddingTable(store, shards)
batch = rows[np.arange(len(rows))]
assert len(batch["key"]) == len(set(batch["key"])) == 2 * len(shards) and batch["image_embed"].isfinite().all()
assert verify(folder, shards) == []
held = []
for use in (store.is_done, lambda shard: EmbeddingStore(folder).shard(shard), lambda shard: store.ensure([shard], FakeCLIP(), progress=False)):
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
    assert (
        fill(tmp_path / "store", [file, url], again).row_counts([file, url]) == [9, 12]
        and again.seen == 12
    )
    source.write_bytes(whole[: len(whole) // 2])
    assert ["broke off" in line for line in verify(tmp_path / "store")] == [
        True
    ]  # and no line on each row that lies behind


def test_what_another_process_embedded_meanwhile_is_not_counted(tmp_path, shards):
    class Meanwhile(FakeCLIP):
        def embed_images(self, images):
            if self.seen == 0:
                fill(tmp_path / "store", shards[1:2])
            return super().embed_images(images)

    store = EmbeddingStore(tmp_path / "store")
    assert store.ensure(shards, Meanwhile(), progress=False) == 2 and store.row_counts(shards) == [
        9,
        4,
        12,
    ]
    assert store.ensure(shards, FakeCLIP(), progress=False) == 0


def test_verify_names_what_to_delete_and_never_a_tar(tmp_path, capsys):
    (tmp_path / "tars").mkdir()
    shards = write_shards(tmp_path / "tars", [9, 4, 12, 5], bad={3})
    store = fill(tmp_path / "store", shards, counter=BadSampleCounter(1.0))
    assert app.main(["data", "verify", str(store.folder)]) == 0
    told = capsys.readouterr().out
    assert (
        told.startswith(
            f"note: sample 000003 of {shards[0]} has no row: its image cannot be decoded"
        )
        and "is whole, but for images" in told
    )
    write_tar(Path(shards[1]), {"new.png": picture(77), "new.txt": b"new"})
    spoil(store, shards[2], lambda tensors, _: tensors["image_embed"].fill_(float("nan")))
    Path(shards[3]).unlink()
    lines = verify(store.folder)
    named = {line.partition(": ")[0] for line in lines if ".safetensors: " in line}
    assert named == {str(store.path(shard)) for shard in shards[1:3]}
    assert [line for line in lines if ".safetensors: " not in line] == [
        line for line in lines if line.startswith(f"The shard {shards[3]} cannot be read")
    ]
    assert not any(line.startswith(shard) for line in lines for shard in shards)
    assert app.main(["data", "verify", str(store.folder)]) == 1
    assert (
        "delete the .safetensors files that lines begin with, never a .tar"
        in capsys.readouterr().err
    )
    for name in named:
        Path(name).unlink()
    fill(tmp_path / "store", shards[:3], counter=BadSampleCounter(1.0))
    assert verify(store.folder, shards[:3]) == []
