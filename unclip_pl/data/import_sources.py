"""Where embeddings that were made elsewhere can be found.

They are .npy members of the tars, or the output folder of clip-retrieval.
"""

import io
import os
from bisect import bisect_right
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from unclip_pl.utils.errors import UserError

EMBED_AGAIN = "embed the images again with `lightning predict -c stages/embed.yaml`"
Row = np.ndarray | None


class Source(Protocol):
    """Where rows come from.

    `name` is for messages, `members` are the endings that it needs of each sample, and `has_text`
    says whether it holds text embeddings too.
    """

    name: str
    members: tuple[str, ...]
    has_text: bool

    def check(self, width: int) -> None:
        """Raise a UserError where it is known before reading that rows are not `width` wide."""

    def rows(self, sample: dict[str, Any]) -> tuple[Row, Row, str]:
        """(image row, text row, the file that they are in) of a sample; None: there is no row."""


class TarMembers:
    """Rows next to the images: KEY.img_emb.npy, KEY.text_emb.npy or other endings.

    Args:
        image_key: ending of the members with image embeddings.
        text_key: ending of the members with text embeddings; None: there are none.
    """

    def __init__(self, image_key: str = "img_emb.npy", text_key: str | None = None) -> None:
        self.image_key = image_key.lstrip(".").lower()
        self.text_key = text_key.lstrip(".").lower() if text_key else None
        self.members = tuple(key for key in (self.image_key, self.text_key) if key)
        self.has_text = self.text_key is not None
        self.name = "the members " + " and ".join(f".{key}" for key in self.members)

    def check(self, width: int) -> None:
        """Nothing is known before the tars are read."""

    def rows(self, sample: dict[str, Any]) -> tuple[Row, Row, str]:
        image, text = self._row(sample, self.image_key), self._row(sample, self.text_key)
        return image, text, sample["shard"]

    def _row(self, sample: dict[str, Any], key: str | None) -> Row:
        if key not in sample["members"]:
            return None
        content = io.BytesIO(sample["members"][key])
        try:
            row = np.lib.format.read_array(content, allow_pickle=False)
            return row[0] if row.ndim == 2 and len(row) == 1 else row
        except (OSError, ValueError, EOFError, TypeError, MemoryError) as error:
            raise UserError(
                f"{sample['key']}.{key} in {sample['shard']} cannot be read as .npy ({error}): "
                "write it again, or name other endings."
            ) from None


class RetrievalFolder:
    """clip-retrieval's output folder; its rows are read by mmap.

    It holds img_emb/img_emb_N.npy, text_emb/text_emb_N.npy (optional) and
    metadata/metadata_N.parquet.

    Args:
        folder: the output folder.
        key_column: the metadata's column that holds the samples' keys.

    Raises:
        UserError: pyarrow is absent, a file is missing or broken, row counts disagree, or a key is
            there twice.
    """

    members: tuple[str, ...] = ()

    def __init__(self, folder: str | os.PathLike, key_column: str = "image_path") -> None:
        self.folder, self.column, self.name = Path(folder).expanduser(), key_column, str(folder)
        self.has_text = (self.folder / "text_emb").is_dir()
        self.parts = self._find_parts()
        self.starts, keys = [0], []
        for part in tqdm(self.parts, desc="reading keys", unit=" files", disable=None):
            keys.append(self._read_keys(part))
            self.starts.append(self.starts[-1] + len(keys[-1]))
        self._sort_keys(np.concatenate(keys))
        self.used = np.zeros(self.starts[-1], bool)
        self._open_part: tuple[int, list[np.ndarray]] = (-1, [])

    def _find_parts(self) -> list[str]:
        """The numbers N of the files, as they are written."""
        tables = sorted((self.folder / "img_emb").glob("img_emb_*.npy"))
        parts = sorted(path.stem.removeprefix("img_emb_") for path in tables)
        if not parts:
            raise UserError(
                f"{self.name} has no img_emb/img_emb_*.npy: give the output folder of "
                "clip-retrieval, made with its images enabled."
            )
        metadata = (self.folder / "metadata").glob("metadata_*.parquet")
        unpaired = {path.stem.removeprefix("metadata_") for path in metadata} - set(parts)
        if unpaired:
            part = min(unpaired)
            raise UserError(
                f"{self._metadata(part)} has no {self._table('img_emb', part)} next to it: copy "
                "the folder whole."
            )
        return parts

    def _sort_keys(self, keys: np.ndarray) -> None:
        """Sort the keys (N,) and note the row of each.

        For each key this takes 8 bytes more than the longest key.
        """
        self.order = np.argsort(keys, kind="stable")
        self.keys = keys[self.order]
        repeated = np.flatnonzero(self.keys[1:] == self.keys[:-1])
        if not len(repeated):
            return
        first = repeated[0]
        one, other = (
            self._metadata(self.parts[self._part(int(row))])
            for row in self.order[first : first + 2]
        )
        where = f"twice in {one}" if one == other else f"in {one} and in {other}"
        raise UserError(
            f"The key {self.keys[first].decode()} is {where}, so its row is not known: give the "
            f"samples of all tars keys of their own, and {EMBED_AGAIN}."
        )

    def check(self, width: int) -> None:
        """Raise a UserError where a file's rows are not `width` wide."""
        for part in self.parts:
            for kind in self._kinds:
                path = self._table(kind, part)
                columns = _map_table(path).shape[1]
                if columns != width:
                    raise UserError(
                        f"{path} has rows of {columns} numbers where this CLIP's embeddings have "
                        f"{width}: name the CLIP that they were made with."
                    )

    def rows(self, sample: dict[str, Any]) -> tuple[Row, Row, str]:
        row = self._find(sample["key"].encode())
        if row is None:
            return None, None, self.name
        if self.used[row]:
            raise UserError(
                f"The key {sample['key']} is in {sample['shard']} and in a shard before it, and "
                f"{self.name} has one row: leave one out."
            )
        self.used[row] = True
        part = self._part(row)
        name = self.parts[part]
        if self._open_part[0] != part:
            self._open_part = part, [_map_table(self._table(kind, name)) for kind in self._kinds]
        image, *text = (table[row - self.starts[part]] for table in self._open_part[1])
        return image, text[0] if text else None, str(self._table("img_emb", name))

    def _find(self, key: bytes) -> int | None:
        """The row of a key."""
        if len(key) > self.keys.itemsize:
            return None
        at = int(np.searchsorted(self.keys, np.bytes_(key)))
        if at == len(self.keys) or self.keys[at] != key:
            return None
        return int(self.order[at])

    @property
    def _kinds(self) -> list[str]:
        return ["img_emb", "text_emb"] if self.has_text else ["img_emb"]

    def _table(self, kind: str, part: str) -> Path:
        return self.folder / kind / f"{kind}_{part}.npy"

    def _metadata(self, part: str) -> Path:
        return self.folder / "metadata" / f"metadata_{part}.parquet"

    def _part(self, row: int) -> int:
        return bisect_right(self.starts, row) - 1

    def _read_keys(self, part: str) -> np.ndarray:
        """(N,) bytes of a file, checked against the tables of the same number."""
        path = self._metadata(part)
        keys = read_keys(path, self.column)
        for kind in self._kinds:
            table = self._table(kind, part)
            rows = len(_map_table(table))
            if rows != len(keys):
                raise UserError(
                    f"{table} has {rows} rows and {path} has {len(keys)}: copy both again, or "
                    f"{EMBED_AGAIN}."
                )
        return keys


def read_keys(path: Path, column: str) -> np.ndarray:
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
                    f"{path} has no column {column} of keys, only {', '.join(schema.names)}: name "
                    "it with --key-column."
                )
            kind = schema.field(column).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(
                    f"The column {column} of {path} holds {kind}, not the samples' keys: name "
                    "another with --key-column."
                )
            keys = file.read([column]).column(column).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): copy it again."
        ) from None
    empty = next((row for row, key in enumerate(keys) if not key), None)
    if empty is not None:
        raise UserError(f"Row {empty} of {path} has no {column}: {EMBED_AGAIN}.")
    return np.array([key.encode() for key in keys], "S")


def _map_table(path: Path) -> np.ndarray:
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
