"""What goes wrong with a user's data and disks: damaged tars, bombs, doubled keys, servers, old manifests, full and read-only disks, clocks."""

import functools
import gzip
import http.server
import itertools
import json
import multiprocessing
import os
import re
import struct
import threading
import time
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image, ImageFile

from tests.data.shardkit import FakeCLIP, picture, write_shards, write_tar
from tests.data.test_modules import Recorder, data_of
from tests.data.test_modules import fit as fit_data
from tests.data.test_shards import keep, loader, saved, take
from tests.disk import enlarge, read_only, small_disk
from tests.training import toy
from unclip_pl.cluster.checkpoint_io import newest_checkpoint
from unclip_pl.data.bad_samples import BadSample, BadSampleCounter
from unclip_pl.data.decoding import decode
from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.data.names import expand
from unclip_pl.data.openmoji import openmoji_shards
from unclip_pl.data.reader import SKIPPED, ShuffledShards
from unclip_pl.data.shards import count_samples, raw_samples
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.verify import verify
from unclip_pl.datamodules.image_embedding import ImageEmbeddingData
from unclip_pl.datamodules.image_text import ImageTextData
from unclip_pl.training.checkpoints import NewestCheckpoint
from unclip_pl.training.progress import Progress
from unclip_pl.utils.errors import UserError


def keys_of(shard: str, counter: BadSampleCounter) -> list[str]:
    return [sample["key"] for sample in raw_samples(shard, counter)]


@pytest.mark.parametrize("packed", [False, True])
def test_damage_anywhere_in_a_tar_is_named_and_counted(tmp_path, packed, caplog):
    pack = gzip.compress if packed else bytes
    (shard,) = write_shards(tmp_path, [20])
    whole = Path(shard).read_bytes()
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    damaged = [
        whole[:at] + b"\x99" * 512 + whole[at + 512 :] for at in headers[3::9]
    ]  # tarfile takes such a header for the end
    cut = [whole[:at] for at in (headers[5], headers[5] + 300, headers[-1], headers[-1] + 700)]
    for data, images in [
        *((data, 19) for data in damaged),
        *zip(cut, (1, 1, 20, 20), strict=True),
    ]:  # what ends is a .json that nobody needs
        Path(shard).write_bytes(pack(data))
        caplog.clear()
        counter = BadSampleCounter(1.0)
        assert (
            len(keys_of(shard, counter)) <= images
            and counter.bad >= 1
            and any("is no whole tar" in line for line in caplog.messages)
        )
        with pytest.raises(UserError, match="is no whole tar"):
            count_samples(shard)
    for length in (0, 1, 5, 11, 40) if packed else (0, 1, 100, 511):
        Path(shard).write_bytes(pack(whole)[:length])
        counter = BadSampleCounter(1.0)
        assert keys_of(shard, counter) == [] and counter.bad == 1


def png_header(side: int) -> bytes:
    """A PNG that says it is side x side and has no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">II", zlib.crc32(body), 9999)
        + b"IDAT"
    )


@pytest.mark.filterwarnings(
    "ignore::PIL.Image.DecompressionBombWarning"
)  # as shards.py has it; pytest sets filters of its own
def test_a_picture_of_a_hundred_megapixels_is_a_bad_sample_at_once(tmp_path, caplog, monkeypatch):
    huge = saved(Image.new("1", (10_000, 10_000)))
    load, loaded = ImageFile.ImageFile.load, []
    monkeypatch.setattr(
        ImageFile.ImageFile,
        "load",
        lambda image: loaded.append(image.width * image.height) or load(image),
    )
    shard = write_tar(
        tmp_path / "a.tar",
        {"a.png": huge, "b.png": png_header(40_000), "c.png": b"", "d.png": picture(1)},
    )
    samples = ShuffledShards([shard], 8, LoaderConfig(max_bad_rate=1.0), keep)
    assert [sample["key"] for sample in itertools.islice(samples, 2)] == [
        "d",
        "d",
    ]  # and so a whole pass
    assert loaded and max(loaded) < 10_000  # "at once": the pixels of no other were read
    with warnings.catch_warnings(), pytest.raises(BadSample, match="larger than 50 megapixels"):
        warnings.simplefilter("error")
        decode(huge, 8)
    for key, reason in {
        "a": "larger than 50 megapixels",
        "b": "larger than 50 megapixels",
        "c": "0 bytes",
    }.items():
        assert any(
            f"sample {key} of {shard}" in line and reason in line for line in caplog.messages
        ), key


def test_a_jpeg_of_a_hundred_megapixels_is_decoded_at_an_eighth():
    large = saved(Image.new("L", (10_000, 10_000), 200), "JPEG", quality=50)
    assert decode(large, 64).unique().numpy() == pytest.approx(200 / 127.5 - 1, abs=0.01)
    with pytest.raises(BadSample, match="larger than 50 megapixels"):
        decode(large, 4096)  # nothing can be left out


def test_of_doubled_keys_the_first_is_taken_and_the_rest_named(tmp_path, caplog):
    shard = write_tar(tmp_path / "a.tar", {
        "a.png": picture(1), "a.txt": b"first", "b.png": picture(2), "./a.png": picture(9), "c.png": picture(3), "c.PNG": picture(8), "c.txt": b"c",
    })  # fmt: skip
    again = write_shards(tmp_path, [2])[0]
    data = Path(again).read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % 512)
    Path(again).write_bytes(
        data + data + bytes(1024)
    )  # every sample twice, the tar appended to itself
    counter = BadSampleCounter(1.0)
    found = {sample["key"]: sample for sample in raw_samples(shard, counter)}
    assert (
        found["a"]["caption"] == "first"
        and found["c"]["image"] == picture(3)
        and counter.bad == len(caplog.messages)
    )
    assert any("the second of the name c.PNG" in line for line in caplog.messages)
    caplog.clear()
    assert keys_of(again, counter) == ["000000", "000001"]
    assert [
        f"sample 00000{n} of {again}" in line and "has the same key" in line
        for n, line in enumerate(caplog.messages)
    ] == [True, True]
    store = EmbeddingStore(tmp_path / "store")
    store.ensure([again], FakeCLIP(), progress=False, counter=BadSampleCounter(1.0))
    assert store.row_counts([again]) == [2] and verify(store.folder) == []


def test_pictures_of_every_format_with_gaps_and_json_captions_make_batches(tmp_path):
    drawing = Image.radial_gradient("L").convert("RGB")
    shard = write_tar(tmp_path / "00000.tar", {
        "000000003.jpg": saved(drawing, "JPEG", quality=95), "000000003.json": b'{"caption": "three", "status": "success"}', "000000003.txt": b"three",
        "000000007.png": saved(drawing), "000000007.json": b'{"caption": "seven"}', "000000011.webp": saved(drawing, "WEBP", lossless=True),
        "000000011.txt": b"eleven", "000000012.json": b'{"caption": "failed to download", "status": "failed_to_download"}',
        "000000019.jpg": saved(drawing, "WEBP", lossless=True), "000000019.txt": b"nineteen, named wrongly",
    })  # fmt: skip
    data = data_of(ImageTextData, [shard], max_bad_rate=1.0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch["key"]) == ["000000003", "000000007", "000000011", "000000019"]
    exact = decode(saved(drawing), 8)
    assert (batch["image"] - exact).abs().amax() < 0.05
    assert all(
        word in " ".join(batch["caption"]).lower()
        for word in ("three", "seven", "eleven", "nineteen")
    )


@pytest.fixture
def server(tmp_path):
    """(address, folder) of a web server on this machine."""
    folder = tmp_path / "www"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    ) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder
        httpd.shutdown()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_come_over_http_by_a_brace_pattern(server, workers, caplog):
    address, folder = server
    here = write_shards(folder, [9, 4, 12])
    there = expand(f"{address}/{{00000..00002}}.tar")
    assert list(map(count_samples, there)) == [9, 4, 12]
    assert [keys_of(shard, BadSampleCounter(0)) for shard in there] == [
        keys_of(shard, BadSampleCounter(0)) for shard in here
    ]
    assert (
        sorted(itertools.chain(*take(loader(there, steps=6, num_workers=workers), 6)))[-1]
        <= "000024"
    )
    missing = f"{address}/00003.tar"
    counter = BadSampleCounter(1.0)
    assert keys_of(missing, counter) == [] and counter.bad == 1 and missing in caplog.messages[-1]
    with pytest.raises(UserError, match=r"00003\.tar is no whole tar"):
        count_samples(missing)


def test_shards_in_s3_come_through_the_command_that_fetches_them(tmp_path, monkeypatch):
    (tmp_path / "bucket").mkdir()
    shards = write_shards(tmp_path / "bucket", [9, 4])
    aws = tmp_path / "aws"
    aws.write_text(
        f'#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] && exec cat "{tmp_path}/${{3#s3://}}"\nexit 9\n'
    )
    aws.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError) as error:
        expand("s3://bucket/00000.tar")
    assert "'pipe:aws s3 cp s3://bucket/00000.tar -'" in str(error.value)
    urls = expand("pipe:aws s3 cp s3://bucket/{00000..00001}.tar -")
    assert [keys_of(url, BadSampleCounter(0)) for url in urls] == [
        keys_of(shard, BadSampleCounter(0)) for shard in shards
    ]


class ReaderOf(ShuffledShards):
    """What one reader gives, here and now."""

    def reader(self) -> tuple[int, int]:
        return self.place


@pytest.mark.parametrize("workers", [0, 2])
def test_the_progress_bar_counts_bad_samples_that_any_worker_met(tmp_path, workers):
    (tmp_path / "shards").mkdir()
    shards = write_shards(tmp_path / "shards", [20] * 4, bad={3, 17, 30, 44, 45, 61, 70, 79})

    class Watching(Recorder):
        def training_step(self, batch, batch_idx):
            assert (
                SKIPPED not in batch
            )  # a number of the host, which no device needs to be asked for
            return super().training_step(batch, batch_idx)

    progress = Progress(refresh_rate=1)
    data = data_of(ImageTextData, shards, num_workers=workers, max_bad_rate=0.2)
    module = Watching()
    trainer = Trainer(
        default_root_dir=tmp_path, max_steps=54, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        num_sanity_val_steps=0, use_distributed_sampler=False, callbacks=[progress],
    )  # fmt: skip
    before = set(multiprocessing.active_children())
    trainer.fit(
        module, datamodule=data
    )  # 54 batches of 4 are three passes over the 72 good samples
    assert set(multiprocessing.active_children()) <= before  # no worker outlives the training
    count = trainer.train_dataloader.bad
    readers = [
        ReaderOf(data.train_shards, 8, data.config, data.sample_transform(train=True))
        for _ in range(workers or 1)
    ]
    for place, reader in enumerate(readers):
        reader.place = place, len(readers)
    assert count == sum(
        sample[SKIPPED]
        for reader in readers
        for sample in itertools.islice(reader, 216 // len(readers))
    )
    assert isinstance(count, int) and 16 < count < 32
    assert f"bad={count}" in progress.train_progress_bar.postfix
    clean = loader(write_shards(tmp_path, [20] * 4), num_workers=workers)
    take(clean, 14)
    assert clean.bad == 0


def test_embeddings_without_their_images_are_left_over(tmp_path):
    shards = write_shards(tmp_path, [9, 8])
    store = EmbeddingStore(tmp_path / "store")
    store.ensure(shards, FakeCLIP(), progress=False)
    write_tar(tmp_path / "00001.tar", {f"{n:06d}.png": picture(n) for n in (9, 12, 16)})
    assert sum("has no image" in line for line in verify(store.folder)) == 5
    data = data_of(ImageEmbeddingData, shards, shards[1:], tmp_path / "store", max_bad_rate=0.0)
    data.setup("fit")  # as on a rank that finds the store as it is
    seen = [key for _ in range(2) for batch in data.train_dataloader() for key in batch["key"]]
    assert set(seen) <= {f"{n:06d}" for n in (*range(9), 9, 12, 16)} and len(seen) == 2 * 4 * (
        17 // 4
    )
    assert [key for batch in data.val_dataloader() for key in batch["key"]] == [
        "000009",
        "000012",
        "000016",
    ]


def test_a_manifest_of_another_version_is_refused_before_any_work(tmp_path):
    shards = write_shards(tmp_path, [9, 4])
    store = EmbeddingStore(tmp_path / "store")
    store.ensure(shards[:1], FakeCLIP(), progress=False)
    path = store.folder / "manifest.json"
    good = path.read_text()
    path.write_text(json.dumps({"format": 7, "tables": []}))
    clip = FakeCLIP()
    for use in (
        lambda: store.ensure(shards, clip, progress=False),
        lambda: store.finish(shards[:1], clip),
        lambda: verify(store.folder),
    ):
        with pytest.raises(UserError, match="has format 7, this version reads 1: fill a new one"):
            use()
    assert clip.seen == 0 and json.loads(path.read_text())["format"] == 7
    for damaged in ("", good[:50], "[]", "{}"):
        path.write_text(damaged)
        with pytest.raises(UserError, match="no whole embedding store"):
            verify(store.folder)
        store.ensure(shards[:1], clip, progress=False)
        assert path.read_text() == good and clip.seen == 0
    (store.folder / "clip.json").write_text("{")
    with pytest.raises(UserError, match=r"clip\.json cannot be read .* fill a new store"):
        store.ensure(shards, clip, progress=False)


@pytest.mark.parametrize("may_mount", [True, False])
def test_a_store_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    tmp_path, monkeypatch, may_mount
):
    if not may_mount:
        monkeypatch.setattr("tests.disk.mount", lambda *_: False)
    shards = write_shards(tmp_path, [150] * 4)
    with small_disk(tmp_path / "disk", "48k") as disk:
        store = EmbeddingStore(disk / "store")
        with pytest.raises(
            UserError,
            match=r"cannot be written \(the disk is full\): free space, or choose another folder",
        ) as error:
            store.ensure(shards, FakeCLIP(), progress=False)
        done = len(list(store.folder.glob("*.safetensors")))
        assert (
            "\n" not in str(error.value) and not list(store.folder.glob("*.tmp")) and 0 < done < 4
        )
        enlarge(disk, "4m")
        second = FakeCLIP()
        store.ensure(shards, second, progress=False)
        assert second.seen == 150 * (4 - done) and verify(store.folder, shards) == []


def test_a_whole_cache_may_be_read_only_and_one_that_is_not_says_so(tmp_path, monkeypatch):
    (tmp_path / "tars").mkdir()
    shards = write_shards(tmp_path / "tars", [9, 4])
    cache = tmp_path / "cache"
    store = EmbeddingStore(cache / "store")
    store.ensure(shards[:1], FakeCLIP(), progress=False)
    monkeypatch.setenv("UNCLIP_CACHE", str(cache))
    with read_only(cache), read_only(cache / "store") as folder:
        data = data_of(ImageEmbeddingData, shards[:1], store=folder)
        assert [len(keys) for keys in fit_data(data, tmp_path, 3).keys] == [4, 4, 4]
        for use in (
            lambda: EmbeddingStore(folder).ensure(shards, FakeCLIP(), progress=False), lambda: EmbeddingStore(cache / "new").ensure(shards, FakeCLIP()),
            lambda: openmoji_shards(32, progress=False),
        ):  # fmt: skip
            with pytest.raises(
                UserError,
                match=r"cannot be written \((the file system is read-only|no permission)\).*UNCLIP_CACHE",
            ):
                use()


def test_a_clock_that_runs_backwards_changes_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "tars").mkdir()
    shards = write_shards(tmp_path / "tars", [9, 4])
    hours = itertools.count(1_900_000_000, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(hours)))
    monkeypatch.setattr(time, "time_ns", lambda: next(hours) * 10**9)
    store = EmbeddingStore(tmp_path / "store")
    store.ensure(shards, FakeCLIP(), 2)
    again = FakeCLIP()
    assert store.ensure(shards, again) == 0 and again.seen == 0 and verify(store.folder) == []
    toy.trainer(tmp_path / "run", NewestCheckpoint(2), steps=5).fit(toy.Toy(), toy.loader())
    assert newest_checkpoint(tmp_path / "run").name == "newest-step=5.ckpt"
    rates = [float(rate) for rate in re.findall(r"(\S+) images/s", capsys.readouterr().err)]
    assert rates and all(0 <= rate < 1e6 for rate in rates)


def test_the_newest_checkpoint_is_that_of_the_highest_step_whatever_its_time(tmp_path):
    for age, step in enumerate([30, 9, 100]):
        torch.save({}, tmp_path / f"newest-step={step}.ckpt")
        os.utime(tmp_path / f"newest-step={step}.ckpt", (2e9 - 1e6 * step - age,) * 2)
    assert newest_checkpoint(tmp_path).name == "newest-step=100.ckpt"
    (tmp_path / "copy").mkdir()
    for name in ("copy/newest-step=100.ckpt", "best-step=100.ckpt"):
        torch.save({}, tmp_path / name)
    for times in ((1, 2e9), (2e9, 1)):
        for name, moment in zip(
            ("newest-step=100.ckpt", "copy/newest-step=100.ckpt"), times, strict=True
        ):
            os.utime(tmp_path / name, (moment, moment))
        assert newest_checkpoint(tmp_path) == tmp_path / "newest-step=100.ckpt"
