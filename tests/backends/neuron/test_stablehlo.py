"""Graphs of the StableHLO frontend, run by XLA's CPU client on as many devices as they have ranks: `make test-hlo`."""

import hashlib
import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.artifact.manifest import read
from pipeline.backends.base import cache_key
from pipeline.backends.neuron import costs, hlo
from pipeline.backends.neuron.backend import NeuronBackend
from pipeline.errors import HostError
from pipeline.graphs.spec import GraphSpec, Ring
from pipeline.recipe.backend_settings import NeuronSettings
from support.neuron_graphs import (
    FAMILIES,
    LENGTH,
    MECHANISMS,
    MODULE,
    OVER_STATES,
    PROMPTS,
    arguments_of,
    make,
    phases,
    sums,
    weightless,
)
from support.neuron_lane import DEVICE, environment, run, tandem
from support.pairs import empty_state
from support.paths import ROOT, TESTS

pytestmark = pytest.mark.hlo

SLOW_OR_UNKNOWN = {"power", "reduce-window", "sort", "rng", "while", "conditional"}
"""Operators that the lowering avoids: unsupported by neuronx-cc, or slow on the chip."""


UNLISTED = {"shift-left", "shift-right-arithmetic", "xor", "dynamic-slice"}
"""Operators that no list of the compiler has: of the noise of sampling, and of blocks of a cache."""


def equals_eager(graphs, pair, spec, filled, arguments):
    """Results and state, but for the scratch position, to which blocks of prompts are not written."""
    pair.state = {name: tensor.clone() for name, tensor in filled.items()}
    graphs.state = [{name: tensor.clone() for name, tensor in filled.items()}]
    for one, other in zip(pair.step(spec, **arguments), graphs.step(spec, **arguments), strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4, msg=lambda m: f"{spec.name}: {m}")
    for name, tensor in pair.state.items():
        kept = slice(None, -1) if tensor.dim() == 4 else slice(None)
        got, wanted = (one.movedim(2, 0)[kept] if one.dim() == 4 else one for one in (graphs.state[0][name], tensor))
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{spec.name} {n}: {m}")


def summed(module):
    """Sums over ranks, in a prefill of divided tokens by reduce-scatter."""
    found = hlo.collectives(module)
    return found.get("all-reduce", 0) + found.get("reduce-scatter", 0)


def noise(shape):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(t.shape, generator=generator) if t.is_floating_point() else torch.full_like(t, 7)
        for name, t in empty_state(shape).items()
    }


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize(
    ("family", "rows"),
    [*((family, 4) for family in (*FAMILIES, *OVER_STATES, MODULE, "gpt-oss", "qwen3.5")), ("qwen3", 1)],
)
def test_hlo_equals_eager(backend, graphs_of, family, rows, lookup):
    """Results and carried state of every phase, from caches that are not empty, to 1e-4."""
    pair = make(family, rows, reduced=family in OVER_STATES, lookup=lookup)
    graphs, filled = graphs_of(backend, pair), noise(pair.shape)
    for spec in phases(rows):
        if lookup and spec.phase != "speculate":
            continue  # the same graph as without
        equals_eager(graphs, pair, spec, filled, arguments_of(spec, pair.shape))


@pytest.mark.parametrize("family", MECHANISMS)
def test_hlo_of_mechanisms_equals_eager(backend, graphs_of, family):
    """RoPE kinds, windows, norms, caps and experts, of few and of many tokens: caches that are not empty, to 1e-4."""
    pair = make(family)
    graphs, filled = graphs_of(backend, pair), noise(pair.shape)
    specs = (
        GraphSpec("prefill", 4, 8, 8),
        GraphSpec("decode", 4, 1, LENGTH),
        GraphSpec("speculate", 4, 3, LENGTH, 2),
    )
    for spec in specs:
        equals_eager(graphs, pair, spec, filled, arguments_of(spec, pair.shape))


RINGS = (Ring(6, 6 - 1 + 8),)


@pytest.mark.parametrize("family", ["olmo3", "gpt-oss"])
def test_hlo_of_rings_equals_eager(backend, graphs_of, family):
    """At the first turn and at later ones, steps and chunks across the end of the ring; no operator is new."""
    pair = make(family)
    pair = replace(pair, shape=replace(pair.shape, rings=RINGS))
    graphs, filled = graphs_of(backend, pair), noise(pair.shape)
    assert {tensor.shape[2] for name, tensor in filled.items() if name.endswith(".0")} == {14}
    specs = (
        GraphSpec("prefill", 4, 8, 8),
        GraphSpec("prefill", 4, 8, LENGTH),
        GraphSpec("decode", 4, 1, LENGTH),
        GraphSpec("decode", 4, 1, 12),
        GraphSpec("speculate", 4, 3, LENGTH, 2),
        GraphSpec("score", 4, 8, LENGTH, model="draft"),
    )
    for spec in specs:
        given = arguments_of(spec, pair.shape)
        if "position" in given and spec.kv == LENGTH:
            given["position"] = [24, 9, 3, 31]
        equals_eager(graphs, pair, spec, filled, given)
        lowered = graphs.trace(spec).program.hlo
        assert hlo.faults(lowered) == [], spec.name
        assert set(hlo.unlisted(lowered, hlo.DOCUMENTED)) <= UNLISTED, spec.name


@pytest.mark.parametrize("tp", [1, 2])
def test_generation_with_rings_equals_plain_greedy(backend, graphs_of, tp):
    """Past the first turn, on ranks; the tokens of one model without cache, ranks or speculation."""
    pair = make("gemma2", 4)
    rows, _ = generate(graphs_of(backend, replace(pair, shape=replace(pair.shape, rings=RINGS)), tp), steps=7)
    assert max(map(len, rows)) > 6 - 1 + 8 + 3
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert row[len(prompt) :] == pair.greedy(prompt, len(row) - len(prompt))


def generate(graphs, steps: int = 4) -> tuple[list[list[int]], list[int]]:
    """Tokens of prefill, four steps of speculate with K=3, and three of decode; and the sizes of the steps."""
    tokens = torch.zeros(4, 8, dtype=torch.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    lengths = [len(prompt) for prompt in PROMPTS]
    first = graphs.step(GraphSpec("prefill", 4, 8, 8), tokens=tokens, lengths=lengths, slots=[0, 1, 2, 3])[0]
    rows = [[*prompt, int(token)] for prompt, token in zip(PROMPTS, first, strict=True)]
    sizes: list[int] = []

    def step(spec):
        last, position = [row[-1] for row in rows], [len(row) - 1 for row in rows]
        return graphs.step(spec, last_token=last, position=position, active=[True] * 4)

    for _ in range(steps):
        new, counts = step(GraphSpec("speculate", 4, 4, LENGTH, 3))
        sizes += counts.tolist()
        for row, some, count in zip(rows, new.tolist(), counts.tolist(), strict=True):
            row.extend(some[:count])
    for _ in range(3):
        for row, token in zip(rows, step(GraphSpec("decode", 4, 1, LENGTH))[0].tolist(), strict=True):
            row.append(token)
    return rows, sizes


@pytest.mark.parametrize(
    ("family", "reduced", "tp", "replicated"),
    [
        *((family, reduced, 1, True) for family in FAMILIES for reduced in (False, True)),
        *((family, True, 2, replicated) for family in FAMILIES for replicated in (False, True)),
        ("llama", False, 8, False),
        ("llama", False, 4, True), ("llama-bias", False, 4, False), ("qwen3", True, 4, False),
        ("qwen2-moe", False, 2, True), ("gemma2", False, 4, True), ("granite", False, 2, False),
        ("gemma4", False, 2, True), ("gemma4-small", False, 2, True), ("qwen3.5", False, 2, True),
        ("gemma4-experts", False, 2, True), ("llama4", False, 2, True),
        ("olmo2", False, 4, True), ("olmo3", False, 2, False),
        ("qwen3-moe-by-rank", False, 2, True), ("gpt-oss-by-rank", False, 4, True),
        ("qwen3-moe-by-rank", False, 1, True),
        ("eagle3", True, 1, True), ("eagle3", True, 2, True), ("eagle3", True, 2, False),
    ],
)  # fmt: skip
def test_generation_on_ranks_equals_plain_greedy(backend, graphs_of, family, reduced, tp, replicated):
    """Collectives run: tokens of 1, 2 and 4 ranks are those of one model without cache, ranks or speculation."""
    pair = make(family, 4, replicated=replicated, reduced=reduced)
    rows, sizes = generate(graphs_of(backend, pair, tp))
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert row[len(prompt) :] == pair.greedy(prompt, len(row) - len(prompt))
    assert min(sizes) >= 1
    assert max(sizes) <= 4


@pytest.mark.parametrize("tp", [2, 4])
def test_stochastic_steps_on_ranks_equal_those_of_one(backend, graphs_of, tp):
    pair = make("qwen3", 4, replicated=False)
    one, many = graphs_of(backend, pair), graphs_of(backend, pair, tp)
    for spec in (s for s in phases(4) if s.sampling != "greedy"):
        arguments = arguments_of(spec, pair.shape)
        for alone, together in zip(one.step(spec, **arguments), many.step(spec, **arguments), strict=True):
            torch.testing.assert_close(together, alone, msg=lambda m, s=spec: f"{s.name}: {m}")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_hlo_is_what_the_compiler_takes(backend, family, tp):
    """Data types, operators, constants; collectives where the model is split; no reduction with `or`."""
    shape = make(family, 4, tp, replicated=False).shape
    for spec in phases(4):
        lowered = backend.trace(spec, shape).program.hlo
        assert hlo.faults(lowered) == [], spec.name
        assert set(hlo.unlisted(lowered, hlo.DOCUMENTED)) <= UNLISTED, spec.name
        assert summed(lowered) == sums(spec, shape), spec.name
        found = costs.costs(lowered)
        assert found.transposes == 0, spec.name
        assert found.contracted.keys() <= {0, 1}, spec.name
        if spec.phase == "decode":  # the target alone
            assert found.contracted[0] == 4 * shape.target.layers + (not shape.target.tied)
            assert found.contracted.get(1, 0) == shape.target.tied  # an embedding, whose rows are looked up
        opcodes = {i.opcode for c in lowered.computations for i in c.instructions}
        assert not opcodes & SLOW_OR_UNKNOWN, spec.name
        called = {i for c in lowered.computations for o in c.instructions if o.opcode == "reduce"
                  for i in o.called_computation_ids}  # fmt: skip
        reducers = {i.opcode for c in lowered.computations if c.id in called for i in c.instructions}
        assert "or" not in reducers, spec.name


def test_collectives_name_their_group_for_older_readers(backend):
    """XLA's newer field for groups, unknown to older readers, would read as one group of all replicas."""
    shape = make("llama", 4, 2, replicated=False).shape
    lowered = backend.trace(GraphSpec("decode", 4, 1, LENGTH), shape).program.hlo
    found = [i for c in lowered.computations for i in c.instructions if i.opcode in ("all-reduce", "all-gather")]
    assert found
    for one in found:
        assert [list(group.replica_ids) for group in one.replica_groups] == [[0, 1]]
        assert not one.HasField("collective_device_list")
    ids = [i.id for c in lowered.computations for i in c.instructions]
    assert max(ids) < 1 << 31
    assert len(set(ids)) == len(ids)


def test_state_has_the_memory_of_its_parameter(backend):
    """The module names the aliases for the compiler, the boundary for the runtime; arguments come first."""
    for spec in phases(4):
        program = backend.trace(spec, make("llama", 4).shape).program
        entries = program.hlo.input_output_alias.entries
        named = {one.output_shape_index[0]: one.parameter_number for one in entries}
        assert named == dict(program.boundary.aliases), spec.name
        kinds = [place.kind for place in program.boundary.parameters]
        assert "argument" not in kinds[kinds.count("argument") :]  # the runtime takes a call's tensors first
        assert (spec.phase == "score") or named


def test_bfloat16_weights_and_caches_are_multiplied_as_they_are(backend):
    """No float32 copy of a weight or a cache feeds a product; sums are float32."""
    shape = make("llama", 4).shape
    shape = replace(shape, models=replace(shape.models, target_dtype="bfloat16", draft_dtype="bfloat16"))
    for spec in (GraphSpec("decode", 4, 1, LENGTH), GraphSpec("speculate", 4, 4, LENGTH, 3)):
        lowered = backend.trace(spec, shape).program.hlo
        by_id = {i.id: i for c in lowered.computations for i in c.instructions}
        for one in by_id.values():
            if one.opcode == "dot":
                kinds = [by_id[i].shape.element_type for i in one.operand_ids]
                assert kinds == [16, 16], (spec.name, one.name)


def test_operator_without_a_lowering_is_named_with_its_line(backend, monkeypatch):
    from pipeline.backends.neuron.export import StableHloSeams

    def attend(self, q_BNTD, k, v, attend):
        return torch.special.bessel_j0(super(StableHloSeams, self).attend(q_BNTD, k, v, attend))

    monkeypatch.setattr(StableHloSeams, "attend", attend)
    with pytest.raises(HostError) as error:
        backend.trace(GraphSpec("decode", 4, 1, LENGTH), make("llama", 4).shape)
    assert "no lowering to StableHLO for" in error.value.what
    assert "bessel_j0" in error.value.what
    line = attend.__code__.co_firstlineno + 1
    assert f"{Path(__file__).name}:{line}" in error.value.what
    assert error.value.fix


def test_key_is_not_that_of_the_other_frontend(backend):
    """Of no phase; the graph's own text begins with the frontend's name (tests/backends/neuron/test_xla.py)."""
    other = NeuronBackend(NeuronSettings(name="neuron", target="trn2", lnc=2))
    keys = set()
    for spec in phases(4):
        traced = backend.trace(spec, make("llama", 4).shape)
        assert traced.ir.startswith(b"stablehlo\n"), spec.name
        keys |= {cache_key(traced, one.toolchain(), one.flags()) for one in (backend, other)}
    assert len(keys) == 2 * len(phases(4))


HASH = """
import hashlib
from support.pairs import make_pair
from pipeline.backends.neuron.backend import NeuronBackend
from pipeline.recipe.backend_settings import NeuronSettings
from pipeline.graphs.spec import GraphSpec
backend = NeuronBackend(NeuronSettings(name="neuron", target="trn2", lnc=2, frontend="stablehlo"))
traced = backend.trace(GraphSpec("speculate", 4, 4, 40, 3), make_pair("some").shape)
print(hashlib.sha256(traced.ir).hexdigest())
assert not any(name in traced.ir for name in (b"pipeline", b"tests", b".py"))
"""


def test_hlo_is_the_same_from_two_folders(backend, tmp_path):
    found = set()
    for name in ("one", "another/deeper"):
        root = tmp_path / name
        shutil.copytree(ROOT / "pipeline", root / "pipeline")
        shutil.copytree(TESTS, root / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        where = environment() | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
        done = run(HASH, where)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.splitlines()[-1])
    assert len(found) == 1


def test_plan_prints_costs_with_a_floor(backend, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"id": "0", "class": "chat", "prompt": "a"}) + "\n")
    where = environment(TANDEM_CACHE=str(tmp_path / "cache"))
    done = tandem("plan", "tiny.yaml", "--costs", where=where, cwd=tmp_path, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "decode-b2-t1-s48" in done.stdout
    assert "floor: trn2, lnc=2: 167 TFLOPS and 725 GB/s on a core" in done.stdout


TINY = """
name: tiny
target: {source: "pico://qwen3?layers=1", dtype: float32}
draft: {derive: {from: target, layers: [0]}}
speculation: {draft_tokens: [2], sampling: [greedy, stochastic], candidates: 64}
shapes: {batch: [2], prefill: [16], kv: [48]}
backend: {name: neuron, target: trn2, lnc: 2, frontend: stablehlo}
validate: {prompts: prompts.jsonl, max_new_tokens: 6, gates: {tokens_per_step: 1.0}}
"""


@pytest.mark.parametrize("tp", [1, 2])
def test_artifact_is_built_gated_and_run_on_ranks(backend, tmp_path, tp):
    """Traced, compiled by the fake compiler, assembled into NxDModel, gated on as many devices as it has ranks."""
    (tmp_path / "tiny.yaml").write_text(TINY + f"parallel: {{tensor: {tp}}}\n")
    lines = [{"id": str(i), "class": "chat", "prompt": text} for i, text in enumerate(["a", "bc"])]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    where = environment(FAKE_NEURON_LS=DEVICE, TANDEM_CACHE=str(tmp_path / "cache"))
    done = tandem("build", "tiny.yaml", "--out", "out", "--workers", "1", where=where, cwd=tmp_path, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = read(tmp_path / "out").manifest
    assert manifest.passed
    assert manifest.ranks == tp
    assert "torch-xla" not in manifest.toolchain
    with zipfile.ZipFile(tmp_path / "out" / manifest.graphs[0].file) as archive:
        assert archive.namelist() == ["graph.neff", "boundary.json"]


def test_selftest_writes_what_ran(backend, tmp_path):
    where = environment(FAKE_NEURON_LS=DEVICE, TANDEM_CACHE=str(tmp_path / "cache"))
    words = ["neuron", "selftest", "--frontend", "stablehlo", "--pair", "pico"]
    done = tandem(*words, where=where, cwd=tmp_path, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads((tmp_path / "selftest.json").read_text())
    build, gates, latency = made["steps"]
    assert [build["step"], gates["step"], latency["step"]] == ["build", "gates", "latency"]
    assert made["backend"]["target"] == "trn2"
    assert len(build["facts"]["graphs"]) > 4
    assert gates["facts"]["passed"] is True
    assert gates["facts"]["ran_on"]["chip"] == "trn2"
    assert latency["facts"]["speculation"]["tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("recipe", "layers", "tp"),
    [("pico-spec", None, 1), ("pico-spec", None, 2), ("llama-8b-spec", 1, 8), ("qwen3-32b-spec", 1, 32)],
)
def test_every_graph_of_a_recipe_is_taken(backend, recipe, layers, tp):
    graphs, pair = weightless(recipe, layers, tp)
    keys = set()
    for spec in graphs:
        traced = backend.trace(spec, pair)
        assert hlo.faults(traced.program.hlo) == [], spec.name
        assert summed(traced.program.hlo) == sums(spec, pair), spec.name
        keys.add(hashlib.sha256(traced.ir).hexdigest())
    assert len(keys) == len(graphs)
