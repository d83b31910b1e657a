"""Embeddings that were made elsewhere, into an embedding store: clip-retrieval's folders, and .npy members of the tars. Paired by key.

Taken over as they are, after a look at some images (and captions) of every shard: the CLIP at hand must give the same rows.
"""

import io
import logging
import os
import random
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.embeddings import EmbeddingStore, describe
from unclip_pl.data.shards import BadSample, ErrorBudget, decode, expand, raw_samples
from unclip_pl.utils.errors import UserError

CHECKED = 8
"""Samples of a shard that are embedded to compare."""
SAME = 0.98
"""Cosine from which a row is of the same picture or caption: another resize or float16 moves it by some 0.001, another picture by more."""
ENOUGH = 0.75
"""Share of the checked samples that must agree: CLIP's own transform takes transparency and EXIF otherwise than we do."""
LENGTH = 0.05
"""Relative difference in length that rounding and another resize can explain."""
ANEW = "embed the images anew with `lightning predict -c stages/embed.yaml`"
log = logging.getLogger(__name__)


class Source(Protocol):
    """Where the rows come from: `name` for sentences, the endings of `members` that it wants of each sample, and whether it `has_text`."""

    name: str
    members: tuple[str, ...]
    has_text: bool

    def check(self, width: int) -> None:
        """Raise a UserError where the rows are seen from the outset not to be `width` wide."""

    def rows(self, sample: dict[str, Any]) -> tuple[np.ndarray | None, np.ndarray | None, str]:
        """Image row, text row (None: there is none), and the file that they are in."""


class TarMembers:
    """Rows that lie beside the images: KEY.img_emb.npy, KEY.text_emb.npy or other endings.

    Args:
        image_key: ending of the image embeddings' members.
        text_key: of the text embeddings' members; None: there are none.
    """

    def __init__(self, image_key: str = "img_emb.npy", text_key: str | None = None) -> None:
        self.image_key, self.text_key = (
            key and key.lstrip(".").lower() for key in (image_key, text_key)
        )
        self.members = tuple(key for key in (self.image_key, self.text_key) if key)
        self.has_text = self.text_key is not None
        self.name = "the members " + " and ".join(f".{key}" for key in self.members)

    def check(self, width: int) -> None:
        """Nothing is known before the tars are read."""

    def rows(self, sample: dict[str, Any]) -> tuple[np.ndarray | None, np.ndarray | None, str]:
        image, text = (
            self._row(sample, key) if key and key in sample["members"] else None
            for key in (self.image_key, self.text_key)
        )
        return image, text, sample["shard"]

    def _row(self, sample: dict[str, Any], key: str) -> np.ndarray:
        try:
            row = np.lib.format.read_array(io.BytesIO(sample["members"][key]), allow_pickle=False)
            return row[0] if row.ndim == 2 and len(row) == 1 else row
        except (OSError, ValueError, EOFError, TypeError, MemoryError) as error:
            raise UserError(
                f"{sample['key']}.{key} in {sample['shard']} cannot be read as .npy ({error}): write it again, or name other endings."
            ) from None


class RetrievalFolder:
    """clip-retrieval's output: img_emb/img_emb_N.npy, text_emb/text_emb_N.npy where there are any, metadata/metadata_N.parquet. Rows by mmap.

    Args:
        folder: the output folder.
        key_column: the metadata's column that holds the samples' keys.

    Raises:
        UserError: pyarrow is absent, a file is missing or broken, row counts disagree, or a key is doubled.
    """

    members: tuple[str, ...] = ()

    def __init__(self, folder: str | os.PathLike, key_column: str = "image_path") -> None:
        self.folder, self.column, self.name = Path(folder).expanduser(), key_column, str(folder)
        self.has_text = (self.folder / "text_emb").is_dir()
        self.parts = sorted(
            path.stem.removeprefix("img_emb_")
            for path in (self.folder / "img_emb").glob("img_emb_*.npy")
        )
        if not self.parts:
            raise UserError(
                f"{folder} has no img_emb/img_emb_*.npy: give the output folder of clip-retrieval, made with its images enabled."
            )
        strays = {
            path.stem.removeprefix("metadata_")
            for path in (self.folder / "metadata").glob("metadata_*.parquet")
        } - {*self.parts}
        if strays:
            raise UserError(
                f"{self._metadata(min(strays))} has no {self._table('img_emb', min(strays))} beside it: copy the folder whole."
            )
        self.starts, keys = [0], []
        for part in tqdm(self.parts, desc="reading keys", unit=" files", disable=None):
            keys.append(self._keys(part))
            self.starts.append(self.starts[-1] + len(keys[-1]))
        self._index(np.concatenate(keys))
        self.used = np.zeros(self.starts[-1], bool)
        self._mapped: tuple[int, list[np.ndarray]] = (-1, [])

    def _index(self, keys: np.ndarray) -> None:
        """Keys sorted, and the row of each: 8 bytes more than the longest key for each."""
        self.order = np.argsort(keys, kind="stable")
        self.keys = keys[self.order]
        doubled = np.flatnonzero(self.keys[1:] == self.keys[:-1])
        if len(doubled):
            files = [
                self._metadata(self.parts[self._part(int(row))])
                for row in self.order[doubled[0] : doubled[0] + 2]
            ]
            where = (
                f"twice in {files[0]}"
                if files[0] == files[1]
                else f"in {files[0]} and in {files[1]}"
            )
            key = self.keys[doubled[0]].decode()
            raise UserError(
                f"The key {key} is {where}, so its row is not known: give the samples of all tars keys of their own, and {ANEW}."
            )

    def check(self, width: int) -> None:
        """The widths of all files."""
        for part in self.parts:
            for kind in self._kinds:
                path = self._table(kind, part)
                if (found := _mapped(path).shape[1]) != width:
                    raise UserError(
                        f"{path} has rows of {found} numbers where this CLIP's embeddings have {width}: name the CLIP that they were made with."
                    )

    def rows(self, sample: dict[str, Any]) -> tuple[np.ndarray | None, np.ndarray | None, str]:
        key = sample["key"].encode()
        at = (
            int(np.searchsorted(self.keys, np.bytes_(key)))
            if len(key) <= self.keys.itemsize
            else len(self.keys)
        )
        if at == len(self.keys) or self.keys[at] != key:
            return None, None, self.name
        row = int(self.order[at])
        if self.used[row]:
            raise UserError(
                f"The key {sample['key']} is in {sample['shard']} and in a shard before it, and {self.name} has one row: leave one out."
            )
        self.used[row] = True
        part = self._part(row)
        if self._mapped[0] != part:
            self._mapped = (
                part,
                [_mapped(self._table(kind, self.parts[part])) for kind in self._kinds],
            )
        image, *text = (table[row - self.starts[part]] for table in self._mapped[1])
        return image, text[0] if text else None, str(self._table("img_emb", self.parts[part]))

    @property
    def _kinds(self) -> list[str]:
        return ["img_emb", "text_emb"] if self.has_text else ["img_emb"]

    def _table(self, kind: str, part: str) -> Path:
        return self.folder / kind / f"{kind}_{part}.npy"

    def _metadata(self, part: str) -> Path:
        return self.folder / "metadata" / f"metadata_{part}.parquet"

    def _part(self, row: int) -> int:
        return bisect_right(self.starts, row) - 1

    def _keys(self, part: str) -> np.ndarray:
        """(N,) bytes of a file, checked against the tables beside it."""
        path = self._metadata(part)
        keys = read_column(path, self.column)
        for kind in self._kinds:
            table = _mapped(self._table(kind, part))
            if len(table) != len(keys):
                raise UserError(
                    f"{self._table(kind, part)} has {len(table)} rows and {path} has {len(keys)}: copy both again, or {ANEW}."
                )
        return keys


def read_column(path: Path, column: str) -> np.ndarray:
    """A column of strings of a parquet file -> (N,) bytes, none of them empty.

    Raises:
        UserError: pyarrow is absent, or the file has no such column.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"Reading {path} needs pyarrow, which is not installed: pip install pyarrow."
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise UserError(
                    f"{path} has no column {column} of keys, only {', '.join(schema.names)}: name it with --key-column."
                )
            if not (
                pyarrow.types.is_string(schema.field(column).type)
                or pyarrow.types.is_large_string(schema.field(column).type)
            ):
                raise UserError(
                    f"The column {column} of {path} holds {schema.field(column).type}, not the samples' keys: name another with --key-column."
                )
            values = file.read([column]).column(column).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): copy it again."
        ) from None
    if not all(values):
        raise UserError(
            f"Row {next(i for i, value in enumerate(values) if not value)} of {path} has no {column}: {ANEW}."
        )
    return np.array([value.encode() for value in values], "S")


def _mapped(path: Path) -> np.ndarray:
    """A .npy file (N, D) of floats by mmap."""
    try:
        table = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as .npy ({error}): copy it again.") from None
    if table.ndim != 2 or table.dtype.kind != "f":
        raise UserError(
            f"{path} holds {table.dtype} {table.shape}, no rows of embeddings: give floats (N, D)."
        )
    return table


class Importer(EmbeddingStore):
    """A store whose rows are taken from a `source`; tokens, and text embeddings where the source has none, are of the CLIP.

    Args:
        folder: of the store, made on demand.
        source: of the rows.
        embed_missing: embed the samples that the source has no row for; else they are an error.
    """

    def __init__(
        self, folder: str | os.PathLike, source: Source, embed_missing: bool = False
    ) -> None:
        super().__init__(folder)
        self.source, self.embed_missing = source, embed_missing

    def _own(self, clip: FrozenCLIP) -> None:
        """Compare with the folder's owner; a new folder is claimed when its first shard has stood the check."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.glob("*.json")) or any(self.folder.glob("*.safetensors")):
            super()._own(clip)

    def _embed(
        self, shard: str, clip: FrozenCLIP, batch_size: int, budget: ErrorBudget, bar: tqdm
    ) -> None:
        described = describe(shard)
        bar.set_description("importing", refresh=False)
        keys: dict[str, str] = {}  # and the caption of each
        images: list[np.ndarray] = []
        texts: list[np.ndarray] = []
        spots: list[tuple[int, Tensor]] = []  # row and image of the samples to compare
        draw = random.Random(shard)
        for sample in raw_samples(shard, budget, self.source.members, whole=True):
            key = sample["key"]
            try:
                image, text = self._rows(sample, clip)
                # a uniform draw of those seen so far, and what is drawn must decode
                place = len(spots) if len(spots) < CHECKED else draw.randrange(len(keys) + 1)
                if place < CHECKED:
                    spots[place : place + 1] = [
                        (len(keys), decode(sample["image"], clip.image_size))
                    ]
            except BadSample as error:
                budget.spend(f"sample {key} of {shard}", error)
                continue
            budget.good()
            keys[key] = sample["caption"]
            images.append(image)
            texts += [text] if text is not None else []
            bar.update(len(sample["image"]))
            bar.set_postfix_str(f"{budget.bad} bad", refresh=False)
        if not keys:
            raise UserError(
                f"The shard {shard} has no usable sample: take it out of the data, or mend it."
            )
        tokens, computed = self._text(list(keys.values()), clip, batch_size)
        tensors = {
            "image_embed": torch.from_numpy(np.stack(images)),
            "text_embed": torch.from_numpy(np.stack(texts)) if texts else computed,
        }
        at = [row for row, _ in spots]
        where = f"{self.source.name} for {shard}"
        compare(
            tensors["image_embed"],
            at,
            clip.embed_images(torch.stack([image for _, image in spots])),
            list(keys),
            "image",
            where,
        )
        if texts:
            compare(
                tensors["text_embed"],
                at,
                clip.embed_text(tokens[at]).embed,
                list(keys),
                "text",
                where,
            )
        super()._own(clip)
        self._write(shard, list(keys), tensors | {"tokens": tokens.int()}, described)

    def _rows(
        self, sample: dict[str, Any], clip: FrozenCLIP
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Image and text row (D,) float16 of a sample; raises BadSample where there is none because the image does not decode."""
        image, text, file = self.source.rows(sample)
        if image is None or (text is None and self.source.has_text):
            picture = decode(sample["image"], clip.image_size)
            if not self.embed_missing:
                kind = "image" if image is None else "text"
                raise UserError(
                    f"There is no {kind} embedding of the sample {sample['key']} of {sample['shard']} in {self.source.name}: "
                    "compare the keys and the endings of members, or embed what is missing with --embed-missing."
                )
            image = clip.embed_images(picture[None])[0].cpu().numpy() if image is None else image
            if self.source.has_text and text is None:
                text = clip.embed_text(clip.tokenize([sample["caption"]])).embed[0].cpu().numpy()
        where = f"of the sample {sample['key']} in {file}"
        return _row(
            image, clip.embed_dim, f"The image embedding {where}"
        ), None if text is None else _row(text, clip.embed_dim, f"The text embedding {where}")

    def _text(
        self, captions: list[str], clip: FrozenCLIP, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens (N, L), and text embeddings (N, D) float16 or, where the source has them, (0,)."""
        tokens = torch.cat(
            [
                clip.tokenize(captions[i : i + batch_size])
                for i in range(0, len(captions), batch_size)
            ]
        )
        embed = (
            []
            if self.source.has_text
            else [clip.embed_text(batch).embed.half().cpu() for batch in tokens.split(batch_size)]
        )
        return tokens, torch.cat(embed) if embed else torch.empty(0)


def _row(row: np.ndarray, width: int, what: str) -> np.ndarray:
    if row.shape != (width,) or row.dtype.kind != "f":
        raise UserError(
            f"{what} is {row.dtype} {row.shape}, and this CLIP's are floats ({width},): name the CLIP that it was made with."
        )
    with np.errstate(over="ignore"):
        half = row.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(
            f"{what} is not finite in float16: take the sample out of the data, or {ANEW}."
        )
    return half


def compare(
    table: Tensor, at: list[int], fresh: Tensor, keys: list[str], kind: str, where: str
) -> None:
    """Look whether `fresh` (M, D), computed here, are the rows `at` of `table` (N, D): direction, then length.

    Raises:
        UserError: the rows are in another order, of another CLIP, normalised, or scaled.
    """
    given, fresh = table[at].float(), fresh.float().cpu()
    near = F.cosine_similarity(fresh, given) >= SAME
    for i in (~near).nonzero().flatten().tolist():
        cosine, best = F.cosine_similarity(fresh[i : i + 1], table.float()).max(0)
        if cosine >= SAME:
            raise UserError(
                f"The rows of {where} are in another order than its keys: the {kind} embedding of {keys[int(best)]} is that of {keys[at[i]]}; "
                "pair the files as they were written."
            )
    if near.sum() < ENOUGH * len(at):
        raise UserError(
            f"The {kind} embeddings of {where} were made with another CLIP or from other {kind}s: only {int(near.sum())} of {len(at)} samples that were "
            f"embedded to compare agree, {keys[at[int((~near).nonzero()[0])]]} does not; name the CLIP that they were made with."
        )
    for i in (~near).nonzero().flatten().tolist():
        log.warning(
            "the %s embedding of %s from %s is not what this CLIP gives; its picture may be transparent or turned",
            kind,
            keys[at[i]],
            where,
        )
    theirs, ours = (rows[near].norm(dim=1).median().item() for rows in (given, fresh))
    if abs(theirs / ours - 1) <= LENGTH:
        return
    lost = "the lengths are lost and cannot be found again, and training needs them"
    cure = (
        "take the folder text_emb (or --text-key) away, then they are computed from the captions"
        if kind == "text"
        else ANEW
    )
    if ((table.float().norm(dim=1) - 1).abs() < 0.01).all():
        raise UserError(
            f"The {kind} embeddings of {where} are normalised to length 1 (clip-retrieval always does that), and this CLIP's have lengths around {ours:.3g}: "
            f"{lost}; {cure}."
        )
    raise UserError(
        f"The {kind} embeddings of {where} have lengths around {theirs:.3g}, and this CLIP's have {ours:.3g}: they were rescaled; {cure}."
    )


def import_embeddings(
    folder: str | os.PathLike,
    shards: str | Sequence[str],
    source: Source,
    clip: FrozenCLIP,
    *,
    batch_size: int = 256,
    progress: bool = True,
    budget: ErrorBudget | None = None,
    embed_missing: bool = False,
) -> EmbeddingStore:
    """Fill a store from `source` for `shards`; a shard that is done is not done again, and one that is refused leaves no file.

    Raises:
        UserError: the first row that is missing, doubled, not finite, of another width or CLIP, or normalised; too many bad samples.
    """
    names = expand(shards)
    source.check(clip.embed_dim)
    Importer(folder, source, embed_missing).ensure(
        names, clip, batch_size, progress=progress, budget=budget
    )
    return EmbeddingStore(folder)
