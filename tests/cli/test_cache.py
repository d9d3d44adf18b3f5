"""cache push, pull, stats, gc: graphs of every backend, and counts of what was counted."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.backends.base import make_backend
from pipeline.cache.local import Cache
from pipeline.cache.remote import Remote, push_all
from pipeline.recipe.backend_settings import InductorSettings, NeuronSettings
from support.commands import answer, invoke
from support.paths import TESTS


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A working directory with an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    return tmp_path


KEY = "ab" * 32


@pytest.fixture
def neuron_sdk(tmp_path, monkeypatch) -> dict[str, str]:
    """Distributions of the Neuron SDK and its compiler on the path; returns the toolchain that they are."""
    fake = TESTS / "fake_neuron"
    packages = tmp_path / "packages"
    for name in ("torch", "torch-xla"):
        about = packages / f"{name.replace('-', '_')}-2.9.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.9.0\n")
    for path in (fake, packages):
        monkeypatch.syspath_prepend(str(path))
    monkeypatch.setenv("PATH", os.pathsep.join([str(fake / "bin"), os.environ["PATH"]]))
    return make_backend(NeuronSettings(name="neuron", target="trn2")).toolchain().as_dict()


def share(folder: Path, toolchains: Sequence[dict[str, str]]) -> str:
    """A shared cache with a graph of each toolchain."""
    local = Cache(folder / "builder", "graphs")
    for number, toolchain in enumerate(toolchains):
        local.put(f"{number}{number}" * 32, b"graph", toolchain)
    assert push_all(local, Remote(str(folder / "shared"), "write").open("graphs")) == len(toolchains)
    return str(folder / "shared")


def test_cache_pull_takes_the_graphs_of_every_installed_backend(work, neuron_sdk):
    """It knew only inductor: on a machine with the Neuron SDK, it pulled nothing for it."""
    inductor = make_backend(InductorSettings()).toolchain().as_dict()
    url = share(work, [inductor, neuron_sdk, neuron_sdk | {"neuronx-cc": "1.0"}])
    result = invoke("cache", "pull", url, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "pulled": 2,
        "toolchains": [
            {"toolchain": toolchain, "pulled": 1, "kinds": {"graphs": 1, "subgraphs": 0}}
            for toolchain in (inductor, neuron_sdk)
        ],
    }
    assert Cache(work / "cache", "graphs").get("11" * 32).read_bytes() == b"graph"


def test_cache_pull_of_one_backend_says_which_toolchain(work, neuron_sdk):
    inductor = make_backend(InductorSettings()).toolchain().as_dict()
    result = invoke("cache", "pull", share(work, [inductor, neuron_sdk]), "--backend", "neuron")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("neuron (torch 2.9.0, ")
    assert ", neuronx-cc 2.24.8799.0): pulled 1 graph and 0 subgraphs from " in result.stdout
    assert Cache(work / "cache", "graphs").get("00" * 32) is None


def test_cache_pull_of_a_backend_that_is_not_installed(work):
    (work / "shared").mkdir()
    result = invoke("cache", "pull", "shared", "--backend", "neuron")
    assert result.exit_code == 3
    assert "backend neuron: " in result.stderr
    assert "fix: `tandem doctor --backend neuron` lists every problem" in result.stderr


def test_cache_stats_and_gc_count_by_kind(work):
    """Goldens and memos were counted as graphs."""
    for kind, size in (("graphs", 1 << 20), ("goldens", 2 << 20)):
        Cache(work / "cache", kind).put(KEY, b"x" * size)
    counted = json.loads(invoke("cache", "stats", "--json").stdout)
    assert (counted["entries"], counted["size_bytes"]) == (2, 3 << 20)
    assert counted["kinds"]["goldens"] == {"entries": 1, "size_bytes": 2 << 20}
    assert answer("cache", "stats").stdout.splitlines()[2:8] == [
        "entries                                              number     size",
        "graphs: compiled graphs of all builds                     1  1.0 MiB",
        "subgraphs: object files that graphs share                 0      0 B",
        "memos: from a graph's inputs to its key                   0      0 B",
        "goldens: reference outputs of the gates                   1  2.0 MiB",
        "files: weights and artifacts for nodes of a cluster       0      0 B",
    ]
    removed = answer("cache", "gc", "--max-gib", "0").stdout
    start = (
        "removed 1 graph, 1.0 MiB; 0 subgraphs, 0 B; 0 memos, 0 B; 1 golden, 2.0 MiB; 0 files, 0 B; kept 0 entries, 0 B"
    )
    assert removed == f"{start}\n"


def test_cache_gc_says_what_it_kept_and_what_it_does_not_limit(work):
    """43 MiB of shards and blobs stayed after `--max-gib 0.001`, without a word."""
    Cache(work / "cache", "graphs").put(KEY, b"x" * 2048)
    blob = work / "cache/blobs/sha256/ab/blob"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"x" * (1 << 20))
    shown = answer("cache", "gc", "--max-gib", "1").stdout
    assert shown.endswith("; kept 1 entry, 2.0 KiB; not limited by --max-gib: blobs 1.0 MiB\n")
    assert "graphs, subgraphs, memos, goldens and files" in " ".join(invoke("cache", "gc", "--help").stdout.split())


def test_cache_gc_says_why_blobs_stay(work):
    """`--max-gib 0 --max-days 0` on a machine that pulls removed nothing, and did not say that a day is the minimum."""
    for name in ("new", "old", "linked"):
        blob = work / f"cache/blobs/sha256/ab/{name}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(b"x" * (1 << 20))
    (work / "cache/blobs/locks").mkdir()
    os.link(work / "cache/blobs/sha256/ab/linked", work / "artifact")
    os.utime(work / "cache/blobs/sha256/ab/old", (1, 1))
    shown = answer("cache", "gc", "--max-days", "0").stdout
    assert "; 1 unused blob or shard, 1.0 MiB; kept 0 entries, 0 B; " in shown
    assert "; kept 1 blob or shard, 1.0 MiB: younger than one day; " in shown
    assert shown.endswith("; kept 1 blob or shard, 1.0 MiB: used by artifacts on this machine\n")
    data = json.loads(answer("cache", "gc", "--max-days", "30", "--json").stdout)
    assert data["unused_kept"]["newer"] == {"entries": 1, "size_bytes": 1 << 20}
    assert "one day" in invoke("cache", "gc", "--help").stdout


def test_cache_gc_needs_a_limit(work):
    refused = invoke("cache", "gc")
    assert refused.exit_code == 2
    assert "wrong input: cache gc: no limit given\n  fix: add --max-gib, --max-days or both\n" in refused.stderr


@pytest.mark.parametrize("command", [("stats", "--remote", "nowhere"), ("pull", "nowhere"),
                                     ("gc", "--max-gib", "1", "--remote", "nowhere")])  # fmt: skip
def test_cache_commands_of_a_misspelt_folder(work, command):
    """`cache stats --remote` showed zeros."""
    result = invoke("cache", *command)
    assert result.exit_code == 2
    assert "wrong input: nowhere: no such folder\n" in result.stderr


def test_cache_stats_adds_up_the_folders(work):
    Cache(work / "cache", "graphs").put(KEY, b"x" * 2048)
    lines = [line.split() for line in answer("cache", "stats").stdout.splitlines()]
    assert ["graphs", "2.1", "KiB"] in lines
    assert lines[-1][0] == "total"


def test_cache_gc_counts_unused_blobs_only_if_it_looked_for_them(work):
    """It said `0 blobs and shards` without --max-days, which is what removes them."""
    assert "unused" not in answer("cache", "gc", "--max-gib", "1").stdout
    assert "0 unused blobs and shards, 0 B" in answer("cache", "gc", "--max-gib", "1", "--max-days", "1").stdout


def test_cache_push_of_an_empty_cache_says_so(work):
    """It said `none is new`."""
    assert "to shared: the local cache " in answer("cache", "push", "shared").stdout
    assert answer("cache", "push", "shared").stdout.endswith("cache has no graphs\n")


def test_cache_push_of_nothing_new_says_why(work):
    share(work, [])
    Cache(work / "cache", "graphs").put(KEY, b"x", {"backend": "none"})
    answer("cache", "push", "shared")
    assert answer("cache", "push", "shared").stdout == "pushed 0 graphs and 0 subgraphs to shared: none is new\n"
