"""The embedding store: raw CLIP embeddings and tokens of every sample, one file a tar shard, paired with the images by key.

    clip.json                  fingerprint of the CLIP that the folder belongs to, from its first minute
    manifest.json              the same; for each shard: its file, rows, size and digest of the tar
    NAME-HASH.safetensors      image_embed, text_embed (N, D) float16; tokens (N, L) int32; mean (D,), scatter (D, D) float64 of image_embed

A file appears under its name when it is whole. A shard that is done and unchanged is not done twice; a run that was killed goes on.
"""

import hashlib
import json
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from unclip_pl.clip.fingerprint import require_same
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.captions import Captionless
from unclip_pl.data.shards import (
    BadSample,
    ErrorBudget,
    Lost,
    decode,
    is_url,
    read_shard,
    too_many_files,
)
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_file, file_lock, remove_leftovers

log = logging.getLogger(__name__)
FORMAT = 1
FILL = "fill it with `lightning predict -c stages/embed.yaml`"
DAY = 86400.0
LOOKED_AT = 64  # shards whose rows are asked for captions


def mapped(path: Path) -> tuple[dict[str, Any], Callable[[str, str], np.ndarray]]:
    """A safetensors file by mmap: its metadata `rows`, and arrays by name and numpy type.

    Raises ValueError, KeyError or OSError where the file is not whole.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError("it is shorter than its header says")
            header = json.loads(file.read(length))
    except OSError as error:
        raise too_many_files(error) or error from None
    meta = json.loads(header.pop("__metadata__")["rows"])

    end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    if size < end:
        raise ValueError("it is cut short")
    # torch closes the file that it maps; np.memmap keeps one open for each array, and a thousand of
    # them is the usual limit
    content = torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8).numpy()
    content.flags.writeable = False

    def array(name: str, kind: str) -> np.ndarray:
        first, last = (8 + length + offset for offset in header[name]["data_offsets"])
        return content[first:last].view(kind).reshape(header[name]["shape"])

    return meta, array


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard by mmap, no file kept open: `image_embed`, `text_embed` (N, D) float16, `tokens` (N, L) int32, and `keys`, N of them."""

    path: Path
    image_embed: np.ndarray
    text_embed: np.ndarray
    tokens: np.ndarray
    keys: list[str]
    source: dict[str, Any]

    @cached_property
    def row(self) -> dict[str, int]:
        """Row by key."""
        return {key: i for i, key in enumerate(self.keys)}

    @classmethod
    def open(cls, path: Path) -> "ShardRows":
        """Map a file of the store; raises ValueError, KeyError or OSError where it is not whole."""
        meta, rows = mapped(path)
        return cls(
            path,
            rows("image_embed", "<f2"),
            rows("text_embed", "<f2"),
            rows("tokens", "<i4"),
            meta["keys"],
            meta["source"],
        )


@dataclass(frozen=True)
class Statistics:
    """Of the image embeddings, in float64: `count`, `mean` (D,), `covariance` (D, D) (over N, not N - 1)."""

    count: int
    mean: torch.Tensor
    covariance: torch.Tensor

    @property
    def std(self) -> torch.Tensor:
        """(D,)"""
        return self.covariance.diagonal().clamp(min=0).sqrt()


class EmbeddingStore:
    """A folder of embeddings: `ensure` makes what is missing, `shard` reads. May be sent to another process.

    Args:
        folder: made on demand.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self._open: dict[str, ShardRows] = {}
        self._since = 0.0
        self._captions = Captionless()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # a pickled mmap would be its contents

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest; raises a UserError where there is none or it is of another version."""
        try:
            return self._read_manifest()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.folder} is no whole embedding store ({error}): {FILL}."
            ) from None

    def _read_manifest(self) -> dict[str, Any]:
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise too_many_files(error) or error from None
        if (version := manifest["format"]) != FORMAT:
            raise UserError(
                f"The store {self.folder} has format {version}, this version reads {FORMAT}: fill a new one."
            )
        return manifest

    def path(self, shard: str) -> Path:
        """The file of a shard; its name depends on the shard's whole name, as the configuration gives it."""
        stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in Path(shard).stem)[:64]
        return (
            self.folder / f"{stem}-{hashlib.sha256(os.fsencode(shard)).hexdigest()[:8]}.safetensors"
        )

    def shard(self, shard: str) -> ShardRows:
        """The rows of a shard, mapped once and kept."""
        if shard not in self._open:
            self._open[shard] = self._mapped(shard)
        return self._open[shard]

    def _mapped(self, shard: str) -> ShardRows:
        try:
            return ShardRows.open(self.path(shard))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"The store {self.folder} has no whole rows for {shard} ({error}): {FILL}."
            ) from None

    def rows(self, shards: Sequence[str]) -> list[int]:
        """How many rows each of `shards` has."""
        return [len(self._mapped(shard).keys) for shard in shards]

    def captionless(self, shards: Sequence[str], blank: np.ndarray) -> Captionless:
        """How many rows of `shards` have the tokens (L,) of no caption; of many shards, of some."""
        found = Captionless()
        for shard in shards[:: max(1, len(shards) // LOOKED_AT)]:
            tokens = self._mapped(shard).tokens
            found.seen += len(tokens)
            found.missing += int((tokens == blank).all(1).sum())
        return found

    def done(self, shard: str) -> bool:
        """Whether the shard's file is whole and made from the tar as it is now."""
        source = describe(shard)
        try:
            return ShardRows.open(self.path(shard)).source == source
        except (OSError, ValueError, KeyError):
            return False

    def ensure(
        self,
        shards: Sequence[str],
        clip: FrozenCLIP,
        batch_size: int = 256,
        *,
        rank: int = 0,
        world: int = 1,
        progress: bool = True,
        budget: ErrorBudget | None = None,
    ) -> int:
        """Embed what is missing of this rank's share of `shards`; returns how many shards it embedded.

        Alone (world 1) it ends with `finish`; of several ranks one calls `finish` when all are through. Other processes may fill the same
        store at the same time: a shard that one of them is at is left to it.

        Raises:
            UserError: the store belongs to another CLIP; a tar is gone, has no usable sample, or is a URL that breaks off; too many bad samples.
        """
        count = self.embed(shards[rank::world], clip, batch_size, progress=progress, budget=budget)
        if world == 1:
            self.finish(shards, clip)
        return count

    def embed(
        self,
        shards: Sequence[str],
        clip: FrozenCLIP,
        batch_size: int = 256,
        *,
        progress: bool = True,
        budget: ErrorBudget | None = None,
    ) -> int:
        """Embed those of `shards` that are not done; returns how many this process did, and leaves the manifest alone. See `ensure`."""
        self._own(clip)
        self._since, budget = time.monotonic(), budget or ErrorBudget()
        self._captions = Captionless()
        missing = [shard for shard in shards if not self.done(shard)]
        sizes = [describe(shard)["size"] for shard in missing]
        total = None if None in sizes else sum(sizes)
        with tqdm(
            desc="embedding",
            total=total,
            unit="B",
            unit_scale=True,
            file=sys.stderr,
            disable=not (progress and missing),
        ) as bar:
            first = {
                shard: self._embed_locked(shard, clip, batch_size, budget, bar, wait=0.0)
                for shard in dict.fromkeys(missing)
            }
            others = [
                self._embed_locked(shard, clip, batch_size, budget, bar, wait=DAY)
                for shard, embedded in first.items()
                if embedded is None
            ]
        if self._captions.missing:
            log.warning("%s", self._captions)
        return sum(embedded is True for embedded in [*first.values(), *others])

    def finish(self, shards: Sequence[str], clip: FrozenCLIP) -> None:
        """Write the manifest over `shards`, all of them done, and over what it named before and is still there."""
        if (
            self._manifest_over(shards, clip) == self._old_manifest()
        ):  # so that a whole store may be read-only
            return
        with (
            file_lock(self.folder / ".manifest.lock"),
            atomic_file(self.folder / "manifest.json", "w") as file,
        ):
            file.write(json.dumps(self._manifest_over(shards, clip), indent=1) + "\n")

    def _old_manifest(self) -> dict[str, Any]:
        """The manifest that is there, one without shards where there is none or it is damaged; raises a UserError where it is of another version."""
        try:
            return self._read_manifest()
        except (OSError, ValueError, KeyError, TypeError):
            return {"shards": {}}

    def _manifest_over(self, shards: Sequence[str], clip: FrozenCLIP) -> dict[str, Any]:
        old = self._old_manifest()
        entries = {
            shard: entry
            for shard, entry in old["shards"].items()
            if (self.folder / entry["file"]).is_file()
        }
        for shard in shards:
            rows = self._mapped(shard)
            entries[shard] = {"file": rows.path.name, "rows": len(rows.keys), **rows.source}
        fingerprint = old.get("clip") or clip.fingerprint()
        return {
            "format": FORMAT,
            "clip": fingerprint,
            "rows": sum(entry["rows"] for entry in entries.values()),
            "shards": entries,
        }

    def statistics(self, shards: Sequence[str] | None = None) -> Statistics:
        """Mean and covariance of the image embeddings of `shards` (None: all), merged from the files' own in float64 (Chan et al. 1979)."""
        count, mean, scatter = (
            0,
            torch.zeros((), dtype=torch.float64),
            torch.zeros((), dtype=torch.float64),
        )
        for shard in self.manifest["shards"] if shards is None else shards:
            n = len(self._mapped(shard).keys)
            try:
                with safe_open(self.path(shard), "pt") as file:
                    m, s = file.get_tensor("mean"), file.get_tensor("scatter")
            except SafetensorError as error:
                raise UserError(
                    f"The store {self.folder} has no statistics of {shard} ({error}): delete {self.path(shard)} and {FILL}."
                ) from None
            delta, total = m - mean, count + n
            scatter = scatter + s + torch.outer(delta, delta) * (count * n / total)
            mean, count = mean + delta * (n / total), total
        return Statistics(count, mean, scatter / max(count, 1))

    def _own(self, clip: FrozenCLIP) -> None:
        """Claim an empty folder for a CLIP, or compare with the one that it belongs to."""
        claim, manifest = self.folder / "clip.json", self.folder / "manifest.json"
        self._old_manifest()  # one of another version is refused before any work
        if claim.is_file():
            try:
                theirs = json.loads(claim.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise too_many_files(error) or UserError(
                    f"{claim} cannot be read ({error}): fill a new store."
                ) from None
            require_same(theirs, clip.fingerprint(), f"The embedding store {self.folder}")
            return
        with file_lock(self.folder / ".clip.lock"):
            if claim.is_file():
                self._own(clip)
            elif manifest.is_file():
                require_same(
                    self.manifest["clip"], clip.fingerprint(), f"The embedding store {self.folder}"
                )
            elif any(self.folder.glob("*.safetensors")):
                raise UserError(
                    f"The store {self.folder} has embeddings but neither clip.json nor manifest.json to say of which CLIP: fill a new folder."
                )
            else:
                with atomic_file(claim, "w") as file:
                    json.dump(clip.fingerprint(), file)

    def _embed_locked(
        self,
        shard: str,
        clip: FrozenCLIP,
        batch_size: int,
        budget: ErrorBudget,
        bar: tqdm,
        *,
        wait: float,
    ) -> bool | None:
        """Embed a shard unless another process did so meanwhile (False); None where one is at it for longer than `wait` seconds."""
        with ExitStack() as stack:
            try:
                stack.enter_context(
                    file_lock(self.folder / f".{self.path(shard).stem}.lock", timeout=wait)
                )
            except UserError:
                if wait:
                    raise
                return None
            before, embedded = bar.n, not self.done(shard)
            if embedded:
                remove_leftovers(self.folder, self.path(shard).name)
                self._embed(shard, clip, batch_size, budget, bar)
            bar.update((describe(shard)["size"] or bar.n - before) - (bar.n - before))
        return embedded

    def _embed(
        self, shard: str, clip: FrozenCLIP, batch_size: int, budget: ErrorBudget, bar: tqdm
    ) -> None:
        source = describe(shard)
        keys: list[str] = []
        parts: dict[str, list[torch.Tensor]] = {"image_embed": [], "text_embed": [], "tokens": []}
        for batch in decoded_batches(shard, clip.image_size, batch_size, budget):
            self._captions.add(batch)
            tokens = clip.tokenize([sample["caption"] for sample in batch])
            image = (
                clip.embed_images(torch.stack([sample["image"] for sample in batch])).half().cpu()
            )
            text = clip.embed_text(tokens).embed.half().cpu()
            finite = image.isfinite().all(1) & text.isfinite().all(1)
            for sample, usable in zip(batch, finite.tolist(), strict=True):
                if usable:
                    budget.good()
                    keys.append(sample["key"])
                else:
                    budget.spend(
                        f"sample {sample['key']} of {shard}", "its embedding is not finite"
                    )
            for name, rows in {
                "image_embed": image,
                "text_embed": text,
                "tokens": tokens.int().cpu(),
            }.items():
                parts[name].append(rows[finite])
            bar.update(sum(sample["bytes"] for sample in batch))
            bar.set_postfix_str(
                f"{budget.seen / max(time.monotonic() - self._since, 1e-9):.0f} images/s, {budget.bad} bad",
                refresh=False,
            )
        if not keys:
            raise UserError(
                f"The shard {shard} has no usable sample: take it out of the data, or mend it."
            )
        self._write(shard, keys, {name: torch.cat(part) for name, part in parts.items()}, source)

    def _write(
        self, shard: str, keys: list[str], tensors: dict[str, torch.Tensor], source: dict[str, Any]
    ) -> None:
        """The file of a shard from its rows and `describe(shard)` of before it was read."""
        rows = tensors["image_embed"].double()
        tensors["mean"] = rows.mean(0)
        tensors["scatter"] = (rows - tensors["mean"]).T @ (rows - tensors["mean"])
        with atomic_file(self.path(shard)) as file:
            file.write(save(tensors, {"rows": json.dumps({"keys": keys, "source": source})}))
        self._open.pop(shard, None)


def decoded_batches(
    shard: str, image_size: int, batch_size: int, budget: ErrorBudget
) -> Iterator[list[dict[str, Any]]]:
    """Batches of decoded samples (with `bytes`, the image's size in the tar); the next two are decoded by threads while one is used.

    What cannot be used is charged when the batch that it lay in has been, so that the caller has counted the good ones first.
    """

    def decoded(sample: dict[str, Any]) -> dict[str, Any] | Lost:
        try:
            return sample | {
                "image": decode(sample["image"], image_size),
                "bytes": len(sample["image"]),
            }
        except BadSample as error:
            return Lost(f"sample {sample['key']} of {shard}", error)

    stream = read_shard(shard, budget, whole=True)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        coming: deque[list] = deque()
        while True:
            while len(coming) < 3 and (raw := list(islice(stream, batch_size))):
                coming.append(
                    [
                        sample if isinstance(sample, Lost) else threads.submit(decoded, sample)
                        for sample in raw
                    ]
                )
            if not coming:
                return
            results = [
                place if isinstance(place, Lost) else place.result() for place in coming.popleft()
            ]
            if batch := [result for result in results if not isinstance(result, Lost)]:
                yield batch
            for result in results:
                if isinstance(result, Lost):
                    budget.charge(result)


def describe(shard: str) -> dict[str, Any]:
    """Size and digest of a local tar (SHA-256 of its size, first and last MiB); of a URL neither, so a change there goes unseen.

    Raises:
        UserError: there is no such file.
    """
    if is_url(shard):
        return {"size": None, "digest": None}
    try:
        with Path(shard).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(str(size).encode())
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    except OSError as error:
        if full := too_many_files(error):
            raise full from None
        raise UserError(
            f"The shard {shard} cannot be read ({error.strerror}): put it back, or take it out of data.train and data.val."
        ) from None
    return {"size": size, "digest": digest.hexdigest()}
