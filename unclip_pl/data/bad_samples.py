"""Samples that cannot be used: each is named in the log and counted, up to a limit."""

import errno
import logging
from collections import Counter
from dataclasses import dataclass

from unclip_pl.utils.errors import UserError

log = logging.getLogger(__name__)
CHECK_FROM = 100  # samples: among fewer, one bad sample may be a large share


class BadSample(Exception):
    """A sample that cannot be used.

    Its text says why. In the log it follows "sample KEY of SHARD was skipped: ".
    """


@dataclass(frozen=True)
class SkippedSamples:
    """Stands for samples that cannot be used in what `read_shard` yields.

    Whoever consumes it calls `BadSampleCounter.record_skipped`.
    """

    where: str
    reason: object
    count: int = 1


class BadSampleCounter:
    """Counts the samples that cannot be used, and stops the run when they are too many.

    Args:
        max_rate: largest share of bad samples, from 0 to 1; checked from the 100th sample on.
        option: the setting that the error message names.
    """

    def __init__(self, max_rate: float = 0.01, option: str = "data.loader.max_bad_rate") -> None:
        self.max_rate, self.option = max_rate, option
        self.seen = self.bad = self.largest_shard = 0
        self._last = ""
        self._reported: set[str] = set()  # kinds of unused files that were named
        # (samples read, samples taken for lost) of each broken shard
        self._broken_shards: list[tuple[int, int]] = []

    def record_good(self) -> None:
        """Count a usable sample."""
        self.seen += 1
        if self.seen == CHECK_FROM:
            self.check()

    def record_bad(self, where: str, reason: object, count: int = 1) -> None:
        """Name bad samples in the log and count them.

        Raises:
            UserError: there are too many bad samples.
        """
        self.seen += count
        self.bad += count
        log.warning("%s was skipped: %s", where, reason)
        self._last = f"{where} ({reason})"
        if self.seen >= CHECK_FROM:
            self.check()

    def record_skipped(self, skipped: SkippedSamples) -> None:
        """As `record_bad`, for what `read_shard` yields."""
        self.record_bad(skipped.where, skipped.reason, skipped.count)

    def check(self) -> None:
        """Call this at the end of the data, too: it also judges fewer than 100 samples.

        Raises:
            UserError: there are too many bad samples.
        """
        if self.bad > self.max_rate * self.seen:
            raise UserError(
                f"{self.bad} of {self.seen} samples could not be used, the last one {self._last}: "
                f"mend the data or raise {self.option} ({self.max_rate:g})."
            )

    def report_unused(self, shard: str, files: Counter[str]) -> None:
        """Name files of a shard that belong to no sample; each kind of them is named once."""
        if files.keys() <= self._reported:
            return
        self._reported |= files.keys()
        kinds = ", ".join(f"{kind} {n}" for kind, n in files.most_common(8))
        log.warning("%d files of %s are not read (%s)", files.total(), shard, kinds)

    def record_broken_shard(self, read: int, rest: int) -> int:
        """Estimate how many samples a shard lost that breaks off after `read` samples.

        This is `rest`, or by how much the largest shard so far is larger; at least one.
        """
        lost = max(1, rest, self.largest_shard - read)
        self._broken_shards.append((read, lost))
        return lost

    def record_shard_size(self, read: int) -> int:
        """Take note of a shard of `read` samples.

        Returns:
            By how much the estimates for the broken shards before it grow: they had at least as
            many samples as the largest shard so far.
        """
        if read <= self.largest_shard:
            return 0
        before = sum(lost for _, lost in self._broken_shards)
        self.largest_shard = read
        self._broken_shards = [(had, max(lost, read - had)) for had, lost in self._broken_shards]
        return sum(lost for _, lost in self._broken_shards) - before


def too_many_files(error: Exception) -> UserError | None:
    """The UserError to raise in place of `error` if the cause is the limit on open files.

    None if the cause is another one, such as the file itself.
    """
    if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
        return None
    return UserError(
        f"No more files can be opened ({error.strerror}): raise the limit with `ulimit -n` in the "
        "shell that starts the run."
    )
