"""The right to write to a folder of a bucket, which one process at a time has.

A bucket has no locks. Whoever holds the lease renews it; one that is not renewed is taken over.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from unclip_pl.utils.errors import SharedError, UserError
from unclip_pl.utils.remote import create, delete, read, upload

log = logging.getLogger(__name__)
RENEW_EVERY = 20.0  # seconds between two renewals
LEASE_ENDS = 60.0  # seconds without a renewal after which its holder is taken for dead
SETTLES = 2.0  # seconds after which another that took it over at the same moment has shown


class Lease:
    """An object that says who writes to the folder that it lies in.

    Args:
        url: of the object.
    """

    def __init__(self, url: str) -> None:
        self.url, self.folder = url, url.rpartition("/")[0]
        self.is_lost = False
        """Whether it was ours, and another has it now."""
        self._own = new_holder()
        self._renewed = -LEASE_ENDS  # when it was renewed last, by this machine's clock

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A context in which no other process holds it.

        Raises:
            SharedError: another one does.
        """
        with contextlib.ExitStack() as stack:
            self._wait_until_free()
            stack.callback(self._give_back)
            while not self._take():
                self._wait_until_free()
            stack.enter_context(repeated(self._renew, RENEW_EVERY))
            yield

    def require(self) -> None:
        """Check that it is ours still.

        Raises:
            UserError: it is not, or it was not renewed for too long.
        """
        if not self.is_lost and time.monotonic() - self._renewed >= LEASE_ENDS:
            raise UserError(f"{self.url} was not renewed for more than {LEASE_ENDS:.0f} s.")
        if self.is_lost or not self._is_ours():
            raise UserError(f"Another run writes to {self.folder} now.")

    def _is_ours(self) -> bool:
        try:
            return json.loads(read(self.url))["id"] == self._own["id"]
        except FileNotFoundError:
            return False

    def _take(self) -> bool:
        self._renewed = time.monotonic()
        if not create(self.url, json.dumps(self._own).encode()):
            return False
        time.sleep(SETTLES)  # another that saw the same dead holder may have removed ours
        return self._is_ours()

    def _renew(self) -> None:
        if self.is_lost:
            return
        moment = time.monotonic()
        self._own["renewed"] = time.time()
        try:
            if self._is_ours():
                upload(self.url, json.dumps(self._own).encode())
                self._renewed = moment
                return
        except UserError as error:
            log.warning("%s was not renewed: %s", self.url, error)
            return
        self.is_lost = True
        log.error("%s is lost to another run: nothing more is copied.", self.url)

    def _give_back(self) -> None:
        try:
            if self._is_ours():
                delete(self.url)
        except UserError as error:
            log.warning("%s was not given back, and ends by itself: %s", self.url, error)

    def _wait_until_free(self) -> None:
        """Wait for the end of a lease whose holder is dead, and remove it."""
        with contextlib.suppress(FileNotFoundError):  # it is free, or another removed it
            content = read(self.url)
            holder = json.loads(content)
            if not is_dead(holder, self._own):
                self._watch(content, holder)
            if read(self.url) == content:
                delete(self.url)

    def _watch(self, content: bytes, holder: dict[str, Any]) -> None:
        """Wait as long as a holder may be silent.

        Raises:
            SharedError: it renewed the lease.
            FileNotFoundError: it gave the lease back.
        """
        log.warning("%s is held by %s: waiting to see if it lives.", self.url, holder["host"])
        end = time.monotonic() + LEASE_ENDS
        while time.monotonic() < end:
            time.sleep(min(2.0, LEASE_ENDS / 4))
            if read(self.url) != content:
                raise SharedError(
                    f"Another run, of process {holder['pid']} on {holder['host']}, writes to "
                    f"{self.folder}: wait for its end, or give this run a --mirror of its own."
                )


def new_holder() -> dict[str, Any]:
    """What a lease says of this process.

    `boot` tells machines of one name apart, `pids` containers of one machine.
    """
    boot, pids = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "pids": str(pids.readlink()) if pids.is_symlink() else "",
        "pid": os.getpid(),
        "renewed": time.time(),
    }


def is_dead(holder: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether a holder was a process of this machine and container, and is gone."""
    if any(holder.get(name) != own[name] for name in ("host", "boot", "pids")):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


@contextlib.contextmanager
def repeated(action: Callable[[], None], seconds: float) -> Iterator[None]:
    """A context in which another thread calls `action` every so often."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(seconds):
            action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
