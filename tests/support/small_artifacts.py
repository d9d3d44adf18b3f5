"""Small artifacts, packaged by the real packager from files whose contents mean nothing. Imports no torch."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.artifact.manifest import PULLED, PairArtifact, read_pair
from pipeline.artifact.reports import add_reports
from pipeline.backends.base import Toolchain
from pipeline.cache.local import Cache
from pipeline.graphs.packing import PlainPacking
from pipeline.models.config import Layer, ModelConfig
from pipeline.models.rope_types import Rope
from pipeline.plan.lock import Lock, LockedSource
from pipeline.plan.plan import make_plan
from pipeline.recipe.schema import Recipe
from pipeline.stages.compile import Compiled
from pipeline.stages.package import Parts, package

CONFIG = ModelConfig(
    family="llama", layers=2, hidden=16, intermediate=32, heads=2, kv_heads=1, head_dim=8, vocab=64, norm_eps=1e-5,
    max_position=256, kinds=(Layer(Rope(1e4, 8)),), eos_ids=(2,),
)  # fmt: skip
GENERATION: dict[str, object] = {"eos_token_id": [2]}
RECIPE = {
    "name": "small",
    "target": {"source": "./target"},
    "draft": {"derive": {"from": "target", "layers": [0]}},
    "speculation": {"draft_tokens": [2]},
    "shapes": {"batch": [1], "prefill": [16], "kv": [32]},
    "validate": {"max_new_tokens": 8},
}

WEIGHTS = "weights/target/rank-0-of-1.safetensors"


@dataclass(frozen=True)
class Shard:
    """What the sharder reports of one file."""

    path: Path
    sha256: str
    size: int
    rank: int
    model: str


@dataclass(frozen=True)
class Shards:
    """What the shard stage hands to the packager."""

    root: Path
    files: tuple[Shard, ...]


class Backend:
    """What the packager asks of a backend."""

    packing = PlainPacking()
    graph_file = "graph.bin"
    preload = ()

    def toolchain(self) -> Toolchain:
        return Toolchain("stand-in", {"torch": "2.13.0+cpu", "cxx": "g++ 12"})

    def flags(self) -> dict[str, str]:
        return {"device": "cpu"}

    def requires(self) -> dict[str, str]:
        return {"device": "cpu", "machine": "x86_64", "isa": "avx2"}


def make(
    out: Path, work: Path, *, weights: bytes = b"weights", graph: bytes = b"graph", size: int = 1000,
    generation: dict[str, object] = GENERATION,
    config: dict[str, Any] | None = None,
) -> PairArtifact:  # fmt: skip
    """Package an artifact into `out`; `work` holds its cache and inputs, and may be used again."""
    recipe = Recipe.model_validate_json(json.dumps(RECIPE), strict=False)
    plan = make_plan(recipe, CONFIG, CONFIG)
    graphs = Cache(work / "cache", "graphs")
    compiled = []
    for spec in plan.graphs:
        data = (graph + spec.name.encode()) * (size // 20)
        key = hashlib.sha256(data).hexdigest()
        graphs.put(key, data)
        compiled.append(Compiled(spec, key, False, 0.0))
    root = work / "shards" / hashlib.sha256(weights).hexdigest()[:8]
    shards = Shards(root, tuple(_shard(root, model, weights * (size // 7)) for model in ("target", "draft")))
    lock = Lock(recipe.digest(), LockedSource("./target", "r1", config=config or {}))
    parts = Parts(plan, lock, tuple(compiled), shards, {"tokenizer.json": b"{}"}, generation)
    return package(out, parts, Backend(), graphs.root)


def make_again(out: Path, work: Path, *, passed: bool = True, **contents) -> PairArtifact:
    """As `make`, with the reports of gates that passed, or did not."""
    make(out, work, **contents)
    return add_reports(out, {"parity.json": b"{}"}, {"passed": passed})


def make_validated(out: Path, work: Path, *, passed: bool = True, **contents) -> PairArtifact:
    """As `make_again`; equal artifacts are packaged once in a process, and copied."""
    inputs = passed, sorted(contents.items()), os.environ.get("SOURCE_DATE_EPOCH")
    key = hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]
    work.mkdir(parents=True, exist_ok=True)
    kept = _kept() / key
    if not kept.is_dir():
        make_again(kept, work, passed=passed, **contents)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(kept, out)
    return read_pair(out)


@cache
def _kept() -> Path:
    """The folder of this process's artifacts that were packaged before."""
    folder = tempfile.TemporaryDirectory(prefix="tandem-small-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def make_beside(folder: Path, name: str = "other", **contents) -> Path:
    """Make a validated artifact in a folder of its own, and return where it lies."""
    return make_validated(folder / name, folder / f"{name}-work", size=200_000, **contents).root


def digests(root: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by name; without the record of a pull."""
    paths = (path for path in root.rglob("*") if path.is_file() and path.name != PULLED)
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def kept(registry: Path) -> dict[str, str]:
    """The files of a registry in a folder that a copy must not change, by their digests."""
    folders = ("blobs/", "releases/", "signatures/")
    return {name: digest for name, digest in digests(registry).items() if name.startswith(folders)}


def _shard(root: Path, model: str, data: bytes) -> Shard:
    data = model.encode() + data
    path = Path("weights") / model / "rank-0-of-1.safetensors"
    if not (root / path).is_file():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return Shard(path, hashlib.sha256(data).hexdigest(), len(data), 0, model)
