"""Images that a model draws for a metric: drawn once, into shards of their own.

    samples.json      the settings that they were drawn with; others are refused
    00000.tar ...     images as PNG, with captions; each file is whole or not there

A run that was killed goes on with the shards that are missing. Ranks (of torchrun or srun) take
every n-th shard and never wait for each other. Image k has the seed `seed + k`, and a batch never
crosses a shard, so the images are the same from any number of ranks.
"""

import hashlib
import io
import json
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from eval.captions import Caption
from eval.stored import Batch, StoredImages
from unclip_pl import __version__
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.diffusion.watch import watching
from unclip_pl.stages.base import Stage
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_file, remove_leftovers
from unclip_pl.utils.images import from_pil, to_pil

Draw = Callable[[Sequence[int]], Tensor]
"""Indices of captions -> images, float (B, 3, H, W) in [-1, 1]."""
SHARD_SIZE = 64
SHOW_EVERY = 1.0
"""Seconds between two updates of the progress bar."""
MANIFEST = "samples.json"
FOLDER_OPTION = "--samples (of eval.compare, eval.sweep and eval.coco: --out)"


@dataclass
class GeneratedImages:
    """Images of captions, which `draw` makes where `folder` lacks them.

    Args:
        captions: caption k is that of image k.
        draw: is called with the indices of a batch.
        settings: plain values that decide what the images are.
        about: what is said of the images with their settings, and follows from these.
        name: for messages.
        first: only so many of the captions for now; the rest may follow into the same folder.
        shard_size: images per shard.
        rank, world_size: this process among all.
        clip: the CLIP whose embeddings the images are drawn from.
        size: side of the images in pixels.
        stages: those that draw, whose steps the progress bar counts.
    """

    folder: Path
    captions: Sequence[Caption]
    draw: Draw
    settings: dict[str, Any]
    name: str = "generated images"
    first: int | None = None
    shard_size: int = SHARD_SIZE
    rank: int = 0
    world_size: int = 1
    clip: FrozenCLIP | None = None
    size: int = 64
    stages: Sequence[Stage] = ()
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.captions[: self.first])

    @property
    def own_shards(self) -> list[Path]:
        """This rank's shards."""
        count = -(-len(self) // self.shard_size)
        return [self.shard_file(number) for number in range(self.rank, count, self.world_size)]

    def shard_file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.tar"

    def indices(self, shard: Path) -> range:
        """Of the images in a shard."""
        first = int(shard.stem) * self.shard_size
        return range(first, min(first + self.shard_size, len(self.captions)))

    def check_manifest(self) -> None:
        """Write the manifest if there is none.

        Raises:
            UserError: the folder holds images of other settings.
        """
        content = {
            "captions_sha256": captions_digest(self.captions),
            "count": len(self.captions),
            "shard": self.shard_size,
        }
        ours = json.loads(json.dumps(self.settings | content))
        manifest = self.folder / MANIFEST
        try:
            theirs = json.loads(manifest.read_text(encoding="utf-8"))["settings"]
        except FileNotFoundError:
            self._write_manifest(ours)
            return
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{manifest} is damaged: remove the folder, or choose another with --samples."
            ) from None
        for key in {**theirs, **ours}:
            if theirs.get(key) != ours.get(key):
                raise UserError(
                    f"{self.folder} holds images with {key} {theirs.get(key)!r}, and this run has "
                    f"{ours.get(key)!r}: choose another folder with {FOLDER_OPTION}, or remove "
                    "that one."
                )

    def _write_manifest(self, settings: dict[str, Any]) -> None:
        if any(self.folder.glob("*.tar")):
            raise UserError(
                f"{self.folder} holds shards that were not drawn here (no {MANIFEST}): choose "
                f"another folder with {FOLDER_OPTION}."
            )
        versions = {"unclip_pl": __version__, "torch": torch.__version__}
        with atomic_file(self.folder / MANIFEST, "w") as file:
            json.dump({"settings": settings, **versions}, file, indent=1)

    def draw_missing(self, batch_size: int) -> None:
        """Draw the shards of this rank that are not there yet."""
        from tqdm import tqdm

        self.check_manifest()
        remove_leftovers(self.folder, "*.tar")
        missing = [shard for shard in self.own_shards if not shard.exists()]
        with tqdm(
            total=sum(len(self.indices(shard)) for shard in missing),
            desc=f"drawing {self.name}",
            unit="image",
            disable=not missing or self.rank != 0,
            mininterval=SHOW_EVERY,
            file=sys.stderr,
        ) as bar:
            steps = StepCount(bar)
            with watching(self.stages, steps.add):
                for shard in missing:
                    for count in self._draw_shard(shard, batch_size):
                        steps.restart()
                        bar.update(count)

    def _draw_shard(self, shard: Path, batch_size: int) -> Iterator[int]:
        """Draw and write one shard; yields the number of images of each batch."""
        indices = self.indices(shard)
        with (
            atomic_file(shard) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                for index, image in zip(batch, self.draw(batch).cpu(), strict=True):
                    self._add(tar, index, image)
                yield len(batch)

    def _add(self, tar: tarfile.TarFile, index: int, image: Tensor) -> None:
        png, caption = io.BytesIO(), self.captions[index]
        to_pil(image).save(png, "PNG")
        facts = {"key": caption.key, "caption": caption.text, "index": index}
        members = {
            "png": png.getvalue(),
            "txt": caption.text.encode(),
            "json": json.dumps(facts, ensure_ascii=False).encode(),
        }
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{index:07d}.{extension}")
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """This rank's images, drawn where they are missing; `keys` are "0000000" and so on."""
        self.draw_missing(batch_size)
        for shard in self.own_shards:
            for batch in StoredImages(str(shard), max_bad_rate=0.0).batches(batch_size):
                # The last shard may have images of more captions than the first ones.
                count = sum(int(key) < len(self) for key in batch["keys"])
                if count:
                    yield {name: values[:count] for name, values in batch.items()}

    def load(self, indices: Sequence[int]) -> Tensor:
        """Images that any rank has drawn, by their indices: (N, 3, H, W) in [-1, 1]."""
        images = []
        for index in indices:
            with tarfile.open(self.shard_file(index // self.shard_size)) as tar:
                member = tar.extractfile(f"{index:07d}.png")
                assert member is not None  # a plain file
                with Image.open(member) as image:
                    images.append(from_pil(image))
        return torch.stack(images)


class StepCount:
    """Shows on a progress bar how many steps the batch has made that is being drawn."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.count, self.shown_at = bar, 0, time.monotonic()

    def restart(self) -> None:
        """Count from 0: the next batch begins."""
        self.count = 0

    def add(self, x0: Tensor) -> None:
        """One step more; at most once a second it is shown."""
        self.count += 1
        self.bar.set_postfix_str(f"this batch: step {self.count}", refresh=False)
        if time.monotonic() - self.shown_at > SHOW_EVERY:
            self.shown_at = time.monotonic()
            self.bar.refresh()


def captions_digest(captions: Sequence[Caption]) -> str:
    """A name for these captions in this order: others have another."""
    texts = json.dumps([caption.text for caption in captions])
    return hashlib.sha256(texts.encode()).hexdigest()[:16]
