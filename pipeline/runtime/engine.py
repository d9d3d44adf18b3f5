"""Generate text with an artifact: admit prompts into rows, speculate or decode, refill rows as they finish.

Chooses the rows of a step and handles their tokens; `batch.py` runs the graphs, which do all computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Self

from pipeline.artifact.manifest import PairManifest
from pipeline.backends.base import Ranks
from pipeline.errors import InputError, no_string
from pipeline.graphs.arguments import Choice
from pipeline.models.generation import GENERATION_CONFIG, GenerationDefaults
from pipeline.runtime.batch import Batch, Row, check_choice, check_prompt
from pipeline.runtime.draft_length import DraftLengthPolicies
from pipeline.runtime.text import Chat, StreamDecoder, Text

SEEDS = 1 << 32
NEW_TOKENS = 128
"""Limit of an answer, if neither the call nor `generation_config.json` sets one."""


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
    """One call of `generate`: its limit (None: the model's), K (None: plain decode), the policies that choose K."""

    max_new_tokens: int | None
    seed: int
    draft_tokens: int | None = None
    draft_length_policy: DraftLengthPolicies | None = None


@dataclass
class Prompt(Row):
    """A prompt of one call: its index, the limit of its answer, and the tokens emitted by its speculative steps."""

    index: int = 0
    limit: int = NEW_TOKENS
    emitted: list[int] = field(default_factory=list)
    copied_steps: list[bool] = field(default_factory=list)


@dataclass
class Call:
    """The prompts of one call: all of them, those that wait for a slot (the next one last), and those in the slots."""

    settings: Settings
    prompts: list[Prompt]
    waiting: list[Prompt]
    slots: list[Prompt | None]


TRANSFORMERS_DEFAULTS = GenerationDefaults()
"""Settings of a model without a `generation_config.json`."""

OnTokens = Callable[[int, list[int]], None]
"""Called with a prompt's index and its new tokens after each step."""

Emitted = list[tuple[Prompt, list[int]]]
"""Prompts with the tokens that a step added to them."""


class Engine:
    """A loaded artifact; a `with` block closes it at the end. Not thread-safe: one `generate` at a time."""

    def __init__(
        self, manifest: PairManifest, ranks: Ranks, text: Text, defaults: GenerationDefaults = TRANSFORMERS_DEFAULTS
    ) -> None:
        self.manifest = manifest
        self.defaults = defaults
        self.ranks = ranks
        self.text = text
        self.batch = Batch(manifest, ranks)
        self.graphs = self.batch.graphs
        self.rows = self.batch.slots
        self.length = self.batch.length
        self._newest: Call | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def generate(  # noqa: PLR0913 - the public signature: options are keyword-only and documented
        self,
        prompts: Sequence[str | list[int] | Chat],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        speculate: bool = True,
        draft_tokens: int | None = None,
        on_tokens: OnTokens | None = None,
    ) -> list[Generation]:
        """Generate for every prompt; more prompts than rows are queued, rows are refilled as they finish.

        A prompt is a text, a list of token ids, or a chat: a list of messages, which the chat template is applied to.
        Settings that are not given are those of the model's `generation_config.json`, as in transformers: greedy unless
        `do_sample` is true and stochastic graphs were built; sampling with `temperature`, `top_k` and `top_p`, by
        default 1, 50 and 1; at most `max_new_tokens`, or `max_length` with the prompt, by default 128. Temperature 0 is
        greedy, `top_k` 0 and `top_p` 1 keep every token. An answer ends at an end-of-sequence token of
        `generation_config.json` or of the tokenizer. Random numbers depend on `seed`, the prompt's index and the
        position alone, so an answer depends neither on the other prompts nor on speculation. Without `draft_tokens`,
        K is the first of the artifact's; with step costs in the artifact, K or plain decode is chosen for each step.

        Raises:
            InputError: a string in place of the list, an empty prompt, one that does not fit the caches,
                token ids beyond the vocabulary, settings out of range, or sampling that was not built.
            ArtifactError: a chat, and the artifact has no chat template or its template rejects the messages.

        """  # fmt: skip
        choice = self.choice(temperature, top_k, top_p)
        call = self._call(prompts, self._settings(max_new_tokens, seed, choice, speculate, draft_tokens), choice)
        for prompt, tokens in self._run(call):
            if on_tokens:
                on_tokens(prompt.index, tokens)
        return [self._result(prompt) for prompt in call.prompts]

    def stream(
        self,
        prompt: str | list[int] | Chat,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        speculate: bool = True,
    ) -> Iterator[str]:
        """Return the answer to one prompt piece by piece, as text; joined, the pieces are the text of `generate`.

        A character of several tokens is in one piece. The next call of `generate` or `stream` ends a stream that was
        not read to its end.

        Raises:
            InputError: as `generate`; from the iterator, if another call began before its end.
            ArtifactError: as `generate`.

        """
        choice = self.choice(temperature, top_k, top_p)
        settings = self._settings(max_new_tokens, seed, choice, speculate, None)
        return self._pieces(self._call([prompt], settings, choice))

    def choice(self, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None) -> Choice:
        """Return the sampling of a call that gives these settings; the others are those of the model."""
        defaults = self.defaults
        if temperature is None:
            temperature = defaults.temperature if defaults.do_sample and self.samples else 0.0
        if temperature == 0:
            return Choice(temperature, top_k or 0, 1.0 if top_p is None else top_p)
        return Choice(
            temperature,
            defaults.top_k if top_k is None else top_k,
            defaults.top_p if top_p is None else top_p,
        )

    def new_tokens(self, prompt: int, max_new_tokens: int | None = None) -> int:
        """Return the limit of the answer to a prompt of this many tokens."""
        return max_new_tokens if max_new_tokens is not None else self.defaults.new_tokens(prompt, NEW_TOKENS)

    @property
    def samples(self) -> bool:
        """Whether stochastic graphs were built."""
        return "stochastic" in self.manifest.sampling

    def stats(self) -> dict[str, int]:
        """Return counts since loading: prefills, chunks, speculative and decode steps, tokens, catch-ups, copies."""
        return dict(self.batch.stats)

    def close(self) -> None:
        """Close the ranks."""
        self.batch.close()

    def _settings(
        self, max_new_tokens: int | None, seed: int, choice: Choice, speculate: bool, draft_tokens: int | None
    ) -> Settings:
        if max_new_tokens is not None and max_new_tokens < 1:
            raise InputError(f"found {max_new_tokens}", where="max_new_tokens", fix="use 1 or more")
        if not 0 <= seed < SEEDS:
            raise InputError(f"found {seed}", where="seed", fix=f"use 0 to {SEEDS - 1}")
        check_choice(self.manifest, choice)
        paced = speculate and draft_tokens is None
        steps = self._steps(draft_tokens) if speculate else None
        return Settings(max_new_tokens, seed, steps, self.batch.draft_length_policy() if paced else None)

    def _steps(self, draft_tokens: int | None) -> int:
        built = self.manifest.draft_tokens
        if draft_tokens is None:
            return built[0]
        if draft_tokens not in built:
            raise InputError(f"K={draft_tokens} was not built", where="draft_tokens", fix=f"use one of {list(built)}")
        return draft_tokens

    def _call(self, prompts: Iterable[str | list[int] | Chat], settings: Settings, choice: Choice) -> Call:
        """Return the checked prompts of a call, as rows that wait."""
        rows = [self._row(number, prompt, choice, settings) for number, prompt in enumerate(_checked(prompts))]
        return Call(settings, rows, rows[::-1], [None] * self.rows)

    def _row(self, number: int, prompt: str | list[int] | Chat, choice: Choice, settings: Settings) -> Prompt:
        where = f"prompt {number}"
        tokens = self._encoded(prompt, where)
        check_prompt(self.manifest, tokens, where)
        limit = self.new_tokens(len(tokens), settings.max_new_tokens)
        if limit < 1:
            what = f"{len(tokens)} tokens; {GENERATION_CONFIG} has max_length={self.defaults.max_length}"
            raise InputError(what, where=where, fix="give max_new_tokens (--max-new-tokens), or shorten the prompt")
        seed = settings.seed | number << 32
        return Prompt(tokens, len(tokens), seed, choice, index=number, limit=limit)

    def _encoded(self, prompt: str | list[int] | Chat, where: str) -> list[int]:
        """Return the token ids of a prompt of any kind."""
        if isinstance(prompt, str):
            return self.text.encode(prompt)
        items: list[Any] = list(prompt)
        if items and all(isinstance(item, Mapping) for item in items):
            return self.text.encode_chat(items)
        if any(isinstance(item, str | Mapping) for item in items):
            what = "found a list of texts, expected a text, a list of token ids, or a list of messages"
            raise InputError(what, where=where, fix='write a message as {"role": "user", "content": "..."}')
        return [index(item) for item in items]

    def _pieces(self, call: Call) -> Iterator[str]:
        decoder = StreamDecoder(self.text.decode)
        for _, tokens in self._run(call):
            if piece := decoder.push(tokens):
                yield piece
        if rest := decoder.rest():
            yield rest

    def _run(self, call: Call) -> Iterator[tuple[Prompt, list[int]]]:
        """Advance the prompts of a call to their ends; yield each one's new tokens after each step."""
        self._newest = call
        while call.waiting or any(call.slots):
            for advance in (self._admit, self._step):
                if self._newest is not call:
                    what = "another call of this engine started before this stream ended"
                    raise InputError(what, where="stream", fix="read a stream to its end before the next call")
                yield from advance(call)
                self._retire(call)

    def _admit(self, call: Call) -> Emitted:
        """Prefill waiting prompts into free slots."""
        free = [slot for slot, row in enumerate(call.slots) if row is None]
        rows = {slot: call.waiting.pop() for slot in free[: len(call.waiting)]}
        if not rows:
            return []
        first = self.batch.prefill(rows)
        for slot, row in rows.items():
            call.slots[slot] = row
        return [(rows[slot], self._take(rows[slot], [token])) for slot, token in first.items()]

    def _step(self, call: Call) -> Emitted:
        """Run one step of every active row; at the end of the caches a speculative step counts fewer drafts."""
        rows = {slot: row for slot, row in enumerate(call.slots) if row is not None}
        if not rows:
            return []
        steps = call.settings.draft_tokens
        if call.settings.draft_length_policy is not None:
            steps = call.settings.draft_length_policy.choose(self.batch.acceptance(rows)) or None
        tokens = self.batch.speculate(rows, steps) if steps else self.batch.decode(rows)
        for slot, row in rows.items():
            if steps:
                row.emitted.append(len(tokens[slot]))
                row.copied_steps.append(row.has_copied)
        return [(row, self._take(row, tokens[slot])) for slot, row in rows.items()]

    def _take(self, row: Prompt, emitted: list[int]) -> list[int]:
        """Append a step's tokens, cut at the end of the sequence and at the limit; return those that were appended."""
        tokens = emitted[: row.limit - (len(row.tokens) - row.prompt)]
        for at, token in enumerate(tokens):
            if token in self.manifest.eos_ids:
                tokens = tokens[: at + 1]
                break
        row.tokens.extend(tokens)
        self.batch.stats["tokens"] += len(tokens)
        return tokens

    def _retire(self, call: Call) -> None:
        """Remove finished rows from their slots."""
        for slot, row in enumerate(call.slots):
            if row is not None and self._finished(row):
                call.slots[slot] = None

    def _finished(self, row: Prompt) -> bool:
        count = len(row.tokens) - row.prompt
        full = row.position >= self.length
        return count >= row.limit or full or row.tokens[-1] in self.manifest.eos_ids

    def _result(self, row: Prompt) -> Generation:
        tokens, steps = row.tokens[row.prompt :], len(row.emitted)
        reason = "stop" if tokens[-1] in self.manifest.eos_ids else "length"
        per_step = list(row.emitted), list(row.copied_steps)
        return Generation(tokens, self.text.decode(tokens), steps, sum(row.emitted) - steps, reason, *per_step)


def _checked(prompts: Iterable[str | list[int] | Chat]) -> list[str | list[int] | Chat]:
    """Return the prompts; reject a single prompt in place of the list."""
    no_string(prompts, "prompts", "prompts")
    listed = list(prompts)
    _no_single_prompt(listed)
    return listed


def _no_single_prompt(prompts: Sequence[object]) -> None:
    """Reject the token ids or the messages of one prompt where a list of prompts is expected."""
    if ids := [prompt for prompt in prompts if isinstance(prompt, int)]:
        what = f"found the token id {ids[0]}, expected a list of prompts: texts, or lists of token ids"
        raise InputError(what, where="prompts", fix=f"write [[{ids[0]}, ...]]")
    if any(isinstance(prompt, Mapping) for prompt in prompts):
        what = "found a message, expected a list of prompts: a chat is a list of messages"
        raise InputError(what, where="prompts", fix='write [[{"role": "user", "content": "..."}]]')
