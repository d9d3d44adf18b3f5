"""Cache rows of a loaded artifact and the graphs that advance them, for the engine and for servers.

Chooses the bucket of a step and its arguments; the caller chooses the rows that take part and handles their tokens.
A row keeps its tokens and the length of the draft's cache, so speculation can be switched at any step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from pipeline.artifact.manifest import MANIFEST, PairManifest
from pipeline.backends.base import Ranks
from pipeline.errors import CorruptError
from pipeline.files.limits import AGAIN
from pipeline.graphs.arguments import (
    Choice,
    Draw,
    PromptRow,
    ScoreRow,
    StepRow,
    prefill_arguments,
    score_arguments,
    step_arguments,
)
from pipeline.graphs.spec import GraphSpec
from pipeline.graphs.verify_arguments import VerifyRow, verify_arguments
from pipeline.recipe.step_costs import by_shape, fault_of
from pipeline.runtime.answers import EarlierAnswers, check_remembered
from pipeline.runtime.chunks import PrefillCall, next_chunk, prefill_calls
from pipeline.runtime.draft_length import COPIED, Acceptance, DraftLengthPolicies, DraftLengthPolicy
from pipeline.runtime.logprobs import Verified, verified_row
from pipeline.runtime.lookup import Lookup
from pipeline.runtime.rules import RuleState

LONGER = 2
"""A match in an earlier answer of so many times the size of prompt lookup precedes one in the request itself."""


@dataclass
class Row:
    """A request in a cache row. `tokens` is prompt and output; after its first step, all but the last are in the
    target's cache. `read` counts the tokens of the prompt that the caches hold. `written` is the end of all positions
    that calls wrote in its slot, of padding and of rejected drafts too, and where it was copied from: rings have lost
    what was there before.

    A sampled token depends on `seed`, its position and the tokens before it alone. `rules` is None for a request that
    asks for no more than its choice. `tenant` shares answers with nobody else. `drafted` and `copied` are the
    acceptances of the draft's own tokens and of those that lookup proposed.
    """

    tokens: list[int]
    prompt: int
    seed: int
    choice: Choice
    rules: RuleState | None = None
    read: int = 0
    written: int = 0
    in_draft: int = 0
    drafted: Acceptance = field(default_factory=Acceptance)
    copied: Acceptance = field(default_factory=lambda: Acceptance(COPIED, start=COPIED))
    lookup: Lookup = field(default_factory=Lookup)
    tenant: str = ""
    proposed: list[int] = field(default_factory=list)
    """What the draft proposed at this position, for `verify`."""
    has_copied: bool = False
    """Whether the last speculative step proposed copied tokens."""

    @property
    def position(self) -> int:
        """Number of tokens in the target's cache: the position at which the last token will be written."""
        return len(self.tokens) - 1

    def wrote(self, end: int) -> None:
        """Record that a call wrote positions up to `end`."""
        self.written = max(self.written, end)


Rows = Mapping[int, Row]
"""Rows by their slot in the caches."""


@dataclass(frozen=True)
class Drafts:
    """Drafts to verify for a row, and what a grammar allows before and after each: int32 [drafts + 1, W], or None."""

    tokens: Sequence[int] = ()
    allowed: Tensor | None = None


NO_DRAFTS = Drafts()


class Batch:
    """The slots of an artifact. Every method gets the rows that take part; the caller appends new tokens to them."""

    def __init__(self, manifest: PairManifest, ranks: Ranks) -> None:
        self.manifest = manifest
        self.ranks = ranks
        self.graphs = [entry.spec for entry in manifest.graphs]
        self.slots = manifest.shapes.batch[-1]
        self.length = manifest.shapes.kv[-1] - 1
        steps = ("speculative_steps", "verify_steps", "decode_steps")
        self.answers: EarlierAnswers | None = None
        self.stats = dict.fromkeys(("prefills", "chunks", *steps, "tokens", "catch_ups", "copies"), 0)

    def remember_answers(self, most_tokens: int) -> None:
        """Propose from answers of earlier requests, too, of which at most so many tokens are kept; 0: keep none.

        Raises:
            InputError: as `check_remembered`.

        """
        check_remembered(self.manifest, most_tokens)
        self.answers = EarlierAnswers(most_tokens, self.manifest.lookup or 1) if most_tokens else None

    def ended(self, row: Row) -> None:
        """Keep the answer of a request that ended, if answers are kept."""
        if self.answers is not None:
            self.answers.add(row.tenant, row.tokens[max(row.prompt - self.answers.size, 0) :])

    def draft_length_policy(self) -> DraftLengthPolicies | None:
        """Return the policies that choose K for each step; None if the artifact has no step costs.

        Raises:
            CorruptError: costs that do not fit the artifact's graphs.

        """
        costs, shapes, ks = self.manifest.step_costs, self.manifest.shapes, self.manifest.draft_tokens
        if costs is None:
            return None
        if (what := fault_of(costs, ks, shapes.batch, shapes.kv[-1])) is not None:
            raise CorruptError(f"step_costs: {what}", where=MANIFEST, fix=AGAIN)
        found = by_shape(costs, shapes.batch, shapes.kv[-1])
        return DraftLengthPolicies({
            batch: {tokens: DraftLengthPolicy(dict(zip(ks, of, strict=True))) for tokens, of in by_tokens.items()}
            for batch, by_tokens in found.items()
        })  # fmt: skip

    def choose_draft_tokens(self, policies: DraftLengthPolicies, rows: Rows) -> int:
        """Return K of the rows' next step; 0 for plain decode."""
        return policies.choose(self._acceptance(rows), _deepest(rows) + 1)

    def warm(self) -> int:
        """Run every graph that serving uses once, without rows, so that no request waits for its loading."""
        catches_up = not self.manifest.draft_kind.reads_target_states
        used = [g for g in self.graphs if g.phase != "score" or (g.model == "draft" and catches_up)]
        for spec in used:
            if spec.phase == "score":
                self._score(spec, {})
            elif spec.phase == "prefill":
                self.ranks.run(spec, prefill_arguments(spec, [], self.slots))
            elif spec.phase == "verify":
                self.ranks.run(spec, verify_arguments(spec, {}, self.manifest.vocab))
            else:
                self.ranks.run(spec, step_arguments(spec, {}))
        return len(used)

    def close(self) -> None:
        """Close the ranks."""
        self.ranks.close()

    def prefill(self, rows: Rows) -> dict[int, int]:
        """Read prompts into their slots, to their ends; return each row's first token."""
        return self.read_to({slot: row.prompt for slot, row in rows.items()}, rows)

    def read(self, rows: Rows) -> None:
        """Read prompts but for their last tokens: the next step's graph reads these."""
        self.read_to({slot: row.prompt - 1 for slot, row in rows.items()}, rows)

    def read_to(self, ends: Mapping[int, int], rows: Rows) -> dict[int, int]:
        """Read the rows' tokens up to `ends`, what the caches hold already excepted; return the token after each end.

        A row whose caches hold all of it reads its last token again; one that ends at 0 reads nothing.
        """
        after: dict[int, int] = {}
        waiting = {slot for slot in rows if ends[slot] > 0}
        while waiting:
            chunks = [next_chunk(slot, rows[slot].read, ends[slot], self.graphs) for slot in sorted(waiting)]
            for call in prefill_calls(chunks, self.graphs):
                after |= self._prefill(call, rows)
            waiting -= {chunk.slot for chunk in chunks if chunk.end == ends[chunk.slot]}
        return {slot: after[slot] for slot in rows if slot in after}

    def decode(self, rows: Rows) -> dict[int, list[int]]:
        """Return one token per row, from the target alone."""
        spec = self._graph("decode", rows, _deepest(rows) + 1, 0)
        out = self.ranks.run(spec, step_arguments(spec, _step_rows(rows)))["token"]
        self.stats["decode_steps"] += 1
        for row in rows.values():
            row.wrote(row.position + 1)
            row.proposed = []  # of another position
            if self.manifest.draft_kind.reads_target_states:  # this draft runs in every step of the target
                row.in_draft = row.position + 1
        return {slot: [int(out[slot])] for slot in rows}

    def propose(self, rows: Rows, steps: int) -> dict[int, list[int]]:
        """Return `steps` tokens of each row's draft, or of prompt lookup, for `verify`; none at a row's first token."""
        rows = {slot: row for slot, row in rows.items() if row.position > 0}
        if not rows:
            return {}
        self._catch_up(rows)
        spec = self._split_graph("propose", rows, self.manifest.draft_tokens[-1])
        copies = {slot: self._copies(row, steps) for slot, row in rows.items()}
        drafts = self.ranks.run(spec, step_arguments(spec, _step_rows(rows, copies)))["drafts"].tolist()
        self.stats["copies"] += sum(map(bool, copies.values()))
        for slot, row in rows.items():
            row.wrote(row.position + spec.draft_tokens)
            row.has_copied, row.proposed = bool(copies[slot]), drafts[slot]
        return {slot: drafts[slot][:steps] for slot in rows}

    def verify(self, rows: Rows, drafts: Mapping[int, Drafts]) -> dict[int, Verified]:
        """Verify given drafts by the rows' rules: 1 to K+1 tokens per row; rows without drafts take a decode step."""
        given = {slot: drafts.get(slot, NO_DRAFTS) for slot in rows}
        spec = self._split_graph("verify", rows, max(len(each.tokens) for each in given.values()))
        arguments = {slot: _verify_row(row, given[slot]) for slot, row in rows.items()}
        out = self.ranks.run(spec, verify_arguments(spec, arguments, self.manifest.vocab))
        counts = out["count"].tolist()
        self.stats["verify_steps"] += 1
        for slot, row in rows.items():
            row.wrote(row.position + spec.tokens)
            self._record_verified(row, counts[slot], given[slot].tokens)
        asked = {slot: row.rules.rules.logprobs if row.rules else None for slot, row in rows.items()}
        return {slot: verified_row(out, slot, counts[slot], asked[slot]) for slot in rows}

    def _record_verified(self, row: Row, count: int, drafts: Sequence[int]) -> None:
        if drafts:
            (row.copied if row.has_copied else row.drafted).record_step(count - 1, len(drafts))
        if self.manifest.draft_kind.reads_target_states:  # this draft runs in every step of the target
            row.in_draft = row.position + count
        elif row.proposed:  # it has read the last token and its proposals but for the last; the accepted ones are valid
            own = common_prefix(row.proposed[:-1], drafts[: count - 1])
            row.in_draft = row.position + 1 + own
        row.proposed = []

    def _split_graph(self, phase: str, rows: Rows, steps: int) -> GraphSpec:
        """Return the smallest graph of a phase that holds the rows' slots and K = `steps` drafts."""
        fits = [g for g in self.graphs if g.phase == phase and g.batch > max(rows) and g.draft_tokens >= steps]
        return min(fits, key=lambda g: (g.batch, g.draft_tokens))

    def has_room(self, rows: Rows, steps: int) -> bool:
        """Return whether K = `steps` drafts fit after every row."""
        return _deepest(rows) + steps < self.length

    def _acceptance(self, rows: Rows) -> dict[int, Acceptance]:
        """Return each row's acceptance for the kind of drafts in its next step: copied tokens, or the draft's own."""
        return {slot: row.copied if self._copies(row, 1) else row.drafted for slot, row in rows.items()}

    def speculate(self, rows: Rows, steps: int) -> dict[int, list[int]]:
        """Draft `steps` tokens and verify them; return 1 to K+1 tokens per row."""
        self._catch_up(rows)
        spec = self._graph("speculate", rows, _deepest(rows) + steps + 1, steps)
        copies = {slot: self._copies(row, steps) for slot, row in rows.items()}
        out = self.ranks.run(spec, step_arguments(spec, _step_rows(rows, copies)))
        self.stats["speculative_steps"] += 1
        self.stats["copies"] += sum(map(bool, copies.values()))
        tokens, counts = out["tokens"].tolist(), out["count"].tolist()
        emitted = {slot: tokens[slot][: counts[slot]] for slot in rows}
        for slot, row in rows.items():
            row.wrote(row.position + spec.tokens)
            row.has_copied, row.proposed = bool(copies[slot]), []
            (row.copied if row.has_copied else row.drafted).record_step(len(emitted[slot]) - 1, steps)
            # After a fully accepted step, the draft's cache lacks the last proposed token until its next pass.
            row.in_draft = row.position + len(emitted[slot]) - (len(emitted[slot]) > steps)
        return emitted

    def _copies(self, row: Row, most: int) -> list[int]:
        """Return tokens to propose instead of the draft's; none if the artifact has no prompt lookup.

        What followed a longer match in an earlier answer comes before what followed a match in the request itself.
        """
        size = self.manifest.lookup
        if size is None:
            return []
        own = row.lookup.find(row.tokens, size, most)
        if self.answers is None:
            return own
        length, earlier = self.answers.find(row.tenant, row.tokens, most)
        return earlier if earlier and (not own or length >= LONGER * size) else own

    def _prefill(self, call: PrefillCall, rows: Rows) -> dict[int, int]:
        """Run one prefill graph; return the token after each chunk."""
        prompts = [
            PromptRow(row.tokens[chunk.start : chunk.end], chunk.slot, Draw(row.choice, row.seed), chunk.start)
            for chunk in call.chunks
            for row in (rows[chunk.slot],)
        ]
        out = self.ranks.run(call.graph, prefill_arguments(call.graph, prompts, self.slots))["token"].tolist()
        self.stats["prefills"] += 1
        self.stats["chunks"] += sum(chunk.start > 0 for chunk in call.chunks)
        for chunk in call.chunks:
            rows[chunk.slot].read = rows[chunk.slot].in_draft = chunk.end
            rows[chunk.slot].wrote(chunk.end)
        return {chunk.slot: out[place] for place, chunk in enumerate(call.chunks)}

    def _catch_up(self, rows: Rows) -> None:
        """Run the draft's `score` graph over the tokens that were decoded without the draft.

        A step itself covers the token before the last one; only longer gaps need this. Rows without a gap run at the
        scratch position.
        """
        while gaps := {slot: row for slot, row in rows.items() if row.in_draft < row.position - 1}:
            spec = self.score_graph("draft", _deepest(rows))
            self._score(spec, gaps)
            self.stats["catch_ups"] += 1

    def _score(self, spec: GraphSpec, rows: Rows) -> None:
        """Run the draft over the next piece of the tokens that its cache lacks."""
        pieces = {}
        for slot, row in rows.items():
            piece = row.tokens[row.in_draft : row.position][: spec.tokens]
            pieces[slot] = ScoreRow(piece, row.in_draft)
            row.wrote(row.in_draft + spec.tokens)
            row.in_draft += len(piece)
        self.ranks.run(spec, score_arguments(spec, pieces, self.length))

    def _graph(self, phase: str, rows: Rows, length: int, steps: int) -> GraphSpec:
        """Return the smallest bucket that holds the rows' slots and `length` positions."""
        how = _how(rows)
        fits = [
            g for g in self.graphs
            if g.phase == phase and g.sampling == how and g.draft_tokens == steps and g.batch > max(rows)
            and g.kv >= min(length, self.length)
        ]  # fmt: skip
        return min(fits, key=lambda g: (g.batch, g.kv))

    def score_graph(self, model: str, length: int) -> GraphSpec:
        """Return the smallest `score` graph of a model that holds `length` positions."""
        fits = [g for g in self.graphs if g.phase == "score" and g.model == model and g.kv >= min(length, self.length)]
        return min(fits, key=lambda g: g.kv)


def _deepest(rows: Rows) -> int:
    return max(row.position for row in rows.values())


def _how(rows: Rows) -> str:
    """Return the sampling of a graph for rows: greedy rows may share a stochastic graph, at temperature 0."""
    return "stochastic" if any(row.choice.temperature > 0 for row in rows.values()) else "greedy"


def _step_rows(rows: Rows, copies: Mapping[int, Sequence[int]] | None = None) -> dict[int, StepRow]:
    """Return the arguments of rows in a step; `copies` are tokens that prompt lookup proposes."""
    copied = copies or {}
    return {
        slot: StepRow(row.tokens[-1], row.position, Draw(row.choice, row.seed), copied.get(slot, ()))
        for slot, row in rows.items()
    }


def _verify_row(row: Row, drafts: Drafts) -> VerifyRow:
    draw = Draw(row.choice, row.seed)
    if row.rules is None:
        return VerifyRow(row.tokens[-1], row.position, drafts.tokens, draw)
    rules = row.rules.at(row.tokens, drafts.tokens, drafts.allowed)
    return VerifyRow(row.tokens[-1], row.position, drafts.tokens, draw, rules)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
