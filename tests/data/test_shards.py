"""Shards and their loaders: what is read, what is passed over, and that a stopped run goes on at the very next sample."""

import io
import itertools
import multiprocessing
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.data.shardkit import picture, pixels, write_shards, write_tar
from unclip_pl.data.bad_samples import BadSample, BadSampleCounter
from unclip_pl.data.decoding import decode
from unclip_pl.data.loader import TrainLoader, ValidationLoader, count_steps_per_epoch
from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.data.names import expand
from unclip_pl.data.reader import SequentialShards, ShuffledShards
from unclip_pl.data.shards import count_samples, raw_samples
from unclip_pl.utils.errors import UserError


def keep(sample: dict, epoch: int) -> dict:
    return {"key": sample["key"], "epoch": epoch, "image": sample["image"]}


def loader(shards, steps=7, rank=0, world=1, start_method=None, **config) -> TrainLoader:
    config = LoaderConfig(**{"batch_size": 4, "num_workers": 0, "window": 2, **config})
    return TrainLoader(
        ShuffledShards(shards, 8, config, keep, rank=rank, world=world), steps, start_method
    )


def take(batches: TrainLoader, count: int) -> list[list[str]]:
    """Keys of the next `count` batches, over as many epochs as that takes."""
    found = []
    while len(found) < count:
        for batch in batches:
            found.append(batch["key"])
            if len(found) == count:
                break
    return found


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path, [9, 4, 12, 7, 5, 11])


def saved(data: bytes | Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    data.save(file, kind, **options)
    return file.getvalue()


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
    ["nothing", "none-*.tar", "{00000..00007}.tar", "empty", "{0..", "s3://bucket/0.tar", []],
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
    assert (
        image.shape == (3, 64, 64)
        and image.dtype == torch.float32
        and -1 <= image.min() < image.max() <= 1
    )


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


def test_transparency_is_white_and_exif_turns():
    clear = saved(Image.new("RGBA", (20, 20), (255, 0, 0, 0)))
    assert torch.equal(decode(clear, 8), torch.ones(3, 8, 8))
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([0, 0, 0] * 256)
    assert torch.equal(decode(saved(palette, transparency=0), 8), torch.ones(3, 8, 8))
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright: turn by 90 degrees clockwise
    half = Image.new("RGB", (32, 32), "black")
    half.paste("white", (0, 0, 32, 16))  # white above: turned, white at the right
    turned = decode(saved(half, "JPEG", exif=exif), 8)
    assert turned[:, :, 5:].min() > 0.8 and turned[:, :, :3].max() < -0.8


def test_grey_16_bit_and_cmyk_keep_their_brightness():
    assert decode(saved(Image.fromarray(pixels(257 * 100))), 8).unique().numpy() == pytest.approx(
        100 / 127.5 - 1, abs=1e-5
    )
    assert decode(saved(Image.new("L", (9, 9), 100)), 8).unique().numpy() == pytest.approx(
        100 / 127.5 - 1, abs=1e-5
    )
    assert decode(saved(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG"), 8).min() > 0.97


def test_the_short_side_is_resized_antialiased_and_the_centre_cut():
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste("white", (32, 0, 64, 32))
    assert (
        decode(saved(wide), 16)[..., 1:-1].min() > 0.95
    )  # at the very edge the filter sees the black beside the cut
    checks = Image.new("L", (64, 64))
    checks.putdata([255 * ((x + y) % 2) for y in range(64) for x in range(64)])
    assert decode(saved(checks), 8).abs().max() < 0.05  # grey, not aliased to black or white
    strip = decode(saved(Image.new("RGB", (20000, 2), "red")), 64)
    assert strip.shape == (3, 64, 64) and strip[0].min() > 0.99


def test_a_large_jpeg_decoded_small_is_the_same_picture(tmp_path, noto):
    picture = decode(next(raw_samples(expand(str(noto))[0], BadSampleCounter(0)))["image"], 256)
    large = Image.fromarray(
        ((picture.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype("uint8")
    ).resize((1024, 1024), Image.Resampling.BICUBIC)
    jpeg, whole = (
        saved(large, "JPEG", quality=95),
        decode(saved(Image.open(io.BytesIO(saved(large, "JPEG", quality=95)))), 64),
    )
    assert 0 < (decode(jpeg, 64) - whole).abs().mean() < 0.02
    assert torch.equal(decode(jpeg, 64, exact_jpeg=True), whole)
    shard = write_tar(tmp_path / "a.tar", {"a.jpg": jpeg, "a.txt": b"a"})
    exact, fast = (
        next(iter(ShuffledShards([shard], 64, LoaderConfig(exact_jpeg=exact), keep)))["image"]
        for exact in (True, False)
    )
    assert torch.equal(exact, whole) and not torch.equal(fast, whole)


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
    assert (
        "could not be used" in str(error.value)
        and "max_bad_rate (0.04)" in str(error.value)
        and "\n" not in str(error.value)
    )


def test_truncated_garbage_and_missing_shards_have_sentences(tmp_path, shards, caplog):
    whole = (tmp_path / "00002.tar").read_bytes()
    (tmp_path / "00002.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "00001.tar").write_bytes(b"garbage" * 1000)
    counter = BadSampleCounter(1.0)
    assert (
        3 < len(list(raw_samples(shards[2], counter))) < 12
        and list(raw_samples(shards[1], counter)) == []
    )
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


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_to_the_sample(shards, workers):
    # 48 samples, epochs of 7 batches of 4: cuts within an epoch, at its end, behind the end of the shards, and twice
    straight = take(loader(shards, num_workers=workers), 30)
    for cut in (0, 3, 7, 12, 14, 23) if workers == 0 else (3, 7, 23):
        first = loader(shards, num_workers=workers)
        assert take(first, cut) == straight[:cut] if cut else True
        second = loader(shards, num_workers=workers)
        second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
        assert len(list(second)) == 7 - (cut % 7 if cut % 7 else 0)
        second = loader(shards, num_workers=workers)
        second.load_state_dict(first.state_dict())
        assert take(second, 30 - cut) == straight[cut:], cut
    third = loader(shards, num_workers=workers)
    third.load_state_dict(first.state_dict())
    take(third, 2)
    fourth = loader(shards, num_workers=workers)
    fourth.load_state_dict(third.state_dict())
    assert take(fourth, 4) == straight[25:29]


def test_resume_is_exact_with_bad_samples_and_at_the_end_of_the_only_window(tmp_path):
    shards = write_shards(tmp_path, [10, 8], bad={0, 17})
    straight = take(loader(shards, steps=4, max_bad_rate=1), 16)
    for cut in range(1, 12):
        first, second = (loader(shards, steps=4, max_bad_rate=1) for _ in range(2))
        take(first, cut)
        second.load_state_dict(first.state_dict())
        assert take(second, 4) == straight[cut : cut + 4]


def test_a_state_of_an_earlier_form_starts_the_next_epoch(shards, caplog):
    second = loader(shards)
    second.load_state_dict(
        {
            "shape": {"world": 1},
            "done": 3,
            "loader": {"dataset_state": {"epoch": 4, "window": 0, "offset": 8}},
        }
    )
    assert (
        next(iter(second))["epoch"].tolist() == [5] * 4 and "start of the next epoch" in caplog.text
    )


def test_a_pass_gives_each_sample_once_and_the_next_another_order(shards):
    flat = [key for keys in take(loader(shards, steps=12), 24) for key in keys]
    one, two = flat[:48], flat[48:]
    assert sorted(one) == sorted(two) == [f"{n:06d}" for n in range(48)]
    assert one != two and one != sorted(one)
    other = [key for keys in take(loader(shards, steps=12, seed=1), 12) for key in keys]
    assert other != one and sorted(other) == sorted(one)


@pytest.mark.parametrize("counts", [[40], [9, 4, 12, 7, 8], [3] * 20])
def test_ranks_and_workers_share_the_samples_and_none_twice(tmp_path, counts, monkeypatch):
    shards, total = write_shards(tmp_path, counts), sum(counts)
    given = Counter()
    for rank in range(2):
        samples = ShuffledShards(shards, 8, LoaderConfig(window=3), keep, rank=rank, world=2)
        for sample in samples:
            if sample["epoch"] > 0:
                break
            given[sample["key"]] += 1
    assert given == Counter(f"{n:06d}" for n in range(total))


def test_fewer_shards_than_workers_still_feed_all_of_them(tmp_path):
    shards = write_shards(tmp_path, [32])
    batches = [take(loader(shards, num_workers=2, rank=rank, world=2), 4) for rank in range(2)]
    flat = [key for rank in batches for keys in rank for key in keys]
    assert len(set(flat)) == len(flat) == 32


def test_spawned_workers_know_their_rank(tmp_path):
    shards = write_shards(tmp_path, [32])
    forked = take(loader(shards, num_workers=1, rank=1, world=2), 4)
    spawned = loader(shards, num_workers=1, rank=1, world=2, start_method="spawn")
    assert take(spawned, 4) == forked
    del spawned
    assert multiprocessing.get_start_method(allow_none=True) in (None, "fork", "forkserver")


@pytest.mark.parametrize("change", [{"seed": 5}, {"window": 1}])
def test_a_state_of_another_shape_starts_the_next_epoch_with_a_warning(shards, caplog, change):
    first, second = loader(shards), loader(shards, **change)
    take(first, 15)  # 60 samples of 48: in epoch 1
    second.load_state_dict(first.state_dict())
    assert "start of the next epoch" in caplog.text and len(caplog.messages) == 1
    assert all(epoch == 2 for epoch in next(iter(second))["epoch"].tolist())
    assert len(list(loader(shards, steps=3))) == 3


@pytest.mark.parametrize(("total", "world"), [(10, 3), (12, 3), (2, 3), (7, 1)])
def test_validation_gives_every_rank_as_much_and_repeats_only_to_fill(tmp_path, total, world):
    shards = write_shards(tmp_path, [total - 1, 1])
    ranks = []
    for rank in range(world):
        samples = SequentialShards(
            shards,
            8,
            LoaderConfig(batch_size=2, num_workers=0),
            keep,
            rank=rank,
            world=world,
            total=total,
        )
        batches = list(ValidationLoader(samples))
        assert len(ValidationLoader(samples)) == len(batches)
        ranks.append([key for batch in batches for key in batch["key"]])
    flat = [key for rank in ranks for key in rank]
    assert {len(rank) for rank in ranks} == {-(-total // world)}
    assert set(flat) == {f"{n:06d}" for n in range(total)} and len(flat) - total < world
    assert ranks[0] == [f"{n:06d}" for n in range(0, total, world)]


def test_validation_with_bad_samples_keeps_ranks_in_step(tmp_path):
    shards = write_shards(tmp_path, [12], bad={0, 3})  # both of rank 0
    config = LoaderConfig(batch_size=2, num_workers=0, max_bad_rate=1.0)
    lengths = [
        len(list(SequentialShards(shards, 8, config, keep, rank=rank, world=3, total=12)))
        for rank in range(3)
    ]
    assert lengths == [4, 4, 4]
    alone = [s["key"] for s in SequentialShards(shards, 8, config, keep, total=12)]
    assert alone == [f"{n:06d}" for n in range(12) if n not in (0, 3)]


def test_steps_of_an_epoch():
    assert count_steps_per_epoch(LoaderConfig(batch_size=8), 100, world=3) == 4
    assert count_steps_per_epoch(LoaderConfig(batch_size=8, steps_per_epoch=9), 100, world=3) == 9
    with pytest.raises(UserError, match="lower data.loader.batch_size"):
        count_steps_per_epoch(LoaderConfig(batch_size=64), 63, world=2)


def test_a_state_is_for_the_same_files_not_for_the_same_names(tmp_path, shards, caplog):
    first = loader(shards)
    take(first, 3)
    for folder, counts in (("moved", [9, 4, 12, 7, 5, 11]), ("other", [9, 4, 12, 7, 50, 11])):
        (tmp_path / folder).mkdir()
        second = loader(write_shards(tmp_path / folder, counts))
        second.load_state_dict(first.state_dict())
        assert ("start of the next epoch" in caplog.text) == (folder == "other")


def until(loaders, epoch, limit=400) -> list[tuple[int, str]]:
    """(epoch, key) of what the ranks' loaders give up to the end of `epoch`, each rank until it has come beyond."""
    given = []
    for one in loaders:
        for batch in (batch for _ in range(limit) for batch in one):
            given += zip(batch["epoch"].tolist(), batch["key"], strict=True)
            if min(batch["epoch"].tolist()) > epoch:
                break
    return given


def resumed(shards, given, old, **shape) -> list[TrainLoader]:
    """Loaders of all ranks of the new `shape` from the state that those of `old` have together; no process group here, so it is put together by hand."""
    states = [one.state_dict() for one in old]
    state = states[0] | {"ranks": [one["ranks"][0] for one in states]}
    world = shape.pop("world", 1)
    new = [loader(shards, rank=rank, world=world, **shape) for rank in range(world)]
    for one in new:
        one.load_state_dict(pickle.loads(pickle.dumps(state)))
    return new


@pytest.mark.parametrize(
    "counts", [[9, 4, 12, 7, 5, 11], [3] * 40], ids=["samples shared out", "shards shared out"]
)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"world": 2}, {"world": 1}), ({"world": 1}, {"world": 3}), ({"world": 3}, {"world": 2, "batch_size": 2}), ({"num_workers": 2}, {"world": 2}),
        ({"world": 2}, {"num_workers": 2}),
    ],
    ids=str,
)  # fmt: skip
def test_another_number_of_readers_gives_each_sample_of_the_epoch_once(
    tmp_path, counts, before, after, caplog
):
    shards, world = write_shards(tmp_path, counts), before.get("world", 1)
    old = [loader(shards, rank=rank, **before) for rank in range(world)]
    steps = round(1.4 * sum(counts) / (4 * world))  # somewhere in epoch 1
    given = [
        pair
        for one in old
        for batch in one_by_one(one, steps)
        for pair in zip(batch["epoch"].tolist(), batch["key"], strict=True)
    ]
    given += until(resumed(shards, given, old, **after), 2)
    every = Counter(given)
    for epoch in range(3):
        assert {key: every[epoch, key] for key in (f"{n:06d}" for n in range(sum(counts)))} == {
            f"{n:06d}": 1 for n in range(sum(counts))
        }, epoch
    assert not caplog.messages


def one_by_one(one, steps):
    batches = (batch for _ in range(steps) for batch in one)
    return [next(batches) for _ in range(steps)]


def test_a_second_change_of_readers_within_the_epoch_loses_nothing_either(tmp_path):
    shards = write_shards(tmp_path, [3] * 40)
    old, given = [loader(shards, rank=rank, world=2) for rank in range(2)], []
    for world in (3, 1, 2):
        given += [
            pair
            for one in old
            for batch in one_by_one(one, 4)
            for pair in zip(batch["epoch"].tolist(), batch["key"], strict=True)
        ]
        old = resumed(shards, given, old, world=world)
    given += until(old, 1)
    every = Counter(given)
    assert all(every[epoch, f"{n:06d}"] == 1 for epoch in range(2) for n in range(120))


def test_what_a_rank_reads_can_be_compared_and_says_what_is_missing(shards):
    one, two = (loader(shards, rank=rank, world=2).rank_summary() for rank in range(2))
    assert one | {"rank": 1} == two and one["missing"] == []
    Path(shards[2]).unlink()
    gone = loader(shards, rank=1, world=2).rank_summary()
    assert gone["missing"] == [shards[2]] and gone["shards"] != two["shards"]
