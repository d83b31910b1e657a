"""`unclip data verify`: check an embedding store.

It is compared with its manifest and with the tars that it was made from.
"""

import lzma
import os
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm
from webdataset.tariterators import base_plus_ext

from unclip_pl.clip.fingerprint import require_same
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.bad_samples import BadSample, BadSampleCounter, SkippedSamples
from unclip_pl.data.decoding import IMAGE_ENDINGS, decode
from unclip_pl.data.names import expand, open_shard
from unclip_pl.data.shard_rows import UNREADABLE, ShardRows, describe_shard
from unclip_pl.data.shards import read_shard
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.text import repair_text

SUFFIXES = tuple(f".{ending}" for ending in IMAGE_ENDINGS)


def verify(
    folder: str | os.PathLike,
    shards: str | Sequence[str] | None = None,
    clip: FrozenCLIP | None = None,
    notes: list[str] | None = None,
) -> list[str]:
    """Check a store.

    Args:
        folder: the store.
        shards: the tars it must cover; None: those that its manifest names.
        clip: the CLIP that it must have been made with; None: any.
        notes: a line is added for each image that has no row because it cannot be used, which is
            as it should be, and for images that belong to no sample.

    Returns:
        One line for each thing that is wrong, none where all is well. Where a line begins with a
        file of the store, deleting that file is the cure.

    Raises:
        UserError: it is no store, or one of another CLIP.
    """
    store = EmbeddingStore(folder)
    manifest = store.manifest
    if clip is not None:
        require_same(manifest["clip"], clip.fingerprint(), f"The embedding store {store.folder}")
    problems: list[str] = []
    names = expand(shards) if shards else list(manifest["shards"])
    for shard in tqdm(names, desc="verifying", unit=" shards", file=sys.stderr):
        path = store.path(shard)
        try:
            source = describe_shard(shard)
        except UserError as error:  # the tar is gone: no file of the store is at fault
            problems.append(str(error))
            continue
        try:
            rows = store.open_rows(shard)
        except UNREADABLE as error:
            problems.append(f"{path}: the rows of {shard} cannot be checked ({error})")
            continue
        if shard not in manifest["shards"]:
            problems.append(
                f"manifest.json does not name {shard}, whose rows are there: fill the store again"
            )
        if rows.source != source:
            problems.append(f"{path}: stale, {shard} has changed since it was made")
        problems += [f"{path}: {line} (of {shard})" for line in _check_rows(rows)]
        unpaired, unusable = _check_pairs(rows, path, shard)
        problems += unpaired
        if notes is not None:
            notes += unusable
    return problems


def _check_rows(rows: ShardRows) -> list[str]:
    """Problems of the tables: their lengths, keys that are there twice, values not finite."""
    tables = {"image_embed": rows.image_embed, "text_embed": rows.text_embed, "tokens": rows.tokens}
    count = len(rows.keys)
    lines = [
        f"{len(table)} rows of {name} for {count} keys"
        for name, table in tables.items()
        if len(table) != count
    ]
    lines += [
        f"key {key} is doubled, it has {n} rows" for key, n in Counter(rows.keys).items() if n > 1
    ]
    for name in ("image_embed", "text_embed"):
        bad = np.flatnonzero(~np.isfinite(tables[name]).all(1))
        lines += [f"key {rows.keys[i]} has a {name} that is not finite" for i in bad if i < count]
    return lines


def _check_pairs(rows: ShardRows, path: Path | str, shard: str) -> tuple[list[str], list[str]]:
    """(problems of rows and images that do not pair up, notes on images that cannot be used)."""
    lines: list[str] = []
    notes: list[str] = []
    present, skipped = set(), 0
    try:
        for sample in read_shard(shard, BadSampleCounter(1.0), whole=True):
            if isinstance(sample, SkippedSamples):
                skipped += sample.count
                notes.append(f"{sample.where} has no row: {sample.reason}")
                continue
            key = sample["key"]
            present.add(key)
            if key in rows.row_of_key:
                continue
            if reason := _why_unusable(sample["image"]):
                notes.append(f"sample {key} of {shard} has no row: {reason}")
            else:
                lines.append(f"{path}: key {key} is missing, it has no row (of {shard})")
    except UserError as error:
        return [str(error)], []
    lines += [
        f"{path}: the row of key {key} has no image (in {shard})"
        for key in rows.keys
        if key not in present
    ]
    unused = [name for name in images_in(shard) if name.rpartition(".")[0] not in present]
    if unused:
        names = ", ".join(unused[:3]) + (" ..." if len(unused) > 3 else "")
        roles = [name for name in unused if base_plus_ext(name)[0] in present]
        line = f"{shard} holds {len(unused)} pictures that no sample has the name of ({names})"
        explained = len(unused) <= skipped + len(roles)
        (notes if explained else lines).append(line)
    return lines, notes


def images_in(shard: str) -> list[str]:
    """The names of all images in a tar, as far as it can be read.

    Only tarfile is used: a second look at what the readers of shards may miss.
    """
    names: list[str] = []
    with open_shard(shard) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r|*", ignore_zeros=True) as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # or it would keep all of them
                    if not member.isdir() and member.name.lower().endswith(SUFFIXES):
                        names.append(repair_text(member.name))
            while stream.read(1 << 20):  # let the command of a pipe end
                pass
        except (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError):
            pass  # damage: the samples before it are compared
    return [name for name in names if not any(map(_hidden, name.split("/")))]


def _hidden(part: str) -> bool:
    return part.startswith(".") and bool(part.strip("."))


def _why_unusable(image: bytes) -> str:
    try:
        decode(image, 64)
    except BadSample as error:
        return str(error)
    return ""
