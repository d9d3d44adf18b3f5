"""Builds of the tiny pair on a real Ray cluster: the artifact of a local build, whatever happens to the nodes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from pipeline.artifact import manifest as artifact
from pipeline.build import run, run_all
from pipeline.cache.collect import SENT
from pipeline.cache.local import Cache
from pipeline.cache.remote import Remote
from pipeline.errors import HostError
from pipeline.recipe import load
from pipeline.sources.pair import resolve_pair
from support import ray_cluster
from support import tiny_build as tiny

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The request of a local build, and its report."""
    request = tiny.request_in(tmp_path_factory.mktemp("local"))
    return request, run(request)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory, s3_server) -> Iterator[ray_cluster.Nodes]:
    """Three nodes, which reach the S3 server by their own environment."""
    before = dict(os.environ)
    os.environ.update(s3_server.environ())
    try:
        with ray_cluster.running(tmp_path_factory.mktemp("nodes")) as started:
            os.environ["RAY_ADDRESS"] = started.address
            yield started
    finally:
        os.environ.clear()
        os.environ.update(before)


def on_ray(request, folder: Path, url: str, **changes):
    """Return the request of a build on the cluster, with a cache of its own."""
    settings = {"out": folder / "out", "cache": folder / "cache", "workers": None, "executor": "ray"}
    return replace(request, **settings, remote=Remote(url, "write"), **changes)


def forget(nodes: ray_cluster.Nodes) -> None:
    """Empty the nodes' caches."""
    for cache in nodes.caches():
        tiny.remove(cache)


def test_build_is_that_of_this_machine(local, nodes, tmp_path):
    """All graphs and goldens come through the shared cache; each graph and each subgraph is stored once.

    The gates ran on the nodes, but their numbers are those of the gates on this machine.
    """
    request, _ = local
    lines = []
    report = run(on_ray(request, tmp_path, str(tmp_path / "shared"), log=lines.append))
    assert len(report.compiled) == 5
    assert tiny.same_parts(report.artifact) == tiny.same_parts(request.out)
    assert artifact.read(report.artifact).manifest.passed
    started = [line.split(":")[0].strip() for line in lines if "started on" in line]
    parts = {"answers-k2", "answers-plain", "reference-0", "scores-target-s48", "scores-draft-s48", "edges-s48"}
    assert len(started) == 5 + len(parts)
    assert {f"tiny/{part}" for part in parts} <= {*started}
    assert {path.stem for path in (tmp_path / "cache/logs/tiny").glob("*.log")} <= {name[5:] for name in started}
    assert measured(report.artifact) == measured(request.out)
    goldens = {entry.key for entry in Cache(tmp_path / "cache", "goldens").entries()}
    assert goldens == {entry.key for entry in Cache(request.cache, "goldens").entries()}
    assert not list((tmp_path / "shared/claims").rglob("[!.]*.lock"))
    compiled = {entry.key for cache in nodes.caches() for entry in Cache(cache, "subgraphs").entries()}
    assert compiled == {entry.key for entry in Cache(request.cache, "subgraphs").entries()}


def measured(root: Path) -> dict[str, object]:
    """Return what gates measured, other than times; counts of goldens as well."""
    report = json.loads((root / "reports/parity.json").read_text())
    goldens = report["provenance"]["goldens"]
    return {name: value for name, value in report.items() if name not in ("speed", "provenance")} | goldens


class Barrier:
    """Holds back tasks of the gates on all nodes, before they have their sources: by the lock of one of the files."""

    def __init__(self, nodes: ray_cluster.Nodes, sha256: str) -> None:
        self.nodes, self.sha256 = nodes, sha256
        self.locks: list[FileLock] = []

    def close(self) -> None:
        """Take the sources from the nodes, of which none runs a task, and hold the next tasks back."""
        self.open()
        for cache in self.nodes.caches():
            tiny.remove(cache / SENT)
            (cache / "locks").mkdir(parents=True, exist_ok=True)
            self.locks.append(FileLock(cache / "locks" / f"{self.sha256}.lock"))
            self.locks[-1].acquire(timeout=0)

    def open(self) -> None:
        """Let all tasks go on."""
        while self.locks:
            self.locks.pop().release()


def test_nodes_that_are_killed_in_mid_gates(local, nodes, tmp_path):
    """A node dies during a task of each kind: answers, reference, scores, comparisons."""
    request, _ = local
    target, _ = resolve_pair(request.recipe, base=request.base, cache=request.cache / "sources")
    barrier, lines, killed = Barrier(nodes, target.files["config.json"].sha256), [], []

    def log(line: str) -> None:
        lines.append(line)
        name, _, what = line.strip().partition(":")
        kind = name.removeprefix("tiny/").partition("-")[0]
        if kind not in ("answers", "reference", "scores", "edges"):
            return
        if "started on" in what and kind not in killed:
            killed.append(kind)
            nodes.kill_node_of(name)
            nodes.add()
            barrier.open()
        elif re.fullmatch(r" [0-9.]+ s", what) and kind != "edges":  # the last one of its kind
            barrier.close()

    barrier.close()
    try:
        report = run(on_ray(request, tmp_path, str(tmp_path / "shared"), log=log))
    finally:
        barrier.open()
    assert killed == ["answers", "reference", "scores", "edges"]
    assert measured(report.artifact) == measured(request.out)
    again = [line.split(":")[0].strip() for line in lines if "run again" in line]
    assert {name.removeprefix("tiny/").partition("-")[0] for name in again} == {*killed}, lines


def test_fleet_is_compiled_from_the_nodes_caches(local, nodes, tmp_path):
    """Two recipes in one queue; the nodes have the graphs, and another shared cache gets them."""
    request, _ = local
    (request.base / "second.yaml").write_text(tiny.RECIPE.replace("name: tiny", "name: second"))
    first = on_ray(request, tmp_path, str(tmp_path / "shared"), validate=False)
    second = replace(first, recipe=load(request.base / "second.yaml"), out=tmp_path / "second")
    reports = run_all([first, second])
    assert [len(report.reused) + len(report.compiled) for report in reports] == [5, 5]
    assert sum(len(report.compiled) for report in reports) <= 5
    graphs = [{entry.key for entry in artifact.read(report.artifact).manifest.graphs} for report in reports]
    assert graphs[0] == graphs[1]


def test_node_that_is_killed_in_mid_build(local, nodes, tmp_path, s3_url):
    """The shared cache is a real S3 server, for gates too; the node's jobs run elsewhere, its claims are taken over."""
    request, _ = local
    forget(nodes)
    lines = []

    def log(line: str) -> None:
        lines.append(line)
        if "started on" in line and len([one for one in lines if "started on" in one]) == 3:
            nodes.kill_node_of(line.split(":")[0].strip())
            nodes.add()

    report = run(on_ray(request, tmp_path, s3_url, log=log))
    assert tiny.same_parts(report.artifact) == tiny.same_parts(request.out)
    assert any("run again" in line for line in lines), lines
    assert measured(report.artifact) == measured(request.out)


def test_node_with_another_toolchain_is_an_error(local, nodes, tmp_path):
    """Its graphs would be for another processor."""
    request, _ = local
    before = nodes.alive()
    nodes.add({"ATEN_CPU_CAPABILITY": "default"}, resources={"neuronx-cc": 1})
    for node in before:
        nodes.cluster.remove_node(node)
    with pytest.raises(
        HostError, match="the node's toolchain or environment differs: isa: default, expected"
    ) as raised:
        run(on_ray(request, tmp_path, str(tmp_path / "shared"), validate=False))
    assert raised.value.where == f"node {os.uname().nodename}"
    assert not (tmp_path / "out").exists()
