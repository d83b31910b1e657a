"""GPT-2's tokenizer from its merges: the ids of transformers, cut and filled up as in GLIDE."""

import pytest
import torch

from tests.interop import glide_kit
from unclip_pl.pipeline.interop.glide import read_merges
from unclip_pl.utils.byte_pairs import BytePairs
from unclip_pl.utils.errors import UserError

N = 320
CAPTIONS = [
    "a red apple on the table",
    "The cat's hat isn't THERE; they're here",
    "  two   spaces, a tab\tand\n\n lines \n",
    "café 你好 🍎 naïve",
    "12:30 and 1234 -- (why?!) ...",
    "aaaaaaa thethethethe",
    " ",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    glide_kit.write_tokenizer(folder, N)
    return folder


@pytest.fixture(scope="module")
def pairs(folder):
    return BytePairs(read_merges(folder, N).tolist())


def test_the_ids_are_those_of_transformers(folder, pairs):
    reference = glide_kit.reference_tokenizer(folder)
    for caption in CAPTIONS:
        assert pairs.encode(caption) == reference(caption.lower())["input_ids"], caption
    used = {number for caption in CAPTIONS for number in pairs.encode(caption)}
    assert len({number for number in used if number > 255}) > 15  # merges are used


def test_captions_are_cut_and_filled_up_as_in_glide(pairs):
    tokens = pairs.tokenize(CAPTIONS, 8)
    expected, mask = glide_kit.padded([pairs.encode(c) for c in CAPTIONS], 8, N - 1)
    assert pairs.padding == N - 1
    assert tokens.dtype == torch.int64 and torch.equal(tokens, expected)
    assert mask.any(1).tolist() == [True] * 7 + [False]  # the empty caption is padding only
    assert mask[3].all() and not mask[6, 1:].any()
    assert torch.equal(tokens != pairs.padding, mask)
    assert pairs.tokenize([], 8).shape == (0, 8)


def test_the_padding_never_comes_out_of_a_text(pairs):
    assert pairs.padding not in pairs.encode("<|endoftext|> a red apple<|endoftext|>")


def test_ids_become_text_again(pairs):
    for caption in CAPTIONS:
        assert pairs.decode(pairs.encode(caption)) == caption.lower()


def test_broken_unicode_is_text_as_well(pairs):
    assert pairs.encode("a \ud83c red") == pairs.encode("a � red")


def test_merges_of_what_is_not_there_are_refused():
    with pytest.raises(UserError, match="damaged"):
        BytePairs([[0, 1], [257, 3]])
    with pytest.raises(UserError, match="damaged"):
        BytePairs([[-1, 1]])
