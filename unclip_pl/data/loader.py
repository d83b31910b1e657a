"""Batches from shards, for ever in training and once in validation; a run that stops goes on at the very next sample.

Order: shards are shuffled by (seed, epoch), readers (rank x worker) share them out, windows of shards are read and permuted. All of it follows
from numbers, so the state of a reader is a place: which reader of how many, epoch, window, offset. Where a run goes on with another number of readers,
they first bring the places of those before them to the end of their epoch: no sample comes twice in it and none is left out.
"""

import hashlib
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from unclip_pl.data.shards import BadSample, ErrorBudget, Lost, decode, is_url, read_shard
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.signals import ignore_signals_in_worker

log = logging.getLogger(__name__)
FORM = 2  # of a loader's state
PASSED_OVER = "passed_over"  # in a sample: how many its reader could not use since the one before; so counts come from the workers with the batches
Prepare = Callable[[dict[str, Any], int], dict[str, Any]]


@dataclass(frozen=True)
class LoaderConfig:
    """How samples become batches."""

    batch_size: int = 32
    """Samples a batch and rank."""
    num_workers: int = 2
    steps_per_epoch: int | None = None
    """Batches an epoch, the same on every rank; None: as many as the samples fill."""
    window: int = 4
    """Shards that a reader holds and mixes at a time."""
    seed: int = 0
    max_bad_rate: float = 0.01
    """Largest share of samples that may be unusable before the run stops."""
    exact_jpeg: bool = False
    """Decode JPEGs whole where a half, quarter or eighth would do; slower, and pixels differ by some 0.4 of 255 levels."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.window < 1 or self.num_workers < 0:
            raise ValueError(
                "data.loader needs a batch_size and window of at least 1 and num_workers of at least 0."
            )
        if self.steps_per_epoch is not None and self.steps_per_epoch < 1:
            raise ValueError(
                f"data.loader.steps_per_epoch is {self.steps_per_epoch}: give 1 or more, or null for as many as the samples fill."
            )
        if not 0 <= self.max_bad_rate <= 1:
            raise ValueError(
                f"data.loader.max_bad_rate is {self.max_bad_rate}: give a share from 0 to 1."
            )


class _Shards(IterableDataset):
    """What both orders share: the shards, this process's place among the readers, and a sample made ready.

    Args:
        shards: their names.
        image_size: side of the decoded images; None: `prepare` is given their bytes and decodes them itself.
        config: seed, window, share of bad samples.
        prepare: (sample, epoch) -> sample, with what else a batch needs; raises BadSample for one that cannot be used. Goes to the workers.
        rank, world: this process among all; captured here, so that workers started in any way know them.
    """

    def __init__(
        self,
        shards: Sequence[str],
        image_size: int | None,
        config: LoaderConfig,
        prepare: Prepare,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.shards, self.image_size, self.config, self.prepare = (
            list(shards),
            image_size,
            config,
            prepare,
        )
        self.rank, self.world = rank, world

    def reader(self) -> tuple[int, int]:
        """(this reader, number of readers), a reader being a worker of a rank."""
        worker = get_worker_info()
        workers = worker.num_workers if worker else 1
        return self.rank * workers + (worker.id if worker else 0), self.world * workers

    def ready(
        self, sample: dict[str, Any], epoch: int, budget: ErrorBudget
    ) -> dict[str, Any] | None:
        """The sample as a batch needs it; None, and counted, where it cannot be used."""
        try:
            image = (
                sample["image"]
                if self.image_size is None
                else decode(sample["image"], self.image_size, self.config.exact_jpeg)
            )
            ready = self.prepare(sample | {"image": image}, epoch)
        except BadSample as error:
            budget.spend(f"sample {sample['key']} of {sample['shard']}", error)
            return None
        budget.good()
        return ready


@dataclass
class Place:
    """Where a reader is in its share: the next sample is number `offset` of `window` in `epoch`; after the epoch `last` it is done, None: never."""

    reader: int
    readers: int
    epoch: int = 0
    window: int = 0
    offset: int = 0
    last: int | None = None
    borrows: bool = False  # there are fewer samples than readers and this one has none: it takes one of the others' of each window


class Samples(_Shards):
    """Endless, shuffled, resumable: `state_dict` is the place of the next sample.

    `inherited`, the same on every rank, are places of readers of another number: shared out among these readers and finished before their own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.places: list[
            Place
        ] = []  # to be read one after the other; the last one is this reader's own
        self.inherited: list[Place] = []
        self.first_epoch = 0

    def state_dict(self) -> dict[str, list[dict[str, int | None]]]:
        return {"places": [asdict(place) for place in self._begun()]}

    def load_state_dict(self, state: dict[str, list[dict[str, Any]]]) -> None:
        self.places = [Place(**place) for place in state["places"]]

    def _begun(self) -> list[Place]:
        if not self.places:
            reader, readers = self.reader()
            self.places = [
                *(replace(place) for place in self.inherited[reader::readers]),
                Place(reader, readers, self.first_epoch),
            ]
        return self.places

    def __iter__(self) -> Iterator[dict[str, Any]]:
        places = self._begun()
        budget, told = ErrorBudget(self.config.max_bad_rate), 0
        while True:
            place = places[0]
            if place.last is not None and place.epoch > place.last:
                places.pop(0)
                continue
            whole, usable = place.window == place.offset == 0 and place.last is None, 0
            windows = self._windows(place)
            while place.window < len(windows):
                window = windows[place.window]
                samples, lost = (
                    (self._borrowed(window, place, budget), {})
                    if place.borrows
                    else self._read(window, place, budget)
                )
                while True:
                    for one in lost.get(place.offset, ()):
                        budget.charge(one)
                    if place.offset >= len(samples):
                        break
                    ready = self.ready(samples[place.offset], place.epoch, budget)
                    place.offset += 1
                    if ready is not None:
                        usable += 1
                        passed, told = budget.bad - told, budget.bad
                        yield ready | {PASSED_OVER: passed}
                place.window, place.offset = place.window + 1, 0
            if whole and not usable and not place.borrows and self._share_samples(place.readers):
                place.window, place.borrows = 0, True
                continue
            if whole and not usable:
                at = f"Reader {place.reader + 1} of {place.readers}"
                raise UserError(
                    f"{at} found no usable sample in its part of {self.shards[0]} ...: check data.train."
                )
            place.epoch, place.window = place.epoch + 1, 0

    def _windows(self, place: Place) -> list[list[str]]:
        order = list(self.shards)
        random.Random(f"{self.config.seed} {place.epoch}").shuffle(order)
        if not self._share_samples(place.readers):
            order = order[place.reader :: place.readers]
        return [order[i : i + self.config.window] for i in range(0, len(order), self.config.window)]

    def _share_samples(self, readers: int) -> bool:
        """Few shards are shared out sample by sample, so that readers have equally much; many are shared out whole, and read once."""
        return len(self.shards) < 8 * readers

    def _read(
        self, window: list[str], place: Place, budget: ErrorBudget
    ) -> tuple[list[dict[str, Any]], dict[int, list[Lost]]]:
        """This reader's samples of a window, and what it has to charge when so many of them are consumed.

        What is lost is shared out among readers as the samples are, and spread evenly over them: so the share of bad samples is at no time larger
        than that of the window. The offset counts samples alone, for how many are lost is but estimated where a shard is broken.
        """
        parts = place.readers if self._share_samples(place.readers) else 1
        mine, samples, bad, met, units = place.reader % parts, [], [], count(), 0
        for sample in (sample for shard in window for sample in read_shard(shard, budget)):
            if isinstance(sample, Lost):
                if own := len(range((mine - units) % parts, sample.count, parts)):
                    bad.append(replace(sample, count=own))
                units += sample.count
            elif next(met) % parts == mine:
                samples.append(sample)
        random.Random(f"{self.config.seed} {place.epoch} {place.window} {place.reader}").shuffle(
            samples
        )
        total, so_far, due = sum(lost.count for lost in bad), 0, defaultdict(list)
        for lost in bad:
            so_far += lost.count
            due[-(-so_far * len(samples) // total)].append(lost)
        return samples, due

    def _borrowed(
        self, window: list[str], place: Place, budget: ErrorBudget
    ) -> list[dict[str, Any]]:
        """One sample of a window, for a reader that has none of its own."""
        found = [
            sample
            for shard in window
            for sample in read_shard(shard, budget)
            if not isinstance(sample, Lost)
        ]
        return [found[place.reader % len(found)]] if found else []


class SamplesInOrder(_Shards):
    """Once and in the shards' order: each rank takes every world-th sample.

    On several ranks each gives as many as there are places, ceil(total / world): one that has fewer (its last place is empty, or a sample
    was bad) repeats its last one, so that no rank waits for another for ever. On one rank nothing is repeated.
    """

    def __init__(self, *args: Any, total: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.total = total

    def __len__(self) -> int:
        return (self.total + self.world - 1) // self.world

    def __iter__(self) -> Iterator[dict[str, Any]]:
        reader, readers = self.reader()
        budget = ErrorBudget(self.config.max_bad_rate)
        places, units, given, last, spare = count(), 0, 0, None, None
        for shard in self.shards:
            for sample in read_shard(shard, budget):
                if isinstance(sample, Lost):  # shared out as in training
                    if own := len(range((reader - units) % readers, sample.count, readers)):
                        budget.charge(replace(sample, count=own))
                    units += sample.count
                    continue
                spare = sample if spare is None else spare
                if next(places) % readers != reader:
                    continue
                ready = self.ready(sample, 0, budget)
                if ready is not None and given < len(self):
                    last, given = ready, given + 1
                    yield ready
        if given == 0:
            last = self.ready(spare, 0, budget) if spare else None
            if last is None:
                raise UserError(
                    f"There is no usable sample in {self.shards[0]} ...: check data.val."
                )
        while last is not None and given < len(self) and (self.world > 1 or given == 0):
            given += 1
            yield last


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Strings become lists, the count of samples passed over a sum, the rest tensors with the batch in front."""
    batch: dict[str, Any] = {}
    for key, first in samples[0].items():
        values = [sample[key] for sample in samples]
        batch[key] = (
            sum(values)
            if key == PASSED_OVER
            else values
            if isinstance(first, str)
            else default_collate(values)
        )
    return batch


def _plainly(batches: Iterator[dict[str, Any]]) -> Generator[dict[str, Any], None, None]:
    """The batches; a UserError of a worker loses the traceback that torch puts in front of its sentence."""
    try:
        yield from batches
    except UserError as error:
        raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None


class TrainLoader:
    """`steps` batches an epoch from an endless stream; its state is exact to the sample, on every rank.

    A state is good for the same shards, seed and window, and exact for the same number of ranks and workers and batch size. With another number of
    them the rest of the epoch is shared out anew; with other shards, seed or window the data go on at the start of the next epoch, with a warning.
    On several ranks `state_dict` gathers from all of them, so all must call it, as Lightning does.
    `bad` counts the samples that this rank's readers passed over on the way to the batches given so far in this run.

    Args:
        samples: the stream.
        steps: batches an epoch.
        start_method: how workers start ("spawn", "forkserver"); None: Python's default.
    """

    def __init__(self, samples: Samples, steps: int, start_method: str | None = None) -> None:
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
        self._loaded: dict[str, Any] | None = (
            None  # the state to begin with, until a batch is asked for
        )
        self._shards, self._missing = _digest(samples.shards)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # One stream for all epochs: the workers stay, and their orders go on.
        self._stream = _plainly(iter(self.loader)) if self._stream is None else self._stream
        self._loaded = None
        self.done = 0 if self.done >= self.steps else self.done
        while self.done < self.steps:
            batch = next(self._stream)
            self.done += 1
            self.bad += batch.pop(PASSED_OVER, 0)
            yield batch

    def close(self) -> None:
        """End the workers now: where the garbage collector finds them it waits five seconds for each."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            self.loader.load_state_dict({})  # lets go of its iterator

    def go_on_from(self, before: "TrainLoader") -> None:
        """Begin an epoch at the place that another loader of this run has come to, and end that one. On several ranks all must call it."""
        self.bad = before.bad
        if before._stream is not None:
            state = before.state_dict()
            before.close()
            before.load_state_dict(state)  # whoever still asks it for its place gets this one
            self.load_state_dict(state | {"done": 0})
        elif before._loaded is not None:
            self.load_state_dict(before._loaded)

    def shape(self) -> dict[str, Any]:
        """What a state depends on."""
        config = self.samples.config
        return {
            "ranks": self.samples.world,
            "workers": config.num_workers,
            "batch size": config.batch_size,
            "seed": config.seed,
            "window": config.window,
            "shards": self._shards,
            "form": FORM,
        }

    def share(self) -> dict[str, Any]:
        """Which part of which data this rank reads, and which shards it cannot see; for a comparison of ranks."""
        return self.shape() | {
            "rank": self.samples.rank,
            "world": self.samples.world,
            "missing": self._missing,
        }

    def state_dict(self) -> dict[str, Any]:
        if self._stream is None and self._loaded is not None:
            return self._loaded
        own, world = self.loader.state_dict(), self.samples.world
        every = [own] * world
        if world > 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_gather_object(every, own)
        return {"shape": self.shape(), "done": self.done, "ranks": every}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream, self._loaded, self.done = None, state, min(state["done"], self.steps)
        theirs, ours = state["shape"], self.shape()
        differs = [key for key, value in ours.items() if theirs.get(key) != value]
        if not differs:
            self.loader.load_state_dict(state["ranks"][self.samples.rank])
        elif set(differs) <= {"ranks", "workers", "batch size"}:
            self.samples.inherited, self.samples.first_epoch = _to_the_end_of_their_epoch(
                _places(state["ranks"])
            )
        else:
            said = ", ".join(
                f"{key} {theirs.get(key)} there and {ours[key]} here" for key in differs
            )
            log.warning(
                "The checkpoint's place in the data does not fit this run (%s): the data go on at the start of the next epoch.",
                said,
            )
            self.samples.first_epoch = (
                max((place["epoch"] for place in _places(state)), default=0) + 1
            )


def _digest(shards: Sequence[str]) -> tuple[str, list[str]]:
    """Of names without their folders, which may move, and of the sizes of files, for another folder may well have the same names; what is not there."""
    sizes = [
        path.stat().st_size if not is_url(shard) and (path := Path(shard)).is_file() else None
        for shard in shards
    ]
    names = [f"{Path(shard).name} {size}" for shard, size in zip(shards, sizes, strict=True)]
    missing = [
        shard
        for shard, size in zip(shards, sizes, strict=True)
        if size is None and not is_url(shard)
    ]
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[
        :8
    ], missing


def _places(state: Any) -> list[dict[str, Any]]:
    """The readers' places in a nested loader state, also one of an earlier form."""
    if isinstance(state, dict):
        if {"epoch", "window", "offset"} <= state.keys():
            return [state]
        state = list(state.values())
    return [place for part in state for place in _places(part)] if isinstance(state, list) else []


def _to_the_end_of_their_epoch(places: list[dict[str, Any]]) -> tuple[list[Place], int]:
    """Places that stop where the foremost of their readers has its epoch's end, and the next epoch, in which any number of readers may begin."""
    found = [Place(**place) for place in places]
    last = max(place.epoch for place in found if place.last is None)
    return [replace(place, last=last) if place.last is None else place for place in found], last + 1


class ValidationLoader(DataLoader):
    """Batches of `SamplesInOrder`, the last one smaller; at most one worker, which keeps the order."""

    def __init__(self, samples: SamplesInOrder) -> None:
        config = samples.config
        workers = min(1, config.num_workers)
        super().__init__(
            samples,
            config.batch_size,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_signals_in_worker,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]  # torch promises its own class of iterator
        return _plainly(super().__iter__())


def steps_of_epoch(config: LoaderConfig, samples: int, world: int) -> int:
    """Batches an epoch on every rank; the last, partial one is left to the next epoch. Where the samples fill a batch but not one on each rank, one: ranks
    then share samples.

    Raises:
        UserError: the samples do not fill one batch.
    """
    if config.steps_per_epoch is None and samples < config.batch_size:
        raise UserError(
            f"{samples} samples do not fill a batch of {config.batch_size}: lower data.loader.batch_size."
        )
    return config.steps_per_epoch or max(1, samples // (config.batch_size * world))
