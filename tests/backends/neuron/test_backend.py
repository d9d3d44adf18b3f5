"""The Neuron backend from recipe to generated tokens, on the fakes of the SDK and of neuronx-distributed."""

import json
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.artifact import manifest as artifact
from pipeline.artifact.verify import verify
from pipeline.backends.base import Traced, cache_key
from pipeline.backends.neuron import graph_file, support
from pipeline.backends.neuron import runtime as neuron
from pipeline.backends.neuron.backend import NeuronBackend
from pipeline.errors import ArtifactError
from pipeline.files.atomic import sha256_file
from pipeline.graphs.packing import InOutPacking, PlainPacking
from pipeline.graphs.signature import Signature, TensorSpec, signature
from pipeline.graphs.spec import GraphSpec, PairSpec
from pipeline.models.weights import NORM
from pipeline.recipe.backend_settings import NeuronSettings
from pipeline.stages.shard_files import write_shards
from support.checkpoints import write_checkpoint
from support.neuron_lane import DEVICE, environment, run, tandem
from support.shards import opened, pair_of

RECIPE = """
name: tiny
target: {source: "pico://qwen3?layers=1", dtype: float32}
draft: {derive: {from: target, layers: [0]}}
speculation: {draft_tokens: [2], sampling: [greedy]}
shapes: {batch: [2], prefill: [16], kv: [48]}
backend: {name: neuron, target: trn2, lnc: 2}
validate: {prompts: prompts.jsonl, max_new_tokens: 6, gates: {tokens_per_step: 1.0}}
"""
LOAD = """
import json, os
from pipeline import runtime
from pipeline.errors import TandemError
said = {{}}
for name, (root, device) in {cases!r}.items():
    os.environ["FAKE_NEURON_LS"] = device
    try:
        engine = runtime.load(root)
        prompts = [[5, 6, 7], [8], [1, 2, 3, 4]]
        plain = [g.tokens for g in engine.generate(prompts, max_new_tokens=8, speculate=False)]
        fast = [g.tokens for g in engine.generate(prompts, max_new_tokens=8)]
        said[name] = "loaded, and speculation equals plain decode" if plain == fast else f"{{plain}} {{fast}}"
    except TandemError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def build(base, *, where, recipe=RECIPE):
    base.mkdir(exist_ok=True)
    (base / "tiny.yaml").write_text(recipe)
    lines = [{"id": str(i), "class": "chat", "prompt": text} for i, text in enumerate(["a", "bc"])]
    (base / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["build", "tiny.yaml", "--out", "out", "--workers", "1"]
    return tandem(*words, where=where | {"TANDEM_CACHE": str(base / "cache")}, cwd=base)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An artifact that was built and gated on the fake device."""
    base = tmp_path_factory.mktemp("neuron")
    done = build(base, where=environment(FAKE_NEURON_LS=DEVICE))
    assert done.returncode == 0, done.stderr
    return base / "out", done


def seal(root):
    """Write the digests of a changed artifact into its manifest, as if it had been built so."""
    data = json.loads((root / "manifest.json").read_text())
    data["files"] = {name: entry for name, entry in data["files"].items() if (root / name).is_file()}
    for name in data["files"]:
        data["files"][name] = {"sha256": sha256_file(root / name), "size": (root / name).stat().st_size}
    data["shards"] = [shard for shard in data["shards"] if shard["file"] in data["files"]]
    (root / "manifest.json").write_text(json.dumps(data))


def cut_neff(root):
    file = next((root / "graphs").rglob("*.zip"))
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["graph.neff"] = parts["graph.neff"][:-9]
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


def edit_weights(change, packing="in-out"):
    def damage(root):
        path = root / "weights/target/rank-0-of-1.safetensors"
        weights = load_file(path)
        change(weights)
        path.unlink()
        save_file(weights, path, {"packing": packing})

    return damage


DAMAGES = {
    "cut": (cut_neff, "truncated or damaged"),
    "no zip": (lambda root: next((root / "graphs").rglob("*.zip")).write_bytes(b"else"), "not a graph file"),
    "no shard": (
        lambda root: (root / "weights/draft/rank-0-of-1.safetensors").unlink(),
        "the draft's weights of rank 0 are missing; the artifact has 1 ranks",
    ),
    "no weight": (edit_weights(lambda w: w.pop(NORM)), f"rank 0 has no target.{NORM}"),
    "unknown weight": (
        edit_weights(lambda w: w.update({"model.nrm": w[NORM].clone()})), "target.model.nrm is in no graph",
    ),
    "other shape": (
        edit_weights(lambda w: w.update({NORM: w[NORM][:5].clone()})),
        f"rank 0: target.{NORM} is [5] float32, expected [",
    ),
    "other layouts": (
        edit_weights(lambda w: None, "plain"), "found weights in layout plain (weights/target/rank-0-of-1.safetensors)",
    ),
    "unknown layout": (edit_weights(lambda w: None, "new"), "expected in-out, or plain for all of them"),
    "other dtype": (edit_weights(lambda w: w.update({NORM: w[NORM].half()})), "float16, expected ["),
}  # fmt: skip
DEVICES = {
    "": "device: the artifact needs neuron, this host has none",
    "trn1.32xlarge 1 2": "chip: the artifact needs trn2, this host has trn1",
    "trn2.48xlarge 1 8": "lnc: the artifact needs 2, this host has 1",
    DEVICE: "loaded, and speculation equals plain decode",
}


@pytest.fixture(scope="module")
def loads(built, tmp_path_factory):
    """What loading says of every damaged copy, and of the sound artifact on other devices: one process for all."""
    base, cases = tmp_path_factory.mktemp("damaged"), {device: (str(built[0]), device) for device in DEVICES}
    for name, (damage, _) in DAMAGES.items():
        copy = shutil.copytree(built[0], base / name)
        damage(copy)
        seal(copy)
        cases[name] = (str(copy), DEVICE)
    done = run(LOAD.format(cases=cases), environment())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_build_passes_its_gates_on_the_device(built):
    root, done = built
    manifest = verify(root).manifest
    assert manifest.passed
    assert manifest.validation["ran_on"] == {"device": "neuron", "chip": "trn2", "lnc": "2"} == manifest.requires
    assert manifest.toolchain["neuronx-cc"] == "2.24.8799.0"
    assert "parity: passed" in done.stderr


def test_graph_files_hold_neff_and_metaneff(built):
    root, _ = built
    file = next(graph.file for graph in artifact.read(root).manifest.graphs if graph.spec.phase == "speculate")
    with zipfile.ZipFile(root / file) as archive:
        assert archive.namelist() == ["graph.neff", "metaneff.pb", "layout.json"]
        assert json.loads(archive.read("layout.json"))["flattener"] == {"layout": "(0, 1, 2)", "exclude": "None"}


def test_nothing_in_the_artifact_names_the_build_s_folders(built):
    root, _ = built
    for path in root.rglob("*"):
        if path.is_file() and path.suffix in (".zip", ".json", ".yaml", ".lock"):
            assert str(root.parent).encode() not in path.read_bytes(), path


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The same recipe, built in another folder on a host without a device."""
    base = tmp_path_factory.mktemp("hostless") / "elsewhere"
    return base, build(base, where=environment())


@pytest.mark.slow
def test_host_without_a_device_builds_the_same_and_leaves_the_gates_to_one_that_has(built, elsewhere):
    """The key is HLO, flags and toolchain: another folder, no device, the same keys."""
    base, done = elsewhere
    assert done.returncode == 0, done.stderr
    assert "not validated: " in done.stderr
    assert "device: the artifact needs neuron, this host has none" in done.stderr
    here, there = (artifact.read(root).manifest for root in (built[0], base / "out"))
    assert there.passed is None
    assert [(g.name, g.key) for g in here.graphs] == [(g.name, g.key) for g in there.graphs]


@pytest.mark.slow
def test_validate_on_device_adds_its_verdict_to_what_a_host_without_one_built(elsewhere, tmp_path):
    base, _ = elsewhere
    root = shutil.copytree(base / "out", tmp_path / "out")
    words = ["validate", str(root), "--on-device", "--recipe", str(base / "tiny.yaml")]
    cache = {"TANDEM_CACHE": str(base / "cache")}
    refused = tandem(*words, where=environment() | cache, cwd=base)
    assert refused.returncode == 2
    assert "device: the artifact needs neuron, this host has none" in refused.stderr
    before = verify(root).manifest
    assert before.passed is None
    done = tandem(*words, where=environment(FAKE_NEURON_LS=DEVICE) | cache, cwd=base)
    assert done.returncode == 0, done.stderr
    after = verify(root).manifest
    assert after.passed
    assert after.validation["ran_on"] == {"device": "neuron", "chip": "trn2", "lnc": "2"}
    assert after.version == before.version
    assert after.files.keys() >= {"reports/parity.json", "reports/parity.html", "reports/junit.xml"}


@pytest.mark.slow
def test_shards_of_two_ranks_with_a_replicated_draft(built, tmp_path):
    """Ranks share the draft's tensors, put together they hold the target; all graphs and both ranks make one NxDModel.

    The fake device has one core, so they are not run.
    """
    done = build(tmp_path, where=environment(), recipe=RECIPE + "parallel: {tensor: 2}\n")
    assert done.returncode == 0, done.stderr
    root, manifest = tmp_path / "out", verify(tmp_path / "out").manifest
    graphs = {one.name: graph_file.read_graph(root, one, lnc=2) for one in manifest.graphs}
    ranks = neuron.read_weights(root, manifest)
    neuron.check_weights(graphs, ranks, root)
    (alone,) = neuron.read_weights(built[0], artifact.read(built[0]).manifest)
    first, second = ranks
    assert first.keys() == second.keys()
    own = first.keys() - alone.keys()  # on one rank the draft reads the target's embedding
    assert own == {"draft.model.embed_tokens.weight"}
    for name in first:
        if name.startswith("draft."):
            assert first[name] is second[name], name
    for name, whole in alone.items():
        if not name.startswith("draft.") and name != "target.rank.vocab_offset":
            if name.endswith(("qkv_proj.weight", "gate_up_proj.weight")):
                continue  # columns of several matrices: tests/stages/test_in_out.py
            joined = [torch.cat([first[name], second[name]], dim) for dim in range(whole.dim())]
            cut = [one[tuple(slice(size) for size in whole.shape)] for one in joined]  # without padding
            assert any(torch.equal(one, whole) for one in [*cut, first[name]]), name
    rows = len(first["target.model.embed_tokens.weight"])
    assert [rank["target.rank.vocab_offset"].item() for rank in ranks] == [0, rows]
    device = {"one core": (str(root), "trn2.48xlarge 2 1")}
    said = json.loads(run(LOAD.format(cases=device), environment()).stdout.splitlines()[-1])
    assert "the artifact needs 2 cores, this host has 1" in said["one core"]


@pytest.mark.parametrize("stored", [PlainPacking(), InOutPacking()], ids=lambda packing: packing.name)
def test_shards_are_those_that_the_graphs_were_traced_for(tmp_path, stored):
    """An earlier version's artifact has plain shards, and its graphs say so; a mixture of both kinds is refused."""
    write_checkpoint(tmp_path / "m")
    target = opened(tmp_path / "m", tmp_path)
    models = pair_of(target, target, tp=2)
    files = write_shards(models, target, target, tmp_path, packing=stored)
    entries = {
        str(file.path.relative_to(tmp_path)): artifact.FileEntry(sha256=file.sha256, size=file.size) for file in files
    }
    spec, pair = GraphSpec("speculate", 4, 3, 40, 2), PairSpec(models, 4, 40)
    ranks = neuron.read_weights(tmp_path, artifact.PairManifest.model_construct(pair=pair, files=entries))
    for traced in (PlainPacking(), InOutPacking()):
        graph = graph_file.Graph(spec, signature(spec, pair, traced), b"", {})
        if traced.name == stored.name:
            neuron.check_weights({spec.name: graph}, ranks, tmp_path)
            continue
        with pytest.raises(ArtifactError, match=r"rank 0 has no target.model.layers.0.self_attn."):
            neuron.check_weights({spec.name: graph}, ranks, tmp_path)


def test_environment_that_changes_code_changes_the_key(monkeypatch):
    backend, traced = NeuronBackend(NeuronSettings(name="neuron", target="trn2", lnc=2)), Traced(b"ir", None)
    plain = cache_key(traced, backend.toolchain(), backend.flags())
    monkeypatch.setitem(support.AT_START, "NEURON_RT_LOG_LEVEL", "INFO")
    assert cache_key(traced, backend.toolchain(), backend.flags()) == plain
    monkeypatch.setitem(support.AT_START, "NEURON_FUSE_SOFTMAX", "1")
    assert backend.flags()["env.NEURON_FUSE_SOFTMAX"] == "1"
    assert cache_key(traced, backend.toolchain(), backend.flags()) != plain


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"NEURON_CC_FLAGS": "-O3"}, "NEURON_CC_FLAGS='-O3' is set"),
        pytest.param(
            {"FAKE_NEURONX_CC": "fail NCC_EOOM001 70"},
            "NCC_EOOM001: the graph's tensors do not fit the device's memory",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_build_refuses_with_what_and_fix(tmp_path, where, says):
    done = build(tmp_path, where=environment(**where))
    assert done.returncode == 3
    assert says in done.stderr
    assert "fix: " in done.stderr


def test_flags_that_the_backend_owns_are_refused():
    backend = NeuronBackend(NeuronSettings(name="neuron", target="trn2", lnc=2, flags={"--target": "trn1"}))
    assert backend.preflight()[0].what == "target cannot be set by a recipe"


@pytest.mark.parametrize("device", DEVICES)
def test_load_on_devices(loads, device):
    assert DEVICES[device] in loads[device]


@pytest.mark.parametrize("name", DAMAGES)
def test_load_refuses_damage(loads, name):
    """NxD drops unknown names with a warning, so the sets are compared; a NEFF's header tells its length."""
    assert DAMAGES[name][1] in loads[name]


@pytest.mark.parametrize(("length", "kind"), [(48, "float32"), (40, "bfloat16")])
def test_graphs_that_disagree_on_a_state_are_refused(length, kind):
    """Buckets share the caches: NxDModel would make them as its first graph says."""

    def graph(length, kind):
        io = Signature((), (TensorSpec("target/k.0", (4, 2, length, 8), kind),), (), ())
        return graph_file.Graph(GraphSpec("decode", 4, 1, length), io, b"", {})

    assert neuron.states([graph(40, "float32")] * 2).keys() == {"target/k.0"}
    with pytest.raises(ArtifactError, match=r"target/k.0 is \(4, 2, 40, 8\) in one graph"):
        neuron.states([graph(40, "float32"), graph(length, kind)])


TRACE = """
import os
from dataclasses import replace
from support.pairs import make_pair
from pipeline.backends.neuron import backend as module
from pipeline.models.parallel import Seams
from pipeline.graphs.spec import GraphSpec
from pipeline.recipe.backend_settings import NeuronSettings

backend = module.NeuronBackend(NeuronSettings(name="neuron", target="trn2", lnc=2))
one = make_pair("some", candidates=16).shape
pair = replace(one, models=replace(one.models, tp=2))
spec = GraphSpec("score", 4, 4, 40, model="draft")
target = GraphSpec("score", 4, 4, 40, model="target")
print(backend.trace(target, pair).ir != backend.trace(target, one).ir)
traced = backend.trace(spec, pair)
meta = traced.program.metaneff
meta.input_tensors[3].checkpoint_key = b"draft.misspelled"
meta.output_aliases_to.clear()
try:
    module.check_names(spec, traced.signature, meta)
except Exception as error:
    print(error)
class InPlace(module.NeuronSeams):
    write, put_row = Seams.write, Seams.put_row
module.NeuronSeams = InPlace
try:
    backend.trace(spec, pair)
except Exception as error:
    print(error)
"""


@pytest.mark.slow
def test_trace_of_ranks_of_wrong_names_and_of_state_in_place():
    """Two ranks are another graph; names that no shard has are refused; the CPU's in-place caches are by the SDK."""
    done = run(TRACE, environment())
    assert done.returncode == 0, done.stderr
    differ, names, in_place = done.stdout.splitlines()
    assert differ == "True"
    assert "draft.misspelled is in the trace but not in the shards" in names
    assert "draft.k.0 is written but not aliased" in names
    assert "mutated in place, which ModelBuilder V2 does not support" in in_place
