"""Reading ranges over HTTP: `pipeline.stores.ranges` against urllib3 and against a bare socket, in turns, on loopback.

    python benchmarks/ranges.py [--megabytes 1024] [--threads 1 16] [--rounds 9] [--part-megabytes 8]

A server process sends parts of one file of random bytes with `sendfile`, from the page cache. Each reader fetches the
whole file in parts into memory that is used again, as a pull does. Rates are of wall time, processor seconds are of the
reading process alone. The bare socket parses nothing and checks nothing: it is the limit of this machine.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import urllib3

sys.path[:0] = [str(Path(__file__).parent.parent)]
MIB = 1 << 20
READ_BYTES = MIB
TIMEOUT_S = 60.0
Read = Callable[[str, int, memoryview], int | None]


class Handler(BaseHTTPRequestHandler):
    """Sends the range that is asked for of the file that the command line names."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    file = -1

    def do_GET(self) -> None:
        size = os.fstat(self.file).st_size
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        last = min(last, size - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.flush()
        while first <= last:
            first += os.sendfile(self.connection.fileno(), self.file, first, last + 1 - first)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def serve(path: Path) -> None:
    """Serve the file until killed; the port is the first line of the output."""
    Handler.file = os.open(path, os.O_RDONLY)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


@contextmanager
def served(path: Path) -> Iterator[str]:
    """The file's URL at a server in another process."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(path)],
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/file?signed=yes"
    finally:
        process.kill()
        process.wait()


def our_read() -> Read:
    from pipeline.stores.ranges import Ranges

    return Ranges().read


def urllib3_read() -> Read:
    """The same promises as ours, by urllib3's public functions: no retries, no redirects, the range or None."""
    pool = urllib3.PoolManager(maxsize=64, retries=False, timeout=TIMEOUT_S)

    def read(url: str, offset: int, buffer: memoryview) -> int | None:
        headers = {"Range": f"bytes={offset}-{offset + len(buffer) - 1}", "Accept-Encoding": "identity"}
        try:
            response = pool.request(
                "GET", url, headers=headers, preload_content=False, decode_content=False, redirect=False
            )
            length = int(response.headers.get("Content-Length") or -1)
            begins = (response.headers.get("Content-Range") or "").startswith(f"bytes {offset}-")
            if response.status != 206 or not begins or not 0 <= length <= len(buffer):
                response.close()
                return None
            done = 0
            while done < length:
                piece = response.read(min(READ_BYTES, length - done))
                buffer[done : done + len(piece)] = piece
                done += len(piece)
        except (urllib3.exceptions.HTTPError, OSError, ValueError):
            return None
        response.release_conn()
        return done

    return read


def bare_read() -> Read:
    """A socket for each thread, whose response is taken to be what was asked for."""
    local = threading.local()

    def read(url: str, offset: int, buffer: memoryview) -> int | None:
        parts = urlsplit(url)
        if not hasattr(local, "socket"):
            local.socket = socket.create_connection((parts.hostname, parts.port))
        last = offset + len(buffer) - 1
        local.socket.sendall(
            f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nRange: bytes={offset}-{last}\r\n\r\n".encode()
        )
        head = b""
        while b"\r\n\r\n" not in head:
            head += local.socket.recv(1024)
        body = head.partition(b"\r\n\r\n")[2]
        buffer[: len(body)] = body
        done = len(body)
        while done < len(buffer):
            done += local.socket.recv_into(buffer[done:])
        return done

    return read


READERS: dict[str, Callable[[], Read]] = {"ours": our_read, "urllib3": urllib3_read, "bare socket": bare_read}


def run(read: Read, url: str, size: int, threads: int, part_bytes: int) -> tuple[float, float]:
    """Seconds and processor seconds of reading the whole file."""
    memory = threading.local()

    def fetch(start: int) -> None:
        if not hasattr(memory, "buffer"):
            memory.buffer = memoryview(bytearray(part_bytes))
        buffer = memory.buffer[: size - start]
        if read(url, start, buffer) != len(buffer):
            raise SystemExit(f"a short read at {start}")

    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(fetch, range(0, size, part_bytes)):
            pass
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def check(url: str, path: Path) -> None:
    """Every reader returns the file's bytes."""
    size = path.stat().st_size
    offset, buffer = size // 3, memoryview(bytearray(3_000_001))
    with path.open("rb") as file:
        file.seek(offset)
        expected = file.read(len(buffer))
    for name, make in READERS.items():
        if make()(url, offset, buffer) != len(buffer) or buffer != expected:
            raise SystemExit(f"{name}: wrong bytes")


def measure(url: str, size: int, threads: int, part_bytes: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Runs of each reader, each on fresh connections; the order rotates from round to round."""
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in READERS}
    names = list(READERS)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            runs[name].append(run(READERS[name](), url, size, threads, part_bytes))
    return runs


def show(runs: dict[str, list[tuple[float, float]]], size: int, threads: int) -> None:
    """A line for each reader, and the ratio of ours to urllib3 within each round."""
    for name, rows in runs.items():
        rates = [size / 1e6 / seconds for seconds, _ in rows]
        spent = statistics.median(processor for _, processor in rows)
        print(f"{threads:2} threads  {name:12} {statistics.median(rates):6.0f} MB/s "
              f"({min(rates):.0f} to {max(rates):.0f})  {spent:.2f} CPU s")  # fmt: skip
    pairs = list(zip(runs["ours"], runs["urllib3"], strict=True))
    speed = statistics.median(theirs[0] / ours[0] for ours, theirs in pairs)
    processor = statistics.median(theirs[1] / ours[1] for ours, theirs in pairs)
    print(f"{threads:2} threads  ours / urllib3: speed {speed:.2f}x, CPU seconds {1 / processor:.2f}x "
          f"(medians of {len(pairs)} rounds)", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--part-megabytes", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
        return
    with tempfile.NamedTemporaryFile(prefix="tandem-ranges-") as file:
        source = random.Random(0)
        for _ in range(given.megabytes):
            file.write(source.randbytes(MIB))
        file.flush()
        size, part_bytes = given.megabytes * MIB, given.part_megabytes * MIB
        with served(Path(file.name)) as url:
            check(url, Path(file.name))
            for threads in given.threads:
                show(measure(url, size, threads, part_bytes, given.rounds), size, threads)


if __name__ == "__main__":
    main()
