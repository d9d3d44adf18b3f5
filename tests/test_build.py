"""The whole pipeline on a tiny pair: build once, then everything that follows from it."""

import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import pipeline
from pipeline import runtime
from pipeline.artifact import manifest as artifact
from pipeline.artifact.manifest import content_digest
from pipeline.artifact.verify import verify
from pipeline.build import run, run_all
from pipeline.cache.collect import entry_stats
from pipeline.errors import ArtifactError, GateError, HostError, InputError
from pipeline.files.atomic import digest_file
from pipeline.files.unfinished import TEMP, remove
from pipeline.graphs.packing import PACKINGS
from pipeline.plan.forecast import forecast
from pipeline.plan.history import History
from pipeline.plan.plan import make_plan
from pipeline.progress import duration, no_progress
from pipeline.recipe import load
from pipeline.recipe.schema import Publish
from pipeline.registry.publish import publish
from pipeline.sources.pair import resolve_pair
from pipeline.stages.compile import Compiled, Job, cached
from pipeline.stages.shard import shard, shard_key
from pipeline.stages.took import BuildClock, recorded, work_of
from support import tiny_build as tiny
from support.paths import ROOT


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A validated artifact, the request that made it, and its report."""
    request = tiny.request_in(tmp_path_factory.mktemp("tiny"))
    return request, run(request)


def test_build_compiles_every_graph_and_passes_its_gates(built):
    request, report = built
    assert len(report.compiled) == 5
    manifest = verify(request.out).manifest
    assert manifest.validation["passed"]
    assert {path.name for path in (request.out / "reports").iterdir()} >= {"parity.json", "junit.xml"}


def test_build_again_does_nothing_without_torch(built):
    request, _ = built
    code = (
        "import sys, pathlib; from pipeline.build import BuildSettings, run; from pipeline.recipe import load\n"
        f"base = pathlib.Path({str(request.base)!r})\n"
        "r = run(BuildSettings(recipe=load(base / 'tiny.yaml'), base=base, out=base / 'out', cache=base / 'cache'))\n"
        "assert r.fresh and 'torch' not in sys.modules, r; print(r.seconds)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 1.0


def test_build_elsewhere_is_all_hits(built, tmp_path):
    request, _ = built
    said = []
    report = tiny.again(request, out=tmp_path / "elsewhere", validate=False, log=said.append)
    assert report.compiled == ()
    assert "compile: all 5 graphs are cached" in said
    first, second = (artifact.read(p).manifest for p in (request.out, tmp_path / "elsewhere"))
    assert [g.key for g in first.graphs] == [g.key for g in second.graphs]


def test_build_sends_weights_and_makes_no_release(built, tmp_path):
    request, _ = built
    registry = tmp_path / "registry"
    recipe = request.recipe.model_copy(update={"publish": (Publish(to=str(registry)),)})
    settings = replace(request, recipe=recipe, out=tmp_path / "out", validate=False, send_weights=True)
    artifact_root = run(settings).artifact
    weights = {digest_file(path).sha256 for path in (artifact_root / "weights").rglob("*.safetensors")}
    assert weights
    assert weights <= {path.name for path in (registry / "blobs").rglob("*") if path.is_file()}
    with pytest.raises(GateError):
        publish(artifact_root, str(registry))


def test_build_with_new_weights_compiles_nothing(built, tmp_path):
    request, _ = built
    changed = tiny.recipe(request, "pico://qwen3?layers=2", "pico://qwen3?layers=2&seed=5")
    report = tiny.again(request, recipe=changed, out=tmp_path / "out", validate=False)
    assert report.compiled == ()
    first, second = (artifact.read(p).manifest for p in (request.out, tmp_path / "out"))
    weights = [name for name in first.files if name.startswith("weights/target")]
    assert weights
    assert all(first.files[name] != second.files[name] for name in weights)


def test_build_with_another_bucket_compiles_its_graphs_alone(built, tmp_path):
    request, _ = built
    changed, said = tiny.recipe(request, "prefill: [16]", "prefill: [16, 24]"), []
    report = tiny.again(request, recipe=changed, out=tmp_path / "out", validate=False, log=said.append)
    assert report.compiled == ("prefill-b2-t24-s48",)
    target, draft = resolve_pair(changed, base=request.base, cache=request.cache / "sources")
    plan = make_plan(changed, target.config, draft.config)
    expected = forecast(plan, work_of(request), History(request.cache).builds()[1:])
    seconds = expected.graphs[report.compiled[0]].seconds
    assert any("compile: 6 graphs, 5 cached, 2 at a time; logs in" in line for line in said)
    (planned,) = [line for line in said if line.startswith("plan: about ")]
    assert f"compile {duration(seconds + expected.headers_s)}" in planned
    total = sum(of.expected_s for of in report.stages.values())
    near = (-1, -0.5, 0, 0.5, 1)  # both are sums of rounded times
    assert planned.startswith(tuple(f"plan: about {duration(total + by)} (still to do: " for by in near))


def test_build_is_recorded_for_the_next_plan(built):
    """The plan stated constants, whatever builds had taken on this machine."""
    request, report = built
    first = History(request.cache).builds()[-1]
    assert set(first.stages) == {"sources", "shard", "package", "reference", "gates"}
    assert len(first.graphs) == len(report.compiled) == 5
    assert all(graph.seconds > 0 and graph.size_bytes > 0 for graph in first.graphs)
    assert all(graph.memory_bytes > 100 << 20 for graph in first.graphs), "of a process with torch"
    assert report.stages["compile"].took_s > 0
    assert report.stages["compile"].expected_s > 0
    pair = resolve_pair(request.recipe, base=request.base, cache=request.cache / "sources")
    plan = make_plan(request.recipe, *(checkpoint.config for checkpoint in pair))
    expected = forecast(plan, work_of(request), [first])
    assert expected.basis == "estimates from 1 recorded build"
    assert all(graph.recorded for graph in expected.graphs.values())
    assert expected.stages["gates"] == first.stages["gates"]


def test_times_of_a_cluster_are_not_those_of_this_machine(built, tmp_path):
    request, _ = built
    clock = BuildClock(replace(request, cache=tmp_path / "cache", executor="ray"))
    pair = resolve_pair(request.recipe, base=request.base, cache=request.cache / "sources")
    plan = make_plan(request.recipe, *(checkpoint.config for checkpoint in pair))
    with recorded(clock, [Compiled(plan.graphs[0], "key", hit=False, seconds=9.0)]):
        clock.plan(plan)
        clock.expect([], 1)
    assert [build.graphs for build in History(tmp_path / "cache").builds()] == [()]


def test_a_record_that_cannot_be_written_fails_no_build(built, tmp_path):
    request, _ = built
    lines: list[str] = []
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/history").write_text("no folder")
    clock = BuildClock(replace(request, cache=tmp_path / "cache", log=lines.append))
    with recorded(clock, []):
        pair = resolve_pair(request.recipe, base=request.base, cache=request.cache / "sources")
        clock.plan(make_plan(request.recipe, *(checkpoint.config for checkpoint in pair)))
        clock.expect([], 1)
    assert lines[0].startswith("plan: about ")
    assert "the times of this build are not recorded" in lines[-1]


def test_fleet_compiles_what_both_recipes_lack_once(built, tmp_path):
    """Two recipes in one queue, in one process, with their gates' results; the second is named in the lines."""
    request, _ = built
    cache, said = tmp_path / "cache", []
    shutil.copytree(request.cache, cache)
    tiny.forget(cache, tiny.cheapest_graph(request).key)
    (request.base / "second.yaml").write_text(tiny.RECIPE.replace("name: tiny", "name: second"))
    first = replace(request, cache=cache, out=tmp_path / "first", validate=False, log=said.append)
    second = replace(first, recipe=load(request.base / "second.yaml"), out=tmp_path / "second")
    reports = run_all([first, second])
    assert [report.artifact for report in reports] == [tmp_path / "first", tmp_path / "second"]
    assert sorted(len(report.compiled) for report in reports) == [0, 1]
    assert tiny.same_parts(tmp_path / "first") == tiny.same_parts(request.out)
    assert any(line.startswith("compile: second: 5 graphs, 4 cached") for line in said)
    assert [report.fresh for report in run_all([first, second])] == [True, True]


def test_fleet_with_failed_gates_builds_the_others(built, tmp_path):
    request, _ = built
    failing = tiny.recipe(request, "tokens_per_step: 1.0", "tokens_per_step: 3.0")
    (request.base / "other.yaml").write_text(tiny.RECIPE.replace("name: tiny", "name: other"))
    said = []
    first = replace(request, recipe=failing, out=tmp_path / "failing", log=said.append)
    second = replace(first, recipe=load(request.base / "other.yaml"), out=tmp_path / "other")
    with pytest.raises(GateError, match="tiny: "):
        run_all([first, second])
    assert artifact.read(tmp_path / "other").manifest.passed
    assert not artifact.read(tmp_path / "failing").manifest.passed
    assert any(line.startswith("gates failed: tiny: ") for line in said)


def test_fleet_of_one_name_is_rejected(tmp_path):
    request = tiny.request_in(tmp_path)
    with pytest.raises(InputError, match="two recipes have the same name: tiny"):
        run_all([request, replace(request, out=tmp_path / "second")])


def test_prompt_lookup_switched_off_keeps_the_shards(built):
    """The key of the shards zeroed facts of graphs by name and missed `lookup`: a switch rewrote every shard."""
    request, _ = built
    changed, lines = tiny.recipe(request, ", lookup: 2", ""), []
    pair = resolve_pair(changed, base=request.base, cache=request.cache / "sources")
    plan, before = (make_plan(parsed, *(c.config for c in pair)) for parsed in (changed, request.recipe))
    assert (plan.pair.lookup, before.pair.lookup) == (False, True)
    packing = PACKINGS[changed.backend.packing]
    shards = shard(plan.pair.models, pair, packing, request.cache, lines.append, no_progress)
    assert lines == ["shard: the shards are cached"]
    assert shards.root.name == shard_key(before.pair.models, pair, packing)


def test_goldens_and_memos_lie_apart_from_graphs(built):
    """All three were entries of `cache/graphs`, so a test that removed `cache/goldens` removed nothing."""
    kinds = entry_stats(built[0].cache)
    assert kinds["memos"].entries >= kinds["graphs"].entries >= 5
    assert kinds["goldens"].entries > 0


def test_build_replaces_a_corrupted_cache_entry(built, tmp_path):
    request, _ = built
    key = tiny.cheapest_graph(request).key
    cache = tmp_path / "cache"
    shutil.copytree(request.cache, cache)
    tiny.flip(cache / "graphs" / key[:2] / key / "data")
    report = tiny.again(request, cache=cache, out=tmp_path / "out", validate=False)
    assert len(report.compiled) == 1
    verify(tmp_path / "out")


def test_build_writes_damaged_cached_shards_again(built, tmp_path):
    """Artifact and cache share files, so an edit of the one damages the other; one build later all is whole."""
    request, _ = built
    cache, said = tmp_path / "cache", []
    shutil.copytree(request.cache, cache)
    shards = sorted(cache.glob("shards/*/weights/*/*.safetensors"))
    tiny.flip(shards[0])
    shards[-1].unlink()
    tiny.again(request, cache=cache, out=tmp_path / "out", validate=False, log=said.append)
    assert any(str(shards[0].name) in line and "damaged" in line for line in said)
    assert content_digest(verify(tmp_path / "out").manifest) == content_digest(artifact.read(request.out).manifest)


def test_build_is_not_fooled_by_an_artifact_of_another_recipe(built, tmp_path):
    """The stamp of a build once outlived its artifact: recipe A, B, then A again at one output left B there."""
    request, _ = built
    out, other = tmp_path / "out", tiny.recipe(request, "pico://qwen3?layers=2", "pico://qwen3?layers=2&seed=5")
    first = tiny.again(request, out=out, validate=False)
    assert tiny.again(request, out=out, validate=False).fresh
    before = artifact.read(out).manifest.version
    tiny.again(request, recipe=other, out=out, validate=False)
    assert not (report := tiny.again(request, out=out, validate=False)).fresh
    assert (first.compiled, report.compiled) == ((), ())
    assert artifact.read(out).manifest.version == before


def test_example_builds_and_generates(built, tmp_path, monkeypatch, capsys):
    """`examples/build_and_generate.py`, with the graphs of the cache."""
    request, _ = built
    monkeypatch.setenv("TANDEM_CACHE", str(request.cache))
    example = runpy.run_path(str(ROOT / "examples/build_and_generate.py"))
    example["main"](request.base / "tiny.yaml", tmp_path / "example")
    first, *answers, streamed = capsys.readouterr().out.splitlines()
    assert first.startswith("built tiny@")
    assert len(answers) >= 2
    assert streamed


def test_build_checks_the_lock_even_if_nothing_else_changed(built, tmp_path):
    request, _ = built
    with pytest.raises(InputError, match="no lock file"):
        tiny.again(request, locked=True)


def test_build_elsewhere_on_another_machine_is_all_hits(built, tmp_path):
    """Another checkout, home, temp folder and cache path: only what the cache holds is the same."""
    request, _ = built
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


def test_builds_at_once_compile_a_graph_once(built, tmp_path):
    """Three processes, one cache that lacks one graph; two of them write the same output."""
    request, _ = built
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


def test_build_survives_kills(built, tmp_path):
    """Killed builds leave nothing that the next one trusts wrongly: same digests as an undisturbed build."""
    request, _ = built
    cache = tmp_path / "cache"
    shutil.copytree(request.cache, cache)
    for delay_s in (0.5, 4.0, 8.0):
        shutil.rmtree(cache / "shards", ignore_errors=True)
        tiny.kill(tiny.child_build(request, tmp_path / "out", cache), delay_s)
    tiny.again(request, cache=cache, out=tmp_path / "out", validate=False)
    assert tiny.same_parts(tmp_path / "out") == tiny.same_parts(request.out)


@pytest.mark.slow
def test_build_survives_kills_at_twenty_moments_of_every_stage(built, tmp_path):
    """From a cold cache and a cold compiler scratch; what killed builds finished is kept, the rest is done again.

    Both builds have one temp folder, since paths in it end up in the compiled libraries.
    """
    request, _ = built
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
            remove(draw.choice(entries))  # so that the stage has something to do each time
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
def test_eight_builds_at_once_from_nothing(built, tmp_path):
    request, _ = built
    outs = [tmp_path / f"out-{number // 2}" for number in range(8)]
    children = [tiny.child_build(request, out, tmp_path / "cache", validate=True) for out in outs]
    reports = [json.loads(child.communicate()[0]) for child in children]
    assert len([name for report in reports for name in report["compiled"]]) == 5
    assert sum(report["fresh"] for report in reports) == 4
    assert len({content_digest(verify(out).manifest) for out in outs}) == 1
    assert tiny.same_parts(outs[0]) == tiny.same_parts(request.out)


def test_build_with_another_k_lacks_its_graph_alone(built):
    request, _ = built
    changed = tiny.recipe(request, "[2], sampling", "[2, 3], sampling")
    pair = resolve_pair(changed, base=request.base, cache=request.cache / "sources")
    plan = make_plan(changed, *(checkpoint.config for checkpoint in pair))
    jobs = [Job(spec, plan.pair, changed.backend, request.cache, request.base / "log") for spec in plan.graphs]
    assert [job.spec.name for job in jobs if cached(job) is None] == ["speculate-b2-t4-s48-k3"]


def test_a_changed_flag_affects_its_graphs_alone(built):
    request, _ = built
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
def test_build_on_a_full_disk_leaves_nothing_half_written(built, tmp_path, limit, missing):
    """A limit on file sizes fails writes in the middle, like a full disk: in the sources, and in the shards."""
    request, _ = built
    cache = tmp_path / "cache"
    shutil.copytree(request.cache, cache, ignore=shutil.ignore_patterns(missing))
    done = tiny.forked_build(request, tmp_path / "out", cache, limit=limit).result()
    assert done.returncode == 3, done.stderr
    assert "cannot write: File too large" in done.stdout
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob(f"{TEMP}*"))
    tiny.again(request, cache=cache, out=tmp_path / "out", validate=False)
    assert tiny.same_parts(tmp_path / "out") == tiny.same_parts(request.out)


def test_build_into_a_read_only_folder_is_refused_before_anything_runs(built, tmp_path):
    request, _ = built
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="cannot write") as caught:
        tiny.again(request, cache=tmp_path / "cache", out=tmp_path / "file" / "out", validate=False)
    assert str(tmp_path / "file") in caught.value.where
    assert not (tmp_path / "cache" / "graphs").exists()


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


def test_graphs_carry_no_regular_expressions(built):
    """torch's runtime brings the templates of `std::regex` into every graph, half of what a compiler makes of it."""
    for file in (built[0].out / "graphs").glob("*/graph.pt2"):
        library = tiny.packed_file(file, ".so")
        assert b"regex_match" in library, "the runtime reads its device differently; mend this test"
        assert b"regex_traits" not in library


def test_graphs_carry_no_checks_of_every_input(built):
    """Inductor's checks of inputs, which an environment variable would turn on, are half of what a compiler reads."""
    for file in (built[0].out / "graphs").glob("*/graph.pt2"):
        assert b"AOTI_RUNTIME_CHECK_INPUTS" not in tiny.packed_file(file, ".so")


def test_load_refuses_a_flipped_bit(built, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(built[0].out, copy)
    tiny.flip(next(copy.glob("weights/target/*.safetensors")))
    with pytest.raises(ArtifactError, match="weights/target"):
        runtime.load(copy)


def test_build_on_a_cold_machine_with_a_warm_shared_cache(built, tmp_path):
    """Zero compiles; a poisoned entry is seen, rebuilt alone, and replaced."""
    from pipeline.cache.local import Cache
    from pipeline.cache.remote import Remote, push_all

    request, first = built
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
