"""The page and the API as one server."""

import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from unclip_pl.studio.album import Album
from unclip_pl.studio.api import api
from unclip_pl.studio.engine import Engine
from unclip_pl.studio.guard import Guard
from unclip_pl.studio.jobs import Jobs
from unclip_pl.studio.page import mount, page
from unclip_pl.utils.errors import UserError

CLOSING_SECONDS = 3
"""That open connections have to end when the server does."""


def build(engine: Engine, runs: Path | None = None, users: dict[str, str] | None = None) -> Guard:
    """Build the whole application, which closes the engine when it is shut down.

    Args:
        engine: draws what the page and the API ask for.
        runs: a folder of training runs to show.
        users: passwords by name; None: everybody may come in.
    """

    album = Album()

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()
        album.close()

    app = FastAPI(lifespan=life, openapi_url=None)
    app.mount("/api", api(engine, Jobs()))
    os.environ["GRADIO_TEMP_DIR"] = str(album.folder)  # what Gradio keeps lies there, and goes too
    mount(app, page(engine, album, runs))
    return Guard(app, users)


def bound(host: str, port: int) -> socket.socket:
    """A socket of this server's own.

    Raises:
        UserError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)  # who comes before the server is ready waits
    except (OSError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else "there is no such port"
        raise UserError(
            f"The address {host}:{port} cannot be used ({reason}): choose another --port or --host."
        ) from None
    return listener


class Server(uvicorn.Server):
    """A server that tells its application when it shuts down."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.closing.set()  # type: ignore[union-attr]  # a Guard
        await super().shutdown(sockets)


def server_of(app: Guard) -> Server:
    """A server that ends within seconds, whoever is still connected."""
    return Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=CLOSING_SECONDS,
        )
    )


def serve(app: Guard, listener: socket.socket) -> None:
    """Serve until the process gets SIGINT or SIGTERM."""
    server = server_of(app)
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}
    try:  # uvicorn sends the signal again when it has shut down, to handlers that were there before
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
