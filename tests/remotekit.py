"""A real S3 server on the loopback, behind a proxy that fails on demand."""

import contextlib
import http.client
import http.server
import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

BUCKET = "bucket"


@dataclass
class Faults:
    """What goes wrong with requests whose path holds `of`: the first entries of `plan`, or `always`
    once it is used up. "503" an answer, "slow" a late one, "cut" half of one."""

    plan: list[str] = field(default_factory=list)
    always: str | None = None
    of: str = ""
    methods: tuple[str, ...] = ("GET", "HEAD", "PUT")
    seen: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # METHOD PATH RANGE

    def next(self, method: str, path: str) -> str | None:
        if self.of not in path or method not in self.methods:
            return None
        fault = self.plan.pop(0) if self.plan else self.always
        if fault:
            self.seen.append(fault)
        return fault


def _handler(port: int, faults: Faults) -> type[http.server.BaseHTTPRequestHandler]:
    class Proxy(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def forward(self):
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            faults.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
            fault = faults.next(self.command, self.path)
            if fault == "503":
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault == "slow":
                time.sleep(0.3)
            server = http.client.HTTPConnection("127.0.0.1", port)
            server.request(self.command, self.path, content, dict(self.headers))
            answer = server.getresponse()
            body = answer.read()
            server.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else len(body)
            self.send_header("Content-Length", str(length or 0))
            # A connection that is kept open would be shared with forked readers
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    return Proxy


@contextlib.contextmanager
def failing(port: int, faults: Faults) -> Iterator[str]:
    """The URL of a proxy before a server on the loopback, with these faults."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(port, faults)) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_port}"
        proxy.shutdown()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[Faults]:
    """A bucket named `BUCKET`; the environment leads s3fs to it, in child processes too."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield from _serve(monkeypatch)


@pytest.fixture
def faults(s3_server: Faults) -> Iterator[Faults]:
    """The empty bucket, and what is to go wrong with it."""
    import s3fs

    vars(s3_server).update(vars(Faults()))
    bucket = s3fs.S3FileSystem(use_listings_cache=False)
    if bucket.ls(BUCKET):
        bucket.rm(bucket.find(BUCKET))
    yield s3_server
    vars(s3_server).update(vars(Faults()))


def _serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    pytest.importorskip("s3fs", reason="needs s3fs: pip install -e '.[test]'")
    moto = pytest.importorskip("moto.server", reason="needs moto: pip install -e '.[test]'")
    import s3fs

    from unclip_pl.utils import remote

    faults = Faults()
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with failing(server.get_host_and_port()[1], faults) as url:
        environment = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # else the client tries again before we do
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
        s3fs.S3FileSystem.clear_instance_cache()
        # moto keeps what an earlier server of this process was given
        urllib.request.urlopen(f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset", b"").close()
        s3fs.S3FileSystem().mkdir(BUCKET)
        yield faults
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def put(local: object, name: str) -> str:
    """Upload a file or folder into the bucket and return its URL."""
    import s3fs

    s3fs.S3FileSystem().put(str(local), f"{BUCKET}/{name}", recursive=True)
    return f"s3://{BUCKET}/{name}"


def names_below(folder: str) -> list[str]:
    """The names of the objects in a folder of the bucket."""
    import s3fs

    found = s3fs.S3FileSystem(use_listings_cache=False).find(f"{BUCKET}/{folder}")
    return sorted(name.removeprefix(f"{BUCKET}/{folder}/") for name in found)
