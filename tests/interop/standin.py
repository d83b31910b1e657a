"""A stand-in of the Hugging Face hub on the loopback: it serves files and takes commits."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import huggingface_hub
import pytest

COMMIT = "1" * 40


class Hub(BaseHTTPRequestHandler):
    """Serves `server.repositories`, {name: {path: bytes}}; takes commits into them.

    Those of data are named "datasets/OWNER/NAME". Of `server.gated` nothing is handed out.
    """

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
        words = unquote(path).strip("/").split("/")
        api = words[0] == "api"
        words = words[1:] if api else words
        kind = words.pop(0) if words[0] in ("models", "datasets") else "models"
        name, rest = "/".join(words[:2]), words[2:]
        files = self.server.repositories.get(name if kind == "models" else f"datasets/{name}")
        if files is None:
            status = 404 if "authorization" in self.headers else 401  # as the hub does
            self.answer(status, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        elif api and rest[:1] == ["tree"]:
            recursive = "recursive=true" in self.path.lower()
            entries = tree(files, "/".join(rest[2:]), recursive)
            if entries is None:
                self.answer(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
            else:
                self.answer(200, entries)
        elif api:
            if "revision" in rest and rest[-1] not in ("main", COMMIT):
                self.answer(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = [{"rfilename": path} for path in files]
            self.answer(200, {"id": name, "sha": COMMIT, "siblings": siblings, "private": False})
        elif self.server.gated:
            self.answer(403, {"error": "ask for access"}, {"X-Error-Code": "GatedRepo"})
        elif (data := files.get("/".join(rest[2:]))) is None:
            self.answer(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer_data(data)

    def answer_data(self, data: bytes) -> None:
        """All of a file, or the range of bytes that is asked for."""
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(data)}"'}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            self.answer(206, data[start : end + 1], headers)
        else:
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


def tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict] | None:
    """The entries of a folder as the hub lists them; None: there is no such folder."""
    prefix = f"{folder}/" if folder else ""
    below = {path: data for path, data in files.items() if path.startswith(prefix)}
    if folder and not below:
        return None
    entries = {}
    for path, data in below.items():
        for parent in list(PurePosixPath(path).parents)[:-1]:
            if str(parent).startswith(prefix):
                oid = digest(str(parent).encode())
                entries[str(parent)] = {"type": "directory", "path": str(parent), "oid": oid}
        entries[path] = {"type": "file", "path": path, "size": len(data), "oid": digest(data)}
    direct = [entry for path, entry in entries.items() if "/" not in path.removeprefix(prefix)]
    return list(entries.values()) if recursive else direct


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def lead_to(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub, in child processes too, ask this server in place of the hub."""
    constants = huggingface_hub.constants
    for offline in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setattr(constants, offline, offline != "HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setenv("HF_ENDPOINT", url)


@contextmanager
def serving():
    """The server, with `repositories` and `messages`; its address is `server.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.messages, server.refuses = {}, [], ""
    server.gated = False
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
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
