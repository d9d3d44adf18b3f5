"""A range of a URL (signed, public, or with one header), into the caller's memory, over connections kept open.

A fast path beside a store's own client: bytes go from the socket into the caller's memory without a copy. It reports no
errors: a proxy, a response that is not the range, a broken connection or a server slower than `deadline_s` allows gives
None, and unusual responses are handed to the store's own client, which retries and explains.

Not urllib3, which copies every piece: it is 30% slower with 16 threads and takes 1.7 times the CPU time, by
`python benchmarks/ranges.py`; see "HTTP range reads" in `docs/results.md`.
"""

from __future__ import annotations

import socket
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

if TYPE_CHECKING:
    import ssl

TIMEOUT_S = 60.0
"""Limit for each wait, and for a range without the time that its bytes may take."""
LEAST_BYTES_PER_S = 64 << 10
"""Slowest server that is waited for: a part of 8 MiB takes at most 188 s."""


def deadline_s(size: int) -> float:
    """Return the seconds within which a server must have sent this many bytes, however it spreads them."""
    return TIMEOUT_S + size / LEAST_BYTES_PER_S


class Ranges:
    """Connections by origin; any thread takes a free connection."""

    def __init__(self) -> None:
        self._free: dict[tuple[str, str], list[HTTPConnection]] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._free)

    def read(
        self, url: str, offset: int, buffer: memoryview, etag: str | None = None, authorization: str = ""
    ) -> int | None:
        """Fill the buffer from `offset` on; returns the number of bytes, fewer where the file ends, or None.

        With `etag`, None also for a file that has another. `authorization` is sent as the header of this name.
        """
        try:
            parts = urlsplit(url)
            if _proxied(parts):
                return None
            connection = self._take(parts)
        except (HTTPException, ValueError):  # a server may redirect to any text
            return None
        try:
            if connection.sock is None:
                connection.connect()
            with _closed_after(deadline_s(len(buffer)), connection.sock):
                count = _fill(connection, parts, (offset, buffer), etag, authorization)
        except (OSError, HTTPException, ValueError):
            count = None
        if count is None:
            connection.close()
        else:
            with self._lock:
                self._free.setdefault(_origin(parts), []).append(connection)
        return count

    def _take(self, parts: SplitResult) -> HTTPConnection:
        with self._lock, suppress(KeyError, IndexError):
            return self._free[_origin(parts)].pop()
        if parts.scheme == "https":
            return HTTPSConnection(parts.netloc, timeout=TIMEOUT_S, context=self._tls)
        return HTTPConnection(parts.netloc, timeout=TIMEOUT_S)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        import ssl  # late: folders and plain HTTP need none, and it takes a while to load

        return ssl.create_default_context()


@contextmanager
def _closed_after(seconds: float, connected: socket.socket) -> Iterator[None]:
    """End a connection that is in use for too long: each byte of a slow server renews the limit of a wait."""
    timer = threading.Timer(seconds, _end, [connected])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(connected: socket.socket) -> None:
    with suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # not that of TLS, which the reading thread uses


def _fill(
    connection: HTTPConnection, parts: SplitResult, into: tuple[int, memoryview], etag: str | None, authorization: str
) -> int | None:
    offset, buffer = into
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    headers = {"Authorization": authorization} if authorization else {}
    connection.request("GET", target, headers={"Range": f"bytes={offset}-{offset + len(buffer) - 1}", **headers})
    response = connection.getresponse()
    begins = (response.getheader("Content-Range") or "").startswith(f"bytes {offset}-")
    length = int(response.getheader("Content-Length") or -1)
    if etag is not None and (response.getheader("ETag") or "").strip('"') != etag.strip('"'):
        return None
    if response.status != 206 or not begins or not 0 <= length <= len(buffer) or response.getheader("Content-Encoding"):
        return None
    done = 0
    while done < length:
        count = response.readinto(buffer[done:length])
        if not count:
            return None
        done += count
    response.read()  # returns no bytes; it ends the response, so that the connection can be used again
    return done


def _origin(parts: SplitResult) -> tuple[str, str]:
    return parts.scheme, parts.netloc


def _proxied(parts: SplitResult) -> bool:
    return parts.scheme in getproxies() and not proxy_bypass(parts.hostname or "")


def _close(free: dict[tuple[str, str], list[HTTPConnection]]) -> None:
    for connections in free.values():
        for connection in connections:
            connection.close()
