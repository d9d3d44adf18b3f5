"""Builds for Neuron on a real Ray cluster whose nodes have the fake compiler: one of them compiles each graph."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.artifact import manifest as artifact
from pipeline.stages.nodes import COMPILER
from support import ray_cluster
from support import tiny_build as tiny
from support.neuron_lane import FAKE, XLA, environment, tandem
from support.paths import ROOT, TESTS

pytestmark = pytest.mark.ray

PACKAGES = os.pathsep.join(map(str, (ROOT, TESTS, FAKE)))
"""Of a host that has the compiler alone, without NxD."""
PLANNED_BYTES = 16 << 30
"""More than the plan's estimate for a compile of neuronx-cc; the fake needs none of it."""
RECIPE = """
name: tiny
target: {source: "pico://qwen3?layers=2", dtype: float32}
draft: {derive: {from: target, layers: [0]}}
speculation: {draft_tokens: [2], sampling: [greedy, stochastic], candidates: 64}
shapes: {batch: [2], prefill: [16], kv: [48]}
backend: {name: neuron, target: trn2, lnc: 2, frontend: stablehlo}
validate: {prompts: prompts.jsonl, max_new_tokens: 6, gates: {tokens_per_step: 1.0}}
"""


def build(base: Path, cache: Path, *words: str, **where: str):
    """Build the recipe without gates, which need a device."""
    base.mkdir()
    (base / "tiny.yaml").write_text(RECIPE)
    (base / "prompts.jsonl").write_text(json.dumps({"id": "0", "class": "chat", "prompt": "a"}) + "\n")
    command = ["build", "tiny.yaml", "--out", "out", "--no-validate", *words]
    variables = environment(TANDEM_CACHE=str(cache), PYTHONPATH=PACKAGES, **where)
    return tandem(*command, where=variables, cwd=base, timeout=1500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("neuron")


@pytest.fixture(scope="module")
def nodes(folder) -> Iterator[ray_cluster.Nodes]:
    """Two nodes that have the compiler, and one that does not and must get no graph."""
    own = XLA | {
        "PATH": os.pathsep.join([str(FAKE / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": PACKAGES,
        "FAKE_NEURONX_CC_CALLS": str(folder / "nodes.txt"),
    }
    with ray_cluster.running(folder / "nodes", nodes=1) as started:
        for _ in range(2):
            started.add(own, resources={COMPILER: 1}, memory=PLANNED_BYTES)
        yield started


@pytest.fixture(scope="module")
def local(folder) -> Path:
    """The artifact of this machine."""
    done = build(folder / "local", folder / "cache", FAKE_NEURONX_CC_CALLS=str(folder / "local.txt"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "local/out"


def calls(file: Path) -> Counter:
    """Return how often the compiler was called for each graph."""
    return Counter(line.split()[0] for line in file.read_text().splitlines())


def on_nodes(nodes, base: Path, shared: Path, **variables: str):
    words = ["--executor", "ray", "--remote-cache", str(shared), "--push-cache"]
    return build(base, base.with_name(base.name + "-cache"), *words, RAY_ADDRESS=nodes.address, **variables)


def test_nodes_compile_each_graph_once_as_this_machine_does(local, nodes, folder):
    """The compiler itself counts: on the nodes it gets the HLO that it gets here, and each graph once."""
    done = on_nodes(nodes, folder / "fanned", folder / "shared")
    assert done.returncode == 0, done.stderr[-3000:]
    root = folder / "fanned/out"
    graphs = artifact.read(root).manifest.graphs
    compiled = calls(folder / "nodes.txt")
    assert len(compiled) == len(graphs) > 4
    assert {*compiled.values()} == {1}
    assert compiled == calls(folder / "local.txt")
    caches = [line.split()[1] for line in (folder / "nodes.txt").read_text().splitlines()]
    assert {*caches} == {str(cache) for cache in nodes.caches()[1:]}  # both nodes of the compiler, and no other
    assert [(one.name, one.key) for one in graphs] == [
        (one.name, one.key) for one in artifact.read(local).manifest.graphs
    ]
    assert tiny.same_parts(root) == tiny.same_parts(local)


def test_next_build_takes_the_graphs_from_the_shared_cache(nodes, folder):
    """Another folder and an empty cache on the machine that builds: nothing is compiled again."""
    before = (folder / "nodes.txt").read_text()
    done = on_nodes(nodes, folder / "again", folder / "shared")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "nodes.txt").read_text() == before
    assert tiny.same_parts(folder / "again/out") == tiny.same_parts(folder / "fanned/out")


def test_node_with_another_environment_is_an_error(nodes, folder):
    """A variable that changes code changes the keys: the nodes' graphs would not be those of this machine."""
    variables = {"NEURON_FUSE_SOFTMAX": "1"}
    done = on_nodes(nodes, folder / "variable", folder / "shared", **variables)
    assert done.returncode == 3
    assert "environment differs: env.NEURON_FUSE_SOFTMAX: None, expected 1" in done.stderr
    assert not (folder / "variable/out").exists()


def test_node_without_the_compiler_is_an_error(nodes, folder):
    """Its resource says that it has one, its packages do not."""
    for node in nodes.alive():
        nodes.cluster.remove_node(node)
    nodes.add(resources={COMPILER: 1}, memory=PLANNED_BYTES)
    done = on_nodes(nodes, folder / "other", folder / "empty")
    assert done.returncode == 3
    assert "not installed: neuronx-cc" in done.stderr
    assert "fix: " in done.stderr
    assert not (folder / "other/out").exists()
