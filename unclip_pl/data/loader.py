"""Batches from shards: without end in training, once in validation.

A run that stops goes on at the very next sample.

`StatefulDataLoader` keeps the readers' states (see `unclip_pl.data.reader`). What it lacks is here:
a state that fits another number of ranks and workers, that survives a second loader in the same
run, and that is refused with a warning for other data. Where a run goes on with another number of
readers, they first bring the states of those before them to the end of their epoch: no sample comes
twice in it and none is left out.
"""

import hashlib
import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.data.names import is_url
from unclip_pl.data.reader import SKIPPED, ReaderState, SequentialShards, ShuffledShards
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.signals import ignore_signals_in_worker

log = logging.getLogger(__name__)
STATE_VERSION = 2
OTHER_READERS = {"ranks", "workers", "batch size"}
"""Parts of the compatibility key that may change: the rest of the epoch is shared out again."""


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Join samples into a batch.

    Strings become lists, and the counts of skipped samples are added up. The rest become tensors
    with the batch dimension in front.
    """
    batch: dict[str, Any] = {}
    for key, first in samples[0].items():
        values = [sample[key] for sample in samples]
        if key == SKIPPED:
            batch[key] = sum(values)
        elif isinstance(first, str):
            batch[key] = values
        else:
            batch[key] = default_collate(values)
    return batch


def _plain_errors(batches: Iterator[dict[str, Any]]) -> Generator[dict[str, Any], None, None]:
    """The batches; a UserError of a worker loses the traceback that torch puts before its text."""
    try:
        yield from batches
    except UserError as error:
        raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None


class TrainLoader:
    """`steps` batches per epoch from an endless stream.

    Its state is exact to the sample, on every rank, for the same shards, seed, window, number of
    ranks and workers, and batch size. With another number of ranks, workers or samples per batch,
    the rest of the epoch is shared out again. With other shards, seed or window the data go on at
    the start of the next epoch, with a warning. On several ranks `state_dict` gathers from all of
    them, so all must call it, as Lightning does.

    `bad` counts the samples that this rank's readers skipped on the way to the batches of this run.

    Args:
        samples: the stream.
        steps: batches per epoch.
        start_method: how workers start ("spawn", "forkserver"); None: Python's default.
    """

    def __init__(
        self, samples: ShuffledShards, steps: int, start_method: str | None = None
    ) -> None:
        config = samples.config
        self.samples, self.steps, self.done, self.bad = samples, steps, 0, 0
        self.loader = StatefulDataLoader(
            samples,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            collate_fn=collate,
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=start_method if config.num_workers else None,
            worker_init_fn=ignore_signals_in_worker,
        )
        self._stream: Generator[dict[str, Any], None, None] | None = None
        # The state to begin with, until a batch is asked for
        self._loaded: dict[str, Any] | None = None
        self._shards_digest, self._missing = _digest(samples.shards)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._stream is None:  # one for all epochs: the workers stay, and their orders go on
            self._stream = _plain_errors(iter(self.loader))
        self._loaded = None
        self.done = 0 if self.done >= self.steps else self.done
        while self.done < self.steps:
            batch = next(self._stream)
            self.done += 1
            self.bad += batch.pop(SKIPPED, 0)
            yield batch

    def close(self) -> None:
        """End the workers now: the garbage collector would wait five seconds for each."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            self.loader.load_state_dict({})  # lets go of its iterator

    def continue_from(self, previous: "TrainLoader") -> None:
        """Begin an epoch where another loader of this run has come to, and end that one.

        On several ranks all must call it.
        """
        self.bad = previous.bad
        if previous._stream is not None:
            state = previous.state_dict()
            previous.close()
            previous.load_state_dict(state)  # its state may still be asked for
            self.load_state_dict(state | {"done": 0})
        elif previous._loaded is not None:
            self.load_state_dict(previous._loaded)

    def compatibility_key(self) -> dict[str, Any]:
        """What a state depends on."""
        config = self.samples.config
        return {
            "ranks": self.samples.world,
            "workers": config.num_workers,
            "batch size": config.batch_size,
            "seed": config.seed,
            "window": config.window,
            "shards": self._shards_digest,
            "form": STATE_VERSION,
        }

    def rank_summary(self) -> dict[str, Any]:
        """Describe which part of which data this rank reads; to compare the ranks of a run.

        It also names the shards that this rank cannot see.
        """
        return self.compatibility_key() | {
            "rank": self.samples.rank,
            "world": self.samples.world,
            "missing": self._missing,
        }

    def state_dict(self) -> dict[str, Any]:
        if self._stream is None and self._loaded is not None:
            return self._loaded
        own, world = self.loader.state_dict(), self.samples.world
        of_ranks = [own] * world
        if world > 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_gather_object(of_ranks, own)
        return {"shape": self.compatibility_key(), "done": self.done, "ranks": of_ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream, self._loaded, self.done = None, state, min(state["done"], self.steps)
        theirs, ours = state["shape"], self.compatibility_key()
        differs = [key for key, value in ours.items() if theirs.get(key) != value]
        if not differs:
            self.loader.load_state_dict(state["ranks"][self.samples.rank])
            return
        if set(differs) <= OTHER_READERS:
            states = _reader_states(state["ranks"])
            self.samples.inherited, self.samples.first_epoch = _finish_epoch(states)
            return
        warn_of_other_data(theirs, ours)
        epochs = [fields["epoch"] for fields in _reader_states(state)]
        self.samples.first_epoch = max(epochs, default=0) + 1


def warn_of_other_data(
    theirs: dict[str, Any], ours: dict[str, Any], reason: str = "it is of an earlier form"
) -> None:
    """Warn that the state of a loader, which depends on `theirs`, does not fit `ours`.

    `reason` is given where the two do not differ.
    """
    differences = [
        f"{key} {theirs.get(key)} there and {value} here"
        for key, value in ours.items()
        if theirs.get(key) != value
    ]
    log.warning(
        "The checkpoint's place in the data does not fit this run (%s): the data go on at the "
        "start of the next epoch.",
        ", ".join(differences) or reason,
    )


def _digest(shards: Sequence[str]) -> tuple[str, list[str]]:
    """A digest of the shards, and those that are not there.

    It covers names without their folders, which may move, and the sizes of files, because another
    folder may have the same names.
    """
    lines, missing = [], []
    for shard in shards:
        path, size = Path(shard), None
        if not is_url(shard):
            if path.is_file():
                size = path.stat().st_size
            else:
                missing.append(shard)
        lines.append(f"{path.name} {size}")
    content = "\n".join(lines).encode(errors="surrogateescape")
    return hashlib.sha256(content).hexdigest()[:8], missing


def _reader_states(state: Any) -> list[dict[str, Any]]:
    """The fields of all `ReaderState`s in a nested loader state, also of an earlier form."""
    if isinstance(state, dict):
        if {"epoch", "window", "offset"} <= state.keys():
            return [state]
        state = list(state.values())
    if not isinstance(state, list):
        return []
    return [fields for part in state for fields in _reader_states(part)]


def _finish_epoch(states: list[dict[str, Any]]) -> tuple[list[ReaderState], int]:
    """(states that stop at the end of the foremost reader's epoch, the next epoch).

    In the next epoch any number of readers may begin.
    """
    readers = [ReaderState(**fields) for fields in states]
    last = max(reader.epoch for reader in readers if reader.last is None)
    finishing = [
        replace(reader, last=last) if reader.last is None else reader for reader in readers
    ]
    return finishing, last + 1


class ValidationLoader(DataLoader):
    """Batches of `SequentialShards`, the last one smaller.

    It has at most one worker, which keeps the order.
    """

    def __init__(self, samples: SequentialShards) -> None:
        config = samples.config
        super().__init__(
            samples,
            config.batch_size,
            num_workers=min(1, config.num_workers),
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_signals_in_worker,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]  # torch's own class
        return _plain_errors(super().__iter__())


def count_steps_per_epoch(config: LoaderConfig, samples: int, world: int) -> int:
    """Batches per epoch on every rank; the last, partial one is left to the next epoch.

    Where the samples fill a batch, but not one on each rank, it is one: ranks then share samples.

    Raises:
        UserError: the samples do not fill one batch.
    """
    if config.steps_per_epoch is None and samples < config.batch_size:
        raise UserError(
            f"{samples} samples do not fill a batch of {config.batch_size}: lower "
            "data.loader.batch_size."
        )
    return config.steps_per_epoch or max(1, samples // (config.batch_size * world))
