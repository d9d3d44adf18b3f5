"""What a graph of the StableHLO frontend says of its parameters, without the packages that lower it."""

import json
import sys

import pytest

from pipeline.backends.base import Traced, cache_key
from pipeline.backends.neuron import support
from pipeline.backends.neuron.backend import NeuronBackend, replica_group
from pipeline.backends.neuron.boundary import Boundary, Place
from pipeline.backends.neuron.hlo_messages import module_class, read_module
from pipeline.cache.local import Cache
from pipeline.errors import HostError
from pipeline.graphs.signature import TensorSpec
from pipeline.graphs.spec import GraphSpec
from pipeline.recipe.backend_settings import NeuronSettings
from pipeline.stages.compile import Job, cached, remember
from support.neuron_graphs import phases
from support.neuron_lane import environment, run
from support.pairs import make_pair

STABLEHLO = NeuronSettings(name="neuron", target="trn2", lnc=2, frontend="stablehlo")
BOUNDARY = Boundary(
    (
        Place("argument", TensorSpec("position", (4,), "int32")),
        Place("weight", TensorSpec("target/model.norm.weight", (32,), "bfloat16")),
        Place("state", TensorSpec("target/k.0", (4, 2, 40, 8), "bfloat16")),
    ),
    (TensorSpec("token", (4,), "int32"), TensorSpec("target/k.0", (4, 2, 40, 8), "bfloat16")),
    {1: 2},
)


def test_boundary_is_read_as_it_was_written():
    assert Boundary.from_json(BOUNDARY.to_json(), "boundary.json") == BOUNDARY
    assert BOUNDARY.arguments == ("position",)
    assert BOUNDARY.aliased == {"target.k.0"}


METANEFF = """
import json
from torch_neuronx.proto import metaneff_pb2
from pipeline.backends.neuron.boundary import metaneff
from backends.neuron.test_boundary import BOUNDARY
meta = metaneff(BOUNDARY, metaneff_pb2)
print(json.dumps([
    [[one.name.decode(), one.checkpoint_key.decode(), one.user_input_key.decode(), one.type, one.data_type,
      list(one.shape)] for one in meta.input_tensors],
    [[one.name.decode(), one.data_type] for one in meta.output_tensors], dict(meta.output_aliases_to),
]))
"""


def test_metaneff_names_parameters_as_the_compiler_does():
    """The runtime binds by position and by the names input0, input1, ...; numbers are those of torch-neuronx 2.9."""
    done = run(METANEFF, environment())
    assert done.returncode == 0, done.stderr
    inputs, outputs, aliases = json.loads(done.stdout.splitlines()[-1])
    assert inputs == [
        ["input0", "", "position", 1, 2, [4]],
        ["input1", "target.model.norm.weight", "", 3, 14, [32]],
        ["input2", "target.k.0", "", 2, 14, [4, 2, 40, 8]],
    ]
    assert outputs == [["output0", 2], ["output1", 14]]
    assert aliases == {"1": 2}


def test_ids_and_groups_are_rewritten_for_older_readers():
    """XLA writes ids of 64 bits and groups in a newer field, which the reader of neuronx-cc may not know."""
    module = module_class()(name="m", entry_computation_id=9 << 32, id=7)
    body = module.computations.add(name="add", id=8 << 32, root_id=8 << 32 | 3)
    body.instructions.add(name="r", opcode="add", id=8 << 32 | 3)
    entry = module.computations.add(name="main", id=9 << 32, root_id=9 << 32 | 2)
    entry.instructions.add(name="p", opcode="parameter", id=9 << 32 | 1)
    reduce = entry.instructions.add(name="a", opcode="all-reduce", id=9 << 32 | 2, operand_ids=[9 << 32 | 1])
    reduce.called_computation_ids.append(8 << 32)
    reduce.collective_device_list.replica_groups.add(replica_ids=[1, 0])
    found = read_module(module.SerializeToString())
    first, second = found.computations
    assert [i.id for c in found.computations for i in c.instructions] == [1, 2, 3]
    assert (first.root_id, second.root_id) == (1, 3)
    last = second.instructions[1]
    assert list(last.operand_ids) == [2]
    assert list(last.called_computation_ids) == [first.id]
    assert [list(group.replica_ids) for group in last.replica_groups] == [[1, 0]]
    assert not last.HasField("collective_device_list")
    assert found.entry_computation_id == second.id


XLA = STABLEHLO.model_copy(update={"frontend": "xla"})


def test_frontends_share_no_key():
    """Each has its own packages in the toolchain, and the frontend is a flag; a loader's torch is not the tracer's."""
    one, other = NeuronBackend(STABLEHLO), NeuronBackend(XLA)
    same = Traced(b"ir", None)
    mixed = [cache_key(same, a.toolchain(), b.flags()) for a in (one, other) for b in (one, other)]
    assert len({*mixed}) == 4  # the toolchain alone makes another key, and so do the flags
    assert one.flags()["frontend"] == "stablehlo"
    assert "torch" not in one.toolchain().versions
    assert {"torch-traced", "torch-mlir", "jaxlib", "neuronx-cc"} == one.toolchain().versions.keys()


@pytest.mark.parametrize("spec", phases(4), ids=lambda spec: spec.name)
def test_frontends_share_no_memo(spec, tmp_path):
    """A memo names the key of a graph that is not traced again, here for every phase."""
    pair = make_pair("some").shape
    jobs = [Job(spec, pair, settings, tmp_path, tmp_path / "log") for settings in (STABLEHLO, XLA)]
    Cache(tmp_path, "graphs").put("abc", b"graph")
    remember(jobs[1], NeuronBackend(XLA), "abc")
    assert [found and found.key for found in map(cached, jobs)] == [None, "abc"]


GOOD = {"torch-traced": "2.13.0", "torch-mlir": "20261001", "jaxlib": "0.10.2", "neuronx-cc": "2.28.7631.0"}


@pytest.mark.parametrize(
    ("changes", "says", "fix"),
    [
        ({}, None, None),
        ({"torch-mlir": "missing", "jaxlib": "missing"}, "not installed: torch-mlir, jaxlib", "[stablehlo]"),
        ({"neuronx-cc": "missing"}, "not installed: neuronx-cc", "'neuronx-cc==2.28.*'"),
        ({"neuronx-cc": "1.0.post1"}, "an empty placeholder from PyPI", "pip uninstall neuronx-cc"),
        ({"neuronx-cc": "2.9.1"}, "found 2.9.1; supported: 2.23, ", "'neuronx-cc==2.28.*'"),
    ],
)
def test_host_needs_of_the_sdk_the_compiler_alone(monkeypatch, changes, says, fix):
    monkeypatch.setattr(support.shutil, "which", lambda name, path=None: f"/bin/{name}")
    problems = support.stablehlo_problems("trn2", 2, GOOD | changes, {})
    assert len(problems) == (says is not None)
    for problem in problems:
        assert says in problem.what
        assert fix in problem.fix


def test_trace_without_the_packages_is_one_error_that_installs_them(monkeypatch):
    for name in ("torch_mlir", "jaxlib"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("pipeline.extras.find_spec", lambda name: None)
    with pytest.raises(HostError) as error:
        NeuronBackend(STABLEHLO).trace(GraphSpec("decode", 4, 1, 40), make_pair("some").shape)
    assert "packages not installed: torch_mlir, jaxlib" in str(error.value)
    assert "stablehlo" in error.value.fix


def test_64_ranks_of_single_cores_on_trn2_follow_the_rows_of_the_chips():
    assert replica_group("trn2", 1, 64)[16:34] == [*range(48, 64), 16, 17]
    assert replica_group("trn2", 2, 64) == list(range(64))
    assert replica_group("trn1", 1, 32) == list(range(32))
