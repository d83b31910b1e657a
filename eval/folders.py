"""Images from a folder of files or from tar shards, as uint8 batches of one size each; what cannot
be read is named, counted, and refused above a rate.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from unclip_pl.data.bad_samples import BadSample, BadSampleCounter
from unclip_pl.data.decoding import IMAGE_ENDINGS, decode
from unclip_pl.data.names import expand, is_url
from unclip_pl.data.shards import count_samples, raw_samples
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import to_uint8

MAX_BAD_RATE = 0.01
FILES = (*IMAGE_ENDINGS, "gif", "bmp", "tif", "tiff")
Batch = dict[str, Any]
"""`images` uint8 (B, 3, H, W), `keys` and `captions`, lists of B."""


class Source(Protocol):
    """Images to be judged; `len` counts those of all ranks, `batches` gives this rank's."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Iterator[Batch]: ...


@dataclass
class Pictures:
    """The images of a folder (`a.png`, with its caption in `a.txt` where there is one) or of tar
    shards; rank r of n takes every n-th.

    Transparent ones come on white, grey ones as RGB. `len` counts the images of all ranks, the
    unreadable ones too.
    """

    where: str
    rank: int = 0
    world_size: int = 1
    max_bad_rate: float = MAX_BAD_RATE
    captions: Sequence[str] | None = None
    """Of a folder: one for each of `files`, in place of the .txt files."""
    size: int | None = None
    """Side in pixels: the short side is resized to it and the centre is cut out. None: each image
    as it is.
    """
    names: Sequence[str] | None = None
    """Of a folder: only these of its files, in this order."""

    def __post_init__(self) -> None:
        if not self.files and not self.shards:
            raise UserError(
                f"There are no images in {self.where}: give a folder with {', '.join(FILES)} files "
                "or with .tar shards, or a pattern of shards."
            )
        if self.captions is not None and self.shards:
            raise UserError(
                f"{self.where} are shards, which have captions of their own: leave --captions out."
            )
        if self.captions is not None and len(self.captions) != len(self.files):
            raise UserError(
                f"There are {len(self.captions)} captions and {len(self.files)} images in "
                f"{self.where}: give one a line, in order of the names."
            )

    @property
    def name(self) -> str:
        return self.where

    @cached_property
    def files(self) -> list[Path]:
        """The image files of a folder, folders inside it included, in the order of their names;
        none where `where` names shards.
        """
        folder = Path(self.where).expanduser()
        if self.names is not None:
            return [folder / name for name in self.names]
        if not folder.is_dir():
            return []
        images = (path for path in folder.rglob("*") if path.suffix.lower()[1:] in FILES)
        return sorted(path for path in images if path.is_file())

    @cached_property
    def shards(self) -> list[str]:
        """The tar shards, where there are no image files."""
        folder = Path(self.where).expanduser()
        if self.files or (folder.is_dir() and not any(folder.glob("*.tar"))):
            return []
        if (
            not folder.exists()
            and not is_url(self.where)
            and not any(sign in self.where for sign in "{*?[")
        ):
            raise UserError(
                f"There is no folder {folder}: give a folder of images, or shards as "
                "'data/{00000..00009}.tar'."
            )
        return expand(self.where)

    def __len__(self) -> int:
        return len(self.files) or sum(count_samples(shard) for shard in self.shards)

    @cached_property
    def side(self) -> int | None:
        """The side that batches have: `size`, or that of the images where the first 32 are squares
        of one side; else None.
        """
        if self.size is not None:
            return self.size
        everything = replace(self, rank=0, world_size=1)._raw(
            BadSampleCounter(1.0, "--max-bad-rate")
        )
        images = [_image(data, None) for _, _, data, _ in islice(everything, 32)]
        sides = {side for image in images if isinstance(image, Tensor) for side in image.shape[1:]}
        return sides.pop() if len(sides) == 1 else None

    def state(self) -> list[tuple[str, int, int]] | None:
        """Names, sizes and times of all files: another list, other images. None where it cannot be
        known (URLs).
        """
        if any(is_url(shard) for shard in self.shards):
            return None
        paths = self.files or [Path(shard) for shard in self.shards]
        return [
            (str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths
        ]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """This rank's images in batches of one size each, at most `batch_size`; images of equal
        size keep their order.

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
        raw = self._raw(counter)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            while window := list(islice(raw, 64)):
                for (key, where, _, caption), image in zip(
                    window, pool.map(lambda one: _image(one[2], self.size), window), strict=True
                ):
                    if isinstance(image, BadSample):
                        counter.record_bad(where, image)
                    else:
                        counter.record_good()
                        yield image, key, caption

    def _raw(self, counter: BadSampleCounter) -> Iterator[tuple[str, str, bytes, str]]:
        """This rank's (key, where, bytes, caption)."""
        for n in range(self.rank, len(self.files), self.world_size):
            path = self.files[n]
            text = path.with_suffix(".txt")
            if self.captions is not None:
                caption = self.captions[n]
            else:
                caption = (
                    text.read_text(encoding="utf-8", errors="replace").strip()
                    if text.is_file()
                    else ""
                )
            yield (
                path.relative_to(Path(self.where).expanduser()).with_suffix("").as_posix(),
                f"image {path}",
                path.read_bytes(),
                caption,
            )
        number = 0
        for shard in self.shards:
            for sample in raw_samples(shard, counter):
                if number % self.world_size == self.rank:
                    yield (
                        sample["key"],
                        f"sample {sample['key']} of {shard}",
                        sample["image"],
                        sample["caption"],
                    )
                number += 1


def _image(data: bytes, size: int | None) -> Tensor | BadSample:
    try:
        return to_uint8(decode(data, size))
    except BadSample as error:
        return error


def _batch(rows: list[tuple[Tensor, str, str]]) -> Batch:
    images, keys, captions = zip(*rows, strict=True)
    return {"images": torch.stack(images), "keys": list(keys), "captions": list(captions)}
