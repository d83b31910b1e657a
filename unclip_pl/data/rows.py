"""Batches from the embedding store alone, for the priors: no image is opened, whole batches are
gathered by mmap.

The order of an epoch is a permutation of all rows that follows from (seed, epoch) and is never
written down, so that the state of a loader is two numbers, the epoch and how many of its rows all
ranks have given; the same on every rank, and good for any number of ranks.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from unclip_pl.data.embeddings import EmbeddingStore
from unclip_pl.data.text_tokens import text_tokens
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.tokens import caption_mask

log = logging.getLogger(__name__)
ROUNDS = 6


@dataclass(frozen=True)
class RowsConfig:
    """How rows of the store become batches."""

    batch_size: int = 256
    """Rows a batch and rank."""
    steps_per_epoch: int | None = None
    """Batches an epoch, the same on every rank; None: as many as the rows fill."""
    seed: int = 0
    max_bad_rate: float = 0.01
    """Largest share of samples that may be unusable while the store is filled."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.seed < 0:
            raise ValueError(
                "data.loader needs a batch_size of at least 1 and a seed of at least 0."
            )
        if self.steps_per_epoch is not None and self.steps_per_epoch < 1:
            raise ValueError(
                f"data.loader.steps_per_epoch is {self.steps_per_epoch}: give 1 or more, or null "
                "for as many as the rows fill."
            )
        if not 0 <= self.max_bad_rate <= 1:
            raise ValueError(
                f"data.loader.max_bad_rate is {self.max_bad_rate}: give a share from 0 to 1."
            )


def shuffled(index: np.ndarray, total: int, seed: int, epoch: int) -> np.ndarray:
    """Where a permutation of 0..total-1, drawn by (seed, epoch), sends each of `index`; int64, any
    shape.

    A Feistel network over the next power of 4, walked until it is back below `total` (Black and
    Rogaway 2002): no table, whatever the size.
    """
    bits = np.uint64(max(1, (int(total - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << bits) - np.uint64(1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64)
    x = index.astype(np.uint64)
    outside = np.ones(x.shape, dtype=bool)
    while outside.any():
        left, right = x[outside] >> bits, x[outside] & low
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & low)
        x[outside] = left << bits | right
        outside = x >= total
    return x.astype(np.int64)


def _mixed(h: np.ndarray) -> np.ndarray:
    """Each bit of a uint64 to all others (the finaliser of MurmurHash3)."""
    h = (h ^ h >> np.uint64(33)) * np.uint64(0xFF51AFD7ED558CCD)
    h = (h ^ h >> np.uint64(33)) * np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ h >> np.uint64(33)


class Rows:
    """The rows of some shards in one table: `rows[index]` is a batch.

    Args:
        store: holds all of `shards`.
        shards: their names, in the order in which their rows are numbered.
        mask: tokens (B, L) -> (B, L) bool, where the caption is; as the CLIP of the store reads
            them.
        text_length: add `text_tokens` of so many (see `data.text_tokens`); None: do not.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        shards: Sequence[str],
        mask: Callable[[torch.Tensor], torch.Tensor] = caption_mask,
        text_length: int | None = None,
    ) -> None:
        self.mask = mask
        self.parts = [store.shard(shard) for shard in shards]
        self.tables = {
            name: [np.asarray(getattr(part, name)) for part in self.parts]
            for name in ("tokens", "text_embed", "image_embed")
        }
        if text_length is not None:
            self.tables["text_tokens"] = [text_tokens(store, name, text_length) for name in shards]
        self.starts = np.cumsum([0, *(len(part.keys) for part in self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: np.ndarray) -> dict[str, Any]:
        """`key`, `tokens` int64 and `text_mask` bool (B, L), `text_embed` and `image_embed` float32
        (B, D), `text_tokens` int64 (B, text_length), of rows `index` (B,) int64."""
        part = np.searchsorted(self.starts, index, side="right") - 1
        local, order = index - self.starts[part], np.argsort(part, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(part[order])) + 1)
        batch: dict[str, Any] = {
            "key": [
                self.parts[p].keys[i] for p, i in zip(part.tolist(), local.tolist(), strict=True)
            ]
        }
        for name, tables in self.tables.items():
            rows = np.empty((len(index), tables[0].shape[1]), tables[0].dtype)
            for group in groups:
                rows[group] = tables[part[group[0]]][local[group]]
            found = torch.from_numpy(rows)
            batch[name] = found.long() if name.endswith("tokens") else found.float()
        return batch | {"text_mask": self.mask(batch["tokens"])}


class RowLoader:
    """Training batches: `steps` an epoch of the trainer, from one permutation of all rows after the
    other; ranks take disjoint ones.

    A state is good for the same rows and seed, whatever the number of ranks and the batch size;
    with others the data go on at the start of the next permutation, with a warning.

    Raises:
        UserError: the rows do not fill one batch.
    """

    def __init__(self, rows: Rows, config: RowsConfig, *, rank: int = 0, world: int = 1) -> None:
        self.rows, self.config, self.rank, self.world = rows, config, rank, world
        self.together = config.batch_size * world
        whole = (
            len(rows) // self.together
        )  # batches of a permutation; the rows left over are others each time
        if len(rows) < config.batch_size:
            raise UserError(
                f"{len(rows)} rows do not fill a batch of {config.batch_size}: lower "
                "data.loader.batch_size."
            )
        self.steps = config.steps_per_epoch or max(1, whole)
        self.epoch = self.row = self.done = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.done = 0 if self.done >= self.steps else self.done
        while self.done < self.steps:
            if self.row and self.row + self.together > len(self.rows):
                self.epoch, self.row = self.epoch + 1, 0
            first = self.row + self.rank * self.config.batch_size
            # Where the rows do not fill a batch on each rank, ranks share some
            index = np.arange(first, first + self.config.batch_size) % len(self.rows)
            self.row, self.done = self.row + self.together, self.done + 1
            yield self.rows[shuffled(index, len(self.rows), self.config.seed, self.epoch)]

    def go_on_from(self, before: "RowLoader") -> None:
        """Begin an epoch at the place that another loader of this run has come to."""
        if before.epoch or before.row:
            self.load_state_dict(before.state_dict() | {"done": 0})

    def shape(self) -> dict[str, int]:
        """What a state depends on."""
        return {"rows": len(self.rows), "seed": self.config.seed}

    def share(self) -> dict[str, Any]:
        """Which part of which data this rank reads; for a comparison of ranks. The rows are mapped,
        so none is missing."""
        return self.shape() | {
            "batch size": self.config.batch_size,
            "rank": self.rank,
            "world": self.world,
            "missing": [],
        }

    def state_dict(self) -> dict[str, Any]:
        return {"shape": self.shape(), "epoch": self.epoch, "row": self.row, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        theirs, ours = state["shape"], self.shape()
        self.epoch, self.row, self.done = (
            state["epoch"],
            state.get("row", 0),
            min(state["done"], self.steps),
        )
        differs = [
            f"{key} {theirs.get(key)} there and {value} here"
            for key, value in ours.items()
            if theirs.get(key) != value
        ]
        if differs or "row" not in state:  # a state of an earlier form has no row
            said = ", ".join(differs) or "it is of an earlier form"
            log.warning(
                "The checkpoint's place in the data does not fit this run (%s): the data go on at "
                "the start of the next epoch.",
                said,
            )
            self.epoch, self.row = self.epoch + 1, 0


class RowsInOrder:
    """Validation batches: each rank takes every world-th row once, the last batch smaller; a rank
    that has a row less repeats its last (or the first)."""

    def __init__(self, rows: Rows, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        self.rows, self.batch_size = rows, batch_size
        self.index = np.arange(rank, len(rows), world)
        if len(self.index) < math.ceil(len(rows) / world):
            self.index = np.append(self.index, self.index[-1:] if len(self.index) else 0)

    def __len__(self) -> int:
        return math.ceil(len(self.index) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for first in range(0, len(self.index), self.batch_size):
            yield self.rows[self.index[first : first + self.batch_size]]
