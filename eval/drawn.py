"""Pictures that a model draws for a metric: drawn once, into shards of their own.

    samples.json      with what settings they were drawn; others are refused
    00000.tar ...     pictures as PNG, with captions; written whole or not at all

A run that was killed goes on with the shards that are missing. Ranks (of torchrun or srun) take
every n-th shard and never wait for each other. Picture k has the seed `seed + k`, and a batch never
crosses a shard, so the pictures are the same from any number of ranks.
"""

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from eval.captions import Caption
from eval.folders import Batch, Pictures
from unclip_pl import __version__
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_file, remove_leftovers
from unclip_pl.utils.images import from_pil, to_pil

Draw = Callable[[Sequence[int]], Tensor]
"""Indices of captions -> float (B, 3, H, W) in [-1, 1]."""
SHARD = 64
MANIFEST = "samples.json"
FOLDER = "--samples (of eval.compare and eval.sweep: --out)"


@dataclass
class Drawn:
    """Pictures of captions that `draw` makes where `folder` lacks them.

    Args:
        captions: caption k is picture k.
        draw: is given the indices of a batch.
        settings: plain values that decide what the pictures are.
        first: only so many of the captions for now; the rest may follow into the same folder.
        shard: pictures a shard.
        rank, world_size: this process among all.
        clip: the CLIP whose embeddings the pictures are drawn from.
        size: side of the pictures in pixels.
    """

    folder: Path
    captions: Sequence[Caption]
    draw: Draw
    settings: dict[str, Any]
    name: str = "drawn"
    first: int | None = None
    shard: int = SHARD
    rank: int = 0
    world_size: int = 1
    clip: FrozenCLIP | None = None
    size: int = 64

    def __len__(self) -> int:
        return len(self.captions[: self.first])

    @property
    def mine(self) -> list[Path]:
        """This rank's shards."""
        return [
            self.folder / f"{number:05d}.tar"
            for number in range(self.rank, -(-len(self) // self.shard), self.world_size)
        ]

    def indices(self, shard: Path) -> range:
        """Of the pictures in a shard."""
        first = int(shard.stem) * self.shard
        return range(first, min(first + self.shard, len(self.captions)))

    def check(self) -> None:
        """Write the manifest; UserError where the folder holds pictures of other settings."""
        ours = json.loads(
            json.dumps(
                self.settings
                | {
                    "captions_sha256": digest_of(self.captions),
                    "count": len(self.captions),
                    "shard": self.shard,
                }
            )
        )
        manifest = self.folder / MANIFEST
        try:
            theirs = json.loads(manifest.read_text(encoding="utf-8"))["settings"]
        except FileNotFoundError:
            if any(self.folder.glob("*.tar")):
                raise UserError(
                    f"{self.folder} holds shards that were not drawn here (no {MANIFEST}): choose "
                    f"another folder with {FOLDER}."
                ) from None
            with atomic_file(manifest, "w") as file:
                json.dump(
                    {"settings": ours, "unclip_pl": __version__, "torch": torch.__version__},
                    file,
                    indent=1,
                )
            return
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{manifest} is damaged: remove the folder, or choose another with --samples."
            ) from None
        other = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if other:
            key = other[0]
            raise UserError(
                f"{self.folder} holds pictures with {key} {theirs.get(key)!r}, and this run has "
                f"{ours.get(key)!r}: choose another folder with {FOLDER}, or remove that one."
            )

    def complete(self, batch_size: int) -> None:
        """Draw what is missing of this rank's shards."""
        from tqdm import tqdm

        self.check()
        remove_leftovers(self.folder, "*.tar")
        missing = [shard for shard in self.mine if not shard.exists()]
        total = sum(len(self.indices(shard)) for shard in missing)
        with tqdm(
            total=total,
            desc=f"drawing {self.name}",
            unit="image",
            disable=not missing or self.rank != 0,
            mininterval=1.0,
            file=sys.stderr,
        ) as bar:
            for shard in missing:
                with (
                    atomic_file(shard) as file,
                    tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
                ):
                    indices = self.indices(shard)
                    for first in range(0, len(indices), batch_size):
                        some = indices[first : first + batch_size]
                        for index, image in zip(some, self.draw(some).cpu(), strict=True):
                            self._add(tar, index, image)
                        bar.update(len(some))

    def _add(self, tar: tarfile.TarFile, index: int, image: Tensor) -> None:
        png, caption = io.BytesIO(), self.captions[index]
        to_pil(image).save(png, "PNG")
        facts = json.dumps(
            {"key": caption.key, "caption": caption.text, "index": index}, ensure_ascii=False
        )
        for ending, data in (
            ("png", png.getvalue()),
            ("txt", caption.text.encode()),
            ("json", facts.encode()),
        ):
            info = tarfile.TarInfo(f"{index:07d}.{ending}")
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """This rank's pictures, drawn where they are missing; `keys` are "0000000" and so on."""
        self.complete(batch_size)
        for shard in self.mine:
            for batch in Pictures(str(shard), max_bad_rate=0.0).batches(batch_size):
                kept = sum(int(key) < len(self) for key in batch["keys"])  # of the last shard
                if kept:
                    yield {name: values[:kept] for name, values in batch.items()}

    def pictures(self, indices: Sequence[int]) -> Tensor:
        """Some that are drawn, by any rank: (N, 3, H, W) in [-1, 1]."""
        found = []
        for k in indices:
            with tarfile.open(self.folder / f"{k // self.shard:05d}.tar") as tar:
                member = tar.extractfile(f"{k:07d}.png")
                assert member is not None  # a plain file
                with Image.open(member) as image:
                    found.append(from_pil(image))
        return torch.stack(found)


def digest_of(captions: Sequence[Caption]) -> str:
    """Tells these captions, in this order, from others."""
    return hashlib.sha256(json.dumps([caption.text for caption in captions]).encode()).hexdigest()[
        :16
    ]
