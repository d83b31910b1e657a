"""Captions of any script are readable in pictures: no boxes, wrapped, in the right direction."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, _imagingft

from unclip_pl.utils import fonts
from unclip_pl.utils.fonts import find_font
from unclip_pl.utils.images import LABEL_WIDTH, grid
from unclip_pl.utils.lettering import draw_lines, text_width, wrap_text

POINTS = 16
CAPTIONS = {
    "Chinese": "红色的圆圈在蓝色正方形的左边，背景是白色的",
    "Japanese": "青い四角の左にある赤い丸",
    "Korean": "파란 사각형 왼쪽에 있는 빨간 원",
    "Hebrew": "עיגול אדום משמאל לריבוע כחול",
    "Arabic": "دائرة حمراء على يسار مربع أزرق",
    "Hindi": "नीले वर्ग के बाईं ओर लाल वृत्त",
    "Thai": "วงกลมสีแดงทางซ้าย",
    "emoji": "😀🚀❤️🦄",
    "Russian": "красный круг слева",
    "symbols": "∑ ≤ µ — “”",
}
NOT_A_CHARACTER = "\U0010ffff"


def draw(text: str, width: int = 400) -> np.ndarray:
    """The pixels of a line, (H, W, 3)."""
    canvas = Image.new("RGB", (width, 30), "white")
    draw_lines(ImageDraw.Draw(canvas), (0, 4), [text], POINTS)
    return np.asarray(canvas).astype(int)


@pytest.mark.parametrize("script", CAPTIONS)
def test_each_character_has_a_glyph(script):
    for character in CAPTIONS[script].replace(" ", "").replace("\ufe0f", ""):
        font = find_font(character, POINTS)
        assert bytes(font.getmask(character)) != bytes(font.getmask(NOT_A_CHARACTER)), character


def test_emoji_are_in_colour_and_sequences_are_one_picture():
    pixels = draw("😀")
    assert (pixels.max(2) - pixels.min(2)).max() > 100
    astronaut, woman = text_width("👩🏽‍🚀", POINTS), text_width("👩", POINTS)
    assert astronaut == woman
    assert text_width("🇫🇷", POINTS) < 1.5 * woman


@pytest.fixture(params=[True, False], ids=["raqm", "without raqm"])
def raqm(request, monkeypatch):
    """Pillow with and without the library that puts letters in order and joins them."""
    caches = (fonts.find_font, fonts._load_font)
    monkeypatch.setattr(_imagingft, "HAVE_RAQM", request.param and _imagingft.HAVE_RAQM)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_text_from_right_to_left_begins_on_the_right(raqm):
    latin, first = text_width("abc", POINTS), text_width("ש", POINTS)
    whole = text_width("שלום abc", POINTS)
    pixels = draw("שלום abc")
    assert np.array_equal(pixels[:, :latin], draw("abc")[:, :latin])
    alone = draw("ש")[:, :first]
    ink = (pixels[:, whole - first : whole] < 128).sum()
    assert abs(ink - (alone < 128).sum()) < 0.2 * ink
    # within text from left to right the Hebrew words change places among themselves only
    assert np.array_equal(draw("abc שלום")[:, :latin], draw("abc")[:, :latin])


def test_numbers_keep_their_order_in_text_from_right_to_left():
    pixels, number = draw("25 שלום"), text_width("25", POINTS)
    whole = text_width("25 שלום", POINTS)
    assert np.array_equal(draw("שלום 25")[:, :number], draw("25")[:, :number])
    assert (pixels[:, :whole] < 128).any()


@pytest.mark.parametrize("script", CAPTIONS)
def test_lines_fit_and_lose_nothing(script):
    text = CAPTIONS[script] + " " + "incomprehensibilities" * 3
    lines = wrap_text(text, POINTS, 90, max_lines=100)
    assert all(text_width(line, POINTS) <= 90 for line in lines) and len(lines) > 3
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_what_is_too_long_ends_in_an_ellipsis():
    lines = wrap_text("a word " * 10_000, POINTS, 100, max_lines=3)
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert text_width(lines[-1], POINTS) <= 100
    assert wrap_text("", POINTS, 100) == [""]


def test_a_character_that_no_font_has_is_told(capsys):
    find_font("\U00012fff", POINTS)
    find_font("\U00012fff", POINTS + 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "U+12FFF" in line and "unclip_pl[fonts]" in line


@pytest.mark.parametrize(("count", "side"), [(4, 32), (3, 1024), (100, 64), (40, 16)])
def test_a_grid_is_at_most_as_wide_as_it_may_be_and_shows_all(count, side):
    rows = [-torch.ones(count, 3, side, side) for _ in range(2)]
    picture = np.asarray(
        grid(rows, ["一只红色的圆圈" * 9, "a word " * 60], max_width=2048).convert("L")
    )
    assert picture.shape[1] <= 2048
    cells = picture[:, LABEL_WIDTH + 8 :] < 10
    cell = min(side, (2048 - LABEL_WIDTH) // min(count, 28))
    assert cells.sum() > 0.9 * 2 * count * cell**2


def test_a_row_of_many_pictures_goes_on_in_the_next_line():
    row = torch.stack([torch.full((3, 64, 64), -1 + 2 * i / 100) for i in range(100)])
    picture = np.asarray(grid([row], max_width=700).convert("L"))
    columns = (picture.shape[1] - 2) // 66
    for i in (0, columns - 1, columns, 99):
        y, x = divmod(i, columns)
        assert abs(picture[y * 66 + 34, x * 66 + 34] - 255 * i / 100) < 2
