"""Batches from the embedding store without images, for the priors: whole batches by mmap.

The order of an epoch is a permutation of all rows that follows from (seed, epoch) and is never
written down. So the state of a loader is two numbers, the epoch and how many of its rows all ranks
have given. It is the same on every rank, and fits any number of ranks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from unclip_pl.data.loader import warn_of_other_data
from unclip_pl.data.loader_config import EmbeddingLoaderConfig
from unclip_pl.data.permutation import permute
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.text_tokens import read_text_tokens
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.tokens import caption_mask


class EmbeddingTable:
    """The rows of some shards in one table: `table[index]` is a batch.

    Args:
        store: holds all of `shards`.
        shards: their names, in the order in which their rows are numbered.
        mask: tokens (B, L) -> (B, L) bool, where the caption is; as the CLIP of the store reads
            them.
        text_length: add `text_tokens` of this length (see `data.text_tokens`); None: leave them
            out.
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
        self.columns = {
            name: [np.asarray(getattr(part, name)) for part in self.parts]
            for name in ("tokens", "text_embed", "image_embed")
        }
        if text_length is not None:
            self.columns["text_tokens"] = [
                read_text_tokens(store, shard, text_length) for shard in shards
            ]
        self.starts = np.cumsum([0, *(len(part.keys) for part in self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: np.ndarray) -> dict[str, Any]:
        """The batch of the rows `index` (B,) int64.

        Returns:
            `key` (list of B), `tokens` int64 and `text_mask` bool (B, L), `text_embed` and
            `image_embed` float32 (B, D), and `text_tokens` int64 (B, text_length) if asked for.
        """
        part_of = np.searchsorted(self.starts, index, side="right") - 1
        local = index - self.starts[part_of]
        pairs = zip(part_of.tolist(), local.tolist(), strict=True)
        batch: dict[str, Any] = {"key": [self.parts[part].keys[row] for part, row in pairs]}
        # Positions in the batch, grouped by the part that their rows are in
        order = np.argsort(part_of, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(part_of[order])) + 1)
        for name, column in self.columns.items():
            rows = np.empty((len(index), column[0].shape[1]), column[0].dtype)
            for group in groups:
                rows[group] = column[part_of[group[0]]][local[group]]
            tensor = torch.from_numpy(rows)
            batch[name] = tensor.long() if name.endswith("tokens") else tensor.float()
        return batch | {"text_mask": self.mask(batch["tokens"])}


class EmbeddingLoader:
    """Training batches of embeddings: `steps` per epoch of the trainer.

    Rows come from permutations of all rows, one after the other. Ranks take disjoint rows.

    A state fits the same rows and seed, whatever the number of ranks and the batch size. With
    others the data go on at the start of the next permutation, with a warning.

    Raises:
        UserError: the rows do not fill one batch.
    """

    def __init__(
        self,
        table: EmbeddingTable,
        config: EmbeddingLoaderConfig,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.table, self.config, self.rank, self.world = table, config, rank, world
        if len(table) < config.batch_size:
            raise UserError(
                f"{len(table)} rows do not fill a batch of {config.batch_size}: lower "
                "data.loader.batch_size."
            )
        self.global_batch = config.batch_size * world
        # Rows that do not fill a last batch are others in each permutation
        self.steps = config.steps_per_epoch or max(1, len(table) // self.global_batch)
        self.epoch = self.row = self.done = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.done = 0 if self.done >= self.steps else self.done
        while self.done < self.steps:
            if self.row and self.row + self.global_batch > len(self.table):
                self.epoch, self.row = self.epoch + 1, 0
            first = self.row + self.rank * self.config.batch_size
            # Where the rows do not fill a batch on each rank, ranks share rows
            index = np.arange(first, first + self.config.batch_size) % len(self.table)
            self.row, self.done = self.row + self.global_batch, self.done + 1
            yield self.table[permute(index, len(self.table), self.config.seed, self.epoch)]

    def continue_from(self, previous: "EmbeddingLoader") -> None:
        """Begin an epoch where another loader of this run has come to."""
        if previous.epoch or previous.row:
            self.load_state_dict(previous.state_dict() | {"done": 0})

    def compatibility_key(self) -> dict[str, int]:
        """What a state depends on."""
        return {"rows": len(self.table), "seed": self.config.seed}

    def rank_summary(self) -> dict[str, Any]:
        """Describe which part of which data this rank reads; to compare the ranks of a run.

        The rows are mapped, so none is missing.
        """
        return self.compatibility_key() | {
            "batch size": self.config.batch_size,
            "rank": self.rank,
            "world": self.world,
            "missing": [],
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "shape": self.compatibility_key(),
            "epoch": self.epoch,
            "row": self.row,
            "done": self.done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        theirs, ours = state["shape"], self.compatibility_key()
        self.epoch, self.row = state["epoch"], state.get("row", 0)
        self.done = min(state["done"], self.steps)
        differs = any(theirs.get(key) != value for key, value in ours.items())
        if differs or "row" not in state:  # a state of an earlier form has no row
            warn_of_other_data(theirs, ours)
            self.epoch, self.row = self.epoch + 1, 0


class SequentialEmbeddingLoader:
    """Validation batches: each rank takes every world-th row once, and the last batch is smaller.

    A rank that has a row less repeats its last one (or the first).
    """

    def __init__(
        self, table: EmbeddingTable, batch_size: int, *, rank: int = 0, world: int = 1
    ) -> None:
        self.table, self.batch_size = table, batch_size
        self.index = np.arange(rank, len(table), world)
        if len(self.index) < math.ceil(len(table) / world):
            self.index = np.append(self.index, self.index[-1:] if len(self.index) else 0)

    def __len__(self) -> int:
        return math.ceil(len(self.index) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for first in range(0, len(self.index), self.batch_size):
            yield self.table[self.index[first : first + self.batch_size]]
