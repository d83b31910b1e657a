"""`unclip data verify`: an embedding store read back, against its manifest and the tars that it was made from."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from unclip_pl.clip import FrozenCLIP, require_same
from unclip_pl.data.embeddings import EmbeddingStore, ShardRows, describe
from unclip_pl.data.shards import BadSample, ErrorBudget, decode, expand, raw_samples
from unclip_pl.errors import UserError


def verify(
    folder: str | os.PathLike, shards: str | Sequence[str] | None = None, clip: FrozenCLIP | None = None, notes: list[str] | None = None
) -> list[str]:
    """One line for each thing that is wrong, none where all is well; those that begin with a file of the store are cured by deleting it.

    Args:
        folder: the store.
        shards: the tars it must cover; None: those that its manifest names.
        clip: the CLIP that it must have been made with; None: any.
        notes: a line is added for each image that has no row because it cannot be decoded, which is as it should be.

    Raises:
        UserError: it is no store, or one of another CLIP.
    """
    store = EmbeddingStore(folder)
    manifest = store.manifest
    if clip is not None:
        require_same(manifest["clip"], clip.fingerprint(), f"The embedding store {store.folder}")
    problems: list[str] = []
    for shard in tqdm(expand(shards) if shards else list(manifest["shards"]), desc="verifying", unit=" shards", file=sys.stderr):
        path = store.path(shard)
        try:
            source = describe(shard)
        except UserError as error:  # the tar is gone: no file of the store is at fault
            problems.append(str(error))
            continue
        try:
            rows = ShardRows.open(path)
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{path}: the rows of {shard} cannot be checked ({error})")
            continue
        if shard not in manifest["shards"]:
            problems.append(f"manifest.json does not name {shard}, whose rows are there: fill the store again")
        if rows.source != source:
            problems.append(f"{path}: stale, {shard} has changed since it was made")
        problems += [f"{path}: {line} (of {shard})" for line in _rows(rows)]
        wrong, undecodable = _pairs(rows, path, shard)
        problems += wrong
        if notes is not None:
            notes += undecodable
    return problems


def _rows(rows: ShardRows) -> list[str]:
    tables = {"image_embed": rows.image_embed, "text_embed": rows.text_embed, "tokens": rows.tokens}
    lines = [f"{len(table)} rows of {name} for {len(rows.keys)} keys" for name, table in tables.items() if len(table) != len(rows.keys)]
    lines += [f"key {key} is doubled, it has {n} rows" for key, n in Counter(rows.keys).items() if n > 1]
    for name in ("image_embed", "text_embed"):
        bad = np.flatnonzero(~np.isfinite(tables[name]).all(1))
        lines += [f"key {rows.keys[i]} has a {name} that is not finite" for i in bad if i < len(rows.keys)]
    return lines


def _pairs(rows: ShardRows, path: Path, shard: str) -> tuple[list[str], list[str]]:
    """Problems, and notes on images that cannot be decoded."""
    lines: list[str] = []
    notes: list[str] = []
    present = set()
    try:
        for sample in raw_samples(shard, ErrorBudget(1.0), whole=True):
            present.add(sample["key"])
            if sample["key"] in rows.row:
                continue
            if why := _why(sample["image"]):
                notes.append(f"sample {sample['key']} of {shard} has no row: {why}")
            else:
                lines.append(f"{path}: key {sample['key']} is missing, it has no row (of {shard})")
    except UserError as error:
        return [str(error)], []
    return lines + [f"{path}: the row of key {key} has no image (in {shard})" for key in rows.keys if key not in present], notes


def _why(image: bytes) -> str:
    try:
        decode(image, 64)
    except BadSample as error:
        return str(error)
    return ""
