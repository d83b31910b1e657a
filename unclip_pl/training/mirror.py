"""Copies of a run's checkpoints in a bucket, from which a run goes on where its own disk is lost.

    mirror.json       id of the run; the checkpoints that are whole here, and their files
    .lease            who writes here now
    newest-step=N.ckpt, best-step=N.ckpt
                      objects, or folders of shards

A checkpoint is named in mirror.json when all of it is here. The one that it replaces is removed
after that. Training goes on meanwhile; what fails is named, and tried again.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unclip_pl.cluster.checkpoint_io import newest_checkpoint, step_of
from unclip_pl.utils.errors import SharedError, UserError
from unclip_pl.utils.files import atomic_file, atomic_folder, file_lock
from unclip_pl.utils.remote import (
    create,
    delete,
    find_below,
    open_remote,
    read,
    require_writable,
    upload,
)
from unclip_pl.utils.signals import stop_state

log = logging.getLogger(__name__)
MANIFEST = "mirror.json"
LEASE = ".lease"
KINDS = ("newest-", "best-")  # how the names of checkpoints that are copied begin
LOOK_EVERY = 5.0  # seconds between two looks at the run's folder
RENEW_EVERY = 20.0  # seconds between two renewals of the lease
LEASE_ENDS = 60.0  # seconds without a renewal after which its holder is taken for dead
COPY_BLOCK = 1 << 20


class Mirror:
    """The folder of a run in a bucket.

    Args:
        url: of the folder.
        folder: of the run on this machine.
    """

    def __init__(self, url: str, folder: Path) -> None:
        require_writable(url)
        self.url, self.folder = url.rstrip("/"), folder
        self.error: str | None = None
        """Why the last attempt to copy failed."""
        self._lost = False
        self._copied: set[str] | None = None  # the checkpoints that are there

    def _manifest(self) -> dict[str, Any]:
        try:
            return json.loads(read(f"{self.url}/{MANIFEST}"))
        except FileNotFoundError:
            return {"id": None, "checkpoints": {}}
        except ValueError as error:
            raise UserError(
                f"{self.url}/{MANIFEST} cannot be read ({error}): give another --mirror."
            ) from None

    def fetch_newest(self) -> None:
        """Copy the newest checkpoint to the run's folder if that has no newer one.

        Raises:
            UserError: both hold checkpoints, of two runs; or it cannot be read.
        """
        manifest = self._manifest()
        names = [name for name in manifest["checkpoints"] if name.startswith("newest-")]
        if not names:
            return
        name = max(names, key=lambda name: step_of(Path(name)))
        with file_lock(self.folder / ".mirror.lock"):
            own = newest_checkpoint(self.folder)
            if own:
                self._require_same_run(manifest)
                if step_of(own) >= step_of(Path(name)):
                    return
            target = self.folder / "checkpoints" / name
            files = manifest["checkpoints"][name]
            if files == [""]:
                with atomic_file(target) as file:
                    self._download(name, file)
            else:
                with atomic_folder(target) as temporary:
                    for part in files:
                        with (temporary / part).open("wb") as file:
                            self._download(f"{name}/{part}", file)
            self._remember(manifest["id"])

    def _download(self, name: str, file: Any) -> None:
        with open_remote(f"{self.url}/{name}") as source:
            while data := source.read(COPY_BLOCK):
                file.write(data)

    def require_own(self) -> None:
        """Check that the checkpoints here are of the run in its folder; an empty place becomes its.

        Raises:
            SharedError: they are of another run, or the run is to start from scratch.
        """
        manifest = self._manifest()
        if manifest["checkpoints"]:
            self._require_same_run(manifest)
            own = newest_checkpoint(self.folder)
            newest = max(manifest["checkpoints"], key=lambda name: step_of(Path(name)))
            if own is None or step_of(own) < step_of(Path(newest)):
                raise SharedError(
                    f"{self.url} holds a run that goes on to {newest}, and {self.folder} does not: "
                    "go on with that run by --resume auto, or give this one a --mirror of its own."
                )
            self._remove_leftovers(manifest)
            return
        manifest["id"] = manifest["id"] or uuid.uuid4().hex
        self._remember(manifest["id"])
        self._write(manifest)

    def _remove_leftovers(self, manifest: dict[str, Any]) -> None:
        """Remove what a run that was killed had not copied as a whole."""
        for part, url in find_below(self.url).items():
            name = part.partition("/")[0]
            if name.startswith(KINDS) and name not in manifest["checkpoints"]:
                delete(url)

    def _require_same_run(self, manifest: dict[str, Any]) -> None:
        own = self.folder / MANIFEST
        known = json.loads(own.read_text())["id"] if own.is_file() else None
        if known != manifest["id"]:
            raise SharedError(
                f"{self.url} holds a run already, and not that of {self.folder}: go on with it by "
                "--resume auto in an empty --trainer.default_root_dir, or give this run a --mirror "
                "of its own."
            )

    def _remember(self, run: str) -> None:
        with atomic_file(self.folder / MANIFEST, "w") as file:
            json.dump({"id": run, "url": self.url}, file)

    def _write(self, manifest: dict[str, Any]) -> None:
        upload(f"{self.url}/{MANIFEST}", (json.dumps(manifest, indent=1) + "\n").encode())

    def copy(self) -> None:
        """Bring what is here to the state of the run's folder; `error` says why it failed."""
        try:
            if self._lost:
                raise UserError(f"Another run writes to {self.url} now.")
            self._copy()
            self.error = None
        except FileNotFoundError as error:
            # The run replaced a checkpoint while it was copied: the newer one is next
            self.error = f"{error.filename or error} is gone"
        except Exception as error:
            self.error = str(error)
            log.warning("The copy to %s failed and is tried again: %s", self.url, error)

    def _copy(self) -> None:
        paths = {
            path.name: path for prefix in KINDS if (path := newest_checkpoint(self.folder, prefix))
        }
        if paths.keys() == self._copied:
            return
        manifest = self._manifest()
        known = manifest["checkpoints"]
        for name, path in paths.items():
            if name not in known:
                known[name] = self._upload(path)
                self._write(manifest)
        for name in [name for name in known if name not in paths and is_replaced(name, paths)]:
            files = known.pop(name)
            self._write(manifest)
            for part in files:
                delete(f"{self.url}/{name}/{part}".rstrip("/"))
        self._copied = set(paths)

    def _upload(self, path: Path) -> list[str]:
        """Copy a checkpoint; returns the names of its files ("": it is one)."""
        if path.is_file():
            upload(f"{self.url}/{path.name}", path)
            return [""]
        files = sorted(part for part in path.iterdir() if part.is_file())
        for part in files:
            upload(f"{self.url}/{path.name}/{part.name}", part)
        return [part.name for part in files]

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """A context in which no other run writes here.

        A bucket has no locks: whoever holds the lease renews it, and one that is not renewed for
        `LEASE_ENDS` seconds is taken over.

        Raises:
            SharedError: another run holds it.
        """
        url, own = f"{self.url}/{LEASE}", new_holder()
        wait_until_free(url, own)
        while not create(url, json.dumps(own).encode()):
            wait_until_free(url, own)

        def renew() -> None:
            own["renewed"] = time.time()
            try:
                if json.loads(read(url))["id"] == own["id"]:
                    upload(url, json.dumps(own).encode())
                    return
                reason = "another run has taken it over"
            except FileNotFoundError:
                reason = "it was removed"
            except UserError as error:
                log.warning("The lease of %s was not renewed: %s", self.url, error)
                return
            self._lost = True
            log.error("The lease of %s is lost (%s): nothing more is copied.", self.url, reason)

        with repeated(renew, RENEW_EVERY):
            yield
        if not self._lost:
            delete(url)


def is_replaced(name: str, paths: dict[str, Path]) -> bool:
    """Whether there is another checkpoint of the kind of this one."""
    kind = name.partition("-")[0]
    return any(other.startswith(f"{kind}-") for other in paths)


def wait_until_free(url: str, own: dict[str, Any]) -> None:
    """Wait for the end of a lease whose holder is dead, and remove it.

    Raises:
        SharedError: its holder lives.
    """
    try:
        content = read(url)
        holder = json.loads(content)
    except FileNotFoundError:
        return
    is_here = (holder["host"], holder["boot"]) == (own["host"], own["boot"])
    if not (is_here and not is_alive(holder["pid"])):
        log.warning("%s is held by %s: waiting to see if it lives.", url, holder["host"])
        end = time.monotonic() + LEASE_ENDS
        while time.monotonic() < end:
            time.sleep(min(2.0, LEASE_ENDS / 4))
            try:
                if read(url) == content:
                    continue
            except FileNotFoundError:
                return
            raise SharedError(
                f"Another run, of process {holder['pid']} on {holder['host']}, writes to "
                f"{url.rpartition('/')[0]}: wait for its end, or give this run a --mirror of its "
                "own."
            )
    if read(url) == content:
        delete(url)


def new_holder() -> dict[str, Any]:
    """What a lease says of this process; `boot` tells machines of one name apart."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "pid": os.getpid(),
        "renewed": time.time(),
    }


def is_alive(pid: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def repeated(action: Any, seconds: float) -> Iterator[None]:
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


@contextlib.contextmanager
def mirrored(mirror: Mirror | None, is_writer: bool) -> Iterator[None]:
    """A context in which the checkpoints of a run are copied to its mirror.

    At its end all of them are there.

    Args:
        mirror: of the run; None: it has none.
        is_writer: whether this rank writes the run's files.

    Raises:
        SharedError: the mirror belongs to another run.
        UserError: the last copy failed at the end of a run that was not asked to stop.
    """
    if mirror is None or not is_writer:
        yield
        return
    with mirror.lease():
        mirror.require_own()
        try:
            with repeated(mirror.copy, LOOK_EVERY):
                yield
        finally:
            mirror.copy()
            if mirror.error:
                log.error(
                    "%s lacks checkpoints of this run (%s). They are whole in %s: go on with "
                    "--resume auto there.",
                    mirror.url,
                    mirror.error,
                    mirror.folder,
                )
        if mirror.error and not stop_state.agreed:
            raise UserError(
                f"The run ended, and {mirror.url} lacks checkpoints that are whole in "
                f"{mirror.folder} ({mirror.error}): repeat the command with --resume auto there."
            )
