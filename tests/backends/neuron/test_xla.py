"""The modules that the backend hands to NxD, lowered by torch-xla; their HLO run by XLA on the CPU: `make test-xla`.

With TANDEM_NXD_SOURCE (the `src` folder of aws-neuron/neuronx-distributed, release 2.29) the real NxD source traces and
assembles them over the fake SDK; without it, the fake of NxD does.
"""

import hashlib
import os
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from pipeline.artifact.manifest import read
from pipeline.graphs.packing import PlainPacking
from pipeline.graphs.signature import signature
from pipeline.graphs.spec import GraphSpec, ModelsSpec, PairSpec
from pipeline.models.config import ModelConfig
from pipeline.models.families import config_of
from pipeline.models.weights import D2T, EMBEDDING, HEAD, weight_specs
from support.neuron_lane import DEVICE, FAKE, NXD, NXD_SOURCE, XLA, environment, run, tandem
from support.pairs import SMALL, Pair, empty_state
from support.paths import ROOT, TESTS

pytestmark = pytest.mark.xla

FAMILIES = {
    "llama": {"model_type": "llama", "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }},
    "llama-bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
}  # fmt: skip
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 8], [11, 30]]
LENGTH = 40


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
    from pipeline.recipe.schema import NeuronSettings

    return NeuronBackend(NeuronSettings(name="neuron", target="trn2", lnc=2))


def configs(family: str, reduced: bool) -> tuple[ModelConfig, ModelConfig]:
    """Target and draft; `eagle3` is a head over the three layers of a llama."""
    config = SMALL | FAMILIES.get(family, FAMILIES["llama"])
    draft = config | {"num_hidden_layers": 1, "tie_word_embeddings": not reduced}
    if reduced:
        draft |= {"draft_vocab_size": 32}
    if family == "eagle3":
        taps = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
        draft |= {"architectures": ["LlamaForCausalLMEagle3"], "eagle_config": taps}
    return config_of(config, "target"), config_of(draft, "draft")


def make(
    family: str, rows: int = 4, tp: int = 1, *, replicated: bool = True, reduced: bool = False, lookup: bool = False
) -> Pair:
    """A random pair of a family; its draft is the target's first layer, with an embedding of its own if it is split."""
    torch.manual_seed(0)
    target, draft = configs(family, reduced)
    shape = PairSpec(ModelsSpec(target, draft, "float32", "float32", tp, replicated), rows, LENGTH, 16, lookup=lookup)
    weights = {}
    for spec in weight_specs(target):
        noise = torch.randn(spec.shape) * (0.1 if spec.kind == "vector" else 0.3)
        is_norm = spec.kind == "vector" and spec.name.endswith("weight")
        weights[spec.name] = noise + 1 if is_norm else noise
        if ".layers.0." not in spec.name and spec.name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[spec.name] *= 0.3
    tensors = {f"target/{name}": tensor for name, tensor in weights.items()}
    for spec in weight_specs(draft):
        if spec.name == D2T:
            tensors["draft/d2t"] = torch.arange(32, dtype=torch.int32) // 2  # draft id i is target id i + i // 2
        elif spec.name == HEAD and reduced:
            ids = torch.arange(32) + torch.arange(32) // 2
            tensors["draft/lm_head.weight"] = weights.get(HEAD, weights[EMBEDDING])[ids]
        elif spec.name in weights and spec.shape == weights[spec.name].shape:
            tensors[f"draft/{spec.name}"] = weights[spec.name].clone()
        else:
            tensors[f"draft/{spec.name}"] = torch.randn(spec.shape) * 0.3 + (spec.kind == "vector")
    for model in ("target", "draft"):
        tensors[f"{model}/rank.vocab_offset"] = torch.zeros(1, dtype=torch.int32)
        for spec in weight_specs(shape.models.config_of(model), replicated=model == "draft" and replicated):
            if spec.split == "vocab":  # shards hold whole blocks
                one = tensors[f"{model}/{spec.name}"]
                tensors[f"{model}/{spec.name}"] = functional.pad(one, (0, 0, 0, -len(one) % 32))
    return Pair(shape, tensors, empty_state(shape))


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
        held = {name.replace("/", "."): tensor for name, tensor in (self.pair.tensors | self.state).items()}
        names = [(one.checkpoint_key or one.user_input_key).decode() for one in meta.input_tensors]
        outputs = run_hlo(traced.program.hlo.SerializeToString(), [given[n] if n in given else held[n] for n in names])
        states = {name.replace("/", "."): name for name in self.state}
        for place, source in meta.output_aliases_to.items():
            self.state[states[names[source]]] = outputs[place]
        return outputs[: len(io.outputs)]


def phases(rows: int) -> list[GraphSpec]:
    """Every phase, both samplings, several K, and a bucket smaller than the cache."""
    return [
        GraphSpec("prefill", rows, 8, LENGTH),
        GraphSpec("prefill", rows, 8, LENGTH, sampling="stochastic"),
        GraphSpec("decode", rows, 1, LENGTH),
        GraphSpec("decode", rows, 1, 16),
        GraphSpec("decode", rows, 1, LENGTH, sampling="stochastic"),
        *(GraphSpec("speculate", rows, k + 1, LENGTH, k) for k in (1, 2, 4, 7)),
        GraphSpec("speculate", rows, 4, 16, 3),
        GraphSpec("speculate", rows, 4, LENGTH, 3, "stochastic"),
        GraphSpec("score", rows, 8, LENGTH, model="target"),
        GraphSpec("score", rows, 8, LENGTH, model="draft"),
    ]


def arguments_of(spec: GraphSpec, shape: PairSpec):
    """Ragged rows, one of them inactive, at positions that the bucket holds."""
    generator = torch.Generator().manual_seed(3)
    rows, found = spec.batch, {}
    for one in signature(spec, shape, PlainPacking()).arguments:
        found[one.name] = {
            "tokens": lambda s=one.shape: torch.randint(61, s, generator=generator),
            "lengths": lambda: [5, 8, 0, 1][:rows], "slots": lambda: [2, 0, 3, 1][:rows] if rows == 4 else [0],
            "last_token": lambda: [4, 50, 9, 0][:rows], "position": lambda: [3, 6, 0, 11][:rows],
            "active": lambda: [True, True, False, True][:rows], "temperature": lambda: [0.7, 0.0, 1.0, 1.3][:rows],
            "top_k": lambda: [0, 3, 5, 0][:rows], "top_p": lambda: [0.9, 1.0, 0.5, 1.0][:rows],
            "seed": lambda s=one.shape: torch.randint(-(2**31), 2**31 - 1, s, generator=generator),
            "copied": lambda s=one.shape: torch.randint(-30, 61, s, generator=generator).clamp(min=-1),
        }[one.name]()  # fmt: skip
    return found


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize(("family", "rows"), [*((family, 4) for family in FAMILIES), ("qwen3", 1), ("eagle3", 4)])
def test_hlo_equals_eager(sdk, family, rows, lookup):
    """Outputs and carried state of every phase, from a cache that holds something, to 1e-4; with copied drafts, too."""
    pair = make(family, rows, reduced=family == "eagle3", lookup=lookup)
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
    first = graphs.step(GraphSpec("prefill", 4, 8, LENGTH), tokens=tokens, lengths=lengths, slots=[0, 1, 2, 3])[0]
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
        assert hlo.faults(traced.program.hlo) == [], spec.name
        found = hlo.collectives(traced.program.hlo)
        assert found.get("all-reduce", 0) == sums(spec, shape), spec.name
        assert (found.get("all-gather", 0) > 0) == (tp > 1 and not (spec.model == "draft" and replicated)), spec.name


def sums(spec: GraphSpec, shape: PairSpec) -> int:
    """All-reduces of a graph: one for the embedding and two a layer, each time that a split model runs."""
    if spec.phase == "score" and spec.model == "draft" and shape.draft.eagle3 is not None:
        return (
            1 + 2 * (shape.target.layers - 1) if shape.models.tp > 1 else 0
        )  # the last layer of the target: keys alone
    runs = {"prefill": {"target": 1, "draft": 1}, "decode": {"target": 1}, "score": {spec.model: 1}}
    each = runs.get(spec.phase, {"target": 1, "draft": spec.draft_tokens})
    return sum(
        times * (1 + 2 * shape.models.config_of(m).layers) for m, times in each.items() if shape.models.tp_of(m) > 1
    )


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
    after = ("self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    unused = {"draft.model.norm.weight", *(f"draft.model.layers.0.{part}.weight" for part in after)}
    for spec in phases(4):
        traced = sdk.trace(spec, shape)
        io, meta = traced.signature, traced.program.metaneff
        named = {one.checkpoint_key.decode(): tuple(one.shape) for one in meta.input_tensors if one.checkpoint_key}
        known = {one.name.replace("/", "."): one.shape for one in io.weights + io.state}
        assert named.items() <= known.items()
        used = "target" if spec.phase == "decode" else None
        needed = {one.name for one in io.weights if used is None or one.name.startswith(used)}
        if tp == 1:
            needed -= {"target/rank.vocab_offset"}  # nothing to add on one rank
        missing = {name.replace("/", ".") for name in needed} - named.keys() - {"draft.rank.vocab_offset"}
        assert missing == (unused if spec.phase == "prefill" else set()), spec.name


HASH = """
import hashlib
from support.pairs import make_pair
from pipeline.backends.neuron.backend import NeuronBackend
from pipeline.recipe.schema import NeuronSettings
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
    assert len(manifest.graphs) == 7


def weightless(recipe: str, layers: int | None, tp: int) -> tuple[list[GraphSpec], PairSpec]:
    """Graphs and pair of a recipe from its lock, weights in its dtype, cut to so many layers, for so many ranks."""
    from pipeline.plan.lock import lock_path, pair_configs
    from pipeline.plan.lock import read as read_lock
    from pipeline.plan.plan import make_plan
    from pipeline.recipe import find, load

    path = find(recipe, ROOT / "recipes")
    parsed = load(path)
    changes = {"parallel": {"tensor": tp}, "target": {"weights": None}, "draft": {"weights": None}}
    cut = parsed.model_copy(update={p: getattr(parsed, p).model_copy(update=new) for p, new in changes.items()})
    configs = pair_configs(parsed, read_lock(lock_path(path)), str(lock_path(path)))
    if layers:
        configs = tuple(replace(config, layers=layers) for config in configs)
    plan = make_plan(cut, *configs)
    return list(plan.graphs), plan.pair


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
