"""What stands before every request to the server: a password, a limit of size, no way outside."""

import asyncio
import base64
import binascii
import hmac
from pathlib import Path
from typing import Any

from unclip_pl.utils.errors import UserError

MOST_BYTES = 40 * 2**20
"""Of one request: three pictures in base64, and some more."""
POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "form-action 'self'",
        "base-uri 'self'",
        "frame-ancestors 'self'",
    ]
)
"""What a browser may load for a page of the studio: nothing from outside."""
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """An ASGI application before another one.

    Args:
        app: the other.
        users: passwords by name, for HTTP basic authentication; None: everybody may come in.
    """

    def __init__(self, app: Any, users: dict[str, str] | None = None) -> None:
        self.app, self.users = app, users
        self.closing = asyncio.Event()
        """Set when the server shuts down: responses that would last for ever end then."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])

        async def send_marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        if self.users is not None and not self._known(headers.get(b"authorization", b"")):
            sent = [(b"www-authenticate", b'Basic realm="unCLIP studio", charset="UTF-8"')]
            await _answer(send_marked, 401, "Give the name and password of this studio.", sent)
            return
        too_large = f"The request has more than {MOST_BYTES // 2**20} MB: send less."
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > MOST_BYTES:
            await _answer(send_marked, 413, too_large)
            return
        received, started, ended = 0, False, False

        async def receive_counted() -> Any:
            nonlocal received
            message = await self._unless_closing(receive)
            received += len(message.get("body", b""))
            return message if received <= MOST_BYTES else {"type": "http.disconnect"}

        async def send_unless_too_large(message: Any) -> None:
            nonlocal started, ended
            if started or received <= MOST_BYTES:
                started, ended = True, is_last(message)
                await send_marked(message)

        try:
            await self.app(scope, receive_counted, send_unless_too_large)
        except Exception:  # what the application makes of a body that ends too early
            if started or received <= MOST_BYTES:
                raise
        if received > MOST_BYTES and not started:
            await _answer(send_marked, 413, too_large)
        elif started and not ended and self.closing.is_set():
            await send({"type": "http.response.body", "body": b""})

    async def _unless_closing(self, receive: Any) -> Any:
        """What comes next; when the server shuts down, that nothing will."""
        both = asyncio.ensure_future(receive()), asyncio.ensure_future(self.closing.wait())
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            return both[0].result() if both[0].done() else {"type": "http.disconnect"}
        finally:
            for task in both:
                task.cancel()

    def _known(self, authorization: bytes) -> bool:
        """Whether it names a user with the right password."""
        kind, _, value = authorization.partition(b" ")
        try:
            name, _, password = base64.b64decode(value, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return False
        expected = (self.users or {}).get(name)
        same = hmac.compare_digest((expected or "").encode(), password.encode())
        return kind.lower() == b"basic" and expected is not None and same


def is_last(message: Any) -> bool:
    """Whether a message ends a response."""
    return message["type"] == "http.response.body" and not message.get("more_body", False)


async def _answer(send: Any, code: int, sentence: str, headers: list[Any] | None = None) -> None:
    body = sentence.encode()
    lines = [(b"content-type", b"text/plain; charset=utf-8"), *(headers or [])]
    await send({"type": "http.response.start", "status": code, "headers": lines})
    await send({"type": "http.response.body", "body": body})


def read_users(path: Path) -> dict[str, str]:
    """Passwords by name from a file with one `name:password` per line.

    Raises:
        UserError: it cannot be read, or a line of it is none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(
            f"The file of users {path} cannot be read ({error.strerror}): check --auth."
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"The file of users {path} is not UTF-8: save it as UTF-8.") from None
    users = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, _, password = line.partition(":")
        if not name or not password:
            raise UserError(f"Line {number} of {path} is no user: write name:password.")
        users[name] = password
    if not users:
        raise UserError(f"The file of users {path} has no users: write name:password in it.")
    return users
