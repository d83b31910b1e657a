"""GPT-2's tokenizer (Radford et al. 2019) as GLIDE uses it, from only its list of merges.

The ids 0 to 255 are the bytes, the printable ones first. Merge k joins two tokens to the token
256 + k. The last id, GPT-2's <|endoftext|>, fills captions up and never comes out of a text.
"""

from collections.abc import Sequence
from itertools import pairwise

import regex
import torch
from torch import Tensor

from unclip_pl.utils.errors import UserError
from unclip_pl.utils.text import repair_text

PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTES = (*PRINTABLE, *(byte for byte in range(256) if byte not in PRINTABLE))
"""The byte of each of the first 256 ids."""
CHARACTERS = (*map(chr, PRINTABLE), *(chr(256 + i) for i in range(256 - len(PRINTABLE))))
"""How files of GPT-2's vocabulary write these ids: a space is "\u0120"."""
ID_OF_BYTE = {byte: number for number, byte in enumerate(BYTES)}
SUFFIXES = ("s", "t", "re", "ve", "m", "ll", "d")
WORDS = regex.compile(
    "|".join(
        [
            *(f"'{suffix}" for suffix in SUFFIXES),
            r" ?\p{L}+",  # letters, digits, other signs: each with the space before it
            r" ?\p{N}+",
            r" ?[^\s\p{L}\p{N}]+",
            r"\s+(?!\S)",  # spaces, of which the last one belongs to the word after them
            r"\s+",
        ]
    )
)
"""What is never joined across."""
MOST_WORDS = 1 << 16
"""How many words are remembered."""


class BytePairs:
    """Captions to ids and back.

    Args:
        merges: the ids that each merge joins, in the order of their rank.

    Raises:
        UserError: a merge joins a token that does not come before it.
    """

    def __init__(self, merges: Sequence[Sequence[int]]) -> None:
        self._merged: dict[tuple[int, int], int] = {}
        self._bytes = [bytes([byte]) for byte in BYTES]
        self._words: dict[str, list[int]] = {}
        for left, right in merges:
            made = len(self._bytes)
            if not (0 <= left < made and 0 <= right < made):
                raise UserError(
                    f"The merges of the tokenizer join token {max(left, right)} before it is "
                    "there: the weights are damaged, so import them again."
                )
            self._merged[left, right] = made
            self._bytes.append(self._bytes[left] + self._bytes[right])
        self.padding = len(self._bytes)

    def encode(self, caption: str) -> list[int]:
        """The ids of a caption in lower case, without start, end and padding."""
        words = WORDS.findall(repair_text(caption).lower())
        return [number for word in words for number in self._encode_word(word)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without padding; bytes that are half of a character become U+FFFD."""
        return b"".join(self._bytes[number] for number in ids).decode(errors="replace")

    def tokenize(self, captions: Sequence[str], length: int) -> Tensor:
        """B captions -> (B, length) int64: cut there, or filled up with `padding`."""
        rows = [self.encode(caption)[:length] for caption in captions]
        filled = [row + [self.padding] * (length - len(row)) for row in rows]
        return torch.tensor(filled, dtype=torch.int64).reshape(len(rows), length)

    def _encode_word(self, word: str) -> list[int]:
        if word not in self._words:
            if len(self._words) == MOST_WORDS:
                self._words.clear()
            self._words[word] = self._join([ID_OF_BYTE[byte] for byte in word.encode()])
        return self._words[word]

    def _join(self, ids: list[int]) -> list[int]:
        """Join neighbours by the merge of the lowest rank, until none is left."""
        while True:
            made = [self._merged.get(pair) for pair in pairwise(ids)]
            best = min((number for number in made if number is not None), default=None)
            if best is None:
                return ids
            joined, i = [], 0
            while i < len(ids):
                merges = i < len(made) and made[i] == best
                joined.append(best if merges else ids[i])
                i += 2 if merges else 1
            ids = joined
