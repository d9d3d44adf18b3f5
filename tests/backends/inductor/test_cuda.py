"""Graphs for a GPU, as far as a machine without one shows: devices of tensors, settings, and what is missing here."""

from __future__ import annotations

import ast
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline import doctor
from pipeline.artifact.verify import check_host
from pipeline.backends.base import make_backend
from pipeline.backends.inductor.backend import BASE_MARCH
from pipeline.backends.inductor.scratch import scratch
from pipeline.errors import ArtifactError, HostError
from pipeline.graphs.module import GraphModule, empty
from pipeline.graphs.signature import signature
from pipeline.graphs.spec import GraphSpec
from pipeline.plan.lock import pair_configs, read, with_toolchain
from pipeline.plan.plan import make_plan
from pipeline.recipe import load
from pipeline.recipe.backend_settings import InductorSettings
from support.pairs import make_pair
from support.paths import PYTHONPATH, ROOT

CUDA = InductorSettings(device="cuda")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")


def plan_of(name):
    """The plan of a recipe of the repository for a GPU, without int8; with a head, of a shorter target."""
    path = ROOT / "recipes" / f"{name}.yaml"
    recipe = load(path)
    changed = recipe.model_copy(update={"backend": CUDA, "draft": recipe.draft.model_copy(update={"weights": None})})
    target, draft = pair_configs(changed, read(path.with_suffix(".lock")), "lock")
    if draft.eagle3 is not None:
        target, draft = replace(target, layers=8), replace(draft, eagle3=replace(draft.eagle3, taps=()))
    return make_plan(changed, target, draft)


class Devices(TorchDispatchMode):
    """Records the operators that take or return a tensor of another device than `meta`, which stands for a GPU."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type != "meta" for tensor in tensors):
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("name", ["pico-spec", "smollm2-135m-spec"])
def test_no_phase_has_a_tensor_on_another_device(name):
    """Such a tensor would be copied to the GPU in every step, or fail."""
    plan, backend = plan_of(name), make_backend(CUDA)
    kinds = {(spec.phase, spec.sampling, spec.model): spec for spec in plan.graphs}
    assert len(kinds) == (9 if "shaped" in plan.recipe.speculation.sampling else 7)
    for spec in kinds.values():
        io = signature(spec, plan.pair, backend.packing)
        devices = Devices()
        with devices, torch.no_grad():
            outputs = GraphModule(spec, plan.pair, io, backend.seams)(empty(io.inputs, "meta"))
        assert devices.found == [], spec.name
        assert {out.device.type for out in outputs} == {"meta"}


def test_whole_graphs_are_traced_without_memory():
    """Uninitialised tensors of all weights and caches took the memory of the GPU in every worker."""
    backend = make_backend(CUDA)
    backend.device = "meta"  # stands for a GPU, of which fake tensors would ask its driver
    traced = backend.trace(GraphSpec("decode", 2, 1, 40), make_pair().shape)
    assert all(isinstance(leaf, FakeTensor) for leaf in tree_leaves(traced.program.example_inputs))


def test_host_code_of_a_gpu_artifact_needs_no_instruction_set_of_its_builder():
    """It was compiled with -march=native, which neither the cache key nor the manifest named."""
    from torch._inductor import config, cpu_vec_isa  # not at the top: the import takes seconds
    from torch._inductor.cpp_builder import get_cpp_options

    with config.patch(make_backend(CUDA).settings() | {"cpp.vec_isa_ok": True}):
        flags = " ".join(get_cpp_options("g++", do_link=False)[2])
        assert not cpu_vec_isa.pick_vec_isa()
    assert "native" not in flags
    assert f"march={BASE_MARCH[platform.machine()]}" in flags


def test_scratch_holds_the_files_of_triton(tmp_path):
    """Inductor sets the variable once per process: later graphs wrote to the removed folder of the first."""
    for name in ("first", "second"):
        with scratch(tmp_path / name):
            assert Path(os.environ["TRITON_CACHE_DIR"]).parent == tmp_path / name


@without_gpu
def test_cuda_without_a_gpu_is_a_problem_and_no_crash(tmp_path):
    """`tandem doctor` and `tandem recipe lock` ended with an AssertionError of torch."""
    found = doctor.diagnose(CUDA)
    assert [problem.what for problem in found.problems] == ["device is cuda, but no GPU is available"]
    assert found.facts["device"]["device"] == "cpu"
    assert found.facts["packages"]["compute_capability"] == "missing"


@without_gpu
def test_lock_made_without_a_gpu_pins_no_version_of_it():
    lock = read(ROOT / "recipes" / "pico-spec.lock")
    made = with_toolchain(lock, make_backend(CUDA).toolchain().as_dict(), {})
    assert set(made.toolchain) == {"tandem", "backend"}


@without_gpu
def test_artifact_for_a_gpu_names_both_devices():
    """Opening it crashed in torch."""
    backend = make_backend(CUDA)
    requires = {"device": "cuda", "machine": "x86_64", "compute_capability": "9.0"}
    manifest = SimpleNamespace(requires=requires, name="a", version="1", ranks=1, toolchain={})
    with pytest.raises(ArtifactError, match="device: the artifact needs cuda, this host has cpu"):
        check_host(manifest, backend.host())


@without_gpu
def test_more_ranks_than_gpus_are_an_error():
    """Every rank took the first GPU."""
    with pytest.raises(HostError, match="the artifact has 2 ranks, this host has 0 GPUs"):
        make_backend(CUDA).open(ROOT, SimpleNamespace(ranks=2))


def test_host_facts_of_a_gpu_name_the_machine(tmp_path):
    (tmp_path / "nvidia0").touch()
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 9.0\n")
    (tools / "nvidia-smi").chmod(0o755)
    code = "from pathlib import Path; from pipeline.artifact import host; print(host.host_facts(dev=Path('.')))"
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": PYTHONPATH}
    shown = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True)
    found = ast.literal_eval(shown)
    assert found == {"device": "cuda", "machine": platform.machine(), "compute_capability": "9.0"}
