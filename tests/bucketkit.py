"""Buckets of Google Cloud Storage and repositories of the Hugging Face hub, on the loopback.

Before each is the proxy of `remotekit`, which fails on demand.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import gcskit
from tests.interop import standin
from tests.remotekit import Faults, failing
from unclip_pl.utils import remote

DATA = "datasets/some-org/data"


@dataclass
class Bucket:
    """A place for objects, with URLs that begin with `url`.

    `objects` are its contents, {name: bytes}. `server` is the stand-in.
    """

    url: str
    objects: dict[str, bytes]
    faults: Faults
    server: Any

    def put(self, local: str | Path, name: str) -> str:
        """Put a file or a folder into it; returns its URL."""
        local = Path(local)
        for path in [local] if local.is_file() else local.rglob("*"):
            if path.is_file():
                part = path.relative_to(local).as_posix()
                self.objects[name if part == "." else f"{name}/{part}"] = path.read_bytes()
        return f"{self.url}/{name}"

    def names_below(self, folder: str) -> list[str]:
        """The names of the objects in a folder."""
        prefix = f"{folder}/"
        return sorted(n.removeprefix(prefix) for n in self.objects if n.startswith(prefix))


def without_waits(module: str, monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
    """Let a package try again at once."""

    async def no_wait(seconds: float) -> None:
        pass

    if asynchronous:
        monkeypatch.setattr(f"{module}.asyncio", SimpleNamespace(sleep=no_wait))
    else:
        known = {"time": time.time, "monotonic": time.monotonic, "sleep": lambda seconds: None}
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(**known))


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """`gs://bucket`, empty."""
    # It would ask Google itself what kind of bucket this is
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs = pytest.importorskip("gcsfs", reason="needs gcsfs: pip install -e '.[remote]'")
    faults = Faults(methods=("GET", "POST"))
    with gcskit.serving() as server, failing(server.server_port, faults) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        monkeypatch.setenv("NO_GCE_CHECK", "true")  # else it looks for the credentials of a machine
        monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
        without_waits("gcsfs.retry", monkeypatch, asynchronous=True)
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield Bucket(f"gs://{gcskit.BUCKET}", server.objects, faults, server)
        gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture
def hf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    """The empty repository `hf://datasets/some-org/data`."""
    from huggingface_hub import HfFileSystem

    faults = Faults()
    with standin.serving() as server, failing(server.server_port, faults) as url:
        standin.lead_to(url, tmp_path / "hub", monkeypatch)
        monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
        without_waits("huggingface_hub.utils._http", monkeypatch, asynchronous=False)
        HfFileSystem.clear_instance_cache()
        server.repositories[DATA] = {}
        yield Bucket(f"hf://{DATA}", server.repositories[DATA], faults, server)
        HfFileSystem.clear_instance_cache()


@pytest.fixture(params=["gs", "hf"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    """Each of them in turn."""
    return request.getfixturevalue(request.param)
