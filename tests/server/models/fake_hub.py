"""A local server with as much of the hub's HTTP protocol as fetching models needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

CHUNK = 10 * 2**20
"""Bytes that the hub's client writes at once; it resumes after the last whole chunk."""

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repository, and the requests for it.

    Attributes:
        folder: folder of its files.
        repository: its name.
        token: that requests must carry; None for none.
        cut: path of a file whose first answer ends after ``CHUNK`` bytes.
        sent: bytes sent, by file.
    """

    folder: Path
    repository: str = "org/tiny"
    token: str | None = None
    cut: str | None = None
    sent: dict[str, int] = field(default_factory=dict[str, int])
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub, path = self.hub, unquote(self.path.partition("?")[0])
        asked = re.fullmatch(
            r"(/api/models)?/(?P<repository>[^/]+/[^/]+)/(?P<kind>revision|tree|resolve)"
            r"/(?P<revision>[^/]+)(/(?P<file>.+))?",
            path,
        )
        if asked is None or asked["repository"] != hub.repository:
            self._refuse(401, "RepoNotFound")
        elif hub.token and self.headers["authorization"] != f"Bearer {hub.token}":
            self._refuse(403, "GatedRepo")
        elif asked["revision"] not in ("main", "v1", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif asked["kind"] == "revision":
            self._json({"id": hub.repository, "sha": COMMIT, "siblings": []})
        elif asked["kind"] == "tree":
            self._json([_entry(hub.folder, file) for file in _files(hub.folder)])
        elif not (hub.folder / asked["file"]).is_file():
            self._refuse(404, "EntryNotFound")
        else:
            self._file(asked["file"], body=body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("x-error-code", code)
        self.send_header("content-length", "0")
        self.end_headers()

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, name: str, *, body: bool) -> None:
        data = (self.hub.folder / name).read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        first = int(span[1]) if span else 0
        part = data[first : int(span[2]) + 1] if span and span[2] else data[first:]
        self.send_response(206 if span else 200)
        self.send_header("etag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("x-repo-commit", COMMIT)
        self.send_header("accept-ranges", "bytes")
        self.send_header("content-length", str(len(part)))
        if span:
            end = first + len(part) - 1
            self.send_header("content-range", f"bytes {first}-{end}/{len(data)}")
        self.end_headers()
        if not body:
            return
        if self.hub.cut == name:
            self.hub.cut, part = None, part[:CHUNK]
            self.close_connection = True
        self.hub.sent[name] = self.hub.sent.get(name, 0) + len(part)
        self.wfile.write(part)


def _files(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def _entry(folder: Path, name: str) -> dict[str, Any]:
    size = (folder / name).stat().st_size
    return {"type": "file", "path": name, "size": size, "oid": "0" * 40}


@contextmanager
def serving(hub: Hub) -> Generator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
