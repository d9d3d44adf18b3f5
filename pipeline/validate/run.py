"""Run all gates on an artifact and store the reports in it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import GateError

if TYPE_CHECKING:
    from pipeline.artifact.manifest import PairManifest
    from pipeline.runtime.engine import Engine
    from pipeline.sources.checkpoint import Checkpoint
    from pipeline.validate.gates.run import Gates
    from pipeline.validate.report.schema import Report

SHOWN_FINDINGS = 10


def validate(root: Path, target: Checkpoint, draft: Checkpoint, base: Path, cache: Path, log: Any) -> None:
    """Run the gates on the artifact in `root` and store the reports in it.

    Raises:
        GateError: a gate failed; the reports say where, and the artifact cannot be published.

    """
    from pipeline.artifact.reports import add_reports
    from pipeline.backends.base import make_backend
    from pipeline.cache.local import Cache
    from pipeline.recipe import load as load_recipe
    from pipeline.runtime.open import load
    from pipeline.validate.gates.run import Gates
    from pipeline.validate.prompts import load_prompts, prompts_path
    from pipeline.validate.report import page, summaries
    from pipeline.validate.report import schema as report

    recipe = load_recipe(root / "recipe.yaml")
    prompts = load_prompts(prompts_path(recipe.validate_.prompts, base))
    log(f"validate: {len(prompts)} prompts")
    started = time.monotonic()
    engine = load(root)
    try:
        gates = Gates(engine, recipe, prompts, (target, draft), Cache(cache, "goldens"), log)
        gates.run()
        found = make_report(gates, make_backend(engine.manifest.backend).host())
    finally:
        engine.close()
    files = {
        "parity.json": report.to_bytes(found),
        "parity.html": page.render(found).encode(),
        "parity.md": summaries.markdown(found).encode(),
        "junit.xml": summaries.junit(found),
    }
    ran_on = make_backend(engine.manifest.backend).host()
    add_reports(root, files, summaries.summary(found) | {"ran_on": ran_on})
    for gate in found.gates:
        log(f"  {gate.name}: {'passed' if gate.passed else 'FAILED'}")
    for label, value in summaries.headlines(found):
        log(f"    {label}: {value}")
    log(f"  {time.monotonic() - started:.0f} s; the report is {root / 'reports' / 'parity.html'}")
    if not found.passed:
        failures = [what for gate in found.gates for what in gate.findings]
        more = f"; and {len(failures) - SHOWN_FINDINGS} more" if len(failures) > SHOWN_FINDINGS else ""
        what = "; ".join(failures[:SHOWN_FINDINGS]) + more
        raise GateError(what, where=recipe.name, fix=f"open {root / 'reports' / 'parity.html'}")


def validate_artifact(root: Path, base: Path, log: Any) -> None:
    """Run the gates on a built artifact again, with the sources its recipe names."""
    from pipeline.cache.local import default_root
    from pipeline.recipe import load as load_recipe
    from pipeline.sources.pair import resolve_pair

    recipe = load_recipe(root / "recipe.yaml")
    target, draft = resolve_pair(recipe, base=base, cache=default_root() / "sources")
    validate(root, target, draft, base, default_root(), log)


def make_report(gates: Gates, ran_on: Mapping[str, str] | None = None) -> Report:
    """The report of gates that have run, on a host in the words of `Backend.host`."""
    from pipeline.validate.report.schema import Gate, Report

    found, manifest = gates.found, gates.engine.manifest
    return Report.model_validate(
        {
            "name": manifest.name,
            "version": manifest.version,
            "passed": found.passed,
            "gates": [Gate(name=n, passed=not f, findings=tuple(f)) for n, f in found.gates.items()],
            "tested": _tested(manifest, gates),
            "parity": found.data["parity"],
            "choices": found.data["choices"],
            "losslessness": found.data["losslessness"],
            "distribution": found.data.get("distribution"),
            "acceptance": found.data["acceptance"],
            "speed": found.data["speed"],
            "sequences": [_sequence(gates.engine, s) for s in (*gates.sequences, *gates.probes)],
            "provenance": _provenance(manifest, gates) | {"ran_on": dict(ran_on or {})},
        }
    )


def _tested(manifest: PairManifest, gates: Gates) -> dict[str, Any]:
    return {
        "prompts": len(gates.prompts),
        "classes": list(dict.fromkeys(p.kind for p in gates.prompts)),
        "graphs": [g.name for g in manifest.graphs],
        "batch": manifest.shapes.batch, "prefill": manifest.shapes.prefill, "kv": manifest.shapes.kv,
        "draft_tokens": manifest.draft_tokens, "sampling": manifest.sampling,
        "ranks": manifest.ranks, "dtype": manifest.dtype,
        "cut_prompts": gates.found.data["cut_prompts"],
    }  # fmt: skip


def _sequence(engine: Engine, sequence: Any) -> dict[str, Any]:
    return {
        "name": sequence.name,
        "class": sequence.kind,
        "prompt_tokens": sequence.prompt,
        "tokens": sequence.tokens,
        "texts": [engine.text.token(token) for token in sequence.tokens],
    }


def _provenance(manifest: PairManifest, gates: Gates) -> dict[str, Any]:
    import transformers

    return {
        "recipe_digest": manifest.recipe_digest,
        "lock_digest": manifest.lock_digest,
        "toolchain": manifest.toolchain,
        "requires": manifest.requires,
        "transformers": transformers.__version__,
        "created": manifest.created,
        "goldens": gates.found.data["goldens"],
        "seconds": {name: round(value, 2) for name, value in gates.found.seconds.items()},
    }
