"""A server of the studio in a thread, and a real browser before it."""

import contextlib
import shutil
import threading
import time

import pytest

from unclip_pl.studio.engine import Engine

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextlib.contextmanager
def served(models, limit=64, **options):
    """The address of a server, and its engine."""
    from unclip_pl.studio import server

    engine = Engine(models, limit)
    listener = server.bound("127.0.0.1", 0)
    running = server.server_of(server.build(engine, **options))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not running.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", engine
    finally:
        running.should_exit = True
        thread.join(30)
    assert not thread.is_alive() and not engine._thread.is_alive()


@contextlib.contextmanager
def chromium():
    """A headless browser; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"there is no browser here: install one of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
