"""Images from a folder of files or from tar shards, as uint8 batches of one size each.

Images that cannot be read are named and counted, and refused above a rate.
"""

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from unclip_pl.data.bad_samples import BadSample, BadSampleCounter
from unclip_pl.data.decoding import IMAGE_ENDINGS, decode
from unclip_pl.data.names import expand, is_url
from unclip_pl.data.shards import count_samples, raw_samples
from unclip_pl.utils.distributed import rank
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import is_sheet, to_uint8

log = logging.getLogger(__name__)
MAX_BAD_RATE = 0.01
EXTENSIONS = (*IMAGE_ENDINGS, "gif", "bmp", "tif", "tiff")
LOOKAHEAD = 64
"""Images that are decoded ahead of the batch."""
Batch = dict[str, Any]
"""`images` uint8 (B, 3, H, W); `keys` and `captions`, lists of B strings."""


class ImageSource(Protocol):
    """Images to evaluate; `len` counts those of all ranks, `batches` gives this rank's."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Iterator[Batch]: ...


class EncodedImage(NamedTuple):
    """The bytes of an image file; `place` names it in messages."""

    key: str
    place: str
    data: bytes
    caption: str


@dataclass
class StoredImages:
    """The images of a folder (`a.png`, its caption in `a.txt` if there is one) or of tar shards.

    Transparent images come on white, grey ones as RGB. `len` counts the images of all ranks, the
    unreadable ones too.

    Args:
        path: a folder, or shards as a path, pattern or URL.
        rank, world_size: this process among all; rank r takes images r, r + n, r + 2 n ...
        max_bad_rate: the largest share of images that may be unreadable.
        captions: of a folder: one for each of `files`, instead of the .txt files.
        size: side in pixels: the short side is resized to it and the centre is cut out. None: each
            image as it is.
        names: of a folder: only these of its files, in this order.
    """

    path: str
    rank: int = 0
    world_size: int = 1
    max_bad_rate: float = MAX_BAD_RATE
    captions: Sequence[str] | None = None
    size: int | None = None
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not self.files and not self.shards:
            raise UserError(
                f"There are no images in {self.path}: give a folder with {', '.join(EXTENSIONS)} "
                "files or with .tar shards, or a pattern of shards."
            )
        if self.captions is not None and self.shards:
            raise UserError(
                f"{self.path} are shards, which have captions of their own: leave --captions out."
            )
        if self.captions is not None and len(self.captions) != len(self.files):
            raise UserError(
                f"There are {len(self.captions)} captions and {len(self.files)} images in "
                f"{self.path}: give one per line, in the order of the files' names."
            )

    @property
    def name(self) -> str:
        return self.path

    @property
    def folder(self) -> Path:
        return Path(self.path).expanduser()

    @cached_property
    def files(self) -> list[Path]:
        """The image files of a folder and of the folders in it, sorted; empty for shards.

        Sheets of several pictures that our commands wrote are left out.
        """
        if self.names is not None:
            return [self.folder / name for name in self.names]
        if not self.folder.is_dir():
            return []
        images = (path for path in self.folder.rglob("*") if path.suffix.lower()[1:] in EXTENSIONS)
        files = sorted(path for path in images if path.is_file())
        sheets = dict.fromkeys(path for path in files if is_sheet(path))
        if sheets:
            _tell_of_sheets(next(iter(sheets)), len(sheets))
        return [path for path in files if path not in sheets]

    @cached_property
    def shards(self) -> list[str]:
        """The tar shards; empty where there are image files."""
        if self.files or (self.folder.is_dir() and not any(self.folder.glob("*.tar"))):
            return []
        is_pattern = any(sign in self.path for sign in "{*?[")
        if not self.folder.exists() and not is_url(self.path) and not is_pattern:
            raise UserError(
                f"There is no folder {self.folder}: give a folder of images, or shards as "
                "'data/{00000..00009}.tar'."
            )
        return expand(self.path)

    def __len__(self) -> int:
        return len(self.files) or sum(count_samples(shard) for shard in self.shards)

    @cached_property
    def side(self) -> int | None:
        """The side in pixels that batches have; None where images are no squares of one side.

        It is `size`, or else that of the first 32 images.
        """
        if self.size is not None:
            return self.size
        everything = replace(self, rank=0, world_size=1)
        encoded = everything._encoded(BadSampleCounter(1.0, "--max-bad-rate"))
        images = [_decode(image, None) for image in islice(encoded, 32)]
        sides = {side for image in images if isinstance(image, Tensor) for side in image.shape[1:]}
        return sides.pop() if len(sides) == 1 else None

    def file_states(self) -> list[tuple[str, int, int]] | None:
        """(path, bytes, time of the last change) of all files: other states, other images.

        None where they cannot be known (URLs).
        """
        if any(is_url(shard) for shard in self.shards):
            return None
        paths = self.files or [Path(shard) for shard in self.shards]
        states = [(path, path.stat()) for path in paths]
        return [(str(path.absolute()), stat.st_size, stat.st_mtime_ns) for path, stat in states]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """This rank's images in batches of one size each, of at most `batch_size`.

        Images of equal size keep their order.

        Raises:
            UserError: more than `max_bad_rate` of them cannot be read.
        """
        counter = BadSampleCounter(self.max_bad_rate, "--max-bad-rate")
        waiting: dict[tuple[int, ...], list[tuple[Tensor, str, str]]] = {}
        for image, key, caption in self._decoded(counter):
            rows = waiting.setdefault(tuple(image.shape), [])
            rows.append((image, key, caption))
            if len(rows) == batch_size:
                yield _batch(waiting.pop(tuple(image.shape)))
        counter.check()
        for rows in waiting.values():
            yield _batch(rows)

    def _decoded(self, counter: BadSampleCounter) -> Iterator[tuple[Tensor, str, str]]:
        """Images with keys and captions, in order; a few threads decode ahead."""
        all_encoded = self._encoded(counter)
        decode_image = partial(_decode, size=self.size)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            while window := list(islice(all_encoded, LOOKAHEAD)):
                for encoded, image in zip(window, pool.map(decode_image, window), strict=True):
                    if isinstance(image, BadSample):
                        counter.record_bad(encoded.place, image)
                    else:
                        counter.record_good()
                        yield image, encoded.key, encoded.caption

    def _encoded(self, counter: BadSampleCounter) -> Iterator[EncodedImage]:
        """This rank's images as they are stored."""
        for n in range(self.rank, len(self.files), self.world_size):
            path = self.files[n]
            key = path.relative_to(self.folder).with_suffix("").as_posix()
            caption = _caption_of(path) if self.captions is None else self.captions[n]
            yield EncodedImage(key, f"image {path}", path.read_bytes(), caption)
        number = 0
        for shard in self.shards:
            for sample in raw_samples(shard, counter):
                if number % self.world_size == self.rank:
                    key = sample["key"]
                    place = f"sample {key} of {shard}"
                    yield EncodedImage(key, place, sample["image"], sample["caption"])
                number += 1


@functools.cache  # a folder is listed several times
def _tell_of_sheets(first: Path, count: int) -> None:
    """Say that sheets are left out."""
    if rank() == 0:
        log.warning(
            "%s was skipped%s: it is a sheet of several pictures, made by a command of unclip_pl.",
            first,
            f", and {count - 1} more" if count > 1 else "",
        )


def _caption_of(path: Path) -> str:
    """The text of the file next to an image; empty without one."""
    text = path.with_suffix(".txt")
    return text.read_text(encoding="utf-8", errors="replace").strip() if text.is_file() else ""


def _decode(encoded: EncodedImage, size: int | None) -> Tensor | BadSample:
    try:
        return to_uint8(decode(encoded.data, size))
    except BadSample as error:
        return error


def _batch(rows: list[tuple[Tensor, str, str]]) -> Batch:
    images, keys, captions = zip(*rows, strict=True)
    return {"images": torch.stack(images), "keys": list(keys), "captions": list(captions)}
