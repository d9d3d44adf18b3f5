"""The Neuron backend from recipe to generated tokens, on the fakes of the SDK and of neuronx-distributed."""

import json
import shutil
import zipfile

import pytest
from neuron_lane import DEVICE, environment, run, tandem
from safetensors.torch import load_file, save_file

from pipeline import artifact

RECIPE = """
name: tiny
target: {source: "pico://qwen3?layers=2", dtype: float32}
draft: {derive: {from: target, layers: [0]}}
speculation: {draft_tokens: [2], sampling: [greedy]}
shapes: {batch: [2], prefill: [16], kv: [48]}
backend: {name: neuron, target: trn2, lnc: 2}
validate: {prompts: prompts.jsonl, max_new_tokens: 6, gates: {tokens_per_step: 1.0}}
"""
GENERATE = """
import json, sys
from pipeline import runtime
engine = runtime.load(sys.argv[1] if len(sys.argv) > 1 else {root!r})
prompts = [[5, 6, 7], [8], [1, 2, 3, 4]]
plain = [g.tokens for g in engine.generate(prompts, max_new_tokens=8, speculate=False)]
fast = [g.tokens for g in engine.generate(prompts, max_new_tokens=8)]
print(json.dumps([plain, fast]))
"""


def build(base, *, where, recipe=RECIPE, validate=True):
    base.mkdir(exist_ok=True)
    (base / "tiny.yaml").write_text(recipe)
    lines = [{"id": str(i), "class": "chat", "prompt": text} for i, text in enumerate(["a", "bc"])]
    (base / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["build", "tiny.yaml", "--out", "out", "--workers", "2", *([] if validate else ["--no-validate"])]
    return tandem(*words, where=where | {"TANDEM_CACHE": str(base / "cache")}, cwd=base)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An artifact that was built and gated on the fake device."""
    base = tmp_path_factory.mktemp("neuron")
    done = build(base, where=environment(FAKE_NEURON_LS=DEVICE))
    assert done.returncode == 0, done.stderr
    return base / "out", done


@pytest.fixture
def copy(built, tmp_path):
    """A copy to damage."""
    return shutil.copytree(built[0], tmp_path / "copy")


def seal(root):
    """Write the digests of a changed artifact into its manifest, as if it had been built so."""
    data = json.loads((root / "manifest.json").read_text())
    for name in data["files"]:
        digest = artifact.sha256_file(root / name)
        data["files"][name] = {"sha256": digest, "size": (root / name).stat().st_size}
    (root / "manifest.json").write_text(json.dumps(data))


def load(root, **device):
    return run(GENERATE.format(root=str(root)), environment(**({"FAKE_NEURON_LS": DEVICE} | device)))


def test_build_passes_its_gates_on_the_device(built):
    root, done = built
    manifest = artifact.verify(root).manifest
    assert manifest.passed
    assert manifest.requires == {"device": "neuron", "chip": "trn2", "lnc": "2"}
    assert manifest.toolchain["neuronx-cc"] == "2.24.8799.0"
    assert "parity: passed" in done.stderr


def test_graph_files_hold_neff_and_metaneff(built):
    root, _ = built
    file = next(graph.file for graph in artifact.read(root).manifest.graphs if graph.phase == "speculate")
    with zipfile.ZipFile(root / file) as archive:
        assert archive.namelist() == ["graph.neff", "metaneff.pb", "layout.json"]
        assert json.loads(archive.read("layout.json"))["flattener"] == {"layout": "(0, 1, 2)", "exclude": "None"}


def test_nothing_in_the_artifact_names_the_build_s_folders(built):
    root, _ = built
    for path in root.rglob("*"):
        if path.is_file() and path.suffix in (".zip", ".json", ".yaml", ".lock"):
            assert str(root.parent).encode() not in path.read_bytes(), path


def test_speculation_equals_plain_decode(built):
    done = load(built[0])
    assert done.returncode == 0, done.stderr
    plain, fast = json.loads(done.stdout.splitlines()[-1])
    assert plain == fast
    assert all(len(tokens) == 8 for tokens in plain)


def test_build_again_compiles_nothing(built):
    root, _ = built
    done = build(root.parent, where=environment(FAKE_NEURON_LS=DEVICE), recipe=RECIPE + "# a comment\n")
    assert "nothing changed" in done.stdout


def test_same_recipe_in_another_folder_has_the_same_keys(built, tmp_path):
    """HLO, flags and toolchain make the key: no path does."""
    done = build(tmp_path / "elsewhere", where=environment(), validate=False)
    assert done.returncode == 0, done.stderr
    keys = [[(g.name, g.key) for g in artifact.read(r).manifest.graphs] for r in (built[0], tmp_path / "elsewhere/out")]
    assert keys[0] == keys[1]


def test_host_without_a_device_builds_and_leaves_the_gates_to_one_that_has(tmp_path):
    done = build(tmp_path / "cpu", where=environment())
    assert done.returncode == 0, done.stderr
    assert "not validated: device: the artifact needs neuron, this host has none" in done.stderr
    assert artifact.read(tmp_path / "cpu/out").manifest.passed is None


def test_environment_that_changes_code_changes_the_key(tmp_path, built):
    done = build(tmp_path / "env", where=environment(NEURON_FUSE_SOFTMAX="1"), validate=False)
    assert done.returncode == 0, done.stderr
    manifests = [artifact.read(r).manifest for r in (built[0], tmp_path / "env/out")]
    assert {g.key for g in manifests[0].graphs}.isdisjoint(g.key for g in manifests[1].graphs)
    flags = json.loads((tmp_path / "env/out/graphs" / manifests[1].graphs[0].name / "flags.json").read_text())
    assert flags["env.NEURON_FUSE_SOFTMAX"] == "1"


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"NEURON_CC_FLAGS": "-O3"}, "NEURON_CC_FLAGS='-O3' is set"),
        ({"FAKE_NEURONX_CC": "fail NCC_EOOM001 70"}, "NCC_EOOM001: the graph's tensors do not fit the device's memory"),
    ],
)
def test_build_refuses_with_what_and_fix(tmp_path, where, says):
    done = build(tmp_path, where=environment(**where))
    assert done.returncode == 3
    assert says in done.stderr
    assert "fix: " in done.stderr


def test_build_refuses_flags_that_the_backend_owns(tmp_path):
    recipe = RECIPE.replace("lnc: 2}", "lnc: 2, flags: {target: trn1}}")
    done = build(tmp_path, where=environment(), recipe=recipe)
    assert done.returncode == 3
    assert "target is not a recipe's to set" in done.stderr


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("", "device: the artifact needs neuron, this host has none"),
        ("trn1.32xlarge 1 2", "chip: the artifact needs trn2, this host has trn1"),
        ("trn2.48xlarge 1 8", "lnc: the artifact needs 2, this host has 1"),
    ],
)
def test_load_refuses_another_device(built, device, says):
    done = load(built[0], FAKE_NEURON_LS=device)
    assert done.returncode != 0
    assert says in done.stderr


def test_load_refuses_a_truncated_neff(copy):
    file = next((copy / "graphs").rglob("*.zip"))
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["graph.neff"] = parts["graph.neff"][:-9]
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    seal(copy)
    done = load(copy)
    assert "truncated or damaged" in done.stderr


def test_load_refuses_a_graph_file_that_is_none(copy):
    next((copy / "graphs").rglob("*.zip")).write_bytes(b"something else")
    seal(copy)
    assert "not a graph file" in load(copy).stderr


def test_load_refuses_a_missing_shard(copy):
    (copy / "weights/draft/rank-0-of-1.safetensors").unlink()
    data = json.loads((copy / "manifest.json").read_text())
    del data["files"]["weights/draft/rank-0-of-1.safetensors"]
    data["shards"] = [shard for shard in data["shards"] if shard["model"] != "draft"]
    (copy / "manifest.json").write_text(json.dumps(data))
    done = load(copy)
    assert "the draft's weights of rank 0 are missing; the artifact has 1 ranks" in done.stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("model.norm.weight"), "rank 0 has no target.model.norm.weight"),
        (lambda w: w.update({"model.nrm.weight": w["model.norm.weight"]}), "no graph knows target.model.nrm.weight"),
        (
            lambda w: w.update({"model.norm.weight": w["model.norm.weight"][:5].clone()}),
            "rank 0: target.model.norm.weight is [5] float32, its graphs need [",
        ),
        (
            lambda w: w.update({"model.norm.weight": w["model.norm.weight"].half()}),
            "float16, its graphs need [",
        ),
    ],
)
def test_load_refuses_shards_that_are_not_the_graphs_weights(copy, change, says):
    """NxD drops unknown names with a warning, so the sets are compared here."""
    path = copy / "weights/target/rank-0-of-1.safetensors"
    weights = load_file(path)
    change(weights)
    path.unlink()
    save_file(weights, path)
    seal(copy)
    assert says in load(copy).stderr


TRACE = """
from dataclasses import replace
from pairs import make_pair
from pipeline.backends.neuron.backend import NeuronBackend, check_names
from pipeline.plan import GraphSpec
from pipeline.signature import signature
from pipeline.backends.packing import PlainPacking
backend = NeuronBackend("trn2", 2)
pair = replace(make_pair("some", candidates=16).shape, tp=2)
"""


def test_graph_of_two_ranks_is_another_graph():
    code = (
        TRACE
        + """
spec = GraphSpec("decode", 4, 1, 40)
one, two = (backend.trace(spec, replace(pair, tp=tp)).ir for tp in (1, 2))
print(one != two)
"""
    )
    assert run(code, environment()).stdout.splitlines()[-1] == "True"


def test_trace_refuses_names_that_the_shards_do_not_have():
    code = (
        TRACE
        + """
spec = GraphSpec("score", 4, 4, 40, model="draft")
traced = backend.trace(spec, pair)
meta = traced.program.metaneff
meta.input_tensors[3].checkpoint_key = b"draft.misspelled"
meta.output_aliases_to.clear()
check_names(spec, traced.signature, meta)
"""
    )
    done = run(code, environment())
    assert "draft.misspelled is in the trace, but not in the shards" in done.stderr
    assert "draft.k.0 is written, but not carried" in done.stderr


def test_state_mutated_in_place_is_refused_by_the_sdk():
    """The seam of the CPU backend writes caches in place; ModelBuilder must not be handed that."""
    code = (
        TRACE
        + """
from neuron_lane import FAKE
import os
os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"] = "trn2"
import pipeline.backends.neuron.backend as module
from pipeline.models.parallel import Seams
module.NeuronSeams = lambda tp: Seams()
backend.trace(GraphSpec("decode", 4, 1, 40), replace(pair, tp=1))
"""
    )
    assert "mutated in place, which ModelBuilder V2 does not support" in run(code, environment()).stderr
