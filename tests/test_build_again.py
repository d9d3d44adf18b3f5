"""Builds of what is cached in whole or in part: elsewhere, at once, killed, on a full disk, of damaged entries."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

import pipeline
from pipeline.artifact import manifest as artifact
from pipeline.artifact.manifest import content_digest
from pipeline.artifact.verify import verify
from pipeline.cache.collect import entry_stats
from pipeline.errors import HostError
from pipeline.files.unfinished import TEMP, remove
from pipeline.graphs.packing import PACKINGS
from pipeline.plan.plan import make_plan
from pipeline.progress import no_progress
from pipeline.recipe import load
from pipeline.sources.pair import resolve_pair
from pipeline.stages.compile import Job, cached
from pipeline.stages.shard import shard, shard_key
from support import tiny_build as tiny


def test_build_elsewhere_is_all_hits(tiny_built, tmp_path):
    request, _ = tiny_built
    said = []
    report = tiny.again(request, out=tmp_path / "elsewhere", validate=False, log=said.append)
    assert report.compiled == ()
    assert "compile: all 5 graphs are cached" in said
    first, second = (artifact.read(p).manifest for p in (request.out, tmp_path / "elsewhere"))
    assert [g.key for g in first.graphs] == [g.key for g in second.graphs]


def test_build_with_new_weights_compiles_nothing(tiny_built, tmp_path):
    request, _ = tiny_built
    changed = tiny.recipe(request, "pico://qwen3?layers=2", "pico://qwen3?layers=2&seed=5")
    report = tiny.again(request, recipe=changed, out=tmp_path / "out", validate=False)
    assert report.compiled == ()
    first, second = (artifact.read(p).manifest for p in (request.out, tmp_path / "out"))
    weights = [name for name in first.files if name.startswith("weights/target")]
    assert weights
    assert all(first.files[name] != second.files[name] for name in weights)


def test_prompt_lookup_switched_off_keeps_the_shards(tiny_built):
    """The key of the shards zeroed facts of graphs by name and missed `lookup`: a switch rewrote every shard."""
    request, _ = tiny_built
    changed, lines = tiny.recipe(request, ", lookup: 2", ""), []
    pair = resolve_pair(changed, base=request.base, cache=request.cache / "sources")
    plan, before = (make_plan(parsed, *(c.config for c in pair)) for parsed in (changed, request.recipe))
    assert (plan.pair.lookup, before.pair.lookup) == (False, True)
    packing = PACKINGS[changed.backend.packing]
    shards = shard(plan.pair.models, pair, packing, request.cache, lines.append, no_progress)
    assert lines == ["shard: the shards are cached"]
    assert shards.root.name == shard_key(before.pair.models, pair, packing)


def test_goldens_and_memos_lie_apart_from_graphs(tiny_built):
    """All three were entries of `cache/graphs`, so a test that removed `cache/goldens` removed nothing."""
    kinds = entry_stats(tiny_built[0].cache)
    assert kinds["memos"].entries >= kinds["graphs"].entries >= 5
    assert kinds["goldens"].entries > 0


def test_build_replaces_a_corrupted_cache_entry(tiny_built, tmp_path):
    request, _ = tiny_built
    key = tiny.cheapest_graph(request).key
    cache = tmp_path / "cache"
    shutil.copytree(request.cache, cache)
    tiny.flip(cache / "graphs" / key[:2] / key / "data")
    report = tiny.again(request, cache=cache, out=tmp_path / "out", validate=False)
    assert len(report.compiled) == 1
    verify(tmp_path / "out")


def test_build_writes_damaged_cached_shards_again(tiny_built, tmp_path):
    """Artifact and cache share files, so an edit of the one damages the other; one build later all is whole."""
    request, _ = tiny_built
    cache, said = tmp_path / "cache", []
    shutil.copytree(request.cache, cache)
    shards = sorted(cache.glob("shards/*/weights/*/*.safetensors"))
    tiny.flip(shards[0])
    shards[-1].unlink()
    tiny.again(request, cache=cache, out=tmp_path / "out", validate=False, log=said.append)
    assert any(str(shards[0].name) in line and "damaged" in line for line in said)
    assert content_digest(verify(tmp_path / "out").manifest) == content_digest(artifact.read(request.out).manifest)


def test_build_is_not_fooled_by_an_artifact_of_another_recipe(tiny_built, tmp_path):
    """The stamp of a build once outlived its artifact: recipe A, B, then A again at one output left B there."""
    request, _ = tiny_built
    out, other = tmp_path / "out", tiny.recipe(request, "pico://qwen3?layers=2", "pico://qwen3?layers=2&seed=5")
    first = tiny.again(request, out=out, validate=False)
    assert tiny.again(request, out=out, validate=False).fresh
    before = artifact.read(out).manifest.version
    tiny.again(request, recipe=other, out=out, validate=False)
    assert not (report := tiny.again(request, out=out, validate=False)).fresh
    assert (first.compiled, report.compiled) == ((), ())
    assert artifact.read(out).manifest.version == before


def test_build_elsewhere_on_another_machine_is_all_hits(tiny_built, tmp_path):
    """Another checkout, home, temp folder and cache path: only what the cache holds is the same."""
    request, _ = tiny_built
    root = Path(pipeline.__file__).parent
    shutil.copytree(root, tmp_path / "checkout" / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(request.cache, tmp_path / "moved-cache", ignore=shutil.ignore_patterns("stamps", "shards", "locks"))
    for name in ("home", "temp"):
        (tmp_path / name).mkdir()
    places = {
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "temp"),
        "PYTHONPATH": str(tmp_path / "checkout"),
    }
    moved = tmp_path / "moved-cache"
    running = tiny.forked_build(request, tmp_path / "out", moved, env=os.environ | places, cwd=tmp_path / "home")
    report = json.loads(running.result().stdout)
    assert report["compiled"] == []
    assert len(report["reused"]) == 5
    assert content_digest(verify(tmp_path / "out").manifest) == content_digest(artifact.read(request.out).manifest)


@pytest.mark.slow
def test_builds_at_once_compile_a_graph_once(tiny_built, tmp_path):
    """Three processes, one cache that lacks one graph; two of them write the same output."""
    request, _ = tiny_built
    cache = tmp_path / "cache"
    shutil.copytree(request.cache, cache)
    manifest, key = artifact.read(request.out).manifest, tiny.cheapest_graph(request).key
    shutil.rmtree(cache / "graphs" / key[:2] / key)
    children = [tiny.forked_build(request, tmp_path / out, cache) for out in ("a", "b", "b")]
    reports = [json.loads(child.result().stdout) for child in children]
    assert sorted(name for report in reports for name in report["compiled"]) == ["score-draft-b2-t16-s48"]
    assert sum(report["fresh"] for report in reports) == 1
    digests = {content_digest(verify(tmp_path / out).manifest) for out in ("a", "b")}
    assert digests == {content_digest(manifest)}


def test_build_survives_kills(tiny_built, tmp_path):
    """Killed builds leave nothing that the next one trusts wrongly: same digests as an undisturbed build."""
    request, _ = tiny_built
    cache = tmp_path / "cache"
    shutil.copytree(request.cache, cache)
    for delay_s in (0.5, 4.0, 8.0):
        shutil.rmtree(cache / "shards", ignore_errors=True)
        tiny.kill(tiny.child_build(request, tmp_path / "out", cache), delay_s)
    tiny.again(request, cache=cache, out=tmp_path / "out", validate=False)
    assert tiny.same_parts(tmp_path / "out") == tiny.same_parts(request.out)


@pytest.mark.slow
def test_build_survives_kills_at_twenty_moments_of_every_stage(tiny_built, tmp_path):
    """From a cold cache and a cold compiler scratch; what killed builds finished is kept, the rest is done again.

    Both builds have one temp folder, since paths in it end up in the compiled libraries.
    """
    request, _ = tiny_built
    draw, cache, temp = random.Random(8), tmp_path / "cache", tmp_path / "temp"
    temp.mkdir()
    env = os.environ | {"TMPDIR": str(temp)}
    calm = tiny.child_build(request, tmp_path / "calm", tmp_path / "calm-cache", env=env, validate=True)
    calm.communicate()
    assert calm.returncode == 0
    shutil.rmtree(temp)
    temp.mkdir()
    met = set()
    for stage, lost in 4 * list(tiny.STAGES.items()):
        remove(cache / "stamps")  # a build that the kill came too late for must not count as done
        if entries := sorted(cache.glob(lost)):
            remove(draw.choice(entries))  # otherwise the stage would find all its work in the cache
        child = tiny.child_build(request, tmp_path / "out", cache, env=env, validate=True)
        met.add(tiny.kill_in(child, stage, draw.uniform(0, {"compile": 8, "validate": 1.5}.get(stage, 0.1))))
    assert met >= set(tiny.STAGES), met
    last = tiny.child_build(request, tmp_path / "out", cache, env=env, validate=True)
    last.communicate()
    assert last.returncode == 0
    found = verify(tmp_path / "out").manifest
    assert found.validation["passed"]
    assert tiny.same_parts(tmp_path / "out") == tiny.same_parts(tmp_path / "calm")
    assert not list(tmp_path.glob(f"{TEMP}*"))


@pytest.mark.slow
def test_eight_builds_at_once_from_nothing(tiny_built, tmp_path):
    request, _ = tiny_built
    outs = [tmp_path / f"out-{number // 2}" for number in range(8)]
    children = [tiny.child_build(request, out, tmp_path / "cache", validate=True) for out in outs]
    reports = [json.loads(child.communicate()[0]) for child in children]
    assert len([name for report in reports for name in report["compiled"]]) == 5
    assert sum(report["fresh"] for report in reports) == 4
    assert len({content_digest(verify(out).manifest) for out in outs}) == 1
    assert tiny.same_parts(outs[0]) == tiny.same_parts(request.out)


def test_build_with_another_k_lacks_its_graph_alone(tiny_built):
    request, _ = tiny_built
    changed = tiny.recipe(request, "[2], sampling", "[2, 3], sampling")
    pair = resolve_pair(changed, base=request.base, cache=request.cache / "sources")
    plan = make_plan(changed, *(checkpoint.config for checkpoint in pair))
    jobs = [Job(spec, plan.pair, changed.backend, request.cache, request.base / "log") for spec in plan.graphs]
    assert [job.spec.name for job in jobs if cached(job) is None] == ["speculate-b2-t4-s48-k3"]


def test_a_changed_flag_affects_its_graphs_alone(tiny_built):
    request, _ = tiny_built
    both = tiny.RECIPE.replace("[greedy]", "[greedy, stochastic]")
    paths = {}
    for name, text in {
        "plain": both,
        "isa": both + "backend: {name: inductor, isa: avx2}\n",
        "keep": both.replace("stochastic]", "stochastic], candidates: 64"),
    }.items():
        paths[name] = request.base / f"{name}.yaml"
        paths[name].write_text(text)
    plain, isa, keep = (tiny.keys(request, load(path)) for path in paths.values())
    assert plain.keys() == isa.keys() == keep.keys()
    assert not set(plain.values()) & set(isa.values())
    assert {name for name in plain if plain[name] != keep[name]} == {n for n in plain if n.endswith("stochastic")}


@pytest.mark.parametrize(("limit", "missing"), [(6_000, "sources"), (100_000, "shards")])
def test_build_on_a_full_disk_leaves_nothing_half_written(tiny_built, tmp_path, limit, missing):
    """A limit on file sizes fails writes in the middle, like a full disk: in the sources, and in the shards."""
    request, _ = tiny_built
    cache = tmp_path / "cache"
    shutil.copytree(request.cache, cache, ignore=shutil.ignore_patterns(missing))
    done = tiny.forked_build(request, tmp_path / "out", cache, limit=limit).result()
    assert done.returncode == 3, done.stderr
    assert "cannot write: File too large" in done.stdout
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob(f"{TEMP}*"))
    tiny.again(request, cache=cache, out=tmp_path / "out", validate=False)
    assert tiny.same_parts(tmp_path / "out") == tiny.same_parts(request.out)


def test_build_into_a_read_only_folder_is_refused_before_anything_runs(tiny_built, tmp_path):
    request, _ = tiny_built
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="cannot write") as caught:
        tiny.again(request, cache=tmp_path / "cache", out=tmp_path / "file" / "out", validate=False)
    assert str(tmp_path / "file") in caught.value.where
    assert not (tmp_path / "cache" / "graphs").exists()


@pytest.mark.slow
def test_build_on_a_cold_machine_with_a_warm_shared_cache(tiny_built, tmp_path):
    """Zero compiles; a poisoned entry is seen, rebuilt alone, and replaced."""
    from pipeline.cache.local import Cache
    from pipeline.cache.remote import Remote, push_all

    request, first = tiny_built
    url = str(tmp_path / "shared")
    assert push_all(Cache(request.cache, "graphs"), Remote(url, "write").open("graphs")) >= len(first.compiled)
    changes = {"out": tmp_path / "out", "validate": False}
    report = tiny.again(request, cache=tmp_path / "cold", remote=Remote(url), **changes)
    assert (report.compiled, len(report.reused)) == ((), 5)
    entries = {graph.key: graph.name for graph in artifact.read(request.out).manifest.graphs}
    key = tiny.cheapest_graph(request).key
    data = next(path for path in Path(url, "graphs", key[:2], key).iterdir() if len(path.name) == 64)
    data.write_bytes(b"poison" + data.read_bytes()[6:])
    said = []
    tiny.forget(tmp_path / "cold", key)
    report = tiny.again(request, cache=tmp_path / "cold", remote=Remote(url, "write"), log=said.append, **changes)
    assert report.compiled == (entries[key],)
    assert any("expected" in line and key in line for line in said)
    tiny.forget(tmp_path / "cold", key)
    report = tiny.again(request, cache=tmp_path / "cold", remote=Remote(url), **changes)
    assert report.compiled == ()
