"""Small GLIDEs with random weights, and a tokenizer in the form of GPT-2's."""

import gzip
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch

from tests.oracles import glide

CORPUS = (
    "a red apple on the table, the cat's hat. An oil painting of a corgi: the dog isn't there; "
    "two red cats and three apples at 12:30, café, 你好, they're here and there 1234 "
)
SIZES = {
    "two levels": {},
    "three levels": {"mults": (1, 1, 2), "depth": 2, "attended": (False, True, True), "xf": 128},
}


def random_tensor(seed=0):
    """What makes a model's tensors: norms and biases are not what they are at the start."""
    generator = torch.Generator().manual_seed(seed)

    def make(shape, name):
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            return 0.1 * noise + float(name.endswith("weight"))
        if "embedding" in name:
            return 0.5 * noise
        return noise * (0.5 * noise[0].numel() ** -0.5)

    return make


def weights(seed=0, **sizes):
    """A model's file."""
    return glide.random_weights(random_tensor(seed), **sizes)


def write(folder: Path, tensors, form="hugging face", n=300) -> Path:
    """base.pt and a tokenizer of `n` tokens below a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "base.pt")
    write_tokenizer(folder, n, form)
    return folder


def byte_names() -> dict[int, str]:
    """How GPT-2's files write each byte, in the order of the ids."""
    plain = [b for b in range(256) if chr(b).isprintable() and not chr(b).isspace()]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def write_tokenizer(folder: Path, n: int, form="hugging face") -> None:
    """A vocabulary and merges, learned from `CORPUS` as byte pair encoding is."""
    names = byte_names()
    words = CORPUS.lower().replace(" ", "\n ").split("\n")
    split = [[names[b] for b in word.encode()] for word in words]
    merges: list[tuple[str, str]] = []
    while len(merges) < n - 257:
        counts = Counter(pair for word in split for pair in pairwise(word))
        left, right = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append((left, right))
        for word in split:
            for i in reversed(range(len(word) - 1)):
                if word[i : i + 2] == [left, right]:
                    word[i : i + 2] = [left + right]
    tokens = [*names.values(), *("".join(pair) for pair in merges), "<|endoftext|>"]
    vocabulary = json.dumps({token: number for number, token in enumerate(tokens)})
    lines = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""])
    if form == "hugging face":
        (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
        (folder / "merges.txt").write_text(lines, encoding="utf-8")
    elif form == "gpt-2":
        (folder / "encoder.json").write_text(vocabulary, encoding="utf-8")
        (folder / "vocab.bpe").write_text(lines, encoding="utf-8")
    else:
        (folder / "encoder.json.gz").write_bytes(gzip.compress(vocabulary.encode()))
        (folder / "vocab.bpe.gz").write_bytes(gzip.compress(lines.encode()))


def reference_tokenizer(folder: Path):
    """transformers' GPT-2 tokenizer of `write_tokenizer`."""
    import pytest

    transformers = pytest.importorskip("transformers", reason="a second opinion on the tokens")
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    return transformers.GPT2Tokenizer(
        vocab=vocabulary, merges=[tuple(line.split(" ")) for line in lines]
    )


def padded(rows, length, padding):
    """Token ids and masks, (B, L), as GLIDE fills captions up."""
    rows = [list(row)[:length] for row in rows]
    tokens = [row + [padding] * (length - len(row)) for row in rows]
    mask = [[i < len(row) for i in range(length)] for row in rows]
    return torch.tensor(tokens), torch.tensor(mask)
