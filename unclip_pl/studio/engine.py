"""One model in memory, one thread that draws, and a queue with places in it for all who ask.

A request becomes a `Ticket`, which says where it is and holds what was drawn. Waiting requests that
differ in captions and seeds only are drawn together; each picture depends on its own caption and
seed and not on its company.
"""

import logging
import threading
import time
from enum import StrEnum

import torch
from torch import Tensor

from unclip_pl.studio.drawing import ROWS, Drawn, Result, check_pictures, draw
from unclip_pl.studio.models import Models
from unclip_pl.studio.requests import Create, Request, UseWeights
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import to_uint8

log = logging.getLogger(__name__)
PREVIEW_SECONDS = 0.2
"""The least time between two previews of a drawing."""


class QueueFull(UserError):
    """There is no place left to wait in."""


class Cancelled(Exception):
    """Nobody waits for this drawing any more."""


class State(StrEnum):
    """Where a ticket is."""

    WAITING = "waiting"
    DRAWING = "drawing"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDS = (State.DONE, State.FAILED, State.CANCELLED)


class Ticket:
    """One request on its way. All that is public may be read from any thread.

    Args:
        request: what was asked for.
        owner: whose it is, so that all of somebody's can be cancelled.
    """

    def __init__(self, request: Request, owner: str = "") -> None:
        self.request, self.owner = request, owner
        self.state = State.WAITING
        self.stage, self.step, self.steps = "", 0, 0
        """What it is at."""
        self.seconds: dict[str, float] = {}
        """How long it waited, and was at each stage."""
        self.seconds_to_preview: float | None = None
        """From its submission until there was something to see."""
        self.submitted = time.monotonic()
        self.preview: Tensor | None = None
        """x0 as it was last seen: uint8 (B, 3, H, W), a picture for each that is being drawn."""
        self.pictures: list[Drawn] = []
        self.notes: list[str] = []
        self.error = ""
        """Of a failed one: a sentence."""
        self._ended, self._lock = threading.Event(), threading.Lock()

    @property
    def ended(self) -> bool:
        """Nothing more will happen to it."""
        return self.state in ENDS

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has ended; whether it has."""
        return self._ended.wait(seconds)

    def begin(self) -> bool:
        """It is drawn from now on; False where it has ended already."""
        with self._lock:
            if not self.ended:
                self.state = State.DRAWING
                self.seconds["waiting"] = time.monotonic() - self.submitted
            return not self.ended

    def show(self, preview: Tensor) -> None:
        """Show x0, uint8 (B, 3, H, W), as it is now."""
        if self.seconds_to_preview is None:
            self.seconds_to_preview = time.monotonic() - self.submitted
        self.preview = preview

    def end(self, state: State, result: Result | None = None, error: str = "") -> None:
        """Set its end, unless it has ended already."""
        with self._lock:
            if self.ended:
                return
            if result is not None:
                self.pictures, self.notes = result.pictures, result.notes
            self.error, self.preview, self.state = error, None, state
        self._ended.set()


class Engine:
    """Draws what is submitted, in order, until it is closed.

    Args:
        models: what draws.
        limit: how many requests may wait.
    """

    def __init__(self, models: Models, limit: int = 64) -> None:
        self.models, self.limit = models, limit
        self._waiting: list[Ticket] = []
        self._drawing: list[Ticket] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="studio-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, owner: str = "") -> Ticket:
        """Put a request at the end of the queue.

        Raises:
            UserError: it cannot be drawn here; as a `QueueFull`, too many wait already.
        """
        self.models.check(request)
        check_pictures(self.models, request)
        ticket = Ticket(request, owner)
        with self._changed:
            if self._closing:
                raise UserError("The studio is being closed: ask again when it is back.")
            if len(self._waiting) >= self.limit:
                raise QueueFull(
                    f"{len(self._waiting)} requests are waiting, which is the most that may: try "
                    "again in a minute."
                )
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def place(self, ticket: Ticket) -> int:
        """The place in the queue: 1 is drawn next, 0 waits no more."""
        with self._changed:
            return self._waiting.index(ticket) + 1 if ticket in self._waiting else 0

    def load(self) -> tuple[int, int]:
        """How many requests wait, and how many are being drawn."""
        with self._changed:
            return len(self._waiting), len(self._drawing)

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants it any more: at once if it waits, else at the next step."""
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
        ticket.end(State.CANCELLED)

    def cancel_all(self, owner: str) -> None:
        """Cancel what is somebody's."""
        with self._changed:
            tickets = [t for t in (*self._waiting, *self._drawing) if t.owner == owner]
        for ticket in tickets:
            self.cancel(ticket)

    def close(self, seconds: float = 60) -> None:
        """Cancel all that waits or is drawn, and end the thread."""
        with self._changed:
            self._closing = True
            tickets = [*self._waiting, *self._drawing]
            self._changed.notify_all()
        for ticket in tickets:
            self.cancel(ticket)
        self._thread.join(seconds)

    def _work(self) -> None:
        while batch := self._next():
            try:
                self._draw(batch)
            finally:
                with self._changed:
                    self._drawing = []

    def _next(self) -> list[Ticket]:
        """The next tickets to draw together; empty when the engine is closed."""
        with self._changed:
            while not self._waiting:
                if self._closing:
                    return []
                self._changed.wait()
            first = self._waiting[0]
            self._drawing = self._together(first) if isinstance(first.request, Create) else [first]
            for ticket in self._drawing:
                self._waiting.remove(ticket)
            return self._drawing

    def _together(self, first: Ticket) -> list[Ticket]:
        """`first`, and what waits behind it with equal settings, as many pictures as fit."""
        batch: list[Ticket] = []
        count = 0
        settings = first.request.settings()  # type: ignore[union-attr]  # of a Create
        for ticket in self._waiting:
            request = ticket.request
            if isinstance(request, UseWeights):
                break  # what is behind it is drawn with other weights
            if not isinstance(request, Create) or request.settings() != settings:
                continue
            if batch and count + request.pictures() > ROWS:
                continue
            batch.append(ticket)
            count += request.pictures()
        return batch

    def _draw(self, batch: list[Ticket]) -> None:
        """Draw tickets together; if that fails, one by one, so that one error stops no other."""
        batch = [ticket for ticket in batch if ticket.begin()]
        if not batch:
            return
        watcher = _Watcher(batch)
        try:
            with self.models.watched(watcher.show):
                results = draw(self.models, [t.request for t in batch], watcher.tell)
        except Cancelled:
            return
        except Exception as error:
            if len(batch) > 1:
                for ticket in batch:
                    self._draw([ticket])
                return
            batch[0].end(State.FAILED, error=sentence(error))
            return
        for ticket, result in zip(batch, results, strict=True):
            ticket.end(State.DONE, result)


class _Watcher:
    """Tells tickets what their drawing is at, and ends it where nobody wants it any more."""

    def __init__(self, tickets: list[Ticket]) -> None:
        self.tickets, self.last = tickets, 0.0
        self.last_step = time.monotonic()
        self.counts = [ticket.request.pictures() for ticket in tickets]

    def tell(self, stage: str, step: int, steps: int) -> None:
        self._stop_if_unwanted()
        now = time.monotonic()
        for ticket in self.tickets:
            ticket.stage, ticket.step, ticket.steps = stage, step, steps
            ticket.seconds[stage] = ticket.seconds.get(stage, 0) + now - self.last_step
        self.last_step = now

    def show(self, x0: Tensor) -> None:
        """x0 (B, 3, H, W); of several tickets the pictures of each, if all are drawn at once."""
        self._stop_if_unwanted()
        now = time.monotonic()
        if now - self.last < PREVIEW_SECONDS:
            return
        self.last = now
        shown = to_uint8(x0).cpu()
        if len(self.tickets) == 1:
            self.tickets[0].show(shown)
        elif len(shown) == sum(self.counts):
            for ticket, part in zip(self.tickets, shown.split(self.counts), strict=True):
                ticket.show(part)

    def _stop_if_unwanted(self) -> None:
        if all(ticket.ended for ticket in self.tickets):
            raise Cancelled


def sentence(error: Exception) -> str:
    """What a user sees of an error; an unexpected error goes to the log in full."""
    if isinstance(error, UserError):
        return str(error)
    log.error("A request failed.", exc_info=error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "The studio has too little memory for this request: ask for fewer or smaller ones."
    return f"The studio could not draw this ({type(error).__name__}): its log says more."
