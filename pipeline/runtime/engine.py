"""Generate text with an artifact: admit prompts into rows, speculate or decode, refill rows as they finish.

Decides only which graph runs next; all mathematics is in the graphs. The engine keeps, for every row, its tokens and
how far the draft's cache reaches, so that speculation can be switched off and on at any step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.artifact import Manifest
from pipeline.errors import InputError
from pipeline.plan import GraphSpec
from pipeline.runtime.pace import Acceptance, Pace
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.text import Text


@dataclass(frozen=True)
class Generation:
    """One answer: new token ids, their text, speculative steps taken, draft tokens accepted, and why it ended.

    `finish_reason` is `stop` (end-of-sequence token, which is included) or `length`.
    """

    tokens: list[int]
    text: str
    steps: int
    accepted: int
    finish_reason: str
    emitted_per_step: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """How to choose tokens in one call of `generate`."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    draft_tokens: int | None = None
    pace: Pace | None = None


@dataclass
class Row:
    """A request in a cache row. `tokens` is prompt and output; all but the last are in the target's cache."""

    index: int
    prompt: int
    tokens: list[int]
    in_draft: int
    generator: torch.Generator
    emitted: list[int] = field(default_factory=list)
    speculative_steps: int = 0
    acceptance: Acceptance = field(default_factory=Acceptance)

    @property
    def position(self) -> int:
        """Tokens in the target's cache; where the last token will be written."""
        return len(self.tokens) - 1


OnTokens = Callable[[int, list[int]], None]
"""Called with a prompt's index and its new tokens, as they come."""


class Engine:
    """A loaded artifact. Not thread-safe: one `generate` at a time."""

    def __init__(self, manifest: Manifest, ranks: Ranks, text: Text) -> None:
        self.manifest = manifest
        self.ranks = ranks
        self.text = text
        self.graphs = [g.spec() for g in manifest.graphs]
        self.rows = manifest.shapes.batch[-1]
        self.length = manifest.shapes.kv[-1] - 1
        self._stats = {"prefills": 0, "speculative_steps": 0, "decode_steps": 0, "tokens": 0, "catch_ups": 0}

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        speculate: bool = True,
        draft_tokens: int | None = None,
        on_tokens: OnTokens | None = None,
    ) -> list[Generation]:
        """Generate for every prompt; more prompts than rows are queued, rows are refilled as they finish.

        Greedy at temperature 0. Random numbers depend on `seed` and the prompt's index alone, so an answer does not
        depend on what else is in the batch. Without `draft_tokens`, K is the first that was built; where the artifact
        knows what steps cost, greedy decoding chooses K, or plain decode, anew for each step.

        Raises:
            InputError: an empty prompt, one longer than the largest prefill bucket, token ids beyond the vocabulary, or
                sampling that was not built.

        """  # fmt: skip
        steps = self._steps(draft_tokens) if speculate else None
        pace = self._pace(temperature) if speculate and draft_tokens is None else None
        settings = Settings(max_new_tokens, temperature, top_k, top_p, steps, pace)
        self._check(settings)
        waiting = [self._row(index, prompt, seed) for index, prompt in enumerate(prompts)]
        results: list[Generation | None] = [None] * len(waiting)
        slots: list[Row | None] = [None] * self.rows
        waiting.reverse()
        while waiting or any(slots):
            fresh = self._admit(slots, waiting, settings)
            for slot, row in enumerate(slots):
                if row is not None and (slot in fresh) and self._finished(row, settings):
                    results[row.index], slots[slot] = self._result(row), None
            if fresh and on_tokens:
                self._report(slots, fresh, on_tokens)
            if not any(slots):
                continue
            self._step(slots, settings, on_tokens)
            for slot, row in enumerate(slots):
                if row is not None and self._finished(row, settings):
                    results[row.index], slots[slot] = self._result(row), None
        return [result for result in results if result is not None]

    def stats(self) -> dict[str, int]:
        """Counts since loading: prefills, speculative and plain steps, tokens, draft catch-ups."""
        return dict(self._stats)

    def close(self) -> None:
        """End the ranks."""
        self.ranks.close()

    def _check(self, settings: Settings) -> None:
        how = "stochastic" if settings.temperature > 0 else "greedy"
        if how not in self.manifest.sampling:
            built = ", ".join(self.manifest.sampling)
            raise InputError(
                f"{how} sampling was not built; the artifact has {built}",
                where="temperature",
                fix=f"add {how} to speculation.sampling and rebuild",
            )
        accepted = {
            "max_new_tokens": (settings.max_new_tokens >= 1, "1 or more"),
            "temperature": (settings.temperature >= 0, "0 (greedy) or more"),
            "top_k": (settings.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < settings.top_p <= 1, "more than 0, at most 1"),
        }
        for name, (fits, range_) in accepted.items():
            if not fits:
                raise InputError(f"found {getattr(settings, name)}", where=name, fix=f"use {range_}")

    def _steps(self, draft_tokens: int | None) -> int:
        built = self.manifest.draft_tokens
        if draft_tokens is None:
            return built[0]
        if draft_tokens not in built:
            raise InputError(f"K={draft_tokens} was not built", where="draft_tokens", fix=f"use one of {list(built)}")
        return draft_tokens

    def _pace(self, temperature: float) -> Pace | None:
        """Steps of changing K would draw other random numbers, so only greedy decoding has a pace."""
        costs = self.manifest.step_costs
        if costs is None or temperature > 0:
            return None
        return Pace(dict(zip(self.manifest.draft_tokens, costs, strict=True)))

    def _row(self, index: int, prompt: str | list[int], seed: int) -> Row:
        tokens = self.text.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_tokens(tokens, f"prompt {index}")
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        return Row(index, len(tokens), tokens, 0, generator)

    def _check_tokens(self, tokens: list[int], where: str) -> None:
        longest, last = self.manifest.shapes.prefill[-1], self.manifest.vocab - 1
        if not tokens or len(tokens) > longest:
            raise InputError(
                f"{len(tokens)} tokens; the artifact takes 1 to {longest}",
                where=where,
                fix="shorten the prompt, or build with a larger prefill bucket",
            )
        if strange := [token for token in tokens if not 0 <= token <= last]:
            raise InputError(
                f"token id {strange[0]}; the artifact's vocabulary has ids 0 to {last}",
                where=where,
                fix="send text, or ids of the artifact's own tokenizer",
            )

    def _finished(self, row: Row, settings: Settings) -> bool:
        new = len(row.tokens) - row.prompt
        full = row.position >= self.length
        return new >= settings.max_new_tokens or full or row.tokens[-1] in self.manifest.eos_ids

    def _result(self, row: Row) -> Generation:
        new = row.tokens[row.prompt :]
        reason = "stop" if new[-1] in self.manifest.eos_ids else "length"
        accepted = sum(row.emitted) - row.speculative_steps
        return Generation(new, self.text.decode(new), row.speculative_steps, accepted, reason, list(row.emitted))

    def _admit(self, slots: list[Row | None], waiting: list[Row], settings: Settings) -> list[int]:
        """Prefill waiting prompts into free slots, as many at a time as a graph takes; returns the slots filled."""
        free = [slot for slot, row in enumerate(slots) if row is None]
        chosen = free[: len(waiting)]
        if not chosen:
            return []
        for slot in chosen:
            slots[slot] = waiting.pop()
        rows = {slot: row for slot in chosen if (row := slots[slot]) is not None}
        spec = self._prefill_graph(max(row.prompt for row in rows.values()), len(rows))
        for start in range(0, len(chosen), spec.batch):
            self._prefill(spec, {slot: rows[slot] for slot in chosen[start : start + spec.batch]}, settings)
        return chosen

    def _prefill(self, spec: GraphSpec, rows: dict[int, Row], settings: Settings) -> None:
        tokens = torch.zeros(spec.batch, spec.tokens, dtype=torch.int32)
        lengths = torch.zeros(spec.batch, dtype=torch.int32)
        spare = [slot for slot in range(self.rows) if slot not in rows]
        slots = torch.tensor((list(rows) + spare)[: spec.batch], dtype=torch.int32)
        for place, row in enumerate(rows.values()):
            tokens[place, : row.prompt] = torch.tensor(row.tokens, dtype=torch.int32)
            lengths[place] = row.prompt
        arguments = {"tokens": tokens, "lengths": lengths, "slots": slots}
        order = dict(enumerate(rows.values()))
        out = self.ranks.run(spec, arguments | self._sampling(spec, order, settings, 1))["token"]
        self._stats["prefills"] += 1
        for place, row in order.items():
            row.in_draft = row.prompt
            row.tokens.append(int(out[place]))
            self._stats["tokens"] += 1

    def _step(self, slots: list[Row | None], settings: Settings, on_tokens: OnTokens | None) -> None:
        """One step of every active row: speculation where every row has room for it, else plain decode."""
        rows = {slot: row for slot, row in enumerate(slots) if row is not None}
        deepest = max(row.position for row in rows.values())
        steps = settings.draft_tokens
        if settings.pace is not None:
            steps = settings.pace.choose([row.acceptance for row in rows.values()]) or None
        if steps is None or deepest + steps >= self.length:
            self._decode(rows, settings, on_tokens, deepest)
            return
        self._catch_up(rows)
        spec = self._graph("speculate", max(rows) + 1, deepest + steps + 1, settings, steps)
        arguments = self._row_arguments(spec, rows) | self._sampling(spec, rows, settings, 2 * steps + 1)
        out = self.ranks.run(spec, arguments)
        self._stats["speculative_steps"] += 1
        for slot, row in rows.items():
            new = out["tokens"][slot, : int(out["count"][slot])].tolist()
            self._take(row, new, settings, on_tokens)
            row.speculative_steps += 1
            row.emitted.append(len(new))
            row.acceptance.saw(len(new) - 1, steps)
            # After a fully accepted step a draft model lacks the last token it proposed, until its next pass.
            row.in_draft = row.position - (len(new) > steps)

    def _decode(self, rows: dict[int, Row], settings: Settings, on_tokens: OnTokens | None, deepest: int) -> None:
        spec = self._graph("decode", max(rows) + 1, deepest + 1, settings, 0)
        arguments = self._row_arguments(spec, rows) | self._sampling(spec, rows, settings, 1)
        out = self.ranks.run(spec, arguments)["token"]
        self._stats["decode_steps"] += 1
        for slot, row in rows.items():
            self._take(row, [int(out[slot])], settings, on_tokens)
            if self.manifest.method == "eagle3":  # its head follows every step of the target
                row.in_draft = row.position

    def _take(self, row: Row, new: list[int], settings: Settings, on_tokens: OnTokens | None) -> None:
        """Append a step's tokens, cut at the end of the sequence and at the limit."""
        kept = new[: settings.max_new_tokens - (len(row.tokens) - row.prompt)]
        for place, token in enumerate(kept):
            if token in self.manifest.eos_ids:
                kept = kept[: place + 1]
                break
        row.tokens.extend(kept)
        self._stats["tokens"] += len(kept)
        if on_tokens:
            on_tokens(row.index, kept)

    def _catch_up(self, rows: dict[int, Row]) -> None:
        """Show the draft what was decoded without it, through its `score` graph.

        A step itself covers the token before the last one; only longer gaps need this. Rows without a gap get their
        own next positions, which hold nothing yet.
        """
        while gaps := {slot: row for slot, row in rows.items() if row.in_draft < row.position - 1}:
            deepest = max(row.position for row in rows.values())
            spec = self._score_graph("draft", deepest)
            tokens = torch.zeros(spec.batch, spec.tokens, dtype=torch.int32)
            position = torch.full((spec.batch,), self.length, dtype=torch.int32)
            for slot, row in gaps.items():
                piece = row.tokens[row.in_draft : row.position][: spec.tokens]
                tokens[slot, : len(piece)] = torch.tensor(piece, dtype=torch.int32)
                position[slot] = row.in_draft
                row.in_draft += len(piece)
            self.ranks.run(spec, {"tokens": tokens, "position": position})
            self._stats["catch_ups"] += 1

    def _row_arguments(self, spec: GraphSpec, rows: dict[int, Row]) -> dict[str, Tensor]:
        last = torch.zeros(spec.batch, dtype=torch.int32)
        position = torch.zeros(spec.batch, dtype=torch.int32)
        active = torch.zeros(spec.batch, dtype=torch.bool)
        for slot, row in rows.items():
            last[slot], position[slot], active[slot] = row.tokens[-1], row.position, True
        return {"last_token": last, "position": position, "active": active}

    def _sampling(self, spec: GraphSpec, rows: dict[int, Row], settings: Settings, draws: int) -> dict[str, Tensor]:
        """Arguments of a stochastic graph; none for a greedy one."""
        if spec.sampling == "greedy":
            return {}
        uniforms = torch.zeros(spec.batch, draws)
        for slot, row in rows.items():
            uniforms[slot] = torch.rand(draws, generator=row.generator)
        return {
            "temperature": torch.full((spec.batch,), settings.temperature),
            "top_k": torch.full((spec.batch,), settings.top_k, dtype=torch.int32),
            "top_p": torch.full((spec.batch,), settings.top_p),
            "uniforms": uniforms,
        }

    def _graph(self, phase: str, rows: int, length: int, settings: Settings, steps: int) -> GraphSpec:
        """The smallest bucket that holds `rows` rows and `length` positions."""
        how = "stochastic" if settings.temperature > 0 else "greedy"
        fits = [
            g for g in self.graphs
            if g.phase == phase and g.sampling == how and g.draft_tokens == steps and g.batch >= rows
            and g.kv >= min(length, self.length)
        ]  # fmt: skip
        return min(fits, key=lambda g: (g.batch, g.kv))

    def _prefill_graph(self, tokens: int, rows: int) -> GraphSpec:
        """The smallest token bucket that holds the prompts, in the smallest batch that takes all, else the largest."""
        fits = [g for g in self.graphs if g.phase == "prefill" and g.tokens >= tokens]
        bucket = [g for g in fits if g.tokens == min(f.tokens for f in fits)]
        return min((g for g in bucket if g.batch >= rows), key=lambda g: g.batch, default=bucket[-1])

    def _score_graph(self, model: str, length: int) -> GraphSpec:
        fits = [g for g in self.graphs if g.phase == "score" and g.model == model and g.kv >= min(length, self.length)]
        return min(fits, key=lambda g: g.kv)

    def _report(self, slots: list[Row | None], fresh: list[int], on_tokens: OnTokens) -> None:
        for slot in fresh:
            row = slots[slot]
            if row is not None:
                on_tokens(row.index, row.tokens[-1:])
