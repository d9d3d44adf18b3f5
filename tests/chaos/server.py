"""An S3 server over the folder of a world, and its faults: it fails, is slow, is away, or lies, from one request on.

Objects are the files of the folder, so that what a reader sees there is what the server keeps. The server keeps
conditions (If-None-Match, If-Match) and takes every signature; `support.fault_proxy` breaks what it answers.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from email.utils import formatdate
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from chaos.world import World
from pipeline.files.atomic import write_atomic
from pipeline.stores.folder import FolderBucket
from support import fault_proxy

BUCKET = "chaos"
FOLDER = re.compile(r"(registry|shared)\b")
"""Folders that a server has in their place."""

ABSENT = b"<Error><Code>NoSuchKey</Code></Error>"
TAKEN = b"<Error><Code>PreconditionFailed</Code></Error>"
LISTED = """<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult><Name>{bucket}</Name><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"""
ENTRY = (
    "<Contents><Key>{key}</Key><LastModified>{date}</LastModified>"
    "<ETag>&quot;{tag}&quot;</ETag><Size>{size}</Size></Contents>"
)


@contextmanager
def running(folder: Path) -> Iterator[fault_proxy.Proxy]:
    """Serve a folder as the bucket `chaos`, behind a proxy without faults, until the block ends."""

    class Bound(Handler):
        bucket, lock = FolderBucket(folder), threading.Lock()

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients hang up on purpose."""

    server = Server(("127.0.0.1", 0), Bound)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        with fault_proxy.before(f"http://127.0.0.1:{server.server_port}") as proxy:
            yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environ(endpoint: str) -> dict[str, str]:
    """Return the variables by which a command finds the server."""
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    return {"AWS_ENDPOINT_URL": endpoint, **keys}


def command(words: Sequence[str], world: World) -> tuple[str, ...]:
    """Return a command with the server's addresses in place of the world's folders, if the world has a server."""
    if "AWS_ENDPOINT_URL" not in world.environ:
        return tuple(words)
    return tuple(f"s3://{BUCKET}/{word}" if FOLDER.match(word) else word for word in words)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    bucket: FolderBucket
    lock: threading.Lock
    protocol_version = "HTTP/1.1"

    @property
    def key(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix(f"/{BUCKET}").strip("/")

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            self.answer(200, self.listing(query.get("prefix", [""])[0]))
            return
        data = self.data()
        if data is None:
            self.answer(404, ABSENT)
            return
        headers = {"ETag": f'"{_tag(data)}"', "Last-Modified": formatdate(self.modified(), usegmt=True)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            self.answer(200, data, headers)
            return
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        self.answer(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            was = self.data()
            taken = self.headers.get("If-None-Match") == "*" and was is not None
            wanted = self.headers.get("If-Match")
            if taken or (wanted is not None and (was is None or wanted.strip('"') != _tag(was))):
                self.answer(412, TAKEN)
                return
            write_atomic(self.bucket.root / self.key, sent)
        self.answer(200, b"", {"ETag": f'"{_tag(sent)}"'})

    def do_DELETE(self) -> None:
        self.bucket.delete(self.key)
        self.answer(204, b"")

    def data(self) -> bytes | None:
        """The bytes of the object, or None."""
        with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return (self.bucket.root / self.key).read_bytes()
        return None

    def modified(self) -> float:
        with suppress(FileNotFoundError):
            return (self.bucket.root / self.key).stat().st_mtime
        return 0.0

    def listing(self, prefix: str) -> bytes:
        """Every object below a prefix, on one page."""
        entries = []
        for found in sorted(self.bucket.list(prefix.rpartition("/")[0]), key=lambda each: each.key):
            with suppress(FileNotFoundError):
                if found.key.startswith(prefix):
                    tag = _tag((self.bucket.root / found.key).read_bytes())
                    date = dt.datetime.fromtimestamp(found.modified, dt.UTC).isoformat()
                    entries.append(ENTRY.format(key=escape(found.key), date=date, tag=tag, size=found.size))
        return LISTED.format(bucket=BUCKET, entries="".join(entries)).encode()

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Quiet."""


def _tag(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
