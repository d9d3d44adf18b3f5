"""Memory of this machine and of the control groups (containers) that this process runs in. Linux; starts nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")
"""Files of a control group with its limit and its use, and the key in `memory.stat` of caches that can be freed."""


class Memory(NamedTuple):
    """Bytes of memory. `available` counts file caches, which the kernel frees on demand."""

    available: int
    total: int


def host_memory(root: Path = Path("/")) -> Memory:
    """Return the memory of this machine, or of the control group with the smallest limit; `root` is for tests."""
    facts = _numbers(root / "proc/meminfo")
    kib = 1 << 10
    found = [Memory(facts["MemAvailable:"] * kib, facts["MemTotal:"] * kib), *_groups(root)]
    return Memory(min(each.available for each in found), min(each.total for each in found))


def _groups(root: Path) -> Iterator[Memory]:
    """Yield the memory of each control group of this process that has a limit."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                yield from _limits(root / "sys/fs/cgroup", path, V2)
            elif "memory" in controllers.split(","):
                yield from _limits(root / "sys/fs/cgroup/memory", path, V1)


def _limits(mount: Path, path: str, names: tuple[str, str, str]) -> Iterator[Memory]:
    """Yield the memory of a control group and of those above it; in a container, the path may lie outside the mount."""
    limit_file, use_file, freed = names
    group = mount / path.lstrip("/")
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
            limit = int((folder / limit_file).read_text(encoding="utf-8"))
            used = int((folder / use_file).read_text(encoding="utf-8"))
            available = limit - used + _numbers(folder / "memory.stat").get(freed, 0)
            yield Memory(max(0, available), limit)
        if folder == mount:
            return


def _numbers(path: Path) -> dict[str, int]:
    """Return the numbers of a file with a name and a number in each line."""
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
