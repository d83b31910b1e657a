"""Readers of shards: samples in a shuffled order without end, or once in the shards' own order.

A reader is a worker of a rank. In training, shards are shuffled by (seed, epoch), readers share
them out, and windows of shards are read and permuted. All of it follows from numbers, so the state
of a reader is small: which reader of how many, epoch, window and offset.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from unclip_pl.data.bad_samples import BadSample, BadSampleCounter, SkippedSamples
from unclip_pl.data.decoding import decode
from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.data.shards import read_shard
from unclip_pl.utils.errors import UserError

SKIPPED = "skipped"
"""Key of a sample: how many samples its reader skipped since the one before. So the counts come
from the workers with the batches."""
Transform = Callable[[dict[str, Any], int], dict[str, Any]]
"""(sample, epoch) -> sample; raises BadSample for one that cannot be used."""


class _ShardDataset(IterableDataset):
    """What both orders share: the shards, this process's place among the readers, and `Transform`.

    Args:
        shards: their names.
        image_size: side of the decoded images in pixels; None: `transform` is given their bytes and
            decodes them itself.
        config: seed, window, largest share of bad samples.
        transform: adds what else a batch needs; is sent to the workers.
        rank, world: this process among all; kept here, so that workers know them, however they are
            started.
    """

    def __init__(
        self,
        shards: Sequence[str],
        image_size: int | None,
        config: LoaderConfig,
        transform: Transform,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.shards, self.image_size = list(shards), image_size
        self.config, self.transform = config, transform
        self.rank, self.world = rank, world

    def reader(self) -> tuple[int, int]:
        """(number of this reader, number of readers)."""
        worker = get_worker_info()
        if worker is None:
            return self.rank, self.world
        return self.rank * worker.num_workers + worker.id, self.world * worker.num_workers

    def decode_and_transform(
        self, sample: dict[str, Any], epoch: int, counter: BadSampleCounter
    ) -> dict[str, Any] | None:
        """The sample as a batch needs it; None, and counted, where it cannot be used."""
        try:
            image = sample["image"]
            if self.image_size is not None:
                image = decode(image, self.image_size, self.config.exact_jpeg)
            transformed = self.transform(sample | {"image": image}, epoch)
        except BadSample as error:
            counter.record_bad(f"sample {sample['key']} of {sample['shard']}", error)
            return None
        counter.record_good()
        return transformed


@dataclass
class ReaderState:
    """Where a reader is in its share: the next sample is number `offset` of `window` in `epoch`.

    After the epoch `last` the reader is done; None: never.
    """

    reader: int
    readers: int
    epoch: int = 0
    window: int = 0
    offset: int = 0
    last: int | None = None
    borrows: bool = False
    """There are fewer samples than readers and this one has none: it takes one of the others' of
    each window."""


class ShuffledShards(_ShardDataset):
    """Samples in a shuffled order, without end; `state_dict` says which sample is the next one.

    `inherited`, the same on every rank, are states of another number of readers. They are shared
    out among these readers, and finished before the readers' own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.states: list[ReaderState] = []  # read one after the other; the last is this reader's
        self.inherited: list[ReaderState] = []
        self.first_epoch = 0

    def state_dict(self) -> dict[str, list[dict[str, int | None]]]:
        return {"places": [asdict(state) for state in self._start()]}

    def load_state_dict(self, state: dict[str, list[dict[str, Any]]]) -> None:
        self.states = [ReaderState(**fields) for fields in state["places"]]

    def _start(self) -> list[ReaderState]:
        if not self.states:
            reader, readers = self.reader()
            inherited = [replace(state) for state in self.inherited[reader::readers]]
            self.states = [*inherited, ReaderState(reader, readers, self.first_epoch)]
        return self.states

    def __iter__(self) -> Iterator[dict[str, Any]]:
        states = self._start()
        counter = BadSampleCounter(self.config.max_bad_rate)
        reported = 0
        while True:
            state = states[0]
            if state.last is not None and state.epoch > state.last:
                states.pop(0)
                continue
            whole = state.window == state.offset == 0 and state.last is None
            usable = 0
            for sample in self._rest_of_epoch(state, counter):
                usable += 1
                newly_skipped, reported = counter.bad - reported, counter.bad
                yield sample | {SKIPPED: newly_skipped}
            if whole and not usable:
                if not state.borrows and self._shares_samples(state.readers):
                    state.window, state.borrows = 0, True
                    continue
                raise UserError(
                    f"Reader {state.reader + 1} of {state.readers} found no usable sample in its "
                    f"part of {self.shards[0]} ...: check data.train."
                )
            state.epoch, state.window = state.epoch + 1, 0

    def _rest_of_epoch(
        self, state: ReaderState, counter: BadSampleCounter
    ) -> Iterator[dict[str, Any]]:
        """The usable samples from `state` to the end of its epoch; moves `state` along."""
        windows = self._windows(state)
        while state.window < len(windows):
            samples, skipped = self._read(windows[state.window], state, counter)
            while True:
                for group in skipped.get(state.offset, ()):
                    counter.record_skipped(group)
                if state.offset >= len(samples):
                    break
                sample = samples[state.offset]
                transformed = self.decode_and_transform(sample, state.epoch, counter)
                state.offset += 1
                if transformed is not None:
                    yield transformed
            state.window, state.offset = state.window + 1, 0

    def _windows(self, state: ReaderState) -> list[list[str]]:
        order = list(self.shards)
        random.Random(f"{self.config.seed} {state.epoch}").shuffle(order)
        if not self._shares_samples(state.readers):
            order = order[state.reader :: state.readers]
        return [order[i : i + self.config.window] for i in range(0, len(order), self.config.window)]

    def _shares_samples(self, readers: int) -> bool:
        """Whether shards are shared out sample by sample, and not whole.

        Few shards are, so that readers have equally many samples. Many shards are shared out whole,
        and each is read by one reader only.
        """
        return len(self.shards) < 8 * readers

    def _read(
        self, window: list[str], state: ReaderState, counter: BadSampleCounter
    ) -> tuple[list[dict[str, Any]], dict[int, list[SkippedSamples]]]:
        """This reader's samples of a window, and by offset what it has to count as skipped there.

        What is skipped is shared out among readers as the samples are, and spread evenly over them:
        so the share of bad samples is at no time larger than that of the window. The offset counts
        samples only, for how many are lost is an estimate where a shard is broken.
        """
        if state.borrows:
            return self._borrow(window, state, counter), {}
        parts = state.readers if self._shares_samples(state.readers) else 1
        mine = state.reader % parts
        samples, skipped = [], []
        good, bad = 0, 0
        for sample in (sample for shard in window for sample in read_shard(shard, counter)):
            if isinstance(sample, SkippedSamples):
                if own := share_of(sample.count, mine, parts, bad):
                    skipped.append(replace(sample, count=own))
                bad += sample.count
            else:
                if good % parts == mine:
                    samples.append(sample)
                good += 1
        seed = f"{self.config.seed} {state.epoch} {state.window} {state.reader}"
        random.Random(seed).shuffle(samples)
        return samples, _spread(skipped, len(samples))

    def _borrow(
        self, window: list[str], state: ReaderState, counter: BadSampleCounter
    ) -> list[dict[str, Any]]:
        """One sample of a window, for a reader that has none of its own."""
        samples = [
            sample
            for shard in window
            for sample in read_shard(shard, counter)
            if not isinstance(sample, SkippedSamples)
        ]
        return [samples[state.reader % len(samples)]] if samples else []


def share_of(count: int, reader: int, readers: int, before: int) -> int:
    """How many of `count` samples fall to `reader` when samples are dealt out in turn.

    The samples follow `before` others.
    """
    return len(range((reader - before) % readers, count, readers))


def _spread(skipped: list[SkippedSamples], samples: int) -> dict[int, list[SkippedSamples]]:
    """Spread what is skipped evenly over the offsets of so many samples."""
    total = sum(group.count for group in skipped)
    by_offset = defaultdict(list)
    so_far = 0
    for group in skipped:
        so_far += group.count
        by_offset[-(-so_far * samples // total)].append(group)
    return by_offset


class SequentialShards(_ShardDataset):
    """Samples once, in the shards' order: each rank takes every world-th sample.

    On several ranks each gives equally many, ceil(total / world). One that has fewer (the samples
    do not divide evenly, or one was bad) repeats its last one, so that no rank waits for another
    for ever. On one rank nothing is repeated.
    """

    def __init__(self, *args: Any, total: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.total = total

    def __len__(self) -> int:
        return (self.total + self.world - 1) // self.world

    def __iter__(self) -> Iterator[dict[str, Any]]:
        reader, readers = self.reader()
        counter = BadSampleCounter(self.config.max_bad_rate)
        positions, bad, yielded = count(), 0, 0
        last, first_raw = None, None
        for sample in (s for shard in self.shards for s in read_shard(shard, counter)):
            if isinstance(sample, SkippedSamples):  # shared out as in training
                if own := share_of(sample.count, reader, readers, bad):
                    counter.record_skipped(replace(sample, count=own))
                bad += sample.count
                continue
            first_raw = sample if first_raw is None else first_raw
            if next(positions) % readers != reader:
                continue
            transformed = self.decode_and_transform(sample, 0, counter)
            if transformed is not None and yielded < len(self):
                last, yielded = transformed, yielded + 1
                yield transformed
        if yielded == 0:
            last = self.decode_and_transform(first_raw, 0, counter) if first_raw else None
            if last is None:
                raise UserError(
                    f"There is no usable sample in {self.shards[0]} ...: check data.val."
                )
        while last is not None and yielded < len(self) and (self.world > 1 or yielded == 0):
            yielded += 1
            yield last
