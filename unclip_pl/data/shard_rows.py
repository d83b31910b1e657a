"""One file of the embedding store, mapped into memory, and the tar that it was made from."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from unclip_pl.data.bad_samples import too_many_files
from unclip_pl.data.names import is_streamed
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.remote import is_remote, open_remote, stat

UNREADABLE = (OSError, ValueError, KeyError)
"""What `map_safetensors` and `ShardRows.open` raise where a file is not whole."""
MIB = 1 << 20
HEADER_BLOCK = 1 << 18  # bytes of an object that are asked for at least


def map_safetensors(path: Path | str) -> tuple[dict[str, Any], Callable[[str, str], np.ndarray]]:
    """Map a safetensors file of the store.

    Of an object at a URL the header is read, and each array by a range of bytes when it is asked
    for.

    Returns:
        Its metadata `rows`, and a function (name, numpy type) -> array.

    Raises:
        ValueError, KeyError, OSError: the file is not whole.
    """
    if isinstance(path, str):
        return _read_ranges(path)
    try:
        with path.open("rb") as file:
            header, start, end = _read_header(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise too_many_files(error) or error from None
    meta = json.loads(header.pop("__metadata__")["rows"])

    # torch closes the file that it maps. np.memmap keeps one open for each array, and a thousand
    # of them is the usual limit.
    content = torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8).numpy()
    content.flags.writeable = False

    def array(name: str, kind: str) -> np.ndarray:
        first, last = header[name]["data_offsets"]
        data = content[start + first : start + last]
        return data.view(kind).reshape(header[name]["shape"])

    return meta, array


def _read_ranges(url: str) -> tuple[dict[str, Any], Callable[[str, str], np.ndarray]]:
    """`map_safetensors` of an object at a URL."""
    file = open_remote(url, HEADER_BLOCK)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    header, start, _ = _read_header(file, size)
    meta = json.loads(header.pop("__metadata__")["rows"])

    def array(name: str, kind: str) -> np.ndarray:
        first, last = header[name]["data_offsets"]
        file.seek(start + first)
        return np.frombuffer(file.read(last - first), kind).reshape(header[name]["shape"])

    return meta, array


def _read_header(file: IO[bytes], size: int) -> tuple[dict[str, Any], int, int]:
    """The header of a safetensors file of `size` bytes; where its data start, and where they end.

    Raises:
        ValueError, KeyError: the file is not whole.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > size:
        raise ValueError("it is shorter than its header says")
    header = json.loads(file.read(length))
    start = 8 + length
    parts = [entry for name, entry in header.items() if name != "__metadata__"]
    end = start + max(entry["data_offsets"][1] for entry in parts)
    if size < end:
        raise ValueError("it is cut short")
    return header, start, end


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard by mmap; no file is kept open.

    `image_embed`, `text_embed` (N, D) float16, `tokens` (N, L) int32, `keys` (N of them), and
    `source`, what `describe_shard` returned for the tar.
    """

    path: Path
    image_embed: np.ndarray
    text_embed: np.ndarray
    tokens: np.ndarray
    keys: list[str]
    source: dict[str, Any]

    @cached_property
    def row_of_key(self) -> dict[str, int]:
        return {key: i for i, key in enumerate(self.keys)}

    @classmethod
    def open(cls, path: Path) -> "ShardRows":
        """Map a file of the store.

        Raises:
            ValueError, KeyError, OSError: the file is not whole.
        """
        meta, array = map_safetensors(path)
        return cls(
            path,
            array("image_embed", "<f2"),
            array("text_embed", "<f2"),
            array("tokens", "<i4"),
            meta["keys"],
            meta["source"],
        )


def describe_shard(shard: str) -> dict[str, Any]:
    """Describe a tar by its `size` and a `digest`, which show whether it has changed.

    The digest of a local tar is SHA-256 of its size and of its first and last MiB. That of an
    object in a bucket or on a server is of its size and its ETag, or what the server has in its
    place.

    Of a command (`pipe:`) both are None, so a change there goes unseen.

    Raises:
        UserError: there is no such file.
    """
    if is_streamed(shard):
        return {"size": None, "digest": None}
    try:
        if is_remote(shard):
            found = stat(shard)
            content = f"{found.size} {found.version}".encode()
            return {"size": found.size, "digest": hashlib.sha256(content).hexdigest()}
        with Path(shard).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(str(size).encode())
            digest.update(file.read(MIB))
            file.seek(max(0, size - MIB))
            digest.update(file.read())
    except OSError as error:
        if limit := too_many_files(error):
            raise limit from None
        raise UserError(
            f"The shard {shard} cannot be read ({error.strerror}): put it back, or take it out of "
            "data.train and data.val."
        ) from None
    return {"size": size, "digest": digest.hexdigest()}
