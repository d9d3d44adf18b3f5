"""The modules that the backend hands to NxD, lowered by torch-xla; their HLO run by XLA on the CPU: `make test-xla`.

With TANDEM_NXD_SOURCE (the `src` folder of aws-neuron/neuronx-distributed, release 2.29) the real NxD source traces and
assembles them over the fake SDK; without it, the fake of NxD does.
"""

import hashlib
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pipeline.artifact.manifest import read
from pipeline.graphs.spec import GraphSpec
from support.neuron_graphs import FAMILIES, LENGTH, OVER_STATES, PROMPTS, arguments_of, make, phases, sums, weightless
from support.neuron_lane import DEVICE, FAKE, NXD, NXD_SOURCE, XLA, environment, run, tandem
from support.pairs import Pair, empty_state
from support.paths import ROOT, TESTS
from support.shards import in_out

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def sdk():
    """The fake SDK, and NxD, in this process."""
    if find_spec("torch_xla") is None:
        pytest.fail("torch-xla is not installed: run `make test-xla`")
    if NXD_SOURCE and not (Path(NXD_SOURCE) / "neuronx_distributed").is_dir():
        pytest.fail(f"TANDEM_NXD_SOURCE={NXD_SOURCE} has no neuronx_distributed: name the src folder of its repository")
    os.environ.update(XLA)
    sys.path[:0] = [*map(str, NXD), str(FAKE)]
    from pipeline.backends.neuron.backend import NeuronBackend
    from pipeline.recipe.backend_settings import NeuronSettings

    return NeuronBackend(NeuronSettings(name="neuron", target="trn2", lnc=2))


class Graphs:
    """A pair whose steps run as HLO: traced once a bucket, state carried from output to input as the runtime does."""

    def __init__(self, backend, pair: Pair) -> None:
        self.backend, self.pair = backend, pair
        self.state = empty_state(pair.shape)
        self.traced: dict[GraphSpec, object] = {}

    def step(self, spec: GraphSpec, **arguments):
        from torch_neuronx.xla_impl.trace import run_hlo

        if spec not in self.traced:
            self.traced[spec] = self.backend.trace(spec, self.pair.shape)
        traced = self.traced[spec]
        io, meta = traced.signature, traced.program.metaneff
        dtypes = {one.name: getattr(torch, one.dtype) for one in io.arguments}
        given = {name: torch.as_tensor(value).to(dtypes[name]) for name, value in arguments.items()}
        weights = in_out(self.pair.tensors, self.pair.shape.models)
        held = {name.replace("/", "."): tensor for name, tensor in (weights | self.state).items()}
        names = [(one.checkpoint_key or one.user_input_key).decode() for one in meta.input_tensors]
        outputs = run_hlo(traced.program.hlo.SerializeToString(), [given[n] if n in given else held[n] for n in names])
        states = {name.replace("/", "."): name for name in self.state}
        for place, source in meta.output_aliases_to.items():
            self.state[states[names[source]]] = outputs[place]
        return outputs[: len(io.outputs)]


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize(("family", "rows"), [*((family, 4) for family in (*FAMILIES, *OVER_STATES)), ("qwen3", 1)])
def test_hlo_equals_eager(sdk, family, rows, lookup):
    """Outputs and carried state of every phase, from a cache that holds something, to 1e-4; with copied drafts, too."""
    pair = make(family, rows, reduced=family in OVER_STATES, lookup=lookup)
    graphs = Graphs(sdk, pair)
    noise = torch.Generator().manual_seed(1)
    filled = {
        name: torch.randn(t.shape, generator=noise) if t.is_floating_point() else torch.full_like(t, 7)
        for name, t in empty_state(pair.shape).items()
    }
    for spec in phases(rows):
        if lookup and spec.phase != "speculate":
            continue  # the same graph as without
        pair.state = {name: tensor.clone() for name, tensor in filled.items()}
        graphs.state = {name: tensor.clone() for name, tensor in filled.items()}
        arguments = arguments_of(spec, pair.shape)
        wanted, got = pair.step(spec, **arguments), graphs.step(spec, **arguments)
        for one, other in zip(wanted, got, strict=True):
            torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4, msg=lambda m, s=spec: f"{s.name}: {m}")
        for name, tensor in pair.state.items():
            torch.testing.assert_close(
                graphs.state[name], tensor, atol=1e-4, rtol=1e-4, msg=lambda m, s=spec, n=name: f"{s.name} {n}: {m}"
            )


@pytest.mark.parametrize(
    ("family", "reduced"), [*((family, reduced) for family in FAMILIES for reduced in (False, True)), ("eagle3", True)]
)
def test_generation_through_hlo_equals_plain_greedy(sdk, family, reduced):
    """Prefill, then speculate with K=3, then decode: state carried through every step, tokens as without any cache."""
    pair = make(family, 4, reduced=reduced)
    graphs = Graphs(sdk, pair)
    tokens = torch.zeros(4, 8, dtype=torch.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    lengths = [len(prompt) for prompt in PROMPTS]
    first = graphs.step(GraphSpec("prefill", 4, 8, 8), tokens=tokens, lengths=lengths, slots=[0, 1, 2, 3])[0]
    rows = [[*prompt, int(token)] for prompt, token in zip(PROMPTS, first, strict=True)]
    sizes = []
    for _ in range(4):
        last, position = [row[-1] for row in rows], [len(row) - 1 for row in rows]
        spec = GraphSpec("speculate", 4, 4, LENGTH, 3)
        new, counts = graphs.step(spec, last_token=last, position=position, active=[True] * 4)
        sizes += counts.tolist()
        for row, some, count in zip(rows, new.tolist(), counts.tolist(), strict=True):
            row.extend(some[:count])
    for _ in range(3):
        last, position = [row[-1] for row in rows], [len(row) - 1 for row in rows]
        spec = GraphSpec("decode", 4, 1, LENGTH)
        new = graphs.step(spec, last_token=last, position=position, active=[True] * 4)[0]
        for row, token in zip(rows, new.tolist(), strict=True):
            row.append(token)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert row[len(prompt) :] == pair.greedy(prompt, len(row) - len(prompt))
    assert min(sizes) >= 1
    assert max(sizes) <= 4


@pytest.mark.parametrize("replicated", [True, False])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_hlo_is_what_the_compiler_takes(sdk, family, tp, replicated):
    """Operators, data types and constants of every graph; collectives where the model is split, and only there."""
    from pipeline.backends.neuron import hlo

    shape = make(family, 4, tp, replicated=replicated).shape
    for spec in phases(4):
        traced = sdk.trace(spec, shape)
        assert not traced.ir.startswith(b"stablehlo"), spec.name  # begins the text of the other frontend's graphs
        assert hlo.faults(traced.program.hlo) == [], spec.name
        found = hlo.collectives(traced.program.hlo)
        assert found.get("all-reduce", 0) == sums(spec, shape), spec.name
        alone = replicated and (spec.model == "draft" or spec.phase == "propose")
        assert (found.get("all-gather", 0) > 0) == (tp > 1 and not alone), spec.name


def test_trace_says_how_it_wants_to_be_lowered(sdk):
    """No device, weights as parameters, state aliased: what NxD asks of the SDK."""
    from torch_neuronx.xla_impl import trace

    sdk.trace(GraphSpec("decode", 4, 1, LENGTH), make("qwen3").shape)
    asked = trace.CALLS[-1]
    assert asked["cpu_backend"]
    assert asked["enable_aliasing"]
    assert not asked["inline_weights_to_neff"]


@pytest.mark.parametrize("tp", [1, 2])
def test_weights_and_state_have_the_shards_names(sdk, tp):
    """Every weight that a phase needs. Prefill is done with the draft once its last layer's caches are written."""
    shape = make("qwen3", tp=tp).shape
    after = ("self_attn.o_proj", "post_attention_layernorm", "mlp.gate_up_proj", "mlp.down_proj")
    unused = {"draft.model.norm.weight", *(f"draft.model.layers.0.{part}.weight" for part in after)}
    for spec in phases(4):
        traced = sdk.trace(spec, shape)
        io, meta = traced.signature, traced.program.metaneff
        named = {one.checkpoint_key.decode(): tuple(one.shape) for one in meta.input_tensors if one.checkpoint_key}
        known = {one.name.replace("/", "."): one.shape for one in io.weights + io.state}
        assert named.items() <= known.items()
        used = {"decode": "target", "verify": "target", "propose": "draft"}.get(spec.phase)
        needed = {one.name for one in io.weights if used is None or one.name.startswith(used)}
        if tp == 1:
            needed -= {"target/rank.vocab_offset"}  # nothing to add on one rank
        missing = {name.replace("/", ".") for name in needed} - named.keys() - {"draft.rank.vocab_offset"}
        assert missing == (unused if spec.phase == "prefill" else set()), spec.name


HASH = """
import hashlib
from support.pairs import make_pair
from pipeline.backends.neuron.backend import NeuronBackend
from pipeline.recipe.backend_settings import NeuronSettings
from pipeline.graphs.spec import GraphSpec
backend = NeuronBackend(NeuronSettings(name="neuron", target="trn2", lnc=2))
traced = backend.trace(GraphSpec("speculate", 4, 4, 40, 3), make_pair("some").shape)
print(hashlib.sha256(traced.ir).hexdigest())
"""


def test_canonical_hlo_is_the_same_from_two_folders(tmp_path):
    found = set()
    for name in ("one", "another/deeper"):
        root = tmp_path / name
        shutil.copytree(ROOT / "pipeline", root / "pipeline")
        shutil.copytree(TESTS, root / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        where = environment(nxd=NXD, XLA_HLO_DEBUG="1")
        where["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests"), *map(str, NXD), str(FAKE)])
        done = run(HASH, where)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.splitlines()[-1])
    assert len(found) == 1


def test_pico_is_built_gated_and_run(tmp_path):
    """The tiny recipe for trn2: traced, compiled by the fake compiler, assembled into NxDModel, gated on XLA's CPU."""
    (tmp_path / "prompts").mkdir()
    shutil.copy(ROOT / "recipes/prompts/pico.jsonl", tmp_path / "prompts")
    recipe = (ROOT / "recipes/pico-spec.yaml").read_text()
    recipe = recipe.replace("{name: inductor, device: cpu}", "{name: neuron, target: trn2, lnc: 2}")
    recipe = recipe.replace("[greedy, stochastic]}", "[greedy, stochastic], candidates: 64}")
    (tmp_path / "pico.yaml").write_text(recipe)
    where = environment(nxd=NXD, FAKE_NEURON_LS=DEVICE, TANDEM_CACHE=str(tmp_path / "cache"))
    done = tandem("build", "pico.yaml", "--out", "out", "--workers", "1", where=where, cwd=tmp_path, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = read(tmp_path / "out").manifest
    assert manifest.passed
    assert len(manifest.graphs) == 8


@pytest.mark.parametrize(
    ("recipe", "layers", "tp"),
    [
        ("pico-spec", None, 1), ("pico-spec", None, 2), ("smollm2-135m-spec", None, 1), ("smollm2-135m-spec", None, 3),
        ("llama-70b-spec", 1, 8),
    ],
)  # fmt: skip
def test_every_graph_of_a_recipe_is_taken(sdk, recipe, layers, tp):
    from pipeline.backends.neuron import hlo

    graphs, pair = weightless(recipe, layers, tp)
    keys = set()
    for spec in graphs:
        traced = sdk.trace(spec, pair)
        assert hlo.faults(traced.program.hlo) == [], spec.name
        assert hlo.collectives(traced.program.hlo).get("all-reduce", 0) == sums(spec, pair), spec.name
        keys.add(hashlib.sha256(traced.ir).hexdigest())
    assert len(keys) == len(graphs)
