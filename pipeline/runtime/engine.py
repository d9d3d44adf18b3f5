"""Generate text with an artifact: admit prompts into rows, speculate or decode, refill rows as they finish.

Chooses the rows of a step and handles their tokens; `batch.py` runs the graphs, which do all computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from pipeline.artifact.manifest import PairManifest
from pipeline.backends.base import Ranks
from pipeline.errors import InputError, no_string
from pipeline.graphs.arguments import Choice
from pipeline.runtime.batch import Batch, Row, check_choice, check_prompt
from pipeline.runtime.draft_length import DraftLengthPolicies
from pipeline.runtime.text import Text

SEEDS = 1 << 32


@dataclass(frozen=True)
class Generation:
    """One answer: new token ids, their text, speculative steps, accepted draft tokens, and the reason of its end.

    For each step: the number of emitted tokens, and whether prompt lookup proposed some of them. These and `accepted`
    include tokens that the end of the answer cut off. `finish_reason` is `stop` (end-of-sequence token, which is
    included) or `length`.
    """

    tokens: list[int]
    text: str
    steps: int
    accepted: int
    finish_reason: str
    emitted_per_step: list[int] = field(default_factory=list)
    copied_per_step: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """One call of `generate`: its limit, K (None: plain decode), and the policies that choose K for each step."""

    max_new_tokens: int
    draft_tokens: int | None = None
    draft_length_policy: DraftLengthPolicies | None = None


@dataclass
class Prompt(Row):
    """A prompt of one call: its index, and the tokens emitted by its speculative steps."""

    index: int = 0
    emitted: list[int] = field(default_factory=list)
    copied_steps: list[bool] = field(default_factory=list)


OnTokens = Callable[[int, list[int]], None]
"""Called with a prompt's index and its new tokens after each step."""


class Engine:
    """A loaded artifact. Not thread-safe: one `generate` at a time."""

    def __init__(self, manifest: PairManifest, ranks: Ranks, text: Text) -> None:
        self.manifest = manifest
        self.ranks = ranks
        self.text = text
        self.batch = Batch(manifest, ranks)
        self.graphs = self.batch.graphs
        self.rows = self.batch.slots
        self.length = self.batch.length

    def generate(  # noqa: PLR0913 - the public signature: options are keyword-only and documented
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
        depend on the other prompts. Without `draft_tokens`, K is the first of the artifact's; with step costs in the
        artifact, greedy decoding chooses K, or plain decode, for each step.

        Raises:
            InputError: a string in place of the list, an empty prompt, one longer than the largest prefill bucket,
                token ids beyond the vocabulary, settings out of range, or sampling that was not built.

        """  # fmt: skip
        if max_new_tokens < 1:
            raise InputError(f"found {max_new_tokens}", where="max_new_tokens", fix="use 1 or more")
        if not 0 <= seed < SEEDS:
            raise InputError(f"found {seed}", where="seed", fix=f"use 0 to {SEEDS - 1}")
        choice = Choice(temperature, top_k, top_p)
        check_choice(self.manifest, choice)
        paced = speculate and draft_tokens is None and temperature == 0
        steps = self._steps(draft_tokens) if speculate else None
        settings = Settings(max_new_tokens, steps, self.batch.draft_length_policy() if paced else None)
        waiting = [self._row(index, prompt, choice, seed) for index, prompt in enumerate(_checked(prompts))]
        results: list[Generation | None] = [None] * len(waiting)
        slots: list[Prompt | None] = [None] * self.rows
        waiting.reverse()
        while waiting or any(slots):
            self._admit(slots, waiting, settings, on_tokens)
            self._retire(slots, results, settings)
            rows = {slot: row for slot, row in enumerate(slots) if row is not None}
            if rows:
                self._step(rows, settings, on_tokens)
                self._retire(slots, results, settings)
        return [result for result in results if result is not None]

    def stats(self) -> dict[str, int]:
        """Return counts since loading: prefills, speculative and decode steps, tokens, catch-ups, rows with copies."""
        return dict(self.batch.stats)

    def close(self) -> None:
        """Close the ranks."""
        self.batch.close()

    def _steps(self, draft_tokens: int | None) -> int:
        built = self.manifest.draft_tokens
        if draft_tokens is None:
            return built[0]
        if draft_tokens not in built:
            raise InputError(f"K={draft_tokens} was not built", where="draft_tokens", fix=f"use one of {list(built)}")
        return draft_tokens

    def _row(self, index: int, prompt: str | list[int], choice: Choice, seed: int) -> Prompt:
        tokens = self.text.encode(prompt) if isinstance(prompt, str) else list(prompt)
        check_prompt(self.manifest, tokens, f"prompt {index}")
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        return Prompt(tokens, len(tokens), generator, choice, index=index)

    def _admit(
        self, slots: list[Prompt | None], waiting: list[Prompt], settings: Settings, on_tokens: OnTokens | None
    ) -> None:
        """Prefill waiting prompts into free slots."""
        free = [slot for slot, row in enumerate(slots) if row is None]
        rows = {slot: waiting.pop() for slot in free[: len(waiting)]}
        if not rows:
            return
        for slot, token in self.batch.prefill(rows).items():
            slots[slot] = rows[slot]
            self._take(rows[slot], [token], settings, on_tokens)

    def _step(self, rows: dict[int, Prompt], settings: Settings, on_tokens: OnTokens | None) -> None:
        """Run one step of every active row; at the end of the caches a speculative step counts fewer drafts."""
        steps = settings.draft_tokens
        if settings.draft_length_policy is not None:
            steps = settings.draft_length_policy.choose(self.batch.acceptance(rows)) or None
        tokens = self.batch.speculate(rows, steps) if steps else self.batch.decode(rows)
        for slot, row in rows.items():
            if steps:
                row.emitted.append(len(tokens[slot]))
                row.copied_steps.append(row.has_copied)
            self._take(row, tokens[slot], settings, on_tokens)

    def _take(self, row: Prompt, emitted: list[int], settings: Settings, on_tokens: OnTokens | None) -> None:
        """Append a step's tokens, cut at the end of the sequence and at the limit."""
        tokens = emitted[: settings.max_new_tokens - (len(row.tokens) - row.prompt)]
        for index, token in enumerate(tokens):
            if token in self.manifest.eos_ids:
                tokens = tokens[: index + 1]
                break
        row.tokens.extend(tokens)
        self.batch.stats["tokens"] += len(tokens)
        if on_tokens:
            on_tokens(row.index, tokens)

    def _retire(self, slots: list[Prompt | None], results: list[Generation | None], settings: Settings) -> None:
        """Remove finished rows from their slots, and store their results."""
        for slot, row in enumerate(slots):
            if row is not None and self._finished(row, settings):
                results[row.index], slots[slot] = self._result(row), None

    def _finished(self, row: Prompt, settings: Settings) -> bool:
        count = len(row.tokens) - row.prompt
        full = row.position >= self.length
        return count >= settings.max_new_tokens or full or row.tokens[-1] in self.manifest.eos_ids

    def _result(self, row: Prompt) -> Generation:
        tokens, steps = row.tokens[row.prompt :], len(row.emitted)
        reason = "stop" if tokens[-1] in self.manifest.eos_ids else "length"
        per_step = list(row.emitted), list(row.copied_steps)
        return Generation(tokens, self.text.decode(tokens), steps, sum(row.emitted) - steps, reason, *per_step)


def _checked(prompts: Iterable[str | list[int]]) -> list[str | list[int]]:
    """Return the prompts; reject a single prompt in place of the list."""
    no_string(prompts, "prompts", "prompts")
    listed = list(prompts)
    _no_token_ids(listed)
    return listed


def _no_token_ids(prompts: Sequence[object]) -> None:
    """Reject the token ids of one prompt where a list of prompts is expected."""
    if ids := [prompt for prompt in prompts if isinstance(prompt, int)]:
        what = f"found the token id {ids[0]}, expected a list of prompts: texts, or lists of token ids"
        raise InputError(what, where="prompts", fix=f"write [[{ids[0]}, ...]]")
