"""The memory that a build may take: file caches are free, and a container's limit counts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.memory import Memory, host_memory
from pipeline.stages import workers

GIB = 1 << 30
MEMINFO = "MemTotal: 8388608 kB\nMemFree: 524288 kB\nMemAvailable: 6291456 kB\nHugePages_Total: 0\n"


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


@pytest.fixture
def host(tmp_path) -> Path:
    return write(tmp_path, {"proc/meminfo": MEMINFO})


def test_host_memory_counts_file_caches_as_available(host):
    """MemFree of a machine that has read files is near zero: builds compiled one graph at a time."""
    assert host_memory(host) == Memory(6 * GIB, 8 * GIB)


@pytest.mark.parametrize("path", ["/", "/pod/box", "/elsewhere/than/the/mount"])
def test_host_memory_of_a_container_is_its_limit(host, path):
    """cgroup v2, as in Kubernetes: `memory.current` includes file caches, of which the inactive part is free."""
    group = "sys/fs/cgroup"
    write(host, {
        "proc/self/cgroup": f"0::{path}", f"{group}/memory.max": 4 * GIB, f"{group}/memory.current": 3 * GIB,
        f"{group}/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}", f"{group}/pod/memory.max": "max",
    })  # fmt: skip
    assert host_memory(host) == Memory(3 * GIB, 4 * GIB)


def test_host_memory_of_nested_groups_is_the_smallest(host):
    files = {"proc/self/cgroup": "4:cpu,memory:/job/step\n0::/"}
    for folder, limit in (("", 9 * GIB), ("/job", 2 * GIB), ("/job/step", 5 * GIB)):
        group = f"sys/fs/cgroup/memory{folder}"
        files |= {f"{group}/memory.limit_in_bytes": limit, f"{group}/memory.usage_in_bytes": GIB,
                  f"{group}/memory.stat": "cache 0\ntotal_inactive_file 0"}  # fmt: skip
    assert host_memory(write(host, files)) == Memory(GIB, 2 * GIB)


def test_worker_count_uses_the_available_memory(monkeypatch):
    monkeypatch.setattr(workers, "host_memory", lambda: Memory(3 * GIB, 8 * GIB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert [workers.worker_count(need, 7) for need in (GIB, 4 * GIB, 0)] == [3, 1, 7]


def test_host_memory_of_this_machine_is_plausible():
    found = host_memory()
    assert 0 < found.available <= found.total <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
