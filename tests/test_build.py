"""The whole pipeline on a tiny pair: build once, then everything that follows from it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import transformers

from pipeline import artifact, runtime
from pipeline.build import Request, run
from pipeline.errors import ArtifactError, InputError
from pipeline.recipe import load
from pipeline.sources import resolve_pair

RECIPE = """
name: tiny
target: {source: "pico://qwen3?layers=2", dtype: float32}
draft: {derive: {from: target, layers: [0]}}
speculation: {draft_tokens: [2], sampling: [greedy]}
shapes: {batch: [2], prefill: [16], kv: [48]}
validate: {prompts: prompts.jsonl, max_new_tokens: 10, gates: {tokens_per_step: 1.0}}
"""


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A validated artifact, the request that made it, and its report."""
    base = tmp_path_factory.mktemp("tiny")
    (base / "tiny.yaml").write_text(RECIPE)
    (base / "prompts.jsonl").write_text(
        "".join(json.dumps({"id": str(i), "class": "chat", "prompt": t}) + "\n" for i, t in enumerate(["a", "bc", "d"]))
    )
    request = Request(recipe=load(base / "tiny.yaml"), base=base, out=base / "out", cache=base / "cache", workers=2)
    return request, run(request)


def again(request, **changes):
    fields = {name: getattr(request, name) for name in ("recipe", "base", "out", "cache", "workers", "validate")}
    return run(Request(**(fields | changes)))


def recipe(request, old, new):
    path = request.base / "changed.yaml"
    path.write_text(RECIPE.replace(old, new))
    return load(path)


def test_build_compiles_every_graph_and_passes_its_gates(built):
    request, report = built
    assert len(report.compiled) == 5
    manifest = artifact.verify(request.out).manifest
    assert manifest.validation["passed"]
    assert {path.name for path in (request.out / "reports").iterdir()} >= {"parity.json", "junit.xml"}


def test_build_again_does_nothing_without_torch(built):
    request, _ = built
    code = (
        "import sys, pathlib; from pipeline.build import Request, run; from pipeline.recipe import load\n"
        f"base = pathlib.Path({str(request.base)!r})\n"
        "r = run(Request(recipe=load(base / 'tiny.yaml'), base=base, out=base / 'out', cache=base / 'cache'))\n"
        "assert r.fresh and 'torch' not in sys.modules, r; print(r.seconds)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 1.0


def test_build_elsewhere_is_all_hits(built, tmp_path):
    request, _ = built
    report = again(request, out=tmp_path / "elsewhere", validate=False)
    assert report.compiled == []
    first, second = (artifact.read(p).manifest for p in (request.out, tmp_path / "elsewhere"))
    assert [g.key for g in first.graphs] == [g.key for g in second.graphs]


def test_build_with_new_weights_compiles_nothing(built, tmp_path):
    request, _ = built
    changed = recipe(request, "pico://qwen3?layers=2", "pico://qwen3?layers=2&seed=5")
    report = again(request, recipe=changed, out=tmp_path / "out", validate=False)
    assert report.compiled == []
    first, second = (artifact.read(p).manifest for p in (request.out, tmp_path / "out"))
    weights = [name for name in first.files if name.startswith("weights/target")]
    assert weights
    assert all(first.files[name] != second.files[name] for name in weights)


def test_build_with_another_bucket_compiles_its_graphs_alone(built, tmp_path):
    request, _ = built
    changed = recipe(request, "prefill: [16]", "prefill: [16, 24]")
    report = again(request, recipe=changed, out=tmp_path / "out", validate=False)
    assert report.compiled == ["prefill-b2-t24-s48"]


def test_build_survives_kill_at_any_moment(built, tmp_path):
    """Killed builds leave nothing that the next one trusts wrongly: same digests as an undisturbed build."""
    request, _ = built
    code = (
        "import sys, pathlib; from pipeline.build import Request, run; from pipeline.recipe import load\n"
        "base, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])\n"
        "recipe = load(base / 'tiny.yaml')\n"
        "run(Request(recipe=recipe, base=base, out=out, cache=base / 'cache', workers=1, validate=False))"
    )
    out = tmp_path / "out"
    for delay_s in (0.4, 2.0, 5.0):
        shutil.rmtree(request.cache / "shards", ignore_errors=True)
        child = subprocess.Popen([sys.executable, "-c", code, str(request.base), str(out)], start_new_session=True)
        time.sleep(delay_s)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    again(request, out=out, validate=False)
    killed, calm = artifact.verify(out).manifest.files, artifact.read(request.out).manifest.files
    aside = ("reports/", "provenance.json", "sbom.cdx.json")  # provenance tells where and when; nothing else may differ
    same = {name: entry for name, entry in calm.items() if not name.startswith(aside)}
    assert {name: entry for name, entry in killed.items() if not name.startswith(aside)} == same


def test_build_replaces_a_corrupted_cache_entry(built, tmp_path):
    request, _ = built
    key = artifact.read(request.out).manifest.graphs[0].key
    cache = tmp_path / "cache"
    shutil.copytree(request.cache, cache)
    data = cache / "graphs" / key[:2] / key / "data"
    data.chmod(0o644)
    spoiled = bytearray(data.read_bytes())
    spoiled[len(spoiled) // 2] ^= 1
    data.write_bytes(spoiled)
    report = again(request, cache=cache, out=tmp_path / "out", validate=False)
    assert len(report.compiled) == 1
    artifact.verify(tmp_path / "out")


def test_engine_equals_transformers_token_by_token(built):
    """More prompts than rows, ragged, to the end of the cache: speculation, plain decode and transformers agree."""
    request, _ = built
    target, _ = resolve_pair(request.recipe, base=request.base, cache=request.cache / "sources")
    model = transformers.AutoModelForCausalLM.from_pretrained(target.root, dtype=torch.float32)
    prompts = [[5, 6, 7], [200], list(range(40, 56)), [9, 9], [17, 300, 4, 5, 6]]
    engine = runtime.load(request.out)
    speculative = engine.generate(prompts, max_new_tokens=60)
    plain = engine.generate(prompts, max_new_tokens=60, speculate=False)
    assert [g.tokens for g in speculative] == [g.tokens for g in plain]
    for prompt, answer in zip(prompts, speculative, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=48 - len(prompt), do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert answer.tokens == expected
        assert answer.finish_reason == ("stop" if answer.tokens[-1] in engine.manifest.eos_ids else "length")
    assert engine.stats()["speculative_steps"] < engine.stats()["tokens"]


def test_engine_refuses_what_the_artifact_does_not_have(built):
    engine = runtime.load(built[0].out)
    with pytest.raises(InputError, match="stochastic sampling was not built"):
        engine.generate([[1]], max_new_tokens=4, temperature=1.0)
    with pytest.raises(InputError, match="1 to 16"):
        engine.generate([[1] * 17], max_new_tokens=4)
    with pytest.raises(InputError, match="K=9"):
        engine.generate([[1]], max_new_tokens=4, draft_tokens=9)


def test_graphs_do_not_copy_caches(built):
    """Generated code allocates no buffer of a cache's shape: states are written in place."""
    request, _ = built
    folder = next((request.out / "graphs").glob("speculate-*"))
    io = json.loads((folder / "io.json").read_text())
    cache = next(t for t in io["state"] if t["name"].startswith("target/k"))["shape"]
    with zipfile.ZipFile(folder / "graph.pt2") as package:
        name = next(n for n in package.namelist() if n.endswith(".wrapper.cpp"))
        source = package.read(name).decode()
    shape = ", ".join(f"{n}L" for n in cache)
    arrays = re.findall(r"(int_array_\d+)\[\] = \{" + re.escape(shape) + r"\}", source)
    allocated = re.findall(r"aoti_torch_empty_strided\w*\((?:\d+, )?(int_array_\d+)", source)
    assert allocated, "the generated code names its allocations differently; mend this test"
    assert not set(arrays) & set(allocated)


def test_load_refuses_a_flipped_bit(built, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(built[0].out, copy)
    victim = next(copy.glob("weights/target/*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-5] ^= 4
    Path(victim).chmod(0o644)
    victim.write_bytes(data)
    with pytest.raises(ArtifactError, match="weights/target"):
        runtime.load(copy)


def test_build_on_a_cold_machine_with_a_warm_shared_cache(built, tmp_path):
    """Zero compiles; a poisoned entry is seen, rebuilt alone, and replaced."""
    from pipeline.cache import Cache
    from pipeline.remote_cache import Remote, push_all

    request, first = built
    url = str(tmp_path / "shared")
    assert push_all(Cache(request.cache), Remote(url, "write").open()) >= len(first.compiled)
    changes = {"out": tmp_path / "out", "validate": False}
    report = again(request, cache=tmp_path / "cold", remote=Remote(url), **changes)
    assert (report.compiled, len(report.reused)) == ([], 5)
    entries = {graph.key: graph.name for graph in artifact.read(request.out).manifest.graphs}
    key = sorted(entries)[0]
    data = next(path for path in Path(url, "graphs", key[:2], key).iterdir() if path.name != "entry.json")
    data.write_bytes(b"poison" + data.read_bytes()[6:])
    said = []
    report = again(request, cache=tmp_path / "colder", remote=Remote(url, "write"), say=said.append, **changes)
    assert report.compiled == [entries[key]]
    assert any("should be" in line and key in line for line in said)
    report = again(request, cache=tmp_path / "coldest", remote=Remote(url), **changes)
    assert report.compiled == []
