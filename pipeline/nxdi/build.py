"""Plan -> NxD Inference's fused pair as an artifact, which vLLM's NxDI-backed plugin loads as it is.

    model.pt  neuron_config.json  weights/tp<rank>_sharded_checkpoint.safetensors    what NxD Inference writes
    models/{target,draft}/      configs and tokenizer: vLLM reads them, and no weights there
    tandem-nxdi.json            what was asked for, and how vLLM is started inside the folder
    manifest.json, recipe.*, provenance.json     what NxD Inference does not record

NxD Inference's `model.pt` is TorchScript; nothing here opens it. Tandem neither validates nor runs these artifacts.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from pipeline.artifact.manifest import Artifact, NxdiBackend, NxdiManifest, read
from pipeline.artifact.verify import check_replaceable
from pipeline.backends.base import Toolchain
from pipeline.backends.neuron import support
from pipeline.cache.local import default_root
from pipeline.errors import HostError
from pipeline.files.atomic import atomic_dir, write_atomic
from pipeline.nxdi import config as nxdi
from pipeline.nxdi.compile import Request
from pipeline.nxdi.vllm_args import ASKED
from pipeline.plan.lock import Lock, make_lock
from pipeline.plan.lock import digest as lock_digest
from pipeline.plan.plan import Plan
from pipeline.recipe.schema import NeuronSettings
from pipeline.sources.checkpoint import CONFIG_FILES, Checkpoint
from pipeline.sources.tokenizer import tokenizer_files
from pipeline.stages.package import UNVERSIONED, Origin, created_now, seal


def write(out: Path, plan: Plan, lock: Lock) -> Path:
    """Write what NxD Inference would be asked for, and how vLLM would be started: nothing is compiled.

    Raises:
        RecipeError: the recipe asks for what NxD Inference does not do.

    """
    write_atomic(out / ASKED, _asked(nxdi.package(plan), plan, lock))
    return out / ASKED


def build(out: Path, plan: Plan, pair: tuple[Checkpoint, Checkpoint]) -> Artifact:
    """Compile and shard with NxD Inference, which needs its SDK and no device, and seal the result.

    Raises:
        RecipeError: the recipe asks for what NxD Inference does not do.
        HostError: the SDK is missing or does not fit, or NxD Inference failed, or did not do what it was asked.

    """
    made = nxdi.package(plan)
    settings = nxdi.neuron_settings(plan.recipe)
    versions, inference = support.versions(), _version()
    problems = nxdi.host_problems(settings.target, settings.lnc, versions, inference)
    if problems:
        what = "; ".join(problem.what for problem in problems)
        raise HostError(what, where=problems[0].where, fix=problems[0].fix)
    check_replaceable(out)
    roots = {role: str(one.root.absolute()) for role, one in zip(nxdi.PLACES, pair, strict=True)}
    toolchain = Toolchain("nxdi", {**versions, nxdi.DISTRIBUTION: inference}).as_dict()
    lock = make_lock(plan.recipe, *pair, toolchain)
    with atomic_dir(out) as folder:
        flags = _compile(folder, made, roots, settings)
        _check(folder, made, plan.pair.models.tp)
        _make_relative(folder, {roots[role]: place for role, place in nxdi.PLACES.items()} | {str(folder): "."})
        _add_models(folder, pair)
        (folder / ASKED).write_bytes(_asked(made, plan, lock))
        backend = NxdiBackend(target=settings.target, lnc=settings.lnc, flags=flags)
        manifest = NxdiManifest(
            name=plan.recipe.name, version=UNVERSIONED, created=created_now(), recipe_digest=plan.recipe.digest(),
            lock_digest=lock_digest(lock), toolchain=toolchain, backend=backend, pair=plan.pair,
            requires={"device": "neuron", "chip": settings.target, "lnc": str(settings.lnc)},
            draft_tokens=plan.recipe.speculation.draft_tokens[0], files={},
        )  # fmt: skip
        origin = Origin(plan.recipe, lock, {"name": "nxdi", **backend.model_dump()}, toolchain, flags)
        seal(folder, manifest, origin)
    return read(out)


def _asked(made: nxdi.Package, plan: Plan, lock: Lock) -> bytes:
    sources = {"target": asdict(lock.target), "draft": asdict(lock.draft) if lock.draft else None}
    checkpoints = {role: {"path": place, "source": sources[role]} for role, place in nxdi.PLACES.items()}
    recorded = {**asdict(made), "recipe": plan.recipe.name, "recipe_sha256": plan.recipe.digest()}
    return json.dumps({**recorded, "checkpoints": checkpoints}, indent=1, sort_keys=True).encode() + b"\n"


def _compile(folder: Path, made: nxdi.Package, roots: dict[str, str], settings: NeuronSettings) -> dict[str, str]:
    """Run NxD Inference; returns the flags and the environment that decided the code. A failure keeps its output."""
    chip = {
        "NEURON_PLATFORM_TARGET_OVERRIDE": settings.target,
        "NEURON_LOGICAL_NC_CONFIG": str(settings.lnc),
    }
    with tempfile.TemporaryDirectory(prefix="tandem-nxdi-") as name:
        work = Path(name)
        request = Request(made, roots["target"], roots["draft"], str(folder), str(work / "answer.json"))
        (work / "request.json").write_bytes(request.dump())
        # NxD Inference removes this folder before it starts, whoever else may be using it.
        environment = support.AT_START | chip | {"BASE_COMPILE_WORK_DIR": f"{work}/compile/"}
        command = [sys.executable, "-m", "pipeline.nxdi.compile", str(work / "request.json")]
        with (work / "output.txt").open("wb") as output:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
        if done.returncode:
            raise _failure(done.returncode, work / "output.txt")
        flags = json.loads((work / "answer.json").read_text())
    found = {f"neuronx-cc.{tag}": text for tag, text in sorted(flags.items())}
    return found | {f"env.{name}": value for name, value in support.environment().items()}


def _failure(status: int, output: Path) -> HostError:
    kept = default_root() / "failed-compiles" / "nxdi.txt"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(output, kept)
    said = [line for line in kept.read_text(errors="replace").splitlines() if line.strip()] or ["no message"]
    what = f"NxD Inference ended with status {status}: {said[-1]}"
    return HostError(what, where="compile", fix=f"its output is in {kept}")


def _check(folder: Path, made: nxdi.Package, ranks: int) -> None:
    """Refuse what vLLM would silently compile again: a part that is missing, or another configuration than asked."""
    faults = list(_missing(folder, ranks))
    if not faults:
        faults = nxdi.differences(made, json.loads((folder / nxdi.CONFIG).read_text()))
    if not faults:
        faults = list(_uneven(folder, ranks))
    if faults:
        raise HostError("; ".join(faults), where="nxdi", fix="install packages of one SDK release, see `tandem doctor`")


def _missing(folder: Path, ranks: int) -> Iterator[str]:
    for name in (nxdi.MODEL, nxdi.CONFIG, *map(nxdi.weight_file, range(ranks))):
        if not (folder / name).is_file() or not (folder / name).stat().st_size:
            yield f"NxD Inference wrote no {name}"


def _uneven(folder: Path, ranks: int) -> Iterator[str]:
    """Ranks run one program: their weights have the same names, of both models."""
    from safetensors import safe_open

    first: set[str] = set()
    for rank in range(ranks):
        with safe_open(folder / nxdi.weight_file(rank), framework="np") as file:
            names = set(file.keys())
        first = first or names
        for name in sorted(names ^ first)[:3]:
            yield f"{name} is in the weights of rank {rank if name in names else 0} alone"
    for model in ("target_model", "draft_model"):
        if not any(name.startswith(f"{model}.") for name in first):
            yield f"the weights have none of the {model.partition('_')[0]}"


def _make_relative(folder: Path, places: dict[str, str]) -> None:
    path = folder / nxdi.CONFIG
    config = nxdi.relative(json.loads(path.read_text()), places)
    text = json.dumps(config, indent=2, sort_keys=True)
    if left := [place for place in places if place in text]:
        raise HostError(f"{nxdi.CONFIG} still names {left[0]}", where="nxdi", fix="please report this")
    path.write_text(text + "\n")


def _add_models(folder: Path, pair: tuple[Checkpoint, Checkpoint]) -> None:
    for role, one in zip(nxdi.PLACES, pair, strict=True):
        place = folder / nxdi.PLACES[role]
        place.mkdir(parents=True)
        for name in CONFIG_FILES:
            if (one.root / name).is_file():
                shutil.copyfile(one.root / name, place / name)
        for name, data in (tokenizer_files(one) if role == "target" else {}).items():
            (place / name).write_bytes(data)


def _version() -> str:
    try:
        return metadata.version(nxdi.DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "missing"
