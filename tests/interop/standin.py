"""A stand-in of the Hugging Face hub on the loopback: it serves files and takes commits."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "1" * 40


class Hub(BaseHTTPRequestHandler):
    """Serves `server.repositories`, {name: {path: bytes}}; takes commits into them."""

    def do_GET(self) -> None:
        self.answer_file(self.path.partition("?")[0])

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0].strip("/").split("/")
        if self.server.refuses and path[-2:-1] == ["commit"]:
            self.answer(403, {"error": self.server.refuses})
        elif path[:3] == ["api", "repos", "create"]:
            given = json.loads(body)
            name = "/".join(filter(None, (given.get("organization"), given["name"])))
            self.server.repositories.setdefault(name, {})
            self.answer(200, {"url": f"{self.server.url}/{name}", "name": name})
        elif path[-2:-1] == ["preupload"]:
            files = json.loads(body)["files"]
            rule = {"uploadMode": "regular", "shouldIgnore": False}
            kinds = [{"path": file["path"]} | rule for file in files]
            self.answer(200, {"files": kinds})
        elif path[-2:-1] == ["commit"]:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    held = self.server.repositories["/".join(path[2:4])]
                    held[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "header":
                    self.server.messages.append(entry["value"]["summary"])
            url = f"{self.server.url}/{'/'.join(path[2:4])}/commit/{COMMIT}"
            self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
        else:
            self.answer(200, {})

    def answer_file(self, path: str) -> None:
        words = path.strip("/").split("/")
        api = words[:2] == ["api", "models"]
        name = "/".join(words[2:4] if api else words[:2])
        files = self.server.repositories.get(name)
        if files is None:
            self.answer(404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        elif api and "tree" in words:
            listed = [
                {"type": "file", "path": p, "size": len(d), "oid": digest(d)}
                for p, d in files.items()
            ]
            self.answer(200, listed)
        elif api:
            if "revision" in words and words[-1] not in ("main", COMMIT):
                self.answer(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = [{"rfilename": path} for path in files]
            self.answer(200, {"id": name, "sha": COMMIT, "siblings": siblings, "private": False})
        else:
            data = files["/".join(words[4:])]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(data)}"'}
            self.answer(200, data, headers)

    def answer(self, status: int, body: object, headers: dict | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serving():
    """The server, with `repositories` and `messages`; its address is `server.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.messages, server.refuses = {}, [], ""
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def cache_layout(cache: Path, name: str, files: dict[str, bytes]) -> None:
    """A model as the hub's cache keeps it: blobs, and snapshots of links to them."""
    home = cache / ("models--" + name.replace("/", "--"))
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    (home / "blobs").mkdir()
    for path, data in files.items():
        (home / "blobs" / digest(data)).write_bytes(data)
        link = home / "snapshots" / COMMIT / path
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * len(link.relative_to(home).parent.parts)
        link.symlink_to(f"{up}blobs/{digest(data)}")
