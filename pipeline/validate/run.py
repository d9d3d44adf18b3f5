"""Run all gates on an artifact and store the reports in it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from pathlib import Path

import transformers

from pipeline.artifact.reports import add_reports
from pipeline.backends.base import make_backend
from pipeline.cache.local import Cache, default_root
from pipeline.errors import GateError
from pipeline.graphs.arguments import GREEDY
from pipeline.progress import Log, Progress, duration, no_progress, stage, working
from pipeline.recipe import Recipe
from pipeline.recipe import load as load_recipe
from pipeline.runtime.engine import Engine
from pipeline.runtime.open import load
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.pair import resolve_pair
from pipeline.sources.tokenizer import tokenizer_files
from pipeline.validate.draft.report import DraftReport
from pipeline.validate.draft.short import short_prompts, short_report
from pipeline.validate.gates.answers import ScoredSequence
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.judge import words
from pipeline.validate.gates.parts import Elsewhere
from pipeline.validate.gates.run import GateRun, run_gates
from pipeline.validate.lengths import encoded_prompts
from pipeline.validate.prompts import Prompt, recipe_prompts
from pipeline.validate.reference.goldens import GoldenStore
from pipeline.validate.report import page, summaries
from pipeline.validate.report import schema as report
from pipeline.validate.report.schema import Provenance, Report, Tested, TokenSequence

SHOWN_FINDINGS = 10


def validate(
    root: Path, pair: tuple[Checkpoint, Checkpoint], base: Path, goldens: GoldenStore, log: Log,
    progress: Progress = no_progress, elsewhere: Elsewhere | None = None,
) -> Report:  # fmt: skip
    """Run the gates on the artifact in `root`, store the reports in it, and return the report.

    `pair` is target and draft; `elsewhere` runs parts of the gates on other machines.

    Raises:
        GateError: a gate failed; the reports list the findings, and the artifact cannot be published.

    """
    recipe = load_recipe(root / "recipe.yaml")
    prompts = recipe_prompts(recipe, base)
    started = time.monotonic()
    read = draft_report(recipe, pair, prompts, goldens, log, progress)
    engine = load(root, share_prefixes=False)
    inputs = GateInputs(engine, recipe, prompts, pair, goldens, log, progress, read)
    try:
        with working(f"validate: {len(prompts)} prompts", progress):
            whole = make_report(run_gates(inputs, elsewhere), make_backend(engine.manifest.backend).host())
    finally:
        engine.close()
    store_reports(root, whole)
    log_report(whole, log)
    log(f"validate: {len(prompts)} prompts ({duration(time.monotonic() - started)}); report: {page_of(root)}")
    if not whole.passed:
        raise GateError(failures(whole), where=recipe.name, fix=remedy(whole, recipe, root, base))
    return whole


def draft_report(
    recipe: Recipe, pair: tuple[Checkpoint, Checkpoint], prompts: list[Prompt], goldens: GoldenStore, log: Log,
    progress: Progress,
) -> DraftReport | None:  # fmt: skip
    """Return the short form of `tandem draft doctor`, as a build ran it before it compiled; None for a draft model."""
    if pair[1].config.eagle3 is None:
        return None
    tokens = encoded_prompts(short_prompts(prompts), tokenizer_files(pair[0]))
    return short_report(recipe, pair, tokens, goldens, log, progress)


def make_report(gates: GateRun, ran_on: Mapping[str, str]) -> Report:
    """Return the report of gates that ran on a host, whose facts are those of `Backend.host`."""
    manifest = gates.inputs.engine.manifest
    parity, acceptance = gates.parity.section, gates.acceptance.section
    return Report(
        name=manifest.name,
        version=manifest.version,
        passed=gates.passed,
        gates=tuple(outcome.verdict() for outcome in gates.outcomes),
        tested=_tested(gates),
        parity=parity.models,
        choices=parity.choices,
        losslessness=gates.losslessness.section,
        distribution=None if gates.distribution is None else gates.distribution.section,
        acceptance=acceptance.acceptance,
        speed=acceptance.speed,
        sequences=tuple(_sequence(gates.inputs.engine, sequence) for sequence in gates.sequences.all),
        provenance=_provenance(gates, ran_on),
    )


def _tested(gates: GateRun) -> Tested:
    manifest = gates.inputs.engine.manifest
    return Tested(
        prompts=len(gates.inputs.prompts),
        classes=tuple(dict.fromkeys(prompt.kind for prompt in gates.inputs.prompts)),
        graphs=tuple(graph.name for graph in manifest.graphs),
        batch=manifest.shapes.batch,
        prefill=manifest.shapes.prefill,
        kv=manifest.shapes.kv,
        draft_tokens=manifest.draft_tokens,
        sampling=manifest.sampling,
        ranks=manifest.ranks,
        dtype=manifest.dtype,
        settings=_settings(gates),
        eos_ids=manifest.eos_ids,
        not_applied=gates.inputs.engine.defaults.not_applied(gates.inputs.recipe.speculation.sampling),
        cut_prompts=gates.answers.cut_prompts,
    )


def _settings(gates: GateRun) -> tuple[str, ...]:
    """Return the settings of the gates, which are not those of the model: they must not depend on its defaults."""
    greedy = f"temperature 0, at most {gates.inputs.recipe.validate_.max_new_tokens} new tokens"
    if gates.distribution is None:
        return (greedy,)
    return greedy, *(setting for setting in gates.distribution.section.settings if setting != words(GREEDY))


def _sequence(engine: Engine, sequence: ScoredSequence) -> TokenSequence:
    return TokenSequence(
        name=sequence.name,
        kind=sequence.kind,
        prompt_tokens=sequence.prompt,
        tokens=tuple(sequence.tokens),
        texts=tuple(engine.text.token(token) for token in sequence.tokens),
    )


def _provenance(gates: GateRun, ran_on: Mapping[str, str]) -> Provenance:
    manifest = gates.inputs.engine.manifest
    return Provenance(
        recipe_digest=manifest.recipe_digest,
        lock_digest=manifest.lock_digest,
        toolchain=manifest.toolchain,
        requires=manifest.requires,
        ran_on=dict(ran_on),
        transformers=transformers.__version__,
        created=manifest.created,
        goldens={model: reference.counts for model, reference in gates.references.items()},
        seconds={name: round(value, 2) for name, value in gates.seconds.items()},
    )


def store_reports(root: Path, whole: Report) -> None:
    """Store a report in its artifact, in every form."""
    files = {
        "parity.json": report.to_bytes(whole),
        "parity.html": page.render(whole).encode(),
        "parity.md": summaries.markdown(whole).encode(),
        "junit.xml": summaries.junit(whole),
    }
    add_reports(root, files, summaries.summary(whole))


def log_report(whole: Report, log: Log) -> None:
    """Log each gate's verdict and the main numbers."""
    for label, value in summaries.headlines(whole):
        log(f"    {label}: {value}")
    for gate in whole.gates:
        log(f"  {gate.name}: {'passed' if gate.passed else 'FAILED'}")


def failures(whole: Report) -> str:
    """Return the findings of all gates as one message."""
    findings = [finding for gate in whole.gates for finding in gate.findings]
    more = f"; and {len(findings) - SHOWN_FINDINGS} more" if len(findings) > SHOWN_FINDINGS else ""
    return "; ".join(findings[:SHOWN_FINDINGS]) + more


def remedy(whole: Report, recipe: Recipe, root: Path, base: Path) -> str:
    """Return the fix for failed gates: open the report; for low acceptance also train a draft or lower the limit.

    `base` is the folder of the recipe that was built: the artifact's copy has its sources relative to that folder.
    """
    page_path = f"open {page_of(root)}"
    if all(gate.passed for gate in whole.gates if gate.name == "acceptance"):
        return page_path
    limit = f"lower `validate.gates.tokens_per_step` (now {recipe.floor}) in the recipe"
    file = base / f"{recipe.name}.yaml"
    named = shlex.quote(str(file)) if file.is_file() and base not in (Path("recipes"), Path()) else recipe.name
    train = f"train a draft for this target, `tandem distill {named}`, and name its folder in `draft.source`"
    return f"{train}; or {limit}; to see which prompts, {page_path}"


def page_of(root: Path) -> Path:
    """Return the path of an artifact's report for people."""
    return root / "reports" / "parity.html"


def validate_artifact(root: Path, base: Path, log: Log, progress: Progress = no_progress) -> None:
    """Run the gates on a built artifact again, with the sources its recipe names."""
    recipe = load_recipe(root / "recipe.yaml")
    with stage("sources: target and draft", log, progress):
        pair = resolve_pair(recipe, base=base, cache=default_root() / "sources", progress=progress)
    validate(root, pair, base, Cache(default_root(), "goldens"), log, progress)
