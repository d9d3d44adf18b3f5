"""The gates that stand between a build and a release: parity, losslessness, acceptance. All on the shipped graphs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from pipeline.errors import GateError

if TYPE_CHECKING:
    from pipeline.recipe import Recipe
    from pipeline.runtime.engine import Engine, Generation
    from pipeline.sources import Checkpoint
    from pipeline.validate.prompts import Prompt

PARITY_PROMPTS = 10
"""Prompts whose whole logits are compared, spread over the classes; tokens are compared on all of them."""


@dataclass
class Verdict:
    """Findings of all gates: data for the report, and what failed."""

    gates: dict[str, list[str]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True when no gate found anything."""
        return not any(self.gates.values())


def validate(root: Path, target: Checkpoint, draft: Checkpoint, base: Path, goldens: Path, say: Any) -> None:
    """Run the gates on the artifact in `root` and store the reports in it.

    Raises:
        GateError: a gate failed; the reports say where, and the artifact cannot be published.

    """
    from pipeline.backends.base import make_backend
    from pipeline.package import add_reports
    from pipeline.recipe import load as load_recipe
    from pipeline.runtime import load
    from pipeline.validate.prompts import load_prompts, prompts_path

    recipe = load_recipe(root / "recipe.yaml")
    prompts = load_prompts(prompts_path(recipe.validate_.prompts, base))
    say(f"validate: {len(prompts)} prompts")
    engine = load(root)
    try:
        verdict = _gates(engine, recipe, prompts, (target, draft), goldens, say)
    finally:
        engine.close()
    ran_on = make_backend(engine.manifest.backend).host()
    summary = {"passed": verdict.passed, "gates": verdict.gates, "ran_on": ran_on, **verdict.data["summary"]}
    report = json.dumps({"passed": verdict.passed, "gates": verdict.gates, **verdict.data}, indent=1, sort_keys=True)
    add_reports(root, {"parity.json": report.encode(), "junit.xml": junit(recipe.name, verdict)}, summary)
    for gate, failures in verdict.gates.items():
        say(f"  {gate}: {'passed' if not failures else 'FAILED'}")
    if not verdict.passed:
        failures = [what for found in verdict.gates.values() for what in found]
        raise GateError("; ".join(failures), where=recipe.name, fix=f"read {root / 'reports' / 'parity.json'}")


def validate_artifact(root: Path, base: Path, say: Any) -> None:
    """Run the gates on a built artifact again, with the sources its recipe names."""
    from pipeline.cache import default_root
    from pipeline.recipe import load as load_recipe
    from pipeline.sources import resolve_pair

    recipe = load_recipe(root / "recipe.yaml")
    target, draft = resolve_pair(recipe, base=base, cache=default_root() / "sources")
    validate(root, target, draft, base, default_root() / "goldens", say)


def _gates(
    engine: Engine, recipe: Recipe, prompts: list[Prompt], pair: tuple[Checkpoint, Checkpoint], goldens: Path, say: Any
) -> Verdict:
    verdict = Verdict()
    limit = recipe.validate_.max_new_tokens
    encoded = [_encode(engine, prompt.text) for prompt in prompts]
    say("  greedy tokens, plain decode")
    plain = engine.generate(encoded, max_new_tokens=limit, speculate=False)
    chosen = _spread(prompts, PARITY_PROMPTS)
    sequences = {prompts[i].id: [*encoded[i], *plain[i].tokens] for i in chosen}
    say(f"  logits of {len(sequences)} prompts against transformers")
    verdict.gates["parity"] = _parity(engine, recipe, sequences, pair, goldens, verdict)
    speculative = {}
    for steps in recipe.speculation.draft_tokens:
        say(f"  greedy tokens, speculation with K={steps}")
        speculative[steps] = engine.generate(encoded, max_new_tokens=limit, draft_tokens=steps)
    verdict.gates["losslessness"] = _losslessness(engine, recipe, encoded, plain, speculative, verdict)
    if "stochastic" in recipe.speculation.sampling:
        say("  stochastic draws against the target's distribution")
        verdict.gates["distribution"] = _distribution(engine, encoded[chosen[0]], verdict)
    verdict.gates["acceptance"] = _acceptance(recipe, prompts, speculative, verdict)
    return verdict


def _encode(engine: Engine, text: str) -> list[int]:
    return engine.text.chat(text) if engine.text.has_chat else engine.text.encode(text)


def _spread(prompts: list[Prompt], count: int) -> list[int]:
    """Indices of up to `count` prompts, taken from the classes in turn."""
    kinds: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        kinds.setdefault(prompt.kind, []).append(index)
    turns = [index for group in zip(*_padded(list(kinds.values())), strict=True) for index in group]
    return [index for index in turns if index is not None][:count]


def _padded(groups: list[list[int]]) -> list[list[int | None]]:
    longest = max(map(len, groups))
    return [[*group, *([None] * (longest - len(group)))] for group in groups]


def _parity(
    engine: Engine, recipe: Recipe, sequences: dict[str, list[int]], pair: tuple[Checkpoint, Checkpoint],
    goldens: Path, verdict: Verdict,
) -> list[str]:  # fmt: skip
    from pipeline.validate.parity import Parity, score
    from pipeline.validate.reference import Reference

    target = pair[0]
    failures, data = [], {}
    for model, checkpoint in zip(("target", "draft"), pair, strict=True):
        dtype = recipe.target.dtype if model == "target" else recipe.draft.dtype or recipe.target.dtype
        baseline = Reference(checkpoint, target, "float32", "sdpa", goldens)
        noisy = Reference(checkpoint, target, dtype, "eager" if dtype == "float32" else "sdpa", goldens)
        figures = Parity(model)
        for spec in (g for g in engine.graphs if g.phase == "score" and g.model == model):
            for name, tokens in sequences.items():
                kept = tokens[: min(spec.kv, engine.length)]
                got = score(engine, spec, [kept])[0]
                figures.add(name, got, baseline.logits(tokens)[: len(kept)], noisy.logits(tokens)[: len(kept)])
        failures += figures.failures(recipe.validate_.gates.near_tie_rate)
        data[model] = figures.to_json()
    verdict.data["parity"] = data
    return failures


def _losslessness(
    engine: Engine, recipe: Recipe, encoded: list[list[int]], plain: list[Generation],
    speculative: dict[int, list[Generation]], verdict: Verdict,
) -> list[str]:  # fmt: skip
    from pipeline.validate.losslessness import compare_greedy, is_near_tie

    failures, rows = [], []
    for steps, answers in speculative.items():
        for found in compare_greedy(plain, answers):
            index, place = found["prompt"], found["position"]
            a, b = plain[index].tokens, answers[index].tokens
            both = place < len(a) and place < len(b)
            tie = both and is_near_tie(engine, encoded[index] + a[:place], (a[place], b[place]), recipe.target.dtype)
            rows.append({"K": steps, **found, "near_tie": tie})
            if not tie:
                failures.append(f"K={steps}: prompt {index} differs from plain decode at token {place}")
    tokens = sum(len(answer.tokens) for answers in speculative.values() for answer in answers)
    if sum(row["near_tie"] for row in rows) > recipe.validate_.gates.near_tie_rate * tokens:
        failures.append(f"{len(rows)} near-tie differences in {tokens} tokens exceed the rate")
    verdict.data["losslessness"] = {"tokens": tokens, "differences": rows}
    return failures


def _distribution(engine: Engine, prompt: list[int], verdict: Verdict) -> list[str]:
    from pipeline.validate.losslessness import FALSE_ALARM, chi_square_step

    failures, rows = [], []
    for spec in (g for g in engine.graphs if g.phase == "speculate" and g.sampling == "stochastic"):
        for test in chi_square_step(engine, spec, prompt, seed=spec.batch):
            rows.append({"graph": spec.name, **asdict(test)})
            if test.p_value < FALSE_ALARM:
                failures.append(
                    f"{spec.name}: token {test.position} is not distributed as the target, p={test.p_value:.1e}"
                )
    verdict.data["distribution"] = {"false_alarm_rate": FALSE_ALARM, "tests": rows}
    return failures


def _acceptance(
    recipe: Recipe, prompts: list[Prompt], speculative: dict[int, list[Generation]], verdict: Verdict
) -> list[str]:
    failures, data = [], {}
    floor = recipe.validate_.gates.tokens_per_step
    for steps, answers in speculative.items():
        rate = tokens_per_step(answers)
        kinds = {p.kind for p in prompts}
        by_kind = {k: tokens_per_step([a for a, p in zip(answers, prompts, strict=True) if p.kind == k]) for k in kinds}
        emitted = [n for answer in answers for n in answer.emitted_per_step]
        reached = [sum(n > place + 1 for n in emitted) / max(len(emitted), 1) for place in range(steps)]
        data[str(steps)] = {"tokens_per_step": rate, "by_class": by_kind, "accepted_by_position": reached}
        if rate < floor:
            failures.append(f"K={steps}: {rate:.2f} tokens per step is below the floor {floor}")
    verdict.data["acceptance"] = data
    verdict.data["summary"] = {"tokens_per_step": {k: row["tokens_per_step"] for k, row in data.items()}}
    return failures


def tokens_per_step(answers: list[Generation]) -> float:
    """Mean tokens that a speculative step emits."""
    steps = sum(answer.steps for answer in answers)
    return sum(sum(answer.emitted_per_step) for answer in answers) / max(steps, 1)


def junit(name: str, verdict: Verdict) -> bytes:
    """The gates as a JUnit report, a test case each."""
    failed = sum(bool(found) for found in verdict.gates.values())
    suite = ET.Element("testsuite", name=name, tests=str(len(verdict.gates)), failures=str(failed))
    for gate, found in verdict.gates.items():
        case = ET.SubElement(suite, "testcase", classname=name, name=gate)
        if found:
            ET.SubElement(case, "failure", message=found[0]).text = "\n".join(found)
    return ET.tostring(suite, xml_declaration=True, encoding="utf-8")
