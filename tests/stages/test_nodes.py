"""Compiling on nodes, without Ray: checks before work, what a node must have, and what it is sent."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import build, extras
from pipeline.backends.base import Toolchain, make_backend
from pipeline.backends.neuron import support
from pipeline.backends.neuron.backend import NeuronBackend
from pipeline.cache import claims
from pipeline.cache.local import Cache
from pipeline.cache.remote import Remote
from pipeline.errors import HostError, InputError
from pipeline.graphs.spec import GraphSpec
from pipeline.recipe.backend_settings import InductorSettings, NeuronSettings
from pipeline.stages import nodes
from pipeline.stages.compile import Job, SharedCache
from support import tiny_build as tiny
from support.pairs import make_pair

SHARED = Remote("s3://bucket/cache", "write")
SPEC = GraphSpec("decode", batch=1, tokens=1, kv=16)


@pytest.fixture
def request_(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: object())  # as if Ray were installed
    return replace(tiny.request_in(tmp_path), workers=None, executor="ray", remote=SHARED)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"executor": "slurm"}, "--executor: unknown executor: slurm"),
        ({"remote": None}, "--executor ray: the nodes need a shared cache that they can write"),
        ({"remote": Remote("s3://bucket/cache", "read")}, "the nodes need a shared cache that they can write"),
        ({"workers": 2}, "--workers is the number of processes on this machine"),
    ],
)
def test_executor_that_cannot_be_used_is_rejected_before_work(request_, changes, what):
    with pytest.raises(InputError, match=what) as raised:
        build.run(replace(request_, **changes))
    assert raised.value.fix
    assert not request_.cache.exists()


def test_missing_ray_names_its_extra(request_, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "ray" else object())
    with pytest.raises(HostError, match="packages not installed: ray") as raised:
        build.run(request_)
    assert raised.value.fix.endswith("[ray]'") or "[ray]" in raised.value.fix


def test_check_same_names_every_difference():
    here = {"torch": "2.13.0", "cxx": "g++ 12.2.0", "isa": "avx2"}
    nodes.check_same(here, here)
    with pytest.raises(HostError) as raised:
        nodes.check_same(here, here | {"torch": "2.12.0", "cxx": "g++ 13.1.0"})
    assert raised.value.what == (
        "the node's toolchain or environment differs: torch: 2.12.0, expected 2.13.0; "
        "cxx: g++ 13.1.0, expected g++ 12.2.0"
    )


def job_of(backend, folder: Path) -> nodes.NodeJob:
    job = Job(SPEC, make_pair().shape, backend, folder, folder / "log", SHARED, "tiny", 60.0, 5 << 30)
    return nodes.NodeJob(job, {})


@pytest.mark.parametrize(
    ("backend", "gpus", "custom"),
    [
        (InductorSettings(), 0, {}),
        (InductorSettings(device="cuda"), 1, {}),
        (NeuronSettings(name="neuron", target="trn2"), 0, {"neuronx-cc": 1}),
    ],
    ids=["cpu", "cuda", "neuron"],
)
def test_task_has_the_resources_of_the_plan_and_the_backend(tmp_path, backend, gpus, custom):
    task = nodes.task_of(job_of(backend, tmp_path))
    assert (task.name, task.cores, task.memory_bytes, task.seconds) == (f"tiny/{SPEC.name}", 1, 5 << 30, 60)
    assert (task.gpus, task.custom) == (gpus, custom)


def test_node_of_another_compiler_compiles_nothing(tmp_path, monkeypatch):
    """Its graphs would have other keys, and the build would wait for graphs that never come."""
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "node"))
    backend = InductorSettings()
    sent = replace(job_of(backend, tmp_path), toolchain=nodes.facts(backend, make_backend(backend)) | {"torch": "1.0"})
    with pytest.raises(HostError, match=r"torch: .*, expected 1\.0") as raised:
        nodes.compile_on_node(sent)
    assert raised.value.where == f"node {os.uname().nodename}"
    assert not (tmp_path / "node").exists()


def test_node_with_another_variable_that_changes_code_compiles_nothing(tmp_path, monkeypatch):
    """It is a part of the key: the artifact would have other keys than a build of this machine, and wrong flags."""
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "node"))
    monkeypatch.setattr(NeuronBackend, "preflight", lambda self: [])
    backend = NeuronSettings(name="neuron", target="trn2")
    sent = replace(job_of(backend, tmp_path), toolchain=nodes.facts(backend, make_backend(backend)))
    monkeypatch.setitem(support.AT_START, "NEURON_FUSE_SOFTMAX", "1")
    with pytest.raises(HostError, match=r"environment differs: env\.NEURON_FUSE_SOFTMAX: 1, expected None"):
        nodes.compile_on_node(sent)
    assert not (tmp_path / "node").exists()


def test_folder_of_the_shared_cache_is_sent_as_an_absolute_path(tmp_path, monkeypatch):
    """A worker of Ray has another working directory."""
    monkeypatch.chdir(tmp_path)
    job = replace(job_of(InductorSettings(), tmp_path).job, remote=Remote("shared", "write"))
    assert nodes._sent(job).remote == Remote(str(tmp_path / "shared"), "write")
    assert nodes._sent(replace(job, remote=SHARED)).remote == SHARED


class FakeToolchain:
    """The one fact of a backend that a cache reads."""

    def toolchain(self) -> Toolchain:
        return Toolchain("inductor", {"torch": "1"})


def test_two_machines_compile_an_entry_once(tmp_path, monkeypatch):
    """Both have missed the entry; the second once compiled it too."""
    monkeypatch.setattr(claims, "POLL_S", 0.05)
    made, begun = [], threading.Event()

    def obtain(machine: str) -> bool:
        def make() -> bytes:
            made.append(machine)
            begun.set()
            time.sleep(1)
            return machine.encode()

        sent = job_of(InductorSettings(), tmp_path / machine).job
        job = replace(sent, cache=tmp_path / machine, remote=Remote(str(tmp_path / "shared"), "write"))
        found = SharedCache(job, "subgraphs", FakeToolchain(), lambda _: None).obtain("abc", make)
        return found.hit

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(obtain, "first")
        begun.wait()
        second = pool.submit(obtain, "second")
    assert (made, first.result(), second.result()) == (["first"], False, True)
    assert Cache(tmp_path / "second", "subgraphs").get("abc").read_bytes() == b"first"
