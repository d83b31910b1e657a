"""Copies of a run's checkpoints in a bucket, from which a run goes on where its own disk is lost.

    mirror.json       id of the run; the checkpoints that are whole here, and their files
    .lease            who writes here now
    newest-step=N.ckpt, best-step=N.ckpt
                      objects, or folders of shards
    records/          what the run shows of itself; see `mirror_records`

A checkpoint is named in mirror.json when all of it is here. The one that it replaces is removed
after that. Training goes on meanwhile; what fails is named, and tried again.
"""

import contextlib
import json
import logging
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unclip_pl.cluster.checkpoint_io import (
    CHECKPOINT_NAME,
    newest_checkpoint,
    step_of,
    unsharded_file,
)
from unclip_pl.training.mirror_records import RecordCopies
from unclip_pl.utils.errors import SharedError, UserError
from unclip_pl.utils.files import atomic_file, atomic_folder, file_lock
from unclip_pl.utils.remote import (
    delete,
    find_below,
    open_remote,
    read,
    require_writable,
    stat,
    upload,
)
from unclip_pl.utils.remote_lease import Lease, repeated
from unclip_pl.utils.signals import stop_state

log = logging.getLogger(__name__)
MANIFEST = "mirror.json"
KINDS = ("newest-", "best-")  # how the names of checkpoints that are copied begin
LOOK_EVERY = 5.0  # seconds between two looks at the run's folder
FETCH_TRIES = 4  # how often a checkpoint may be replaced while it is fetched
STOP_SECONDS = 10.0  # for records of a run that is asked to stop, which is killed soon
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
        self.lease = Lease(f"{self.url}/.lease")
        self.records = RecordCopies(self.url, folder, self.lease.require)
        self.error: str | None = None
        """Why the last attempt to copy failed."""
        self._copied: dict[str, tuple[int, int]] = {}  # the checkpoints that are there

    def _manifest(self) -> dict[str, Any]:
        try:
            manifest = json.loads(read(f"{self.url}/{MANIFEST}"))
            return {"id": manifest["id"], "checkpoints": manifest["checkpoints"]}
        except FileNotFoundError:
            return {"id": None, "checkpoints": {}}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.url}/{MANIFEST} cannot be read ({error}): give another --mirror."
            ) from None

    def _own_manifest(self) -> dict[str, Any]:
        """The manifest, which this run may change."""
        self.lease.require()
        return self._manifest()

    def fetch_newest(self) -> None:
        """Copy the checkpoints to the run's folder if one of them is newer than all there.

        That is the newest one of each kind. The one to go on from is the furthest of both.

        Raises:
            UserError: both hold checkpoints, of two runs; it cannot be read; or a run writes to it.
        """
        for _ in range(FETCH_TRIES):
            try:
                with file_lock(self.folder / ".mirror.lock"):
                    self._fetch()
                return
            except FileNotFoundError as error:
                gone = error.filename
        raise UserError(
            f"{gone} is gone or changed, which {self.url}/{MANIFEST} named: another run writes to "
            "it, wait for its end."
        )

    def _fetch(self) -> None:
        manifest = self._manifest()
        names = sorted(manifest["checkpoints"], key=progress_of)
        if not names:
            return
        own = newest_checkpoint(self.folder)
        if own:
            self._require_same_run(manifest)
            if step_of(own) >= step_of(Path(names[-1])):
                return
        self._remember(manifest["id"])  # before the first file: a kill leaves no unknown one
        wanted = {name.partition("-")[0]: name for name in names}.values()
        for name in sorted(wanted, key=progress_of):  # the furthest last: it says that all are here
            target = self.folder / "checkpoints" / name
            if not target.exists():
                self._fetch_one(name, manifest["checkpoints"][name], target)

    def _fetch_one(self, name: str, files: list[str], target: Path) -> None:
        if files == [""]:
            with atomic_file(target) as file:
                self._download(name, file)
            return
        with atomic_folder(target) as temporary:
            for part in files:
                with (temporary / part).open("wb") as file:
                    self._download(f"{name}/{part}", file)

    def _download(self, name: str, file: Any) -> None:
        url = f"{self.url}/{name}"
        before = stat(url)
        with open_remote(url) as source:
            while data := source.read(COPY_BLOCK):
                file.write(data)
        if stat(url) != before:
            raise FileNotFoundError(2, "it was replaced", url)

    def require_own(self) -> None:
        """Check that the checkpoints here are of the run in its folder; an empty place becomes its.

        Raises:
            SharedError: they are of another run, or the run is to start from scratch.
        """
        manifest = self._own_manifest()
        if manifest["checkpoints"]:
            self._require_same_run(manifest)
            own = newest_checkpoint(self.folder)
            newest = max(manifest["checkpoints"], key=progress_of)
            if own is None or step_of(own) < step_of(Path(newest)):
                raise SharedError(
                    f"{self.url} holds a run that goes on to {newest}, and {self.folder} does not: "
                    "go on with that run by --resume auto, or give this one a --mirror of its own."
                )
            self._remove_leftovers(manifest)
            self._copied = {
                name: stamp_of(path)
                for name, path in self._paths().items()
                if name in manifest["checkpoints"]
            }
            return
        manifest["id"] = self._own_id() or uuid.uuid4().hex
        self._remember(manifest["id"])
        self._write(manifest)

    def _remove_leftovers(self, manifest: dict[str, Any]) -> None:
        """Remove what a run that was killed had not copied as a whole."""
        for part, url in find_below(self.url).items():
            name = part.partition("/")[0]
            if CHECKPOINT_NAME.fullmatch(name) and name not in manifest["checkpoints"]:
                delete(url)

    def _own_id(self) -> str | None:
        own = self.folder / MANIFEST
        return json.loads(own.read_text())["id"] if own.is_file() else None

    def _require_same_run(self, manifest: dict[str, Any]) -> None:
        if self._own_id() != manifest["id"]:
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

    def copy(self, is_last: bool = False) -> None:
        """Bring what is here to the state of the run's folder; `error` says why it failed.

        Records follow when checkpoints are here, for without one this place belongs to no run.
        Their loss is no error.
        """
        if self.lease.is_lost:
            self.error = f"Another run writes to {self.url} now"
            return
        before = self.error
        try:
            self._copy()
            self.error = None
        except FileNotFoundError as error:
            self.error = f"{error.filename or error} was replaced while it was copied"
        except Exception as error:
            self.error = str(error)
        if self.error and self.error != before:
            log.warning("The copy to %s failed and is tried again: %s", self.url, self.error)
        if self._copied and not self.error:
            self.records.copy(self._is_behind, is_last, _seconds_for_records)

    def _paths(self) -> dict[str, Path]:
        """The checkpoints in the run's folder that are copied, by their names."""
        found = [newest_checkpoint(self.folder, prefix) for prefix in KINDS]
        return {path.name: path for path in found if path}

    def _is_behind(self) -> bool:
        """Whether there are other checkpoints than those that are here."""
        try:
            return stamps_of(self._paths()) != self._copied
        except FileNotFoundError:  # one is replaced at this moment
            return True

    def _copy(self) -> None:
        paths = self._paths()
        stamps = stamps_of(paths)
        if stamps == self._copied:
            return
        self.lease.require()
        for name, path in paths.items():
            if stamps[name] != self._copied.get(name):
                files = self._upload(path)
                manifest = self._own_manifest()
                manifest["checkpoints"][name] = files
                self._write(manifest)
                self._copied[name] = stamps[name]
        self._remove_replaced(paths)
        self._copied = stamps

    def _remove_replaced(self, paths: dict[str, Path]) -> None:
        manifest = self._own_manifest()
        known = manifest["checkpoints"]
        old = {name: known.pop(name) for name in list(known) if is_replaced(name, paths)}
        if old:
            self._write(manifest)
        for name, files in old.items():
            self._delete(name, files)

    def _delete(self, name: str, files: list[str]) -> None:
        for part in files:
            delete(f"{self.url}/{name}/{part}".rstrip("/"))

    def _upload(self, path: Path) -> list[str]:
        """Copy a checkpoint; returns the names of its files ("": it is one).

        Raises:
            FileNotFoundError: it was replaced meanwhile. What was copied is removed.
        """
        if path.is_file():
            upload(f"{self.url}/{path.name}", path)
            return [""]
        files = sorted(part.name for part in path.iterdir() if part.is_file())
        try:
            for part in files:
                upload(f"{self.url}/{path.name}/{part}", path / part)
        except FileNotFoundError:
            if path.name not in self._copied:  # else mirror.json still names it
                self._delete(path.name, files)
            raise
        return files


def _seconds_for_records() -> float:
    """How long records may be copied; a run may be asked to stop meanwhile."""
    return STOP_SECONDS if stop_state.agreed else math.inf


def progress_of(name: str) -> tuple[int, bool]:
    """A number that is higher for a checkpoint further on; of two at one step, for the newest."""
    return step_of(Path(name)), name.startswith("newest-")


def stamp_of(path: Path) -> tuple[int, int]:
    """What changes when a checkpoint is written again: time in ns and size in bytes."""
    status = unsharded_file(path).stat()
    return status.st_mtime_ns, status.st_size


def stamps_of(paths: dict[str, Path]) -> dict[str, tuple[int, int]]:
    """What changes when one of several checkpoints is written again."""
    return {name: stamp_of(path) for name, path in paths.items()}


def is_replaced(name: str, paths: dict[str, Path]) -> bool:
    """Whether there is not this checkpoint but another of its kind."""
    kind = name.partition("-")[0]
    return name not in paths and any(other.startswith(f"{kind}-") for other in paths)


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
    with mirror.lease.held():
        mirror.require_own()
        try:
            with repeated(mirror.copy, LOOK_EVERY):
                yield
        finally:
            mirror.copy(is_last=True)
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
