"""Plan -> NxD Inference's fused pair as an artifact, which vLLM's NxDI-backed plugin loads as it is.

    model.pt  neuron_config.json  weights/tp<rank>_sharded_checkpoint.safetensors    what NxD Inference writes
    models/{target,draft}/      configs and tokenizer: vLLM reads them, and no weights there
    tandem-nxdi.json            the settings, and how vLLM is started inside the folder
    manifest.json, recipe.*, provenance.json     facts that NxD Inference does not record

NxD Inference's `model.pt` is TorchScript; Tandem does not open it. Tandem neither validates nor runs these artifacts.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

from pipeline.artifact.manifest import Artifact, NxdiBackend, NxdiManifest, read
from pipeline.artifact.verify import check_replaceable
from pipeline.backends.base import Toolchain
from pipeline.backends.neuron import support
from pipeline.cache.local import default_root
from pipeline.errors import HostError, SourceError
from pipeline.files.atomic import atomic_dir, write_atomic
from pipeline.files.unfinished import work_folder
from pipeline.models.quantisation import KEY
from pipeline.nxdi import config as nxdi
from pipeline.nxdi.compile import CompileOrder
from pipeline.nxdi.vllm_args import SETTINGS
from pipeline.plan.lock import Lock, make_lock
from pipeline.plan.lock import digest as lock_digest
from pipeline.plan.plan import Plan
from pipeline.recipe.backend_settings import NeuronSettings
from pipeline.sources.checkpoint import CONFIG_FILES, Checkpoint, require_local
from pipeline.sources.tensors import read_header
from pipeline.sources.tokenizer import tokenizer_files
from pipeline.stages.package import UNVERSIONED, Origin, created_now, seal

EXCEPTION = re.compile(r"^[\w.]+(?:Error|Exception): ")
"""Start of the last line of a Python traceback: the name of a type, which messages omit."""


def write(out: Path, plan: Plan, lock: Lock) -> Path:
    """Write the settings for NxD Inference and vLLM, and compile nothing.

    Raises:
        RecipeError: NxD Inference does not support the recipe.

    """
    write_atomic(out / SETTINGS, _settings_json(nxdi.settings(plan), plan, lock))
    return out / SETTINGS


def build(out: Path, plan: Plan, pair: tuple[Checkpoint, Checkpoint]) -> Artifact:
    """Compile and shard with NxD Inference, which needs its SDK but no device, and seal the result.

    Raises:
        RecipeError: NxD Inference does not support the recipe.
        HostError: the SDK is missing or of another version, or NxD Inference failed or ignored a setting.

    """
    settings, chip = nxdi.settings(plan), nxdi.neuron_settings(plan.recipe)
    versions, inference = support.versions(), _version()
    problems = nxdi.host_problems(chip.target, chip.lnc, versions, inference)
    if problems:
        what = "; ".join(problem.what for problem in problems)
        raise HostError(what, where=problems[0].where, fix=problems[0].fix)
    check_replaceable(out)
    for model in pair:
        require_local(model)
        reject_quantised(model)
    roots = {role: str(model.root.absolute()) for role, model in zip(nxdi.MODEL_FOLDERS, pair, strict=True)}
    toolchain = Toolchain("nxdi", {**versions, nxdi.DISTRIBUTION: inference}).as_dict()
    with atomic_dir(out) as folder:
        flags = _compile(folder, settings, roots, chip)
        lock = make_lock(plan.recipe, *pair, toolchain, flags)
        _check(folder, settings, plan.pair.models.tp)
        _make_relative(folder, {roots[role]: name for role, name in nxdi.MODEL_FOLDERS.items()} | {str(folder): "."})
        _add_models(folder, pair)
        (folder / SETTINGS).write_bytes(_settings_json(settings, plan, lock))
        backend = NxdiBackend(target=chip.target, lnc=chip.lnc, flags=flags)
        manifest = NxdiManifest(
            name=plan.recipe.name, version=UNVERSIONED, created=created_now(), recipe_digest=plan.recipe.digest(),
            lock_digest=lock_digest(lock), toolchain=toolchain, backend=backend, pair=replace(plan.pair, rings=()),
            requires={"device": "neuron", "chip": chip.target, "lnc": str(chip.lnc)},
            draft_tokens=plan.recipe.speculation.draft_tokens[0], files={},
        )  # fmt: skip
        origin = Origin(plan.recipe, lock, {"name": "nxdi", **backend.model_dump()}, toolchain, flags)
        seal(folder, manifest, origin)
    return read(out)


def reject_quantised(model: Checkpoint) -> None:
    """Reject weights that NxD Inference would read as they are stored.

    Raises:
        SourceError: a checkpoint with a `quantization_config`.

    """
    if KEY in model.config_json:
        what = f"{KEY}: NxD Inference reads weights of this kind otherwise than `tandem build`"
        raise SourceError(what, where=str(model.root / "config.json"), fix="use an unquantised checkpoint")


def _settings_json(settings: nxdi.NxdiSettings, plan: Plan, lock: Lock) -> bytes:
    sources = {"target": asdict(lock.target), "draft": asdict(lock.draft) if lock.draft else None}
    checkpoints = {role: {"path": path, "source": sources[role]} for role, path in nxdi.MODEL_FOLDERS.items()}
    recorded = {**asdict(settings), "recipe": plan.recipe.name, "recipe_sha256": plan.recipe.digest()}
    return json.dumps({**recorded, "checkpoints": checkpoints}, indent=1, sort_keys=True).encode() + b"\n"


def _compile(folder: Path, settings: nxdi.NxdiSettings, roots: dict[str, str], chip: NeuronSettings) -> dict[str, str]:
    """Run NxD Inference; return the flags and environment that shaped the code. A failure keeps its output."""
    overrides = {"NEURON_PLATFORM_TARGET_OVERRIDE": chip.target, "NEURON_LOGICAL_NC_CONFIG": str(chip.lnc)}
    with work_folder("nxdi") as work:
        order = CompileOrder(settings, roots["target"], roots["draft"], str(folder), str(work / "flags.json"))
        (work / "order.json").write_bytes(order.dump())
        # NxD Inference deletes this folder when it starts, even if another process uses it.
        environment = (
            support.AT_START | settings.environment | overrides | {"BASE_COMPILE_WORK_DIR": f"{work}/compile/"}
        )
        command = [sys.executable, "-m", "pipeline.nxdi.compile", str(work / "order.json")]
        with (work / "output.txt").open("wb") as output:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
        if done.returncode:
            raise _failure(done.returncode, work / "output.txt")
        flags = json.loads((work / "flags.json").read_text(encoding="utf-8"))
    by_submodel = {f"neuronx-cc.{tag}": text for tag, text in sorted(flags.items())}
    variables = support.environment(support.AT_START | settings.environment)
    return by_submodel | {f"env.{name}": value for name, value in variables.items()}


def _failure(status: int, output: Path) -> HostError:
    kept = default_root() / "failed-compiles" / "nxdi.txt"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(output, kept)
    text = kept.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()] or ["no message"]
    what = f"NxD Inference ended with status {status}: {EXCEPTION.sub('', lines[-1])}"
    return HostError(what, where="compile", fix=f"read its output: {kept}")


def _check(folder: Path, settings: nxdi.NxdiSettings, ranks: int) -> None:
    """Raise an error for output that vLLM would silently compile again: a missing file, or other settings."""
    faults = list(_missing(folder, ranks))
    if not faults:
        faults = nxdi.differences(settings, json.loads((folder / nxdi.CONFIG).read_text(encoding="utf-8")))
    if not faults:
        faults = list(_uneven_ranks(folder, ranks))
    if faults:
        raise HostError(
            "; ".join(faults),
            where="nxdi",
            fix="install one SDK release: see `tandem doctor --backend neuron`",
        )


def _missing(folder: Path, ranks: int) -> Iterator[str]:
    for name in (nxdi.MODEL, nxdi.CONFIG, *map(nxdi.weight_file, range(ranks))):
        if not (folder / name).is_file() or not (folder / name).stat().st_size:
            yield f"NxD Inference wrote no {name}"


def _uneven_ranks(folder: Path, ranks: int) -> Iterator[str]:
    """Yield weights that some ranks lack: all ranks run the same program on the weights of both models."""
    first: set[str] = set()
    for rank in range(ranks):
        names = set(read_header(folder / nxdi.weight_file(rank)))
        first = first or names
        for name in sorted(names ^ first)[:3]:
            yield f"the weight {name} is on rank {rank if name in names else 0} only"
    for model in ("target_model", "draft_model"):
        if not any(name.startswith(f"{model}.") for name in first):
            yield f"no weights of the {model.partition('_')[0]}"


def _make_relative(folder: Path, folders: dict[str, str]) -> None:
    path = folder / nxdi.CONFIG
    config = nxdi.relative(json.loads(path.read_text(encoding="utf-8")), folders)
    text = json.dumps(config, indent=2, sort_keys=True)
    if absolute := [name for name in folders if name in text]:
        raise HostError(f"{nxdi.CONFIG} contains the absolute path {absolute[0]}", where="nxdi", fix="report this bug")
    path.write_text(text + "\n", encoding="utf-8")


def _add_models(folder: Path, pair: tuple[Checkpoint, Checkpoint]) -> None:
    for role, model in zip(nxdi.MODEL_FOLDERS, pair, strict=True):
        out = folder / nxdi.MODEL_FOLDERS[role]
        out.mkdir(parents=True)
        for name in CONFIG_FILES:
            if (model.root / name).is_file():
                shutil.copyfile(model.root / name, out / name)
        for name, data in (tokenizer_files(model) if role == "target" else {}).items():
            (out / name).write_bytes(data)


def _version() -> str:
    try:
        return metadata.version(nxdi.DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "missing"
