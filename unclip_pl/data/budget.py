"""What is lost of the data on the way: samples that cannot be used, counted and named, up to a
limit."""

import errno
import logging
from collections import Counter
from dataclasses import dataclass

from unclip_pl.utils.errors import UserError

log = logging.getLogger(__name__)


class BadSample(Exception):
    """A sample that cannot be used; its text says why and follows "sample KEY of SHARD was passed
    over: "."""


@dataclass(frozen=True)
class Lost:
    """What `read_shard` gives in the place of samples that cannot be used; whoever comes to it has
    `ErrorBudget.charge` count it."""

    where: str
    reason: object
    count: int = 1


class ErrorBudget:
    """Counts the samples that could not be used and stops the run when they are too many.

    Args:
        max_rate: largest share of bad samples; judged from the 100th sample on.
        option: the setting that the sentence names.
    """

    def __init__(self, max_rate: float = 0.01, option: str = "data.loader.max_bad_rate") -> None:
        self.max_rate, self.option = max_rate, option
        self.seen = self.bad = self.largest = 0
        self._last = ""
        self._told: set[str] = set()  # what files that are not read have been named
        self._broken: list[
            tuple[int, int]
        ] = []  # of each broken shard: samples read, and taken for lost

    def good(self) -> None:
        self.seen += 1
        if self.seen == 100:
            self._judge()

    def spend(self, where: str, reason: object, count: int = 1) -> None:
        """Name a bad sample in the log; raises a UserError where there are too many."""
        self.seen += count
        self.bad += count
        log.warning("%s was passed over: %s", where, reason)
        self._last = f"{where} ({reason})"
        if self.seen >= 100:
            self._judge()

    def _judge(self) -> None:
        if self.bad > self.max_rate * self.seen:
            raise UserError(
                f"{self.bad} of {self.seen} samples could not be used, the last one {self._last}: "
                f"mend the data or raise {self.option} ({self.max_rate:g})."
            )

    def end(self) -> None:
        """All was read: judge a set of fewer than 100 samples, too."""
        self._judge()

    def unread(self, shard: str, files: Counter[str]) -> None:
        """Name files of a shard that nothing is made of, each kind of them once."""
        if files.keys() <= self._told:
            return
        self._told |= files.keys()
        kinds = ", ".join(f"{kind} {n}" for kind, n in files.most_common(8))
        log.warning("%d files of %s are not read (%s)", files.total(), shard, kinds)

    def charge(self, lost: Lost) -> None:
        self.spend(lost.where, lost.reason, lost.count)

    def broken(self, read: int, rest: int) -> int:
        """How many samples a shard lost that ends after `read`: `rest`, or as many as the largest
        shard so far has more, and one at least."""
        lost = max(1, rest, self.largest - read)
        self._broken.append((read, lost))
        return lost

    def larger(self, read: int) -> int:
        """Take note of a shard of `read` samples; returns how many more than was thought the broken
        shards before it lost, if it is the largest."""
        if read <= self.largest:
            return 0
        self.largest, before = read, sum(lost for _, lost in self._broken)
        self._broken = [(had, max(lost, read - had)) for had, lost in self._broken]
        return sum(lost for _, lost in self._broken) - before


def too_many_files(error: Exception) -> UserError | None:
    """What to raise for an error that is none of the file that was to be opened, but of the limit
    on open files; else None."""
    if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
        return None
    return UserError(
        f"No more files can be opened ({error.strerror}): raise the limit with `ulimit -n` in the "
        "shell that starts the run."
    )
