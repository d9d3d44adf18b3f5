"""The whole pipeline on a tiny pair: build once, then everything that follows from it."""

import runpy
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers

from pipeline import runtime
from pipeline.artifact import manifest as artifact
from pipeline.artifact.verify import verify
from pipeline.build import run, run_all
from pipeline.errors import ArtifactError, GateError, InputError
from pipeline.files.atomic import digest_file
from pipeline.plan.forecast import forecast
from pipeline.plan.history import History
from pipeline.plan.plan import make_plan
from pipeline.progress import duration
from pipeline.recipe import load
from pipeline.recipe.schema import Publish
from pipeline.registry.publish import publish
from pipeline.sources.pair import resolve_pair
from pipeline.stages.compile import Compiled
from pipeline.stages.took import BuildClock, recorded, work_of
from support import tiny_build as tiny
from support.paths import ROOT


def test_build_compiles_every_graph_and_passes_its_gates(tiny_built):
    request, report = tiny_built
    assert len(report.compiled) == 5
    manifest = verify(request.out).manifest
    assert manifest.validation["passed"]
    assert {path.name for path in (request.out / "reports").iterdir()} >= {"parity.json", "junit.xml"}


def test_build_again_does_nothing_without_torch(tiny_built):
    request, _ = tiny_built
    code = (
        "import sys, pathlib; from pipeline.build import BuildSettings, run; from pipeline.recipe import load\n"
        f"base = pathlib.Path({str(request.base)!r})\n"
        "r = run(BuildSettings(recipe=load(base / 'tiny.yaml'), base=base, out=base / 'out', cache=base / 'cache'))\n"
        "assert r.fresh and 'torch' not in sys.modules, r; print(r.seconds)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 1.0


def test_build_sends_weights_and_makes_no_release(tiny_built, tmp_path):
    request, _ = tiny_built
    registry = tmp_path / "registry"
    recipe = request.recipe.model_copy(update={"publish": (Publish(to=str(registry)),)})
    settings = replace(request, recipe=recipe, out=tmp_path / "out", validate=False, send_weights=True)
    artifact_root = run(settings).artifact
    weights = {digest_file(path).sha256 for path in (artifact_root / "weights").rglob("*.safetensors")}
    assert weights
    assert weights <= {path.name for path in (registry / "blobs").rglob("*") if path.is_file()}
    with pytest.raises(GateError):
        publish(artifact_root, str(registry))


def test_build_with_another_bucket_compiles_its_graphs_alone(tiny_built, tmp_path):
    request, _ = tiny_built
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


def test_build_is_recorded_for_the_next_plan(tiny_built):
    """The plan stated constants, whatever builds had taken on this machine."""
    request, report = tiny_built
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


def test_times_of_a_cluster_are_not_those_of_this_machine(tiny_built, tmp_path):
    request, _ = tiny_built
    clock = BuildClock(replace(request, cache=tmp_path / "cache", executor="ray"))
    pair = resolve_pair(request.recipe, base=request.base, cache=request.cache / "sources")
    plan = make_plan(request.recipe, *(checkpoint.config for checkpoint in pair))
    with recorded(clock, [Compiled(plan.graphs[0], "key", hit=False, seconds=9.0)]):
        clock.plan(plan)
        clock.expect([], 1)
    assert [build.graphs for build in History(tmp_path / "cache").builds()] == [()]


def test_a_record_that_cannot_be_written_fails_no_build(tiny_built, tmp_path):
    request, _ = tiny_built
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


def test_fleet_compiles_what_both_recipes_lack_once(tiny_built, tmp_path):
    """Two recipes in one queue, in one process, with their gates' results; the second is named in the lines."""
    request, _ = tiny_built
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


def test_fleet_with_failed_gates_builds_the_others(tiny_built, tmp_path):
    request, _ = tiny_built
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


def test_example_builds_and_generates(tiny_built, tmp_path, monkeypatch, capsys):
    """`examples/build_and_generate.py`, with the graphs of the cache."""
    request, _ = tiny_built
    monkeypatch.setenv("TANDEM_CACHE", str(request.cache))
    example = runpy.run_path(str(ROOT / "examples/build_and_generate.py"))
    example["main"](request.base / "tiny.yaml", tmp_path / "example")
    first, *answers, streamed = capsys.readouterr().out.splitlines()
    assert first.startswith("built tiny@")
    assert len(answers) >= 2
    assert streamed


def test_build_checks_the_lock_even_if_nothing_else_changed(tiny_built, tmp_path):
    request, _ = tiny_built
    with pytest.raises(InputError, match="no lock file"):
        tiny.again(request, locked=True)


def test_engine_equals_transformers_token_by_token(tiny_built):
    """More prompts than rows, ragged, to the end of the cache: speculation, plain decode and transformers agree."""
    request, _ = tiny_built
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


def test_graphs_carry_no_regular_expressions(tiny_built):
    """torch's runtime brings the templates of `std::regex` into every graph, half of what a compiler makes of it."""
    for file in (tiny_built[0].out / "graphs").glob("*/graph.pt2"):
        library = tiny.packed_file(file, ".so")
        assert b"regex_match" in library, "the runtime reads its device differently; mend this test"
        assert b"regex_traits" not in library


def test_graphs_carry_no_checks_of_every_input(tiny_built):
    """Inductor's checks of inputs, which an environment variable would turn on, are half of what a compiler reads."""
    for file in (tiny_built[0].out / "graphs").glob("*/graph.pt2"):
        assert b"AOTI_RUNTIME_CHECK_INPUTS" not in tiny.packed_file(file, ".so")


def test_load_refuses_a_flipped_bit(tiny_built, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_built[0].out, copy)
    tiny.flip(next(copy.glob("weights/target/*.safetensors")))
    with pytest.raises(ArtifactError, match="weights/target"):
        runtime.load(copy)
