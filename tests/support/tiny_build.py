"""The tiny pair that tests build, and builds of it in this process and in others, to be killed or not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from pipeline.artifact import manifest as artifact
from pipeline.artifact.verify import verify
from pipeline.backends.base import cache_key, make_backend
from pipeline.build import BuildSettings, run
from pipeline.files.unfinished import remove
from pipeline.plan.plan import make_plan
from pipeline.recipe import load
from pipeline.sources.pair import resolve_pair
from support import preloaded
from support.paths import ROOT

RECIPE = """
name: tiny
target: {source: "pico://qwen3?layers=2", dtype: float32}
draft: {derive: {from: target, layers: [0]}}
speculation: {draft_tokens: [2], sampling: [greedy], lookup: 2}
shapes: {batch: [2], prefill: [16], kv: [48]}
validate: {prompts: prompts.jsonl, max_new_tokens: 10, gates: {tokens_per_step: 1.0}}
"""


def request_in(base: Path) -> BuildSettings:
    """Write the tiny recipe and its prompts; return the request to build it."""
    (base / "tiny.yaml").write_text(RECIPE)
    lines = [{"id": str(i), "class": "chat", "prompt": text} for i, text in enumerate(["a", "bc", "d"])]
    (base / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return BuildSettings(load(base / "tiny.yaml"), base, base / "out", base / "cache", workers=2)


def again(request, **changes):
    fields = {name: getattr(request, name) for name in ("recipe", "base", "out", "cache", "workers", "validate")}
    return run(BuildSettings(**(fields | changes)))


def recipe(request, old, new):
    path = request.base / "changed.yaml"
    path.write_text(RECIPE.replace(old, new))
    return load(path)


CHILD = """
import json, resource, sys
from dataclasses import asdict
from pathlib import Path
from pipeline.build import BuildSettings, run
from pipeline.errors import TandemError
from pipeline.recipe import load
base, out, cache = map(Path, sys.argv[1:4])
validate, limit = sys.argv[4] == "True", int(sys.argv[5])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
def say(line):
    print(line, file=sys.stderr, flush=True)
def begun(what, done, total):
    if done == 0 and ": " in what:  # a stage; its line in the log comes when it ends
        say(what)
try:
    request = BuildSettings(
        load(base / "tiny.yaml"), base, out, cache, workers=1, validate=validate, log=say, progress=begun
    )
    print(json.dumps(asdict(run(request)), default=str))
except TandemError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def child_build(request, out, cache, *, validate=False, env=None) -> subprocess.Popen[str]:
    """Build the tiny recipe in a process group of its own; it prints its report as JSON."""
    arguments = [str(part) for part in (request.base, out, cache, validate, 0)]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], start_new_session=True, text=True, env=env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def forked_build(request, out, cache, *, limit=0, env=None, cwd=ROOT) -> preloaded.Running:
    """As `child_build`, for builds that no test kills."""
    arguments = [str(part) for part in (request.base, out, cache, False, limit)]
    return preloaded.Running(CHILD, tuple(arguments), env or {**os.environ, "PYTHONPATH": str(ROOT)}, cwd)


def kill(child: subprocess.Popen[str], delay_s: float) -> str:
    """End a build with all its workers and compilers; returns the last stage that it spoke of."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=delay_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    said = [line for line in child.communicate()[1].splitlines() if line and not line.startswith(" ")]
    return said[-1].partition(":")[0] if said else "start"


STAGES = {"sources": "sources", "shard": "shards", "compile": "graphs/??/*", "package": "none", "validate": "goldens"}
"""Stages of a build, and what of the cache each fills."""


def kill_in(child: subprocess.Popen[str], stage: str, delay_s: float) -> str:
    """End a build a while after it spoke of `stage`; returns the last stage that it spoke of."""
    said = []
    for line in child.stderr:
        said.append(line)
        if line.startswith(stage):
            time.sleep(delay_s)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    said += child.communicate()[1].splitlines()
    spoken = [line.partition(":")[0].strip() for line in said if line.strip() and not line.startswith(" ")]
    return spoken[-1] if spoken else "start"


def same_parts(root: Path) -> dict[str, object]:
    """Files of an artifact that two builds of one recipe have in common: provenance and reports tell of one build."""
    files = verify(root).manifest.files
    return {
        name: entry
        for name, entry in files.items()
        if not name.startswith(("reports/", "provenance.json", "sbom.cdx.json"))
    }


def cheapest_graph(request) -> artifact.GraphEntry:
    """The graph that compiles fastest: the draft's alone, for tests that lose one and care not which."""
    return next(graph for graph in artifact.read(request.out).manifest.graphs if graph.name.startswith("score-draft"))


def forget(cache: Path, key: str) -> None:
    """Remove a graph from a cache, and the stamps by which a build would see that nothing changed."""
    remove(cache / "graphs" / key[:2] / key)
    remove(cache / "stamps")


def flip(path: Path) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def keys(request: BuildSettings, parsed) -> dict[str, str]:
    """Cache keys of a recipe's greedy and stochastic graphs, found by tracing alone; of two phases, the cheap ones."""
    backend = make_backend(parsed.backend)
    plan = make_plan(
        parsed, *(c.config for c in resolve_pair(parsed, base=request.base, cache=request.cache / "sources"))
    )
    chosen = [spec for spec in plan.graphs if spec.phase in ("prefill", "decode")]
    traced = {spec.name: backend.trace(spec, plan.pair) for spec in chosen}
    return {name: cache_key(graph, backend.toolchain(), backend.flags()) for name, graph in traced.items()}


def packed_file(package: Path, suffix: str) -> bytes:
    """Read the file of a graph's package whose name ends so."""
    with zipfile.ZipFile(package) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(suffix)))
