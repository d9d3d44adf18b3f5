"""A local Hub: the few routes that reading a model needs, as huggingface_hub 2.4 calls them, over plain HTTP.

Repositories are folders in memory. Faults can be set; every request is logged.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = ".safetensors"
API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+?)(/revision/(?P<revision>.+))?")
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Repo:
    """One model repository: revisions by name or commit, and the files of its only commit."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    commit: str = ""

    def __post_init__(self) -> None:
        digest = hashlib.sha1(usedforsecurity=False)
        for name, data in sorted(self.files.items()):
            digest.update(name.encode() + data)
        self.commit = digest.hexdigest()

    def has(self, revision: str) -> bool:
        return revision in ("main", "v1.0", self.commit)


@dataclass
class FakeHub:
    """State: `corrupt` names files that are changed on the way; `failing` answers every request with 503."""

    token: str = "hf_good"
    repos: dict[str, Repo] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    failing: bool = False
    log: list[str] = field(default_factory=list)
    endpoint: str = ""


@contextmanager
def running() -> Iterator[FakeHub]:
    """Serve on a free port of the loopback interface until the block ends."""
    hub = FakeHub()

    class Bound(Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """Routes: model info with blobs, and resolve (HEAD and GET)."""

    state: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.route(body=False)

    def do_GET(self) -> None:
        self.route(body=True)

    def route(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.log.append(f"{self.command} {path}")
        api, resolve = API.fullmatch(path), RESOLVE.fullmatch(path)
        match = api or resolve
        if self.state.failing:
            self.answer(503, b"{}", body=body)
        elif match is None:
            self.answer(404, b"{}", body=body)
        elif (repo := self.allowed(match["repo"], body=body)) is not None:
            if not repo.has(match["revision"] or "main"):
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body=body)
            elif api:
                self.answer(200, json.dumps(info(match["repo"], repo)).encode(), body=body)
            else:
                self.send_file(repo, match["path"], body=body)

    def allowed(self, name: str, *, body: bool) -> Repo | None:
        """The repository, if it is there and the caller may read it; otherwise the answer has been sent."""
        given = self.headers.get("Authorization")
        if given is not None and given != f"Bearer {self.state.token}":
            message = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self.answer(401, b"{}", message, body=body)
            return None
        repo = self.state.repos.get(name)
        if repo is None or (repo.private and given is None):
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)
            return None
        if repo.gated and given is None:
            self.answer(401, b"{}", {"X-Error-Code": "GatedRepo"}, body=body)
            return None
        return repo

    def send_file(self, repo: Repo, path: str, *, body: bool) -> None:
        if path not in repo.files:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body=body)
            return
        data = repo.files[path]
        headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{blob_id(data)}"', "Accept-Ranges": "bytes"}
        if path.endswith(LARGE):
            sha256 = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data)), "ETag": f'"{sha256}"'}
        if path in self.state.corrupt:
            data = bytes([data[0] ^ 1]) + data[1:]
        status = 200
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if ranged:
            first, last = int(ranged[1]), int(ranged[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            status, data = 206, data[first : last + 1]
        self.answer(status, data, headers, body=body)

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None, *, body: bool) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Keep the test's output clean."""


def blob_id(data: bytes) -> str:
    """git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def info(name: str, repo: Repo) -> dict[str, Any]:
    """Model info as the API answers it with `blobs=true`."""
    siblings = []
    for path, data in repo.files.items():
        entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": blob_id(data)}
        if path.endswith(LARGE):
            entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        siblings.append(entry)
    return {"id": name, "sha": repo.commit, "private": repo.private, "siblings": siblings, "tags": []}
