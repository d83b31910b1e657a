"""A stand-in of Google Cloud Storage on the loopback: the part of its JSON API that gcsfs uses."""

import contextlib
import hashlib
import json
import re
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"
PAGE = 3
"""How many objects a list has at most; the rest is on further pages."""


class Storage(BaseHTTPRequestHandler):
    """Serves `server.objects`, {name: bytes}, of one bucket; takes uploads into them."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        if not self.is_allowed():
            return
        if self.name is None:
            self.answer(200, {"name": BUCKET} if self.bucket_only else self.listed())
        elif self.name not in self.server.objects:
            self.refuse(404)
        elif self.query.get("alt") == "media":
            self.answer_data(self.server.objects[self.name])
        else:
            self.answer(200, self.described(self.name))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.is_allowed():
            return
        if "session" in self.query:
            self.take_part(body)
        elif self.query.get("uploadType") == "resumable":
            self.begin(json.loads(body)["name"])
        else:
            boundary = self.headers["Content-Type"].partition("boundary=")[2].strip('"').encode()
            _, about, data, _ = re.split(rb"(?:\n|^)--" + re.escape(boundary), body)
            name = json.loads(about.partition(b"\n\n")[2])["name"]
            self.keep(name, data.partition(b"\n\n")[2])

    def do_DELETE(self) -> None:
        if self.is_allowed():
            status = 404 if self.server.objects.pop(self.name, None) is None else 204
            self.answer(status, b"")

    def is_allowed(self) -> bool:
        """Read the request's place; whether there is such a bucket, and it may be used."""
        place = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(place.query).items()}
        found = re.search(r"/b/([^/]+)(/o)?(?:/(.+))?$", place.path)
        self.bucket_only = found is not None and not found[2]
        self.name = unquote(found[3]) if found and found[3] else None
        if self.server.refuses:
            self.refuse(self.server.refuses)
        elif found is None or found[1] != BUCKET:
            self.refuse(404)
        else:
            return True
        return False

    def listed(self) -> dict:
        """A page of the objects, and of the folders where a delimiter is given."""
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        names = sorted(name for name in self.server.objects if name.startswith(prefix))
        rest = [name.removeprefix(prefix) for name in names]
        folders = {prefix + r.partition("/")[0] + "/" for r in rest if delimiter and "/" in r}
        names = [n for n, r in zip(names, rest, strict=True) if not delimiter or "/" not in r]
        start = int(self.query.get("pageToken", 0))
        answer = {"kind": "storage#objects"}
        answer["items"] = [self.described(name) for name in names[start : start + PAGE]]
        if start == 0:
            answer["prefixes"] = sorted(folders)
        if names[start + PAGE :]:
            answer["nextPageToken"] = str(start + PAGE)
        return answer

    def described(self, name: str) -> dict:
        data = self.server.objects[name]
        return {"name": name, "size": str(len(data)), "etag": hashlib.md5(data).hexdigest()}

    def begin(self, name: str) -> None:
        """Open an upload in parts."""
        session = uuid.uuid4().hex
        self.server.sessions[session] = (name, b"")
        url = f"http://{self.headers['Host']}/upload/storage/v1/b/{BUCKET}/o?session={session}"
        self.answer(200, {}, {"Location": url})

    def take_part(self, body: bytes) -> None:
        session = self.query["session"]
        name, before = self.server.sessions[session]
        start, _, total = map(int, re.findall(r"\d+", self.headers["Content-Range"]))
        data = before[:start] + body
        self.server.sessions[session] = (name, data)
        if len(data) < total:
            self.answer(308, b"", {"Range": f"bytes=0-{len(data) - 1}"})
        else:
            self.keep(name, data)

    def keep(self, name: str, data: bytes) -> None:
        if self.query.get("ifGenerationMatch") == "0" and name in self.server.objects:
            self.refuse(412)
            return
        self.server.objects[name] = data
        self.answer(200, self.described(name))

    def answer_data(self, data: bytes) -> None:
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
            headers = {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
            self.answer(206, data[start : end + 1], headers)
        else:
            self.answer(200, data)

    def refuse(self, status: int) -> None:
        self.answer(status, {"error": {"code": status, "message": f"no ({status})"}})

    def answer(self, status: int, body: object, headers: dict | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def serving() -> Iterator[ThreadingHTTPServer]:
    """The server, with `objects`; with a status as `refuses` it answers nothing else."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Storage) as server:
        server.objects, server.sessions, server.refuses = {}, {}, None
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()
