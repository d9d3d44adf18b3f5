"""Ranges of a URL: the bytes that were asked for, in the caller's memory; everything else is left to a real client."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import pytest

from pipeline.stores import ranges as ranges_module
from pipeline.stores.ranges import Ranges

DATA = random.Random(0).randbytes(300_000)


class Server(ThreadingHTTPServer):
    """Serves DATA; `mood` is what it does wrong."""

    daemon_threads = True
    mood, connections = "", 0

    def get_request(self):
        self.connections += 1
        return super().get_request()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        mood = self.server.mood
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        body = DATA[first : last + 1]
        assert self.headers["Accept-Encoding"] == "identity"
        self.send_response({"whole": 200, "refused": 403, "moved": 302, "failing": 503}.get(mood, 206))
        if mood == "moved":
            self.send_header("Location", "/elsewhere")
        begin = first + (mood == "other range")
        self.send_header("Content-Range", f"bytes {begin}-{begin + len(body) - 1}/{len(DATA)}")
        self.send_header("Content-Length", str(len(body) + (mood == "too long")))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if mood == "cut" else body)
        self.close_connection = mood in ("cut", "too long", "last")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Keep the test's output clean."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/bucket/key?signed=yes"


def test_read_fills_the_buffer_over_one_connection(server, url):
    ranges, buffer = Ranges(), bytearray(100_000)
    for start in (0, 100_000, 150_001):
        assert ranges.read(url, start, memoryview(buffer)) == 100_000
        assert buffer == DATA[start : start + 100_000]
    assert server.connections == 1


def test_read_ends_with_the_file(url):
    buffer = bytearray(100_000)
    assert Ranges().read(url, 299_000, memoryview(buffer)) == 1000
    assert buffer[:1000] == DATA[299_000:]


@pytest.mark.parametrize("mood", ["whole", "refused", "moved", "failing", "other range", "too long", "cut"])
def test_read_leaves_the_unusual_to_others(server, url, mood):
    ranges, buffer = Ranges(), memoryview(bytearray(100_000))
    server.mood = mood
    assert ranges.read(url, 0, buffer) is None
    server.mood = ""
    assert ranges.read(url, 0, buffer) == 100_000  # over another connection
    assert buffer == DATA[:100_000]
    assert server.connections == 2


def test_read_after_the_server_hung_up(server, url):
    """A kept connection may be dead: that is one of the things that the caller's client deals with."""
    ranges, buffer = Ranges(), memoryview(bytearray(1000))
    server.mood = "last"
    assert [ranges.read(url, 0, buffer) for _ in range(3)] == [1000, None, 1000]


def test_read_of_nobody(url, server):
    server.server_close()
    assert Ranges().read(url.replace(str(server.server_port), "1"), 0, memoryview(bytearray(10))) is None


def test_read_knows_no_proxies(url, monkeypatch):
    """Where a proxy is set, the store's client goes through it; nothing may go around it."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    buffer = memoryview(bytearray(10))
    assert Ranges().read(url, 0, buffer) is None
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert Ranges().read(url, 0, buffer) == 10


class Dripping:
    """A server that sends a byte from time to time, after `start`; it never waits as long as a client's limit."""

    def __init__(self, start: bytes, pause_s: float) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/x"
        self.start, self.pause_s, self.ended = start, pause_s, Event()
        Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while not self.ended.is_set():
            with suppress(OSError):
                connected, _ = self.socket.accept()
                Thread(target=self._drip, args=(connected,), daemon=True).start()

    def _drip(self, connected: socket.socket) -> None:
        with suppress(OSError), connected:
            connected.recv(4096)
            connected.sendall(self.start)
            while not self.ended.wait(self.pause_s):
                connected.sendall(b"x")

    def close(self) -> None:
        """End it."""
        self.ended.set()
        self.socket.close()


BODY = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-999/1000\r\nContent-Length: 1000\r\n\r\n"


@pytest.mark.parametrize(
    "start", [BODY, b"HTTP/1.1 206 Partial Content\r\nX-", b""], ids=["body", "headers", "nothing"]
)
def test_read_ends_at_its_deadline_whatever_drips(start, monkeypatch):
    """Each byte renewed the limit: a read with a limit of 2 s lasted 30 s."""
    monkeypatch.setattr(ranges_module, "TIMEOUT_S", 1.0)
    server = Dripping(start, 0.1)
    try:
        started = time.monotonic()
        assert Ranges().read(server.url, 0, memoryview(bytearray(1000))) is None
        assert time.monotonic() - started < 3
    finally:
        server.close()


def test_a_deadline_grows_with_the_bytes():
    assert ranges_module.deadline_s(8 << 20) == ranges_module.TIMEOUT_S + 128


def test_deadlines_leave_no_threads(url):
    buffer, ranges = memoryview(bytearray(1000)), Ranges()
    before = threading.active_count()
    for _ in range(50):
        assert ranges.read(url, 0, buffer) == 1000
    assert threading.active_count() <= before + 2
