"""Copies of what a run shows of itself in its mirror: configuration, pictures and curves.

They lie in the folder `records` there, by the names that they have in the run's folder. Only what
is new or changed is copied, now and then. They are there to be looked at, also by
`tensorboard --logdir`: a run that goes on elsewhere adds to them, and fetches none.
"""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from unclip_pl.training.run_folder import CONFIG
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.remote import sizes_below, upload

log = logging.getLogger(__name__)
SETTINGS = (CONFIG, "hparams.yaml")  # of one size with other values
RECORDS = (*SETTINGS, "events.out.tfevents*", "pictures/[!.]*")
RECORDS_EVERY = 300.0  # seconds between two copies; curves are copied as a whole each time


class RecordCopies:
    """The folder `records` of a mirror.

    Args:
        url: of the mirror.
        folder: of the run on this machine.
        require_right: raises an error if this run may not write there any more.
    """

    def __init__(self, url: str, folder: Path, require_right: Callable[[], None]) -> None:
        self.url, self.folder = f"{url}/records", folder
        self._require_right = require_right
        self._copied: dict[str, tuple[int, int]] = {}  # time and size of what is there
        self._sizes: dict[str, int] | None = None  # of what is there from an earlier start
        self._begun = -RECORDS_EVERY
        self._warned = False

    def copy(
        self,
        is_behind: Callable[[], bool],
        at_once: bool = False,
        seconds: Callable[[], float] = lambda: math.inf,
    ) -> None:
        """Copy what is new. What fails is a warning, and is tried again at a later call.

        Args:
            is_behind: whether there is a checkpoint to be copied, which comes first.
            at_once: also if the last copy was a moment ago.
            seconds: after so many no further file is begun.
        """
        if not at_once and time.monotonic() - self._begun < RECORDS_EVERY:
            return
        self._begun = time.monotonic()
        try:
            if self._sizes is None:
                self._sizes = sizes_below(self.url)
            for path in self._files():
                if is_behind() or time.monotonic() - self._begun >= seconds():
                    self._begun = -RECORDS_EVERY
                    return
                self._copy_file(path, self._sizes)
        except (UserError, OSError) as error:
            self._warn(error)

    def _files(self) -> list[Path]:
        found = (path for pattern in RECORDS for path in sorted(self.folder.glob(pattern)))
        return [path for path in found if path.is_file()]

    def _copy_file(self, path: Path, sizes: dict[str, int]) -> None:
        name = path.relative_to(self.folder).as_posix()
        try:
            status = path.stat()
            stamp = status.st_mtime_ns, status.st_size
            known = sizes if name not in SETTINGS else {}
            is_there = name not in self._copied and known.get(name) == status.st_size
            if not is_there and self._copied.get(name) != stamp:
                content = path.read_bytes()  # at once, as curves grow meanwhile
                self._require_right()
                upload(f"{self.url}/{name}", content)
        except OSError as error:
            self._warn(error)
            return
        self._copied[name] = stamp

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            log.warning(
                "%s lacks pictures or curves of this run, which are tried again: %s",
                self.url,
                error,
            )
        self._warned = True
