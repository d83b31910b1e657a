"""Twenty clients at once, two hundred requests: none is lost, none mixed up, memory stays flat."""

import contextlib
import ctypes
import io
import json
import re
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.studio.browser import served
from tests.studio.conftest import tiny_models

pytest.importorskip("fastapi_offline", reason='needs the extra "web"')

from unclip_pl.studio import engine as rooms
from unclip_pl.studio.models import Models
from unclip_pl.studio.requests import Create
from unclip_pl.utils.images import to_uint8

CLIENTS, REQUESTS = 20, 200
CAPTIONS = ("red heart", "fox", "green apple", "woman firefighter")
QUICK = {"prior_steps": 1, "steps": 2}


def ask(url, body=None, method=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read()


def resident():
    """Memory of this process in MB, without what the C library holds free."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_twenty_clients_get_what_they_asked_for(monkeypatch):
    models, batches, memory = tiny_models(64), [], []
    real, lock = rooms.draw, threading.Lock()

    def draw(models, requests, tell):
        batches.append(len(requests))
        return real(models, requests, tell)

    monkeypatch.setattr(rooms, "draw", draw)

    def client(address, k):
        caption, settings = CAPTIONS[k % 4], QUICK | {"guidance_scale": 1 + k % 2}
        body = {"captions": [caption], "seed": k, "prior": ("diffusion", "none")[k % 3 == 0]}
        job = json.loads(ask(f"{address}/api/create", body | settings))
        while job["state"] in ("waiting", "drawing"):
            job = json.loads(ask(f"{address}/api/jobs/{job['id']}?wait=30"))
        assert job["state"] == "done", job
        data = ask(address + job["pictures"][0]["url"])
        with lock:
            memory.append(resident())
        shown = Image.open(io.BytesIO(data)).tobytes()
        pixels = torch.frombuffer(bytearray(shown), dtype=torch.uint8).view(64, 64, 3)
        return Create(captions=(caption,), seed=k, prior=body["prior"], **settings), pixels

    with served(models) as (address, _), ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(lambda k: client(address, k), range(REQUESTS)))
    assert len(found) == REQUESTS and sum(batches) == REQUESTS
    assert len(batches) < REQUESTS / 2  # most were drawn together
    quarter = REQUESTS // 4  # the least of each: batches come and go
    # After the warm-up, which takes the first half
    assert min(memory[-quarter:]) - min(memory[2 * quarter : 3 * quarter]) < 15
    for request, pixels in found[::7]:
        unclip, condition = models.unclip_for(request)
        alone = unclip.generate(
            request.captions, [request.seed], condition, size=64,
            prior_sampling=models.prior_sampling(request), sampling=models.sampling(request),
        )  # fmt: skip
        difference = pixels.permute(2, 0, 1).int() - to_uint8(alone[0]).int()
        assert difference.abs().max() <= 1


def test_the_first_preview_needs_less_than_a_second_of_one_core(monkeypatch):
    """Seconds of the processor, of all threads: a busy machine does not change these."""
    seen, spent, real = threading.Event(), [], rooms.Ticket.show

    def show(ticket, preview):
        real(ticket, preview)
        spent.append(time.process_time() - start)
        seen.set()

    monkeypatch.setattr(rooms.Ticket, "show", show)
    threads = torch.get_num_threads()
    with served(Models.load()) as (address, _):
        torch.set_num_threads(1)  # others would wait actively
        try:
            for _ in range(2):
                seen.clear()
                start = time.process_time()
                job = json.loads(ask(f"{address}/api/create", {"captions": ["fox"]}))
                assert seen.wait(120)
                job = json.loads(ask(f"{address}/api/jobs/{job['id']}"))
                ask(f"{address}/api/jobs/{job['id']}", method="DELETE")
                assert set(job["seconds"]) >= {"waiting", "prior"}
                assert job["seconds_to_preview"] >= job["seconds"]["prior"]
        finally:
            torch.set_num_threads(threads)
    assert min(spent) < 1, spent
