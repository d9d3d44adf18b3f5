"""Gates on compiled pairs, and on what is left of one after someone edits its shards."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipeline.artifact import manifest as artifact
from pipeline.artifact.manifest import FileEntry, dump
from pipeline.artifact.verify import verify
from pipeline.build import BuildSettings, run
from pipeline.cache.local import Cache
from pipeline.errors import GateError
from pipeline.recipe import load
from pipeline.registry.publish import publish
from pipeline.sources.pair import resolve_pair
from pipeline.validate.report import schema as report
from pipeline.validate.run import validate

RECIPE = """
name: half
target: {source: "pico://llama?layers=2", dtype: bfloat16}
draft: {derive: {from: target, layers: [0]}}
speculation: {draft_tokens: [1], sampling: [greedy]}
shapes: {batch: [2], prefill: [32], kv: [48]}
validate: {prompts: prompts.jsonl, max_new_tokens: 10, gates: {tokens_per_step: 1.0}}
"""
TEXTS = ["The quick brown fox", "def add(first,", "Once upon a time"]


pytestmark = pytest.mark.compile


@pytest.fixture(scope="module")
def request_(tiny_built):
    """A validated artifact, by the request that made it; tests may write its reports again."""
    return tiny_built[0]


@pytest.mark.slow
def test_bfloat16_pair_passes_and_visits_every_graph(tmp_path_factory):
    base = tmp_path_factory.mktemp("half")
    (base / "half.yaml").write_text(RECIPE)
    lines = [json.dumps({"id": f"p{i}", "class": "chat", "prompt": text}) for i, text in enumerate(TEXTS)]
    (base / "prompts.jsonl").write_text("\n".join(lines))
    request = BuildSettings(
        recipe=load(base / "half.yaml"), base=base, out=base / "out", cache=base / "cache", workers=2
    )
    run(request)
    found = report.load(request.out)
    assert found.passed
    assert {path.name for path in (request.out / "reports").iterdir()} == {
        "parity.json", "parity.html", "parity.md", "junit.xml",
    }  # fmt: skip
    assert found.parity["target"].dtype == "bfloat16"
    assert len(found.parity["target"].layers) == 2
    assert 0.3 < found.parity["target"].error_over_noise < 1.5
    check_visits(found, length=48)


def check_visits(found: report.Report, length: int) -> None:
    """Every graph was scored or driven, up to the last position that it can use."""
    scored = {graph for of in found.parity.values() for graph in of.points.graphs}
    driven = {edge.graph for edge in found.losslessness.edges}
    speculate = {name for name in found.tested.graphs if name.startswith("speculate")}
    assert scored == {name for name in found.tested.graphs if name.startswith("score")}
    assert speculate <= driven
    longest = max(found.parity["target"].points.position)
    assert longest == length - 2, "probes fill the cache to its last usable position"


def test_gates_visit_every_graph(request_):
    check_visits(report.load(request_.out), length=48)


def gates(request, root: Path) -> list[str]:
    """Run the gates on an artifact of this request; returns the lines said."""
    said: list[str] = []
    pair = resolve_pair(request.recipe, base=request.base, cache=request.cache / "sources")
    validate(root, pair, request.base, Cache(request.cache, "goldens"), said.append)
    return said


def edited(request, root: Path, change) -> Path:
    """A copy whose target shard went through `change`, with a manifest that agrees."""
    shutil.copytree(request.out, root)
    name = next(n for n in artifact.read(root).manifest.files if n.startswith("weights/target/"))
    tensors = load_file(root / name)
    change(tensors)
    (root / name).unlink()
    save_file(tensors, root / name)
    data = (root / name).read_bytes()
    manifest = artifact.read(root).manifest
    entry = FileEntry(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    changed = manifest.model_copy(update={"files": {**manifest.files, name: entry}, "validation": None})
    (root / "manifest.json").unlink()
    (root / "manifest.json").write_bytes(dump(changed))
    return root


def test_validate_again_takes_references_from_the_cache(request_):
    gates(request_, request_.out)
    goldens = report.load(request_.out).provenance.goldens
    assert all(of.computed == 0 and of.cached > 0 for of in goldens.values())


def test_edited_weights_fail_and_cannot_be_published(request_, tmp_path):
    def perturb(tensors):
        name = "model.layers.1.self_attn.v_proj.weight"
        tensors[name] = tensors[name] * 1.02

    root = edited(request_, tmp_path / "edited", perturb)
    with pytest.raises(GateError, match="values of layer 1"):
        gates(request_, root)
    found = verify(root).manifest
    assert found.validation["passed"] is False
    with pytest.raises(GateError, match="failed its gates"):
        publish(root, str(tmp_path / "registry"), ())


def test_shifted_shard_fails(request_, tmp_path):
    def shift(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].roll(1, 0)

    with pytest.raises(GateError):
        gates(request_, edited(request_, tmp_path / "edited", shift))
