"""START HERE: the stages of a build, in order, and which of them a change makes stale.

    recipe -> sources -> plan -> compile (trace, AOT) + shard -> package -> validate -> artifact

Every stage's result is addressed by its inputs, so a build that is killed anywhere is completed by the next one, and
one that finds nothing changed does nothing: it compares a stamp, without importing torch.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import artifact as artifacts
from pipeline.artifact import Artifact
from pipeline.cache import default_root
from pipeline.errors import ArtifactError, RecipeError
from pipeline.files import write_atomic
from pipeline.recipe import Recipe, load

if TYPE_CHECKING:
    from pipeline.backends.base import Backend
    from pipeline.compile import Compiled
    from pipeline.plan import Plan
    from pipeline.remote_cache import Remote
    from pipeline.shard import ShardFile
    from pipeline.sources import Checkpoint

VERSIONED = ("torch", "transformers", "safetensors", "gguf", "tokenizers")


@dataclass
class Report:
    """What a build did, for the terminal and `--json`."""

    artifact: Path
    fresh: bool = False
    compiled: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    seconds: float = 0.0


Say = Callable[[str], None]
"""Shows one line of progress."""


def silent(line: str) -> None:
    """A `Say` that shows nothing."""


@dataclass(frozen=True)
class Request:
    """One build: a recipe and where things go."""

    recipe: Recipe
    base: Path
    out: Path
    cache: Path = field(default_factory=default_root)
    workers: int | None = None
    validate: bool = True
    locked: bool = False
    remote: Remote | None = None
    say: Say = silent

    @cached_property
    def stamp(self) -> Path:
        """Where the inputs of the last complete build are recorded."""
        return self.cache / "stamps" / f"{hashlib.sha256(bytes(self.out.absolute())).hexdigest()[:16]}.json"


def build(recipe: Recipe | Path, out: Path | None = None, **options: Any) -> Artifact:
    """Build a recipe into the directory `out` (default `artifacts/<name>`) and return the artifact.

    Raises:
        TandemError: wrong input, a missing tool, or a failed gate; what is finished stays cached.

    """
    base = Path("recipes")
    if isinstance(recipe, Path):
        base, recipe = recipe.parent, load(recipe)
    options.setdefault("base", base)
    request = Request(recipe=recipe, out=out or Path("artifacts") / recipe.name, **options)
    return artifacts.read(run(request).artifact)


def run(request: Request) -> Report:
    """Run the stages that are stale."""
    started = time.monotonic()
    report = Report(request.out)
    inputs = fingerprint(request)
    if _is_current(request, inputs):
        report.fresh = True
        report.seconds = time.monotonic() - started
        return report
    _stages(request, report)
    write_atomic(request.stamp, json.dumps({"inputs": fingerprint(request)}).encode())
    report.seconds = time.monotonic() - started
    return report


def _stages(request: Request, report: Report) -> None:
    from pipeline.backends.base import make_backend
    from pipeline.lock import make_lock
    from pipeline.package import package
    from pipeline.plan import make_plan
    from pipeline.sources import resolve_pair

    backend = make_backend(request.recipe.backend.model_dump())
    problems = backend.preflight()
    if problems:
        raise _preflight_error(problems)
    request.say("sources: target and draft")
    target, draft = resolve_pair(request.recipe, base=request.base, cache=request.cache / "sources")
    plan = make_plan(request.recipe, target.config, draft.config)
    lock = make_lock(request.recipe, target, draft, backend.toolchain().as_dict())
    if request.locked:
        _check_lock(request, lock)
    compiled = _compile(request, plan, report)
    shards, weights = _shard(request, plan, target, draft, backend)
    request.say("package")
    built = package(request.out, plan, backend, lock, compiled, shards, weights, target, request.cache)
    if request.validate:
        from pipeline.validate import validate

        validate(built.root, target, draft, request.base, request.cache / "goldens", request.say)


def _compile(request: Request, plan: Plan, report: Report) -> list[Compiled]:
    """Compile what the cache lacks, in workers, saying what remains."""
    from pipeline.compile import Job, compile_all, worker_count

    logs = request.cache / "logs" / request.recipe.name
    settings = request.recipe.backend.model_dump()
    cache, remote = str(request.cache), request.remote
    jobs = [Job(spec, plan.pair, settings, cache, str(logs / f"{spec.name}.log"), remote) for spec in plan.graphs]
    workers = request.workers or worker_count(max(plan.compile_memory(spec) for spec in plan.graphs), len(jobs))
    request.say(f"compile: {len(jobs)} graphs, {workers} at a time; logs in {logs}")
    left = {spec.name: plan.compile_seconds(spec) for spec in plan.graphs}

    def done(one: Compiled) -> None:
        left.pop(one.spec.name)
        (report.reused if one.hit else report.compiled).append(one.spec.name)
        how = "cached" if one.hit else f"{one.seconds:.0f} s"
        remaining = f", {len(left)} left, about {sum(left.values()) / workers:.0f} s" if left else ""
        request.say(f"  {one.spec.name}: {how}{remaining}")
        for note in one.notes:
            request.say(f"    {note}")

    return compile_all(jobs, workers, done)


def _shard(
    request: Request, plan: Plan, target: Checkpoint, draft: Checkpoint, backend: Backend
) -> tuple[list[ShardFile], Path]:
    """Write the weight shards, or find those of an earlier build with the same weights and layout."""
    from pipeline.files import atomic_dir
    from pipeline.shard import ShardFile, write_shards

    facts = {
        "pair": asdict(plan.pair) | {"rows": 0, "length": 0, "candidates": 0},
        "packing": backend.packing.name,
        "target": [target.revision, target.layers],
        "draft": [draft.revision, draft.layers],
        "files": [sorted((n, d.sha256) for n, d in c.files.items()) for c in (target, draft)],
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    root = request.cache / "shards" / key
    if not (root / "shards.json").is_file():
        request.say(f"shard: weights for {plan.pair.tp} rank(s)")
        with atomic_dir(root) as folder:
            files = write_shards(plan.pair, target, draft, folder, packing=backend.packing)
            rows = [[str(f.path.relative_to(folder)), f.sha256, f.size, f.rank, f.model] for f in files]
            (folder / "shards.json").write_text(json.dumps(rows))
    rows = json.loads((root / "shards.json").read_text())
    return [ShardFile(Path(path), *rest) for path, *rest in rows], root


def fingerprint(request: Request) -> dict[str, Any]:
    """Everything a build depends on, as far as it can be told without torch: recipe, package, versions, local files."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        digest.update(path.read_bytes())
    recipe = request.recipe
    names = [n for n in (recipe.target.source, recipe.draft.source) if n and "://" not in n]
    local = [p for name in names for p in _files(request.base / name)] + [request.base / recipe.validate_.prompts]
    return {
        "recipe": recipe.model_dump_json(by_alias=True),
        "package": digest.hexdigest(),
        "versions": {name: _version(name) for name in VERSIONED},
        "files": sorted([str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in local if p.is_file()),
        "validate": request.validate,
    }


def _is_current(request: Request, inputs: dict[str, Any]) -> bool:
    """True when the last build had these inputs and its artifact is still whole, by names and sizes."""
    try:
        recorded = json.loads(request.stamp.read_text())["inputs"]
        files = artifacts.read(request.out).manifest.files
        return recorded == json.loads(json.dumps(inputs)) and all(
            (request.out / name).stat().st_size == entry.size for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, ArtifactError):
        return False


def _check_lock(request: Request, fresh: Any) -> None:
    from pipeline.lock import check_locked, lock_path, read

    path = lock_path(request.base / f"{request.recipe.name}.yaml")
    problems = check_locked(read(path), fresh, str(path))
    if problems:
        raise RecipeError(problems)


def _preflight_error(problems: Iterable[Any]) -> Exception:
    from pipeline.errors import HostError

    first, *rest = list(problems)
    more = "".join(f"; {p.what}" for p in rest)
    return HostError(first.what + more, where=first.where, fix=first.fix)


def _files(path: Path) -> list[Path]:
    return [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"
