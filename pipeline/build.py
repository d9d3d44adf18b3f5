"""START HERE: the stages of a build, in order, and which of them a change makes stale.

    recipe -> sources -> plan -> shard -> compile (trace, AOT) -> package -> validate -> artifact

Every stage's result is addressed by its inputs, so a build that is killed anywhere is completed by the next one, and
one that finds nothing changed does nothing: it compares a stamp, without importing torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import manifest as artifacts
from pipeline.artifact.manifest import Artifact
from pipeline.cache.local import default_root
from pipeline.errors import ArtifactError, RecipeError
from pipeline.files.atomic import check_writable, disk_errors, sha256_file, write_atomic
from pipeline.progress import Log, Progress, no_log, no_progress
from pipeline.recipe.schema import Recipe, load

if TYPE_CHECKING:
    from pipeline.backends.base import Backend
    from pipeline.cache.remote import Remote
    from pipeline.plan.plan import Plan
    from pipeline.sources.checkpoint import Checkpoint
    from pipeline.stages.compile import Compiled
    from pipeline.stages.shard import ShardFile

VERSIONED = ("torch", "transformers", "safetensors", "gguf", "tokenizers")


@dataclass
class Report:
    """What a build did, for the terminal and `--json`."""

    artifact: Path
    fresh: bool = False
    compiled: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    seconds: float = 0.0


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
    lock: Path | None = None
    log: Log = no_log
    progress: Progress = no_progress

    @property
    def lock_file(self) -> Path:
        """The recipe's lock, which need not exist."""
        return self.lock or self.base / f"{self.recipe.name}.lock"

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
    """Run the stages that are stale. Builds of one output at once take turns, and all but the first find it done."""
    started = time.monotonic()
    report = Report(request.out)
    with _alone(request.stamp.with_suffix(".lock"), request.log, f"another build of {request.out}"):
        inputs = fingerprint(request)  # as they were before anything was read: what changes meanwhile is stale again
        report.fresh = _is_current(request, inputs)
        if not report.fresh:
            artifacts.check_replaceable(request.out)
            check_writable(request.out.absolute().parent)
            with disk_errors(request.stamp):
                request.stamp.unlink(missing_ok=True)
            _stages(request, report)
            stamp = {"inputs": inputs, "artifact": _identity(request.out)}
            write_atomic(request.stamp, json.dumps(stamp).encode())
    report.seconds = time.monotonic() - started
    return report


def _stages(request: Request, report: Report) -> None:
    from pipeline.backends.base import make_backend
    from pipeline.plan.lock import make_lock
    from pipeline.plan.plan import make_plan
    from pipeline.sources.pair import resolve_pair
    from pipeline.sources.tokenizer import tokenizer_files
    from pipeline.stages.package import package
    from pipeline.validate.prompts import load_prompts, prompts_path

    backend = make_backend(request.recipe.backend.model_dump())
    problems = backend.preflight()
    if problems:
        raise _preflight_error(problems)
    if request.validate:
        load_prompts(prompts_path(request.recipe.validate_.prompts, request.base))  # refused now, not after an hour
    request.log("sources: target and draft")
    target, draft = resolve_pair(
        request.recipe, base=request.base, cache=request.cache / "sources", progress=request.progress
    )
    plan = make_plan(request.recipe, target.config, draft.config)
    lock = make_lock(request.recipe, target, draft, backend.toolchain().as_dict())
    if request.locked:
        _check_lock(request, lock)
    tokenizer = tokenizer_files(target)
    shards, weights = _shard(request, plan, target, draft, backend)
    compiled = _compile(request, plan, report)
    request.log("package")
    built = package(request.out, plan, backend, lock, compiled, shards, weights, tokenizer, request.cache)
    if request.validate and _runs_here(request, backend, built):
        from pipeline.validate.run import validate

        validate(built.root, target, draft, request.base, request.cache, request.log)


def _compile(request: Request, plan: Plan, report: Report) -> list[Compiled]:
    """Compile what the cache lacks, in workers, saying what remains. Graphs in a shared cache are found by workers."""
    from pipeline.stages.compile import Job, cached, compile_all, worker_count

    logs = request.cache / "logs" / request.recipe.name
    settings = request.recipe.backend.model_dump()
    cache, remote = str(request.cache), request.remote
    jobs = [Job(spec, plan.pair, settings, cache, str(logs / f"{spec.name}.log"), remote) for spec in plan.graphs]
    found = {spec.name: one for spec, job in zip(plan.graphs, jobs, strict=True) if (one := cached(job))}
    missing = [job for job in jobs if job.spec.name not in found]
    left = {job.spec.name: plan.compile_seconds(job.spec) for job in missing}
    memory = max((plan.compile_memory(job.spec) for job in missing), default=0)
    workers = request.workers or worker_count(memory, max(len(missing), 1))

    def remaining() -> str:
        return f"about {sum(left.values()) / workers:.0f} s"

    def done(one: Compiled) -> None:
        left.pop(one.spec.name, None)
        found[one.spec.name] = one
        (report.reused if one.hit else report.compiled).append(one.spec.name)
        request.progress("compile", len(jobs) - len(left), len(jobs))
        how = "cached" if one.hit else f"{one.seconds:.0f} s"
        request.log(f"  {one.spec.name}: {how}" + (f", {len(left)} left, {remaining()}" if left else ""))
        for note in one.notes:
            request.log(f"    {note}")

    what = f"{len(missing)} of {len(jobs)} graphs, {workers} at a time, {remaining()}; logs in {logs}"
    request.log(f"compile: {what}" if missing else f"compile: all {len(jobs)} graphs are cached")
    for one in list(found.values()):
        done(one)
    if missing:
        compile_all(missing, workers, done)
    return [found[spec.name] for spec in plan.graphs]


def _shard(
    request: Request, plan: Plan, target: Checkpoint, draft: Checkpoint, backend: Backend
) -> tuple[list[ShardFile], Path]:
    """Write the weight shards, or take those of an earlier build with the same weights and layout, if still whole."""
    from pipeline.files.atomic import atomic_dir
    from pipeline.stages.shard import write_shards

    facts = {
        "pair": asdict(plan.pair) | {"rows": 0, "length": 0, "candidates": 0},
        "packing": backend.packing.name,
        "target": [target.revision, target.layers],
        "draft": [draft.revision, draft.layers],
        "files": [sorted((n, d.sha256) for n, d in c.files.items()) for c in (target, draft)],
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    root = request.cache / "shards" / key
    with _alone(root.with_suffix(".lock"), request.log, "a build that writes the same shards"):
        found = _whole_shards(root, request.log)
        if found is None:
            request.log(f"shard: weights for {plan.pair.models.tp} rank(s)")
            with atomic_dir(root) as folder:
                files = write_shards(
                    plan.pair.models, target, draft, folder, packing=backend.packing,
                    progress=lambda done, total: request.progress("shard", done, total),
                )  # fmt: skip
                found = [replace(file, path=file.path.relative_to(folder)) for file in files]
                rows = [[str(f.path), f.sha256, f.size, f.rank, f.model] for f in found]
                (folder / "shards.json").write_text(json.dumps(rows))
    return found, root


def _whole_shards(root: Path, log: Log) -> list[ShardFile] | None:
    """Shards of an earlier build, read through and compared with their digests; None if they must be written."""
    from pipeline.artifact.manifest import FileEntry, differences
    from pipeline.stages.shard import ShardFile

    if not root.exists():
        return None
    try:
        rows = json.loads((root / "shards.json").read_text())
        found = [ShardFile(Path(path), *rest) for path, *rest in rows]
        faults = differences(root, {f.path.as_posix(): FileEntry(sha256=f.sha256, size=f.size) for f in found})
    except (OSError, ValueError, TypeError) as error:
        faults = [str(error)]
    if not faults:
        with contextlib.suppress(OSError):  # when it was used last, for `tandem cache gc`
            os.utime(root / "shards.json")
        return found
    log(f"shard: cached shards are damaged ({'; '.join(faults)}): written again")
    shutil.rmtree(root, ignore_errors=True)
    return None


@contextlib.contextmanager
def _alone(lock: Path, log: Log, other: str) -> Iterator[None]:
    """Hold a lock file among all builds that share this cache; that of a killed build falls free."""
    from filelock import FileLock, Timeout

    held = FileLock(lock)
    with disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=0)
        except Timeout:
            log(f"waiting for {other}")
            held.acquire()
    try:
        yield
    finally:
        held.release()


def fingerprint(request: Request) -> dict[str, Any]:
    """Everything a build depends on, as far as it can be told without torch: recipe, package, versions, local files."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        digest.update(path.read_bytes())
    return {
        "recipe": request.recipe.model_dump_json(by_alias=True),
        "package": digest.hexdigest(),
        "versions": {name: _version(name) for name in VERSIONED},
        "compiler": [os.environ.get("CXX"), shutil.which(os.environ.get("CXX", "g++"))],
        "files": sorted(_stamp_of(path) for path in _local_files(request) if path.is_file()),
        "validate": request.validate,
        "locked": request.locked,
    }


def _local_files(request: Request) -> list[Path]:
    """Files outside the package that decide a build: folders of weights, prompts, and the lock where it binds."""
    from pipeline.validate.prompts import prompts_path

    recipe, base = request.recipe, request.base
    names = [n for n in (recipe.target.source, recipe.draft.source) if n and "://" not in n]
    found = [path for name in names for path in _files(base / Path(name).expanduser())]
    found.append(prompts_path(recipe.validate_.prompts, base))
    return [*found, request.lock_file] if request.locked else found


def _stamp_of(path: Path) -> list[Any]:
    """What changes whenever a file is written or replaced, even by one of its size and time."""
    stat = path.stat()
    return [str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _is_current(request: Request, inputs: dict[str, Any]) -> bool:
    """True when `out` still holds the artifact of the last build, made of these inputs; by digest, names and sizes."""
    try:
        recorded = json.loads(request.stamp.read_text())
        files = artifacts.read(request.out).manifest.files
        return (
            recorded["inputs"] == json.loads(json.dumps(inputs))
            and recorded["artifact"] == _identity(request.out)
            and all((request.out / name).stat().st_size == entry.size for name, entry in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, ArtifactError):
        return False


def _identity(root: Path) -> str:
    """Names an artifact with its reports."""
    return sha256_file(root / artifacts.MANIFEST)


def _runs_here(request: Request, backend: Backend, built: Artifact) -> bool:
    """Whether this host can run what it built; an artifact for another chip or instruction set is left unvalidated."""
    try:
        artifacts.check_host(built.manifest, backend.host())
    except ArtifactError as error:
        request.log(f"not validated: {error.what}; run `tandem validate {built.root}` on such a host before publishing")
        return False
    return True


def _check_lock(request: Request, fresh: Any) -> None:
    from pipeline.plan.lock import check_locked, read

    problems = check_locked(read(request.lock_file), fresh, str(request.lock_file))
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
