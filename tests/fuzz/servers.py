"""Targets of servers: a Hub, an S3 server, and a server of ranges whose answer is the input, byte for byte."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from pipeline.errors import TandemError
from pipeline.sources.hub import Hub as HubSource
from pipeline.stores import hub_api, s3
from pipeline.stores.base import Blob
from pipeline.stores.hub import HubStore
from pipeline.stores.objects import ObjectStore
from pipeline.stores.ranges import Ranges

COMMIT = "0123456789abcdef0123456789abcdef01234567"
READ_BYTES = 1 << 16


class AnsweringServer:
    """A server on the loopback interface that gives one answer to every request, and closes the connection."""

    def __init__(self) -> None:
        self.answer = b""
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self.socket.accept()
            with connection, suppress(OSError):
                connection.settimeout(5)
                self._receive(connection)
                connection.sendall(self.answer)
                connection.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _receive(connection: socket.socket) -> None:
        """Read a request to its end: a connection that is closed with unread bytes is reset."""
        data = b""
        while b"\r\n\r\n" not in data and (piece := connection.recv(READ_BYTES)):
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        stated = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        left = int(stated[0].partition(b":")[2]) - len(body) if stated else 0
        while left > 0 and (piece := connection.recv(READ_BYTES)):
            left -= len(piece)


def any_of(*calls: Callable[[], object]) -> None:
    """Make every call; raise a documented error in the end if none succeeds."""
    failures = []
    for call in calls:
        try:
            call()
        except TandemError as error:
            failures.append(error)
    if len(failures) == len(calls):
        raise failures[0]


@contextmanager
def impatient() -> Iterator[None]:
    """Send each request to a Hub once, without a wait and without a line in the log."""
    from huggingface_hub.utils import _http

    defaults = _http.http_backoff.__kwdefaults__
    waiting = SimpleNamespace(sleep=lambda _: None, monotonic=time.monotonic, time=time.time)
    with ExitStack() as stack:
        for patched in (
            patch.object(hub_api, "TRIES", 1),
            patch.object(hub_api, "time", waiting),
            patch.object(_http, "time", waiting),
            patch.dict(defaults, {"max_retries": 0}),
            patch.object(logging.getLogger("huggingface_hub"), "disabled", True),
            patch.object(_http.logger, "disabled", True),
        ):
            stack.enter_context(patched)
        yield


def hub_target(folder: Path) -> Callable[[bytes], object]:
    """What a registry and a source ask of a Hub."""
    server = AnsweringServer()
    hub = hub_api.Hub(server.url, "hf_x")
    store = HubStore("org", None, hub)
    source = HubSource(server.url, "hf_x", folder)

    def read(data: bytes) -> None:
        server.answer = data
        hub.ranges, hub._located = Ranges(), {}
        with impatient():
            ask()

    def ask() -> None:
        any_of(
            lambda: hub.tree("org/name", "main"),
            lambda: hub.read_small("org/name", COMMIT, "manifest.json"),
            lambda: hub.read("org/name", COMMIT, "weights", 0, memoryview(bytearray(10))),
            lambda: store.versions("name"),
            lambda: store.read_alias("name", "prod"),
            lambda: source.commit("org/name", 5),
            lambda: source.fetch("org/name", folder, lambda *_: None),
            store.names,
        )

    return read


def s3_target(folder: Path) -> Callable[[bytes], object]:
    """What a registry asks of an S3 server."""
    server = AnsweringServer()
    settings = {
        "AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }  # fmt: skip
    before = dict(os.environ)
    os.environ.update(settings)
    retries, s3.RETRIES = s3.RETRIES, 0
    try:
        bucket = s3.S3Bucket("bucket", "prefix")
    finally:
        s3.RETRIES = retries
        os.environ.clear()
        os.environ.update(before)
    store = ObjectStore(bucket)

    def read(data: bytes) -> None:
        server.answer = data
        bucket.ranges, bucket.checked = Ranges(), False
        os.environ["AWS_SKIP_SIGNATURE"] = "1"
        any_of(
            lambda: bucket.get("key", 1 << 16),
            lambda: list(bucket.list("blobs")),
            lambda: bucket.size("key"),
            lambda: store.read_blob(Blob("name", "1", "file", "ab" * 32, 10), 0, memoryview(bytearray(10))),
            lambda: store.read_alias("name", "prod"),
            lambda: bucket.swap("key", b"data", '"tag"'),
            bucket.check,
        )
        del os.environ["AWS_SKIP_SIGNATURE"]

    return read


def ranges_target(folder: Path) -> Callable[[bytes], object]:
    """A range of a signed URL."""
    server = AnsweringServer()

    def read(data: bytes) -> None:
        server.answer = data
        buffer = bytearray(10)
        count = Ranges().read(f"{server.url}/file", 0, memoryview(buffer))
        if count is None:
            raise TandemError("not the range")
        assert 0 <= count <= len(buffer)

    return read
