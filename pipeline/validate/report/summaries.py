"""Shorter forms of a report: data for the manifest, lines for the terminal, JUnit for CI, Markdown for reviews."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree import ElementTree as ET

from pipeline.validate.report.schema import Distribution, Latencies, Report


def summary(report: Report) -> dict[str, Any]:
    """Return the summary that the manifest stores."""
    return {
        "passed": report.passed,
        "gates": {gate.name: list(gate.findings) for gate in report.gates},
        "ran_on": report.provenance.ran_on,
        "tokens_per_step": {str(a.draft_tokens): a.tokens_per_step for a in report.acceptance},
        "error_over_noise": {model: of.error_over_noise for model, of in report.parity.items()},
        "speed": {
            "plain": _rates(report.speed.plain),
            "speculative": _rates(report.speed.speculative),
            "measured_speedup": report.speed.measured_speedup,
        },
    }


def _rates(of: Latencies) -> dict[str, Any]:
    return {
        "tokens_per_s": of.tokens_per_s,
        "first_token_ms": of.first_token_ms,
        "inter_token_ms": of.inter_token_ms,
    }


def headlines(report: Report) -> list[tuple[str, str]]:
    """Return the main measurements, as label and value, for terminal, Markdown and page."""
    rows = [
        (f"{model}: error over {of.dtype} noise", f"{show(of.error_over_noise)} ({of.tokens} tokens)")
        for model, of in report.parity.items()
    ]
    rows += list(_router_ties(report))
    flips = sum(of.flips for of in report.parity.values())
    ties = sum(of.near_ties for of in report.parity.values())
    rows.append(("flipped tokens", f"{flips}{_near_ties(ties, flips)}"))
    choices = report.choices
    answers = f"{choices.tokens} compared{_near_ties(choices.near_ties, choices.tokens)}"
    if choices.after_router_ties:
        answers += f", {choices.after_router_ties} differ after near-ties of a router"
    rows.append(("answer tokens against the reference", answers))
    lossless = report.losslessness
    differences = len(lossless.differences)
    tokens = f"{differences} of {lossless.tokens} tokens differ{_near_ties(lossless.near_ties, differences)}"
    rows.append(("speculation against plain decode", tokens))
    if report.distribution is not None:
        passed = any(gate.name == "distribution" and gate.passed for gate in report.gates)
        tests = _exact_tests([test.p_value for test in report.distribution.tests], passed=passed)
        rows.append(("sampled tokens recomputed from their seeds", f"{report.distribution.tokens} compared; {tests}"))
        rows += _left_out(report.distribution)
    rows += [(f"tokens per step (K={a.draft_tokens})", f"{a.tokens_per_step:.2f}") for a in report.acceptance]
    rows.append(("speed-up, measured once; other load changes it", show(report.speed.measured_speedup)))
    rows.append(("speed-up, from acceptance and draft size", show(report.speed.expected_speedup)))
    if tested := report.tested.settings:
        rows.append(("settings of the gates", "; ".join(tested)))
    if left_out := report.tested.not_applied:
        rows.append(("generation_config.json, not applied", ", ".join(left_out)))
    if cut := report.tested.cut_prompts:
        what = "they do not fit the caches with an answer; only their last tokens ran"
        rows.append(("prompts that were cut", f"{len(cut)} of {report.tested.prompts}: {what}"))
    return rows


def _router_ties(report: Report) -> Iterator[tuple[str, str]]:
    for model, of in report.parity.items():
        if of.experts is not None:
            choices = f"{of.experts.near_ties} of {of.experts.choices} choices of experts"
            usual = f"transformers in {of.dtype}: {of.experts.near_ties_of_noise}"
            yield f"{model}: tokens at router near-ties", f"{of.experts.tokens} of {of.tokens} ({choices}; {usual})"


def _left_out(sampling: Distribution) -> Iterator[tuple[str, str]]:
    if sampling.mass_left_out is not None:
        mean, largest = (f"{share:.1%}" for share in sampling.mass_left_out)
        kept = f"at temperature 1, {sampling.candidates} candidates leave out"
        yield "probability that is never sampled", f"{kept} {mean} on average, {largest} at most"


def _exact_tests(p_values: Sequence[float | None], *, passed: bool) -> str:
    """Return the number of tests and the smallest p-value; that of a gate that passed is large enough."""
    known = [p_value for p_value in p_values if p_value is not None]
    if not known:
        return f"{len(p_values)} exact tests, none with a p-value"
    tests = "1 exact test" if len(known) == 1 else f"{len(known)} exact tests"
    return f"{tests}, smallest p {show(min(known))}{' (good: chance explains it)' if passed else ''}"


def _near_ties(near_ties: int, tokens: int) -> str:
    if not near_ties:
        return ""
    return " (all near-ties)" if near_ties == tokens else f" ({near_ties} near-ties)"


def show(value: float | None) -> str:
    """Return a number as text."""
    if value is None:
        return "not a number"
    return f"{value:.2f}" if 0.01 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"


def junit(report: Report) -> bytes:
    """Return the gates as a JUnit report, one test case per gate."""
    failed = sum(not gate.passed for gate in report.gates)
    suite = ET.Element("testsuite", name=report.name, tests=str(len(report.gates)), failures=str(failed))
    for gate in report.gates:
        case = ET.SubElement(suite, "testcase", classname=report.name, name=gate.name)
        if gate.findings:
            ET.SubElement(case, "failure", message=gate.findings[0]).text = "\n".join(gate.findings)
    return ET.tostring(suite, xml_declaration=True, encoding="utf-8")


def markdown(report: Report) -> str:
    """Return a summary for a pull request or a model card."""
    verdict = "passed" if report.passed else "**failed**"
    lines = [
        f"### {report.name} {report.version}: validation {verdict}",
        "",
        "| gate | verdict | finding |",
        "| --- | --- | --- |",
    ]
    for gate in report.gates:
        first = gate.findings[0].replace("|", "\\|") if gate.findings else ""
        more = f" (and {len(gate.findings) - 1} more)" if len(gate.findings) > 1 else ""
        lines.append(f"| {gate.name} | {'passed' if gate.passed else '**failed**'} | {first}{more} |")
    lines += ["", "| | |", "| --- | --- |", *(f"| {label} | {value} |" for label, value in headlines(report))]
    return "\n".join(lines) + "\n"
