"""Compare two releases by their reports alone: changes, and whether they exceed the noise. No torch.

A change exceeds the noise when it is larger than the two samples explain: a two-proportion test for
acceptance, a rank test for latencies (each at one in a thousand), a tenth for ratios of errors, whose sampling error is
far below that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.validate.report import page
from pipeline.validate.report.schema import Acceptance, Latencies, Report
from pipeline.validate.report.summaries import show

SIGNIFICANCE = 3.29
"""Standard errors: one in a thousand, two-sided."""

RATIO_CHANGE = 0.10


@dataclass(frozen=True)
class Change:
    """One measurement of both releases. `beyond_noise` is None where no test applies; `worse` only beyond noise."""

    what: str
    before: float | None
    after: float | None
    beyond_noise: bool | None
    worse: bool = False

    @property
    def judgement(self) -> str:
        """Verdict on the change."""
        if self.beyond_noise is None:
            return "for information"
        if not self.beyond_noise:
            return "within noise"
        return "worse" if self.worse else "better"


def compare(before: Report, after: Report) -> list[Change]:
    """Return every measurement that both reports have, and the verdict of every gate."""
    return [*_gates(before, after), *_parity(before, after), *_acceptance(before, after), *_speed(before, after)]


def _gates(before: Report, after: Report) -> Iterator[Change]:
    verdicts = {gate.name: gate.passed for gate in before.gates}
    for gate in after.gates:
        was = verdicts.get(gate.name)
        if was is not None:
            yield Change(
                f"gate {gate.name} passed", float(was), float(gate.passed), was != gate.passed, was and not gate.passed
            )


def _parity(before: Report, after: Report) -> Iterator[Change]:
    for model, new in after.parity.items():
        old = before.parity.get(model)
        if old is None:
            continue
        a, b = old.error_over_noise, new.error_over_noise
        beyond = None if a is None or b is None else abs(b - a) > RATIO_CHANGE * max(a, b)
        yield Change(
            f"{model}: error over noise", a, b, beyond, bool(beyond and b is not None and a is not None and b > a)
        )
        moved = differ((old.flips, old.tokens), (new.flips, new.tokens))
        shares = [of.flips / max(of.tokens, 1) for of in (old, new)]
        yield Change(f"{model}: share of tokens flipped", shares[0], shares[1], moved, moved and shares[1] > shares[0])


def _acceptance(before: Report, after: Report) -> Iterator[Change]:
    known = {of.draft_tokens: of for of in before.acceptance}
    for new in after.acceptance:
        old = known.get(new.draft_tokens)
        if old is None:
            continue
        moved = _emitted_differ(old, new)
        yield Change(
            f"tokens per step (K={new.draft_tokens})",
            old.tokens_per_step,
            new.tokens_per_step,
            moved,
            moved and new.tokens_per_step < old.tokens_per_step,
        )
        for kind, of in new.by_class.items():
            if kind in old.by_class:
                yield Change(
                    f"tokens per step (K={new.draft_tokens}), {kind}",
                    old.by_class[kind].tokens_per_step,
                    of.tokens_per_step,
                    None,
                )


def _emitted_differ(old: Acceptance, new: Acceptance) -> bool:
    """Return the result of a z-test on the mean tokens per step."""
    parts = []
    for lengths in (old.lengths, new.lengths):
        total = max(sum(lengths), 1)
        mean = sum((i + 1) * n for i, n in enumerate(lengths)) / total
        spread = sum((i + 1 - mean) ** 2 * n for i, n in enumerate(lengths)) / total
        parts.append((mean, spread / total))
    (a, va), (b, vb) = parts
    return abs(a - b) > SIGNIFICANCE * math.sqrt(va + vb) + 1e-12


def _speed(before: Report, after: Report) -> Iterator[Change]:
    pairs: dict[str, tuple[Latencies, Latencies]] = {
        "plain": (before.speed.plain, after.speed.plain),
        "speculative": (before.speed.speculative, after.speed.speculative),
    }
    for name, (a, b) in pairs.items():
        moved = rank_differ(a.step_ms, b.step_ms)
        slower = (b.step_p50_ms or 0) > (a.step_p50_ms or 0)
        yield Change(f"{name}: step p50, ms", a.step_p50_ms, b.step_p50_ms, moved, bool(moved and slower))
        yield Change(f"{name}: tokens/s", a.tokens_per_s, b.tokens_per_s, None)
        yield Change(f"{name}: first token, ms", a.first_token_ms, b.first_token_ms, None)
    yield Change("speed-up", before.speed.measured_speedup, after.speed.measured_speedup, None)


def differ(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Return whether two shares, given as counts, differ beyond noise."""
    (x, n), (y, m) = a, b
    pooled = (x + y) / max(n + m, 1)
    error = math.sqrt(pooled * (1 - pooled) * (1 / max(n, 1) + 1 / max(m, 1)))
    return abs(x / max(n, 1) - y / max(m, 1)) > SIGNIFICANCE * error + 1e-12


def rank_differ(a: Sequence[float], b: Sequence[float]) -> bool | None:
    """Return the result of Mann and Whitney's rank test (1947), approximated; None with fewer than 10 values."""
    n, m = len(a), len(b)
    if min(n, m) < 10:
        return None
    order = sorted([(value, 0) for value in a] + [(value, 1) for value in b])
    ranks = sum(rank for rank, (_, which) in enumerate(order, 1) if which == 0)
    statistic = ranks - n * (n + 1) / 2
    return abs(statistic - n * m / 2) > SIGNIFICANCE * math.sqrt(n * m * (n + m + 1) / 12)


def render(before: Report, after: Report) -> str:
    """Return the comparison as one page, like the report's."""
    changes = compare(before, after)
    worse = [change for change in changes if change.worse]
    names = f"{before.name} {before.version}", f"{after.name} {after.version}"
    return page.render_document(
        "compare.html.j2",
        f"{names[0]} and {names[1]}",
        {
            "before": names[0],
            "after": names[1],
            "text": "Some measurements are worse beyond noise" if worse else "Nothing is worse beyond noise",
            "findings": [f"{c.what}: {show(c.before)} before, {show(c.after)} after" for c in worse],
            "changes": changes,
        },
    )
