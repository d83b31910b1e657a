"""Training runs of a folder as they stand: curves, newest pictures, newest checkpoint."""

import threading
from dataclasses import dataclass, field
from pathlib import Path

from tensorboard.backend.event_processing import event_accumulator as events

from unclip_pl.cluster.checkpoint_io import newest_checkpoint
from unclip_pl.utils.errors import UserError

DEPTH = 3
"""Levels of folders below the given one in which runs are looked for."""
POINTS = 500
"""Of a curve; TensorBoard keeps a fair choice of more."""
EVENTS = "events.out.tfevents*"
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Run:
    """One run."""

    name: str
    """Its folder, as seen from the folder of runs."""
    curves: dict[str, list[tuple[int, float]]] = field(repr=False)
    """(step, value) by what was logged: "train/loss"."""
    picture: Path | None
    """Of the newest validation."""
    checkpoint: Path | None
    """The newest whole one."""

    @property
    def step(self) -> int:
        """The last that was logged."""
        return max((curve[-1][0] for curve in self.curves.values() if curve), default=0)


class Runs:
    """Reads what is new in the runs of a folder each time it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._readers: dict[str, events.EventAccumulator] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The runs that are there, the one that wrote last first."""
        found: dict[str, float] = {}
        for depth in range(DEPTH + 1):
            for pattern in (EVENTS, CONFIG):
                for path in self.folder.glob("*/" * depth + pattern):
                    name = path.parent.relative_to(self.folder).as_posix()
                    found[name] = max(found.get(name, 0), path.stat().st_mtime)
        return sorted(found, key=lambda name: -found[name])

    def folder_of(self, name: str) -> Path:
        """The folder of a run.

        Raises:
            UserError: there is no such run.
        """
        if name not in self.names():
            raise UserError(f"There is no run {name} in the folder of runs: choose another.")
        return self.folder / name

    def read(self, name: str) -> Run:
        """A run as it stands.

        Raises:
            UserError: there is no such run.
        """
        folder = self.folder_of(name)
        pictures = sorted((folder / "pictures").glob("step-*.png"))
        return Run(
            name,
            self._curves(name, folder),
            pictures[-1] if pictures else None,
            newest_checkpoint(folder),
        )

    def _curves(self, name: str, folder: Path) -> dict[str, list[tuple[int, float]]]:
        with self._lock:
            if name not in self._readers:
                size = {events.SCALARS: POINTS, events.IMAGES: 1, events.TENSORS: 1}
                self._readers[name] = events.EventAccumulator(str(folder), size)
            reader = self._readers[name]
            reader.Reload()
            return {
                tag: [(event.step, event.value) for event in reader.Scalars(tag)]
                for tag in sorted(reader.Tags()[events.SCALARS])
            }
