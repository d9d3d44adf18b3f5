"""A real Ray cluster of several nodes on this machine; each node has a cache folder of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.s3_server import free_ports

STORE_BYTES = 80 << 20
MEMORY_BYTES = 6 << 30


@dataclass
class Nodes:
    """The cluster, the folder of the nodes' caches, the address for Ray Client, and the nodes that run tasks."""

    cluster: Any
    folder: Path
    client_address: str
    workers: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self, env: Mapping[str, str] | None = None, **settings: Any) -> Any:
        """Start a node of one core; `env` are variables of its workers."""
        cache = self.folder / f"cache-{len(self.workers)}"
        settings = {"num_cpus": 1, "memory": MEMORY_BYTES, "object_store_memory": STORE_BYTES} | settings
        node = start(self.cluster, env_vars={"TANDEM_CACHE": str(cache), **(env or {})}, **settings)
        self.workers.append(node)
        return node

    def alive(self) -> list[Any]:
        """Return the nodes that run tasks and that no test has killed."""
        return [node for node in self.workers if node in self.cluster.worker_nodes]

    def kill_node_of(self, task: str) -> None:
        """Kill the node that runs a task, which Ray shows as the name of its worker's process."""
        raylets = {str(node.all_processes["raylet"][0].process.pid): node for node in self.alive()}
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # ended meanwhile
                status = (command.parent / "status").read_text()
                parent = status.partition("PPid:")[2].split()[0]
                if parent in raylets and f"ray::{task}" in command.read_text():
                    self.cluster.remove_node(raylets[parent], allow_graceful=False)
                    return
        raise AssertionError(f"no worker runs {task}")

    def caches(self) -> list[Path]:
        return [self.folder / f"cache-{index}" for index in range(len(self.workers))]


def start(cluster: Any, **settings: Any) -> Any:
    """Start a node. Ray waits at most 30 s for its agents, which take longer on a busy machine."""
    for is_last in (False, False, False, False, True):
        try:
            return cluster.add_node(include_log_monitor=False, no_monitor=True, **settings)
        except Exception as error:
            if is_last or "timed out during startup" not in str(error):
                raise
    raise AssertionError


@contextmanager
def running(folder: Path, nodes: int = 3) -> Iterator[Nodes]:
    """Start a head node without cores and nodes of one core; stop them."""
    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0", RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S="120"
    )
    from ray.cluster_utils import Cluster

    cluster, (port,) = Cluster(initialize_head=False, connect=False), free_ports(1)
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        start(cluster, ray_client_server_port=port, **head)
        started = Nodes(cluster, folder, f"ray://127.0.0.1:{port}")
        for _ in range(nodes):
            started.add()
        yield started
    finally:
        cluster.shutdown()
