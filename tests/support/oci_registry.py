"""Real OCI registries on the loopback interface: Debian's docker-registry 2.8, and go-containerregistry's two ways.

Only the last has a route for referrers. None has writes on a condition.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.s3_server import free_ports

START_S = 30
CONFIG = """\
version: 0.1
log: {{level: warn}}
storage:
  filesystem: {{rootdirectory: {folder}/data}}
http: {{addr: "127.0.0.1:{port}"}}
{auth}
"""
HTPASSWD = """\
auth:
  htpasswd: {{realm: tests, path: {path}}}
"""


@dataclass
class Registry:
    """Where it is."""

    host: str
    folder: Path


PROGRAMS = {
    "distribution": ("docker-registry", "apt-get install docker-registry"),
    "crane": ("crane", "go install github.com/google/go-containerregistry/cmd/crane@latest"),
    "referrers": ("referrers-registry", "in tests/support/referrers: go mod tidy; go build -o referrers-registry"),
}
"""Make of a registry -> its program, and how to get it."""


@contextmanager
def running(kind: str, auth: str = "") -> Iterator[Registry]:
    """Start, wait until it answers, stop. `auth`: a section of Docker's registry's configuration."""
    folder = Path(tempfile.mkdtemp(prefix="tandem-oci-"))
    port = free_ports(1)[0]
    command = _command(kind, folder, port, auth)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait(f"http://127.0.0.1:{port}/v2/", process, folder)
        yield Registry(f"127.0.0.1:{port}", folder)
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        if process.poll() is None:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _command(kind: str, folder: Path, port: int, auth: str) -> list[str]:
    name, how = PROGRAMS[kind]
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not on PATH: {how}")
    (folder / "data").mkdir()
    if kind != "distribution":
        verbs = ["registry", "serve"] if kind == "crane" else []
        return [program, *verbs, "--address", f"127.0.0.1:{port}", "--disk", str(folder / "data")]
    (folder / "config.yml").write_text(CONFIG.format(folder=folder, port=port, auth=auth))
    return [program, "serve", str(folder / "config.yml")]


def _wait(url: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        if process.poll() is not None:
            break
        with suppress(OSError):
            try:
                urllib.request.urlopen(url, timeout=2).close()
            except urllib.error.HTTPError:
                return
            return
        time.sleep(0.05)
    raise RuntimeError(f"the registry did not start: {(folder / 'log').read_text()[-2000:]}")
