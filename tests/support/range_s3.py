"""An S3 server that lists and sends ranges of objects; it takes every signature. `ranges` logs what it sent."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Bucket:
    """Objects by key, without the bucket's name; key, first byte and number of bytes of each answer."""

    objects: dict[str, bytes] = field(default_factory=dict)
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    endpoint: str = ""


@contextmanager
def running() -> Iterator[Bucket]:
    """Serve on a free port of the loopback interface until the block ends."""
    bucket = Bucket()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            query, key = parse_qs(parts.query), unquote(parts.path).split("/", 2)[-1]
            if "list-type" in query:
                self.answer(200, _listing(bucket.objects, query["prefix"][0]), {})
            elif key not in bucket.objects:
                self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>", {})
            else:
                self.send_object(key, bucket.objects[key])

        def send_object(self, key: str, data: bytes) -> None:
            if self.headers.get("If-Match", _etag(data)) != _etag(data):
                self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>", {})
                return
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first, last = (int(asked[1]), min(int(asked[2]), len(data) - 1)) if asked else (0, len(data) - 1)
            headers = {"ETag": _etag(data), "Last-Modified": "Tue, 01 Sep 2026 00:00:00 GMT"}
            if asked:
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            bucket.ranges.append((key, first, last + 1 - first))
            self.answer(206 if asked else 200, data[first : last + 1], headers)

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    bucket.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def _listing(objects: dict[str, bytes], prefix: str) -> bytes:
    entries = "".join(
        f"<Contents><Key>{key}</Key><LastModified>2026-09-01T00:00:00.000Z</LastModified>"
        f"<ETag>{_etag(data).replace(chr(34), '&quot;')}</ETag><Size>{len(data)}</Size></Contents>"
        for key, data in sorted(objects.items())
        if key.startswith(prefix)
    )
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()
