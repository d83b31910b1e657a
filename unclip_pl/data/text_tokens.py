"""The captions of an embedding store, tokenised for stages that read more tokens than CLIP.

Next to the store's NAME-HASH.safetensors lies NAME-HASH.text-L.safetensors: `text_tokens` (N, L)
uint16, open_clip's BPE, one row for each row of the store. It is made from the captions in the tar,
needs no CLIP, and leaves the embeddings as they are.
"""

import json
import sys
from collections.abc import Sequence

import numpy as np
import torch
from safetensors.numpy import save
from tqdm import tqdm

from unclip_pl.clip.loading import tokenize_bpe
from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.shard_rows import UNREADABLE, map_safetensors
from unclip_pl.data.shards import raw_samples
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.utils.errors import UserError

BATCH = 1024  # captions that are tokenised at a time


def text_tokens_file(store: EmbeddingStore, shard: str, length: int) -> str:
    """The name of the file of a shard's captions."""
    return store.file_of(shard).removesuffix("safetensors") + f"text-{length}.safetensors"


def read_text_tokens(store: EmbeddingStore, shard: str, length: int) -> np.ndarray:
    """The captions of a shard's rows by mmap, (N, length) uint16.

    Raises:
        UserError: there are none, or they are not of the store's rows.
    """
    name, rows = text_tokens_file(store, shard, length), store.shard(shard)
    try:
        meta, array = map_safetensors(store.files.mapped(name))
        tokens = array("text_tokens", "<u2")
    except UNREADABLE as error:
        raise UserError(
            f"The store {store.folder} has no captions of {length} tokens for {shard} ({error}): "
            f"run `lightning predict -c stages/embed.yaml --data.text_length {length}` where the "
            "tars are."
        ) from None
    if meta["source"] != rows.source or tokens.shape != (len(rows.keys), length):
        raise UserError(f"{store.files.place(name)} is not of the rows next to it: delete it.")
    return tokens


def ensure_text_tokens(store: EmbeddingStore, shards: Sequence[str], length: int) -> int:
    """Tokenise the captions of those of `shards` that have no such file yet; returns how many.

    The store must have the rows of all of them. Other processes may do the same: one does the work.

    Raises:
        UserError: a tar is gone, or lacks a sample that the store has a row of.
    """
    missing = [shard for shard in shards if not _is_done(store, shard, length)]
    for shard in tqdm(missing, desc="tokenising", unit=" shards", file=sys.stderr, disable=None):
        with store.files.lock(text_tokens_file(store, shard, length).removesuffix(".safetensors")):
            if not _is_done(store, shard, length):
                _write(store, shard, length)
    return len(missing)


def _is_done(store: EmbeddingStore, shard: str, length: int) -> bool:
    try:
        read_text_tokens(store, shard, length)
    except UserError:
        return False
    return True


def _write(store: EmbeddingStore, shard: str, length: int) -> None:
    rows = store.shard(shard)
    captions: list[str | None] = [None] * len(rows.keys)
    for sample in raw_samples(shard, BadSampleCounter(1.0), whole=True):
        if (row := rows.row_of_key.get(sample["key"])) is not None:
            captions[row] = sample["caption"]
    if None in captions:
        key = rows.keys[captions.index(None)]
        raise UserError(
            f"{shard} has no sample {key}, of which the store {store.folder} has a row: fill the "
            "store again."
        )
    table = np.empty((len(captions), length), np.uint16)
    for first in range(0, len(captions), BATCH):
        part = [caption or "" for caption in captions[first : first + BATCH]]
        table[first : first + BATCH] = tokenize_bpe(part, length).to(torch.int32).numpy()
    meta = {"rows": json.dumps({"source": rows.source})}
    store.files.write(text_tokens_file(store, shard, length), save({"text_tokens": table}, meta))
