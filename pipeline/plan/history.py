"""What builds on this machine took, beside the cache: one small file for each build. Imports no torch.

    <cache>/history/<time>-<random>.json

Only builds of a processor of this kind with as many cores count, so a cache on a shared disk may hold several.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from pydantic import Field, ValidationError

from pipeline.files.atomic import disk_errors, write_atomic
from pipeline.files.unfinished import remove
from pipeline.records import Record

KEPT = 100
"""Builds that are kept; older files are removed."""
LIMIT_BYTES = 4 << 20


class CompiledGraph(Record):
    """The cost of one graph that was compiled."""

    graph: str = Field(description="digest of the graph's inputs: pair, shapes, backend settings")
    kind: str = Field(description="phase and sampling")
    estimated_s: float = Field(description="time by the constants of `plan/estimates.py`")
    seconds: float = Field(description="time in a worker")
    memory_bytes: int = Field(description="peak memory of the worker and its compilers")
    size_bytes: int = Field(description="size of the compiled graph")


class PastBuild(Record):
    """One build: its machine, its plan, and the times of its stages."""

    machine: str = Field(description="processor and cores")
    plan: str = Field(description="digest of what decides the work of the stages")
    cost: str = Field(description="kind of compiler, as in `COMPILE_COSTS`")
    estimates: int = Field(description="version of the constants of `plan/estimates.py`")
    workers: int = Field(description="graphs compiled at a time")
    graphs: tuple[CompiledGraph, ...] = Field(description="the graphs that were compiled")
    stages: dict[str, float] = Field(description="seconds of each stage that ran")
    estimated: dict[str, float] = Field(description="seconds of each stage by constants")
    gates_memory_bytes: int = Field(default=0, description="peak memory of the process that ran the gates")


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return this machine's processor and the cores that a build may use."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    named = facts.get("model name") or facts.get("CPU part") or "unknown processor"
    kind = "/".join(facts.get(name, "") for name in ("cpu family", "model", "stepping"))
    return f"{named} ({kind}), {len(os.sched_getaffinity(0))} cores"


class History:
    """The builds recorded beside one cache."""

    def __init__(self, cache: Path) -> None:
        self.folder = cache / "history"

    def builds(self) -> list[PastBuild]:
        """Return the builds of machines like this one, the newest first. Unreadable files are left out."""
        here = machine()
        return [build for build in map(_read, self._files()) if build is not None and build.machine == here]

    def add(self, build: PastBuild) -> None:
        """Store a build, and remove the oldest beyond `KEPT`.

        Raises:
            HostError: no space, read-only or forbidden.

        """
        name = f"{int(time.time() * 1000):014}-{secrets.token_hex(4)}.json"
        write_atomic(self.folder / name, build.model_dump_json(indent=1).encode())
        with disk_errors(self.folder):
            for path in self._files()[KEPT:]:
                remove(path)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"), reverse=True)


def _read(path: Path) -> PastBuild | None:
    try:
        if path.stat().st_size > LIMIT_BYTES:
            return None
        return PastBuild.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
