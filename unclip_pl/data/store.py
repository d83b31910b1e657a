"""The embedding store: raw CLIP embeddings and tokens of every sample.

Embeddings are paired with the images by key. Each tar shard has one file.

    clip.json              fingerprint of the CLIP that the folder belongs to
    manifest.json          the same; of each shard: its file, rows, size and digest of the tar
    NAME-HASH.safetensors  image_embed, text_embed (N, D) float16; tokens (N, L) int32;
                           mean (D,), scatter (D, D) float64 of image_embed

A file appears under its name when it is whole. A shard that is done and unchanged is not done
twice. A run that was killed goes on where it was.
"""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from tqdm import tqdm

from unclip_pl.clip.fingerprint import require_same
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.bad_samples import BadSampleCounter, too_many_files
from unclip_pl.data.captions import MissingCaptions
from unclip_pl.data.shard_rows import UNREADABLE, ShardRows, describe_shard, map_safetensors
from unclip_pl.data.shards import decode_batches
from unclip_pl.data.store_files import BucketFiles, LocalFiles
from unclip_pl.data.store_statistics import Statistics
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import remove_leftovers
from unclip_pl.utils.remote import is_remote

log = logging.getLogger(__name__)
FORMAT_VERSION = 1
FILL = "fill it with `lightning predict -c stages/embed.yaml`"
DAY = 86400.0
CAPTION_SHARDS = 64  # shards whose rows are checked for captions


class EmbeddingStore:
    """A folder of embeddings: `ensure` makes what is missing, `shard` reads.

    It may be sent to another process.

    Args:
        folder: on a local disk, created when needed, or the URL of a folder in a bucket. Rows in a
            bucket are copied to the cache first; keys and statistics are read without a copy.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        is_bucket = is_remote(folder)
        self.folder: Path | str = str(folder) if is_bucket else Path(folder)
        self.files = BucketFiles(str(folder)) if is_bucket else LocalFiles(Path(folder))
        self._open: dict[str, ShardRows] = {}
        self._started = 0.0
        self._captions = MissingCaptions()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # a pickled mmap would be its contents

    @property
    def manifest(self) -> dict[str, Any]:
        """The contents of manifest.json.

        Raises:
            UserError: there is none, or it is of another version.
        """
        try:
            return self._read_manifest()
        except (*UNREADABLE, TypeError) as error:
            raise UserError(
                f"{self.folder} is no whole embedding store ({error}): {FILL}."
            ) from None

    def _read_manifest(self) -> dict[str, Any]:
        try:
            manifest = json.loads(self.files.read("manifest.json"))
        except OSError as error:
            raise too_many_files(error) or error from None
        if (version := manifest["format"]) != FORMAT_VERSION:
            raise UserError(
                f"The store {self.folder} has format {version}, this version reads "
                f"{FORMAT_VERSION}: fill a new one."
            )
        return manifest

    def file_of(self, shard: str) -> str:
        """The name of a shard's file.

        It follows from the shard's whole name, as the settings give it.
        """
        stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in Path(shard).stem)[:64]
        digest = hashlib.sha256(os.fsencode(shard)).hexdigest()[:8]
        return f"{stem}-{digest}.safetensors"

    def path(self, shard: str) -> Path | str:
        """The path or URL of a shard's file."""
        return self.files.place(self.file_of(shard))

    def shard(self, shard: str) -> ShardRows:
        """The rows of a shard, mapped at the first call.

        Raises:
            UserError: the store has no whole rows for it.
        """
        if shard not in self._open:
            try:
                self._open[shard] = self.open_rows(shard)
            except UNREADABLE as error:
                raise self._no_rows(shard, error) from None
        return self._open[shard]

    def open_rows(self, shard: str) -> ShardRows:
        """Map the rows of a shard.

        Raises:
            ValueError, KeyError, OSError: the store has no whole rows for it.
        """
        return ShardRows.open(self.files.mapped(self.file_of(shard)))

    def _part(self, shard: str) -> tuple[dict[str, Any], Callable[[str, str], np.ndarray]]:
        """See `map_safetensors`: of a store in a bucket no more is read than is used."""
        try:
            return map_safetensors(self.path(shard))
        except UNREADABLE as error:
            raise self._no_rows(shard, error) from None

    def _no_rows(self, shard: str, error: Exception) -> UserError:
        return UserError(
            f"The store {self.folder} has no whole rows for {shard} ({error}): {FILL}."
        )

    def row_counts(self, shards: Sequence[str]) -> list[int]:
        """How many rows each of `shards` has."""
        return [len(self._part(shard)[0]["keys"]) for shard in shards]

    def missing_captions(self, shards: Sequence[str], blank: np.ndarray) -> MissingCaptions:
        """Count the rows of `shards` that have the tokens `blank` (L,) of no caption.

        Of many shards only some are read.
        """
        missing = MissingCaptions()
        for shard in shards[:: max(1, len(shards) // CAPTION_SHARDS)]:
            tokens = self._part(shard)[1]("tokens", "<i4")
            missing.seen += len(tokens)
            missing.missing += int((tokens == blank).all(1).sum())
        return missing

    def is_done(self, shard: str) -> bool:
        """Whether the shard's file is whole and made from the tar as it is now."""
        source = describe_shard(shard)
        try:
            return map_safetensors(self.path(shard))[0]["source"] == source
        except UNREADABLE:
            return False

    def ensure(
        self,
        shards: Sequence[str],
        clip: FrozenCLIP,
        batch_size: int = 256,
        *,
        progress: bool = True,
        counter: BadSampleCounter | None = None,
    ) -> int:
        """Embed what is missing of `shards` and write the manifest, in one process.

        Several ranks call `embed` instead, each with its own shards, and one of them calls `finish`
        when all are through. Other processes may fill the same store at the same time: a shard that
        one of them is working on is left to it.

        Returns:
            How many shards this process embedded.

        Raises:
            UserError: the store belongs to another CLIP; a tar is gone, has no usable sample, or is
                a URL that breaks off; there are too many bad samples.
        """
        count = self.embed(shards, clip, batch_size, progress=progress, counter=counter)
        self.finish(shards, clip)
        return count

    def embed(
        self,
        shards: Sequence[str],
        clip: FrozenCLIP,
        batch_size: int = 256,
        *,
        progress: bool = True,
        counter: BadSampleCounter | None = None,
    ) -> int:
        """Embed those of `shards` that are not done, without the manifest. See `ensure`."""
        self._claim(clip)
        tally = counter or BadSampleCounter()
        self._started = time.monotonic()
        self._captions = MissingCaptions()
        missing = [shard for shard in dict.fromkeys(shards) if not self.is_done(shard)]
        sizes = [describe_shard(shard)["size"] for shard in missing]
        with tqdm(
            desc="embedding",
            total=None if None in sizes else sum(sizes),
            unit="B",
            unit_scale=True,
            file=sys.stderr,
            disable=not (progress and missing),
        ) as bar:

            def embed_locked(shard: str, wait: float) -> bool | None:
                return self._embed_locked(shard, clip, batch_size, tally, bar, wait=wait)

            embedded = {shard: embed_locked(shard, 0.0) for shard in missing}
            for shard, result in embedded.items():
                if result is None:  # another process was working on it
                    embedded[shard] = embed_locked(shard, DAY)
        if self._captions.missing:
            log.warning("%s", self._captions)
        return sum(result is True for result in embedded.values())

    def finish(self, shards: Sequence[str], clip: FrozenCLIP) -> None:
        """Write the manifest of `shards`, all of which must be done.

        Shards that it named before stay in it if their files are still there.
        """
        if self._new_manifest(shards, clip) == self._old_manifest():
            return  # so that a whole store may be read-only
        with self.files.lock("manifest"):
            manifest = json.dumps(self._new_manifest(shards, clip), indent=1) + "\n"
            self.files.write("manifest.json", manifest.encode())

    def _old_manifest(self) -> dict[str, Any]:
        """The manifest that is there, or one without shards where there is none or it is damaged.

        Raises:
            UserError: it is of another version.
        """
        try:
            return self._read_manifest()
        except (*UNREADABLE, TypeError):
            return {"shards": {}}

    def _new_manifest(self, shards: Sequence[str], clip: FrozenCLIP) -> dict[str, Any]:
        old, names = self._old_manifest(), set(self.files.names())
        entries = {shard: entry for shard, entry in old["shards"].items() if entry["file"] in names}
        for shard in shards:
            rows, _ = self._part(shard)
            count = len(rows["keys"])
            entries[shard] = {"file": self.file_of(shard), "rows": count, **rows["source"]}
        return {
            "format": FORMAT_VERSION,
            "clip": old.get("clip") or clip.fingerprint(),
            "rows": sum(entry["rows"] for entry in entries.values()),
            "shards": entries,
        }

    def statistics(self, shards: Sequence[str] | None = None) -> Statistics:
        """Mean and covariance of the image embeddings of `shards` (None: all).

        They are merged from the files' own in float64 (Chan et al. 1979).

        Raises:
            UserError: a file has no statistics.
        """
        count = 0
        mean = scatter = torch.zeros((), dtype=torch.float64)
        for shard in self.manifest["shards"] if shards is None else shards:
            rows, array = self._part(shard)
            n = len(rows["keys"])
            try:
                shard_mean, shard_scatter = (
                    torch.from_numpy(array(name, "<f8").copy()) for name in ("mean", "scatter")
                )
            except KeyError as error:
                raise UserError(
                    f"The store {self.folder} has no statistics of {shard} ({error} is missing): "
                    f"delete {self.path(shard)} and {FILL}."
                ) from None
            delta, total = shard_mean - mean, count + n
            scatter = scatter + shard_scatter + torch.outer(delta, delta) * (count * n / total)
            mean, count = mean + delta * (n / total), total
        return Statistics(count, mean, scatter / max(count, 1))

    def _claim(self, clip: FrozenCLIP) -> None:
        """Claim an empty folder for a CLIP, or compare with the one that it belongs to."""
        where = f"The embedding store {self.folder}"
        self._old_manifest()  # one of another version is refused before any work
        if self.files.exists("clip.json"):
            try:
                theirs = json.loads(self.files.read("clip.json"))
            except (OSError, ValueError) as error:
                raise too_many_files(error) or UserError(
                    f"{self.files.place('clip.json')} cannot be read ({error}): fill a new store."
                ) from None
            require_same(theirs, clip.fingerprint(), where)
            return
        with self.files.lock("clip"):
            if self.files.exists("clip.json"):
                self._claim(clip)
            elif self.files.exists("manifest.json"):
                require_same(self.manifest["clip"], clip.fingerprint(), where)
            elif self.has_rows():
                raise UserError(
                    f"The store {self.folder} has embeddings but neither clip.json nor "
                    "manifest.json to say of which CLIP: fill a new folder."
                )
            elif not self.files.create("clip.json", json.dumps(clip.fingerprint()).encode()):
                self._claim(clip)  # another machine was faster

    def has_rows(self) -> bool:
        """Whether there is any file with rows, whole or not."""
        return any(name.endswith(".safetensors") for name in self.files.names())

    def _embed_locked(
        self,
        shard: str,
        clip: FrozenCLIP,
        batch_size: int,
        counter: BadSampleCounter,
        bar: tqdm,
        *,
        wait: float,
    ) -> bool | None:
        """Embed a shard; False if another process did so meanwhile.

        None if another process has been working on it for longer than `wait` seconds.
        """
        file = self.file_of(shard)
        with ExitStack() as stack:
            try:
                stack.enter_context(self.files.lock(file.removesuffix(".safetensors"), wait))
            except UserError:
                if wait:
                    raise
                return None
            before, embedded = bar.n, not self.is_done(shard)
            if embedded:
                if isinstance(self.folder, Path):
                    remove_leftovers(self.folder, file)
                self._embed(shard, clip, batch_size, counter, bar)
            shown = bar.n - before
            bar.update((describe_shard(shard)["size"] or shown) - shown)
        return embedded

    def _embed(
        self, shard: str, clip: FrozenCLIP, batch_size: int, counter: BadSampleCounter, bar: tqdm
    ) -> None:
        source = describe_shard(shard)
        keys: list[str] = []
        parts: dict[str, list[torch.Tensor]] = {"image_embed": [], "text_embed": [], "tokens": []}
        for batch in decode_batches(shard, clip.image_size, batch_size, counter):
            self._captions.add(batch)
            tokens = clip.tokenize([sample["caption"] for sample in batch])
            images = torch.stack([sample["image"] for sample in batch])
            image_embed = clip.embed_images(images).half().cpu()
            text_embed = clip.embed_text(tokens).embed.half().cpu()
            finite = image_embed.isfinite().all(1) & text_embed.isfinite().all(1)
            for sample, usable in zip(batch, finite.tolist(), strict=True):
                if usable:
                    counter.record_good()
                    keys.append(sample["key"])
                else:
                    where = f"sample {sample['key']} of {shard}"
                    counter.record_bad(where, "its embedding is not finite")
            parts["image_embed"].append(image_embed[finite])
            parts["text_embed"].append(text_embed[finite])
            parts["tokens"].append(tokens.int().cpu()[finite])
            bar.update(sum(sample["bytes"] for sample in batch))
            rate = counter.seen / max(time.monotonic() - self._started, 1e-9)
            bar.set_postfix_str(f"{rate:.0f} images/s, {counter.bad} bad", refresh=False)
        if not keys:
            raise UserError(
                f"The shard {shard} has no usable sample: take it out of the data, or mend it."
            )
        self._write(shard, keys, {name: torch.cat(part) for name, part in parts.items()}, source)

    def _write(
        self, shard: str, keys: list[str], tensors: dict[str, torch.Tensor], source: dict[str, Any]
    ) -> None:
        """Write the file of a shard; `source` is `describe_shard` of before it was read."""
        rows = tensors["image_embed"].double()
        tensors["mean"] = rows.mean(0)
        tensors["scatter"] = (rows - tensors["mean"]).T @ (rows - tensors["mean"])
        content = save(tensors, {"rows": json.dumps({"keys": keys, "source": source})})
        self.files.write(self.file_of(shard), content)
        self._open.pop(shard, None)
