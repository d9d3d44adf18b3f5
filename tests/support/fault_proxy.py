"""An HTTP proxy before a real server that breaks what it is told to: statuses, cut and wrong bodies, delays, resets."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

PIECE_BYTES = 64 << 10


@dataclass
class Fault:
    """What happens to requests whose `METHOD /path` matches, `times` times after the first `skip`.

    `kind`: a status ("503"), "cut" (half of the body, then a reset), "short" (half of the body, as if it were whole),
    "wrong" (a flipped bit, at a share of the body), "slow" (seconds), "reset" (no answer), or "lost" (the request is
    carried out, but its answer never comes).
    """

    pattern: str
    kind: str
    times: int = 1
    skip: int = 0
    body: bytes = b""
    seconds: float = 0.2
    at: float = 0.0


@dataclass
class Proxy:
    """Where it is, what it breaks, and what it saw; `met`: the requests that met a fault.

    `dropped_headers` of requests (small letters) do not pass.
    """

    upstream: str
    endpoint: str = ""
    faults: list[Fault] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    broken: int = 0
    met: list[str] = field(default_factory=list)
    sent_bytes: int = 0
    dropped_headers: tuple[str, ...] = ()
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault_for(self, line: str) -> Fault | None:
        with self.lock:
            self.log.append(line)
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, line):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    self.broken += 1
                    self.met.append(f"{fault.kind} for request {len(self.log)}: {line}")
                    return fault
        return None


@contextmanager
def before(upstream: str) -> Iterator[Proxy]:
    """A proxy before a server, until the block ends."""
    proxy = Proxy(upstream)

    class Bound(Handler):
        state = proxy

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients hang up, and are killed, on purpose."""

    server = Server(("127.0.0.1", 0), Bound)
    proxy.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """One connection of a client, with a connection of its own to the server for each request."""

    state: Proxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        fault = self.state.fault_for(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault is not None and fault.kind == "reset":
            self.hang_up()
        elif fault is not None and fault.kind.isdigit():
            self.answer(int(fault.kind), fault.body)
        else:
            self.forward(body, fault)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def forward(self, body: bytes, fault: Fault | None) -> None:
        connection = HTTPConnection(urlsplit(self.state.upstream).netloc, timeout=60)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in self.state.dropped_headers}
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            with self.state.lock:
                self.state.sent_bytes += len(body)
            if fault is not None and fault.kind == "lost":
                answer.read()
                self.hang_up()
                return
            if fault is not None and fault.kind == "slow":
                time.sleep(fault.seconds)
            self.pass_on(answer, fault)
        finally:
            connection.close()

    def pass_on(self, answer: HTTPResponse, fault: Fault | None) -> None:
        length = answer.getheader("Content-Length")
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        if length is None and self.command != "HEAD":
            data = answer.read()
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return
        is_short = fault is not None and fault.kind == "short"
        length = str(int(length or 0) // 2) if is_short else length
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        left = int(length or 0) if self.command != "HEAD" else 0
        flips = max(1, int(left * (1 - fault.at))) if fault is not None and fault.kind == "wrong" else -1
        stop = left // 2 if fault is not None and fault.kind == "cut" else -1
        while left and (piece := answer.read(min(left, PIECE_BYTES))):
            if left >= flips > left - len(piece):
                at = left - flips
                piece = piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
            if left - len(piece) < stop:
                self.wfile.write(piece[: len(piece) // 2])
                self.hang_up()
                return
            self.wfile.write(piece)
            left -= len(piece)

    def answer(self, status: int, body: bytes) -> None:
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Keep the test's output clean."""
