"""Disturbances of a served artifact, for `soak.py --chaos SEED`: processes stand still or die, a disk is full."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from serving import MODULE, Server

STOPPED_S = 20.0
QUIET_S = 45.0
"""Mean seconds between two disturbances."""
READY_S = 300.0
TEMP_MIB = 96
"""Size of the server's temporary folder, if this user may mount one."""
ENDED_S = 30.0
"""Limit for the other processes of a server whose first process ended."""
ENGINE = re.compile(r"VLLM::(Engine|Worker)")


@dataclass(frozen=True)
class Use:
    """What the processes of a server hold: bytes (shared pages shared out), descriptors, threads, temporary files."""

    size_bytes: int
    descriptors: int
    threads: int
    files: int


@dataclass
class Served:
    """A server of an artifact that was pulled from a folder's registry, with a temporary folder; it can start again."""

    artifact: Path
    registry: Path
    work: Path
    server: Server = field(init=False)
    spans: list[tuple[float, float]] = field(default_factory=list)
    """Times in which there was no server, so that a request may fail."""
    outlived: int = 0
    """Processes that did not end after another process of their server was killed."""

    def start(self, prompt: str) -> None:
        """Start the server, on the port that it had before, and wait for its first token."""
        port = self.server.port if hasattr(self, "server") else None
        self.server = Server(
            [*MODULE, "--model", str(self.artifact)], self.work / "log", port=port, TMPDIR=str(self.work / "tmp")
        )
        self.server.first_token(prompt)

    def processes(self) -> list[Path]:
        """The folders in /proc of the server's processes."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, ValueError):
                if os.getpgid(int(folder.name)) == self.server.process.pid:
                    found.append(folder)
        return found

    def engines(self) -> list[int]:
        """The processes that run graphs, or the first process if it runs them itself."""
        named = {int(each.name): (each / "comm").read_text(encoding="utf-8") for each in self.processes()}
        return [pid for pid, name in named.items() if ENGINE.search(name)] or [self.server.process.pid]

    def use(self) -> Use:
        """Return what the server holds now."""
        size = descriptors = threads = 0
        for folder in self.processes():
            with suppress(OSError, ValueError):
                found = re.search(r"^Pss:\s+(\d+) kB", (folder / "smaps_rollup").read_text(encoding="utf-8"), re.M)
                size += int(found[1]) * 1024 if found else 0
                descriptors += len(list((folder / "fd").iterdir()))
                threads += len(list((folder / "task").iterdir()))
        return Use(size, descriptors, threads, sum(path.is_file() for path in (self.work / "tmp").rglob("*")))

    def may_fail(self, began: float, ended: float) -> bool:
        """Return whether a request that took so long met a moment without a server."""
        return any(began <= until and ended >= since for since, until in self.spans)


@contextmanager
def small_temp(work: Path) -> Iterator[bool]:
    """A temporary folder that can be filled; False if this user may not mount one."""
    folder = work / "tmp"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={TEMP_MIB}m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)


def stand_still(served: Served, chance: random.Random) -> str:
    """All processes, or an engine's, stop for 20 s, as a virtual machine that is moved: nothing may fail."""
    pids = served.engines() if chance.random() < 0.5 else [int(each.name) for each in served.processes()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(STOPPED_S)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    return f"{len(pids)} processes stood still for {STOPPED_S:.0f} s"


def fill_disk(served: Served, chance: random.Random) -> str:
    """The temporary folder is full for a while: nothing may fail."""
    path = served.work / "tmp" / "full"
    with suppress(OSError), path.open("wb") as file:
        while True:
            file.write(bytes(1 << 20))
            file.flush()
    time.sleep(chance.uniform(5, STOPPED_S))
    size = path.stat().st_size
    path.unlink()
    return f"the temporary folder was full ({size / 1e6:.0f} MB)"


def lose_registry(served: Served, chance: random.Random) -> str:
    """The registry that the artifact came from is away for a while: nothing may fail."""
    away = served.registry.with_suffix(".away")
    served.registry.rename(away)
    time.sleep(chance.uniform(5, STOPPED_S))
    away.rename(served.registry)
    return "the registry was away"


def kill(served: Served, pid: int, what: str, prompt: str) -> str:
    """A process dies: requests fail, all processes of the server end by themselves, and it is started again."""
    since = time.monotonic()
    served.spans.append((since, float("inf")))
    os.kill(pid, signal.SIGKILL)
    served.server.process.wait(READY_S)
    status = served.server.process.returncode
    while (survivors := served.processes()) and time.monotonic() - since < ENDED_S:
        time.sleep(0.2)
    ended = time.monotonic() - since
    left = f", {len(survivors)} processes left" if survivors else ""
    if survivors:
        served.outlived += len(survivors)
        os.killpg(served.server.process.pid, signal.SIGKILL)
    served.start(prompt)
    served.spans[-1] = (since, time.monotonic())
    return f"{what} was killed: all ended after {ended:.0f} s with {status}{left}, answers again after " \
           f"{time.monotonic() - since:.0f} s"  # fmt: skip


def disturb(served: Served, seed: int, ends: float, prompt: str, *, has_small_disk: bool) -> list[str]:
    """Disturb a server until a moment; first, an engine and the server are killed. Returns what was done, in order."""
    chance, done = random.Random(seed), list[str]()
    kinds = [stand_still, lose_registry, *([fill_disk] if has_small_disk else [])]
    time.sleep(QUIET_S)
    done.append(kill(served, chance.choice(served.engines()), "an engine", prompt))
    print(done[-1], flush=True)
    time.sleep(QUIET_S)
    done.append(kill(served, served.server.process.pid, "the server", prompt))
    print(done[-1], flush=True)
    while time.monotonic() + QUIET_S < ends:
        time.sleep(min(chance.expovariate(1 / QUIET_S), 4 * QUIET_S))
        done.append(chance.choice(kinds)(served, chance))
        print(done[-1], flush=True)
    return done


def copied_registry(artifact: Path, work: Path) -> tuple[Path, Path]:
    """Publish an artifact to a folder and pull it from there; returns the pulled artifact and the registry."""
    from pipeline.registry.publish import PublishSettings, publish
    from pipeline.registry.pull import pull

    registry = work / "registry"
    release = publish(artifact, str(registry), options=PublishSettings())
    pulled = pull(f"{registry}/{release.name}@{release.version}", work / "artifact", cache=work / "cache")
    shutil.rmtree(work / "cache" / "blobs", ignore_errors=True)  # links of what was pulled
    return pulled, registry
