"""GLIDE's base model (Nichol et al. 2021) in the file that OpenAI published, base.pt.

It draws pictures of 64 pixels from captions, which it reads by a text encoder and a tokenizer of
its own. No CLIP is part of it.
"""

import gzip
import json
import zlib
from pathlib import Path

import torch
from torch import Tensor

from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline.interop.files import read_pickle, read_safetensors
from unclip_pl.pipeline.interop.karlo import Part
from unclip_pl.pipeline.interop.karlo_original import HEAD_WIDTH, count, heads_of, unet_config
from unclip_pl.stages.decoder import CondDropoutConfig, Decoder, DecoderSamplingConfig
from unclip_pl.utils.byte_pairs import CHARACTERS
from unclip_pl.utils.errors import UserError

PATTERNS = "base*.pt", "base*.safetensors"
TOKENIZERS = (
    ("vocab.json", "merges.txt"),
    ("encoder.json.gz", "vocab.bpe.gz"),
    ("encoder.json", "vocab.bpe"),
)
"""Vocabulary and merges: as Hugging Face's gpt2 has them, as GLIDE has them, as GPT-2 had them."""
PADDING = "<|endoftext|>"
SIDE = 64


def read(weights: Path, tokenizer: Path | None = None) -> tuple[Part, Tensor]:
    """The decoder in a file or a folder, whose weights are not read yet, and its merges.

    Args:
        weights: base.pt, or a folder with it.
        tokenizer: a folder with one pair of `TOKENIZERS`; None: that of the weights.

    Returns:
        the decoder; the ids that each merge of its tokenizer joins, int32 (M, 2).

    Raises:
        UserError: files are missing, damaged, hold code, or are of another model.
    """
    file = _find(weights) if weights.is_dir() else weights
    source = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
    width = source["positional_embedding"].shape[-1]
    text = TextConfig(
        "transformer",
        vocab_size=source["token_embedding.weight"].shape[0],
        context_length=source["positional_embedding"].shape[0],
        width=width,
        depth=count(source, "transformer.resblocks."),
        heads=heads_of(width, source),
        tokenizer="gpt2",
    )
    channels = source["input_blocks.0.0.weight"].shape[1]
    if channels != 3:
        raise UserError(
            f"{source.where} takes pictures of {channels} channels, as GLIDE's upsampler and "
            "inpainting models do, and its base model takes 3: give base.pt."
        )
    fields = unet_config(source, SIDE)
    net = UNetConfig(head_width=HEAD_WIDTH, embed_dim=0, context_width=width, **fields)
    merges = read_merges(tokenizer or file.parent, text.vocab_size)
    return Part("decoder", glide_stage(net, text), {"decoder": source}), merges


def glide_stage(net: UNetConfig, text: TextConfig) -> Decoder:
    """GLIDE's base model, without weights: 100 steps of DDPM with guidance 3."""
    with torch.device("meta"):
        return Decoder(
            net,
            text,
            DiffusionConfig(variance_bound=None),
            CondDropoutConfig(text=0.2),
            DecoderSamplingConfig("ddpm", steps=100, guidance_scale=3.0),
            normalizer="none",
            condition="none",
        )


def _find(folder: Path) -> Path:
    found = sorted(file for pattern in PATTERNS for file in folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UserError(
            f"{folder} must have one file {' or '.join(PATTERNS)}, GLIDE's base model, and has "
            f"{names}: give the file itself."
        )
    return found[0]


def read_merges(folder: Path, size: int) -> Tensor:
    """The merges of GPT-2's tokenizer in a folder, int32 (size - 257, 2).

    Args:
        folder: with one pair of `TOKENIZERS`.
        size: how many tokens the weights know.

    Raises:
        UserError: files are missing or damaged, or it is another tokenizer.
    """
    pairs = [[folder / name for name in names] for names in TOKENIZERS]
    there = [pair for pair in pairs if all(file.is_file() for file in pair)]
    if not there:
        raise UserError(
            f"{folder} has no tokenizer of GPT-2 (vocab.json with merges.txt, or GLIDE's "
            "encoder.json.gz with vocab.bpe.gz): name the folder that has it (--tokenizer)."
        )
    vocabulary_file, merges_file = there[0]
    ids = {character: number for number, character in enumerate(CHARACTERS)}
    merges = []
    lines = [line.rstrip("\r") for line in _text(merges_file).split("\n")]
    for line in lines[lines[0].startswith("#version") :]:
        parts = line.split(" ")
        if not line:
            continue
        if len(parts) != 2 or not {*parts} <= ids.keys():
            raise UserError(
                f'{merges_file} has the line "{line[:40]}", which joins no two tokens that come '
                "before it: it is another tokenizer than GPT-2's, or damaged, so get it again."
            )
        merges.append([ids[part] for part in parts])
        ids["".join(parts)] = len(CHARACTERS) + len(merges) - 1
    ids[PADDING] = len(CHARACTERS) + len(merges)
    try:
        vocabulary = json.loads(_text(vocabulary_file))
    except ValueError as error:
        raise UserError(f"{vocabulary_file} is not JSON ({error}): get it again.") from None
    if vocabulary != ids:
        raise UserError(
            f"{vocabulary_file} numbers its tokens otherwise than GPT-2 does (256 bytes, the "
            f"merges of {merges_file.name}, {PADDING}): it is another tokenizer, or a file of one "
            "and a file of another."
        )
    if len(ids) != size:
        raise UserError(
            f"The tokenizer in {folder} has {len(ids)} tokens and the weights know {size}: give "
            "the one of the weights (--tokenizer)."
        )
    return torch.tensor(merges, dtype=torch.int32)


def _text(file: Path) -> str:
    """A text file, compressed or not. UserError where it is damaged."""
    try:
        data = file.read_bytes()
        data = gzip.decompress(data) if file.suffix == ".gz" else data
        return data.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): get it again.") from None
