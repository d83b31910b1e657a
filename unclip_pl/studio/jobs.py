"""Tickets by name, for programs that ask for them again, and only for some time."""

import secrets
import threading
import time

from unclip_pl.studio.engine import Ticket
from unclip_pl.utils.errors import UserError

KEPT_SECONDS = 15 * 60
KEPT_BYTES = 256 * 2**20


class NoSuchJob(UserError):
    """A name that no ticket has."""


class Jobs:
    """Remembers tickets for `seconds` after their end, and at most `room` bytes of pictures."""

    def __init__(self, seconds: float = KEPT_SECONDS, room: int = KEPT_BYTES) -> None:
        self.seconds, self.room = seconds, room
        self._tickets: dict[str, Ticket] = {}
        self._ended: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, ticket: Ticket) -> str:
        """Remember a ticket; its name, which nobody can guess."""
        name = secrets.token_urlsafe(16)
        with self._lock:
            self._forget()
            self._tickets[name] = ticket
        return name

    def get(self, name: str) -> Ticket:
        """The ticket of a name.

        Raises:
            NoSuchJob: there is none any more, or never was.
        """
        with self._lock:
            self._forget()
            if name not in self._tickets:
                raise NoSuchJob(
                    f"There is no such job: they are kept for {self.seconds / 60:g} minutes after "
                    "their end. Ask again."
                )
            return self._tickets[name]

    def __len__(self) -> int:
        with self._lock:
            return len(self._tickets)

    def _forget(self) -> None:
        now = time.monotonic()
        for name, ticket in self._tickets.items():
            if ticket.ended:
                self._ended.setdefault(name, now)
        held = {name: _bytes(self._tickets[name]) for name in self._ended}
        total = sum(held.values())
        for name, end in sorted(self._ended.items(), key=lambda item: item[1]):
            if now - end <= self.seconds and total <= self.room:
                break
            total -= held[name]
            del self._tickets[name], self._ended[name]


def _bytes(ticket: Ticket) -> int:
    """Of its pictures, and of those in its request."""
    fields = vars(ticket.request).values()
    given = sum(len(value) for value in fields if isinstance(value, str))
    return given + sum(shown.image.numel() for shown in ticket.pictures)
