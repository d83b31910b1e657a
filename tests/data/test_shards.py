"""Shards: which files are read, what a sample is, and what is skipped and named."""

import itertools
import pickle

import pytest
import torch

from tests.data.loaderkit import keep, loader, take
from tests.data.shardkit import picture, write_shards, write_tar
from unclip_pl.data.bad_samples import BadSample, BadSampleCounter
from unclip_pl.data.decoding import decode
from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.data.names import expand
from unclip_pl.data.reader import ShuffledShards
from unclip_pl.data.shards import count_samples, raw_samples
from unclip_pl.utils.errors import UserError


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path, [9, 4, 12, 7, 5, 11])


def test_patterns_lists_folders_and_urls_expand(tmp_path, shards):
    assert (
        expand(str(tmp_path))
        == expand(str(tmp_path / "{00000..00005}.tar"))
        == expand(str(tmp_path / "*.tar"))
        == shards
    )
    assert expand([shards[2], str(tmp_path / "{00000,00001}.tar")]) == [shards[2], *shards[:2]]
    assert expand("https://host/{0..1}.tar") == ["https://host/0.tar", "https://host/1.tar"]


@pytest.mark.parametrize(
    "spec",
    ["nothing", "none-*.tar", "{00000..00007}.tar", "empty", "{0..", "rados://bucket/0.tar", []],
)
def test_what_matches_nothing_is_one_sentence(tmp_path, shards, spec, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    if spec == []:
        assert expand(spec) == []
        return
    with pytest.raises(UserError) as error:
        expand(spec)
    assert "\n" not in str(error.value) and (
        "shard" in str(error.value) or ".tar" in str(error.value)
    )


def test_img2dataset_output_is_read_as_it_is(noto):
    shards = expand(str(noto))
    samples = [sample for shard in shards for sample in raw_samples(shard, BadSampleCounter(0))]
    assert len(samples) == sum(map(count_samples, shards)) == 400
    assert len({sample["key"] for sample in samples}) == 400 and all(
        sample["caption"] for sample in samples
    )
    image = decode(samples[0]["image"], 64)
    assert image.shape == (3, 64, 64)
    assert image.dtype == torch.float32
    assert -1 <= image.min() < image.max() <= 1


def test_a_shard_is_read_through_a_pipe(shards):
    url = f"pipe:cat {shards[1]}"
    assert expand(url) == [url]
    assert [s["key"] for s in raw_samples(url, BadSampleCounter(0))] == [
        s["key"] for s in raw_samples(shards[1], BadSampleCounter(0))
    ]
    assert count_samples(url) == 4


def test_captions_come_from_txt_then_json_and_may_be_missing(tmp_path):
    image = picture(0)
    shard = write_tar(
        tmp_path / "a.tar",
        {
            "a.png": image,
            "a.txt": b" one \n",
            "b.jpg": image,
            "b.json": b'{"caption": "two"}',
            "c.webp": image,
            "d.png": image,
            "d.txt": b"",
            "e.png": image,
            "e.json": b"[1]",
            "f.PNG": image,
            "f.txt": b"\xff",
        },
    )
    assert {s["key"]: s["caption"] for s in raw_samples(shard, BadSampleCounter(0))} == {
        "a": "one",
        "b": "two",
        "c": "",
        "d": "",
        "e": "",
        "f": "ÿ",
    }


def test_no_pickle_is_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    bomb = pickle.dumps(Bomb())
    shard = write_tar(
        tmp_path / "a.tar",
        {
            "a.png": picture(1),
            "a.txt": b"x",
            "a.pkl": bomb,
            "a.pth": bomb,
            "a.pyd": bomb,
            "b.png": bomb,
            "b.txt": b"y",
        },
    )
    for sample in raw_samples(shard, BadSampleCounter(1)):
        try:
            decode(sample["image"], 8)
        except BadSample:
            assert sample["key"] == "b"
    assert not (tmp_path / "boom").exists()


def test_bad_samples_are_named_and_counted(tmp_path, caplog):
    shard = write_tar(
        tmp_path / "a.tar",
        {
            "a.png": b"garbage",
            "a.txt": b"x",
            "b.txt": b"no image",
            "c.png": picture(0)[:-40],
            "c.txt": b"cut",
            "d.png": picture(1),
            "d.json": b"{",
            "e.png": picture(2),
        },
    )
    samples = ShuffledShards([shard], 8, LoaderConfig(max_bad_rate=1.0), keep)
    assert [s["key"] for s in itertools.islice(samples, 3)] == ["e"] * 3
    for key, reason in {
        "a": "cannot be decoded",
        "b": "no image",
        "c": "cannot be decoded",
        "d": ".json cannot be read",
    }.items():
        assert any(
            f"sample {key} of {shard}" in line and reason in line for line in caplog.messages
        ), key


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_too_many_bad_samples_stop_the_run_with_one_sentence(tmp_path, workers):
    shards = write_shards(tmp_path, [100, 100], bad=set(range(0, 200, 20)))
    assert len(take(loader(shards, steps=40, max_bad_rate=0.06), 40)) == 40
    with pytest.raises(UserError) as error:
        take(loader(shards, steps=50, max_bad_rate=0.04, num_workers=workers), 50)
    assert "could not be used" in str(error.value)
    assert "max_bad_rate (0.04)" in str(error.value)
    assert "\n" not in str(error.value)


def test_truncated_garbage_and_missing_shards_have_sentences(tmp_path, shards, caplog):
    whole = (tmp_path / "00002.tar").read_bytes()
    (tmp_path / "00002.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "00001.tar").write_bytes(b"garbage" * 1000)
    counter = BadSampleCounter(1.0)
    assert 3 < len(list(raw_samples(shards[2], counter))) < 12
    assert list(raw_samples(shards[1], counter)) == []
    assert any("the rest of shard" in line and "no whole tar" in line for line in caplog.messages)
    with pytest.raises(UserError, match=r"00001\.tar is no whole tar"):
        count_samples(shards[1])
    with pytest.raises(UserError, match="is gone"):
        list(raw_samples(str(tmp_path / "none.tar"), counter))
    list(raw_samples("pipe:false", counter))
    assert any("pipe:false" in line for line in caplog.messages)


def test_a_broken_shard_counts_for_what_it_lost(tmp_path):
    shards = write_shards(tmp_path, [200, 200])
    data = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(data[: len(data) // 2 + 100])
    counter = BadSampleCounter(0.9)
    for shard in shards:
        for _ in raw_samples(shard, counter):
            counter.record_good()
    assert counter.bad == 400 - (counter.seen - counter.bad) and 95 < counter.bad < 105


def test_data_without_one_usable_sample_end_in_a_sentence(tmp_path):
    shards = write_shards(tmp_path, [20], bad=set(range(20)))
    with pytest.raises(UserError, match="no usable sample"):
        take(loader(shards, max_bad_rate=1.0), 1)
