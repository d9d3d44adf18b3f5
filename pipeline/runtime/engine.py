"""Generate text with an artifact: admit prompts into rows, speculate or decode, refill rows as they finish.

Chooses the rows of a step and handles their tokens; `batch.py` runs the graphs, which do all computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import index
from typing import Any, Self

from pipeline.artifact.manifest import PairManifest
from pipeline.backends.base import Ranks
from pipeline.errors import InputError
from pipeline.graphs.arguments import Choice
from pipeline.models.generation import GENERATION_CONFIG, SHAPED, GenerationDefaults
from pipeline.runtime.batch import Batch
from pipeline.runtime.calls import NEW_TOKENS, Call, Generation, Prompt, Settings, checked_prompts, drafts_of
from pipeline.runtime.grammar import Grammars
from pipeline.runtime.limits import check_asked, check_choice, check_prompt
from pipeline.runtime.prefixes import Prefixes
from pipeline.runtime.rules import NO_RULES, Rules, RuleState
from pipeline.runtime.text import Chat, StreamDecoder, Text

SEEDS = 1 << 32


TRANSFORMERS_DEFAULTS = GenerationDefaults()
"""Settings of a model without a `generation_config.json`."""

OnTokens = Callable[[int, list[int]], None]
"""Called with a prompt's index and its new tokens after each step."""

Emitted = list[tuple[Prompt, list[int]]]
"""Prompts with the tokens that a step added to them."""


class Engine:
    """A loaded artifact; a `with` block closes it at the end. Not thread-safe: one `generate` at a time."""

    def __init__(
        self, manifest: PairManifest, ranks: Ranks, text: Text, defaults: GenerationDefaults = TRANSFORMERS_DEFAULTS,
        *, share_prefixes: bool = False,
    ) -> None:  # fmt: skip
        self.manifest = manifest
        self.defaults = defaults
        self.ranks = ranks
        self.text = text
        self.batch = Batch(manifest, ranks)
        self.prefixes = Prefixes(self.batch) if share_prefixes else None
        self.graphs = self.batch.graphs
        self.rows = self.batch.slots
        self.length = self.batch.length
        self._newest: Call | None = None
        self._newest_grammars: Grammars | None = None

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
        rules: Rules | None = None,
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
        `rules` asks for a grammar, penalties, biases or log probabilities; without them, those of the model apply.

        Raises:
            InputError: a string in place of the list, an empty prompt, one that does not fit the caches,
                token ids beyond the vocabulary, settings or rules out of range, or sampling that was not built.
            ArtifactError: a chat, and the artifact has no chat template or its template rejects the messages.

        """  # fmt: skip
        choice = self.choice(temperature, top_k, top_p)
        asked = self.rules() if rules is None else rules
        call = self._call(prompts, self._settings(max_new_tokens, seed, choice, asked, speculate, draft_tokens))
        for prompt, tokens in self._run(call):
            if on_tokens:
                on_tokens(prompt.index, tokens)
        return [self._result(prompt) for prompt in call.prompts]

    def stream(  # noqa: PLR0913 - as `generate`
        self,
        prompt: str | list[int] | Chat,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        speculate: bool = True,
        rules: Rules | None = None,
    ) -> Iterator[str]:
        """Return the answer to one prompt piece by piece, as text; joined, the pieces are the text of `generate`.

        A character of several tokens is in one piece. The next call of `generate` or `stream` ends a stream that was
        not read to its end.

        Raises:
            InputError: as `generate`; from the iterator, if another call began before its end.
            ArtifactError: as `generate`.

        """
        choice = self.choice(temperature, top_k, top_p)
        asked = self.rules() if rules is None else rules
        settings = self._settings(max_new_tokens, seed, choice, asked, speculate, None)
        return self._pieces(self._call([prompt], settings))

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

    def rules(self) -> Rules:
        """Return the rules of the model's `generation_config.json`, none without shaped graphs."""
        if not self.shapes:
            return NO_RULES
        found = {name: self.defaults.rules.get(name, getattr(NO_RULES, name)) for name in SHAPED}
        return Rules(**found)

    def new_tokens(self, prompt: int, max_new_tokens: int | None = None) -> int:
        """Return the limit of the answer to a prompt of this many tokens."""
        return max_new_tokens if max_new_tokens is not None else self.defaults.new_tokens(prompt, NEW_TOKENS)

    @property
    def samples(self) -> bool:
        """Whether stochastic graphs were built."""
        return "stochastic" in self.manifest.sampling

    @property
    def shapes(self) -> bool:
        """Whether shaped graphs were built."""
        return "shaped" in self.manifest.sampling

    def stats(self) -> dict[str, int]:
        """Return counts since loading: prefills, chunks, steps of each kind, tokens, catch-ups, copies, shared tokens.

        `shared_tokens` of prompts were not read, because a slot held them.
        """
        return self.batch.stats | {"shared_tokens": self.prefixes.shared_tokens if self.prefixes else 0}

    def close(self) -> None:
        """Close the ranks."""
        self.batch.close()

    def _settings(
        self,
        max_new_tokens: int | None,
        seed: int,
        choice: Choice,
        rules: Rules,
        speculate: bool,
        draft_tokens: int | None,
    ) -> Settings:
        if max_new_tokens is not None and max_new_tokens < 1:
            raise InputError(f"found {max_new_tokens}", where="max_new_tokens", fix="use 1 or more")
        if not 0 <= seed < SEEDS:
            raise InputError(f"found {seed}", where="seed", fix=f"use 0 to {SEEDS - 1}")
        check_choice(self.manifest, choice)
        check_asked(self.manifest, rules)
        paced = speculate and draft_tokens is None
        steps = self._steps(draft_tokens) if speculate else None
        policy = self.batch.draft_length_policy() if paced else None
        return Settings(max_new_tokens, seed, choice, rules, steps, policy)

    def _steps(self, draft_tokens: int | None) -> int:
        built = self.manifest.draft_tokens
        if draft_tokens is None:
            return built[0]
        if draft_tokens not in built:
            raise InputError(f"K={draft_tokens} was not built", where="draft_tokens", fix=f"use one of {list(built)}")
        return draft_tokens

    def _call(self, prompts: Iterable[str | list[int] | Chat], settings: Settings) -> Call:
        """Return the checked prompts of a call, as rows that wait."""
        rows = [self._row(number, prompt, settings) for number, prompt in enumerate(checked_prompts(prompts))]
        return Call(settings, rows, rows[::-1], [None] * self.rows)

    def _row(self, number: int, prompt: str | list[int] | Chat, settings: Settings) -> Prompt:
        where = f"prompt {number}"
        tokens = self._encoded(prompt, where)
        check_prompt(self.manifest, tokens, where)
        limit = self.new_tokens(len(tokens), settings.max_new_tokens)
        if limit < 1:
            what = f"{len(tokens)} tokens; {GENERATION_CONFIG} has max_length={self.defaults.max_length}"
            raise InputError(what, where=where, fix="give max_new_tokens (--max-new-tokens), or shorten the prompt")
        row = Prompt(tokens, len(tokens), settings.seed | number << 32, settings.choice, index=number, limit=limit)
        if settings.rules.asked:
            row.rules = RuleState(settings.rules, tokens, self.manifest.vocab, self.manifest.eos_ids)
        if settings.rules.json_schema is not None:
            row.grammar = self._grammars().of_schema(settings.rules.json_schema)
        return row

    def _grammars(self) -> Grammars:
        """Return the grammars of the artifact's tokenizer, made at the first call: it takes about a second."""
        if self._newest_grammars is None:
            self._newest_grammars = Grammars(self.text.as_json(), self.manifest.vocab, self.manifest.eos_ids)
        return self._newest_grammars

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
        rows: dict[int, Prompt] = {}
        while free and call.waiting:
            row = call.waiting.pop()
            slot = free[0] if self.prefixes is None else self.prefixes.begin(row, free, self._running(call))
            free.remove(slot)
            call.slots[slot] = rows[slot] = row
        if not rows:
            return []
        if call.settings.rules.asked:  # their first token is chosen by rules, which prefill graphs do not have
            self.batch.read(rows)
            return []
        first = self.batch.prefill(rows)
        return [(rows[slot], self._take(rows[slot], [token])) for slot, token in first.items()]

    def _step(self, call: Call) -> Emitted:
        """Run one step of every active row; at the end of the caches a speculative step counts fewer drafts."""
        rows = self._running(call)
        if not rows:
            return []
        steps = call.settings.draft_tokens
        if call.settings.draft_length_policy is not None:
            steps = self.batch.choose_draft_tokens(call.settings.draft_length_policy, rows) or None
        if call.settings.rules.asked:
            tokens = self._verify(rows, steps or 0)
        else:
            tokens = self.batch.speculate(rows, steps) if steps else self.batch.decode(rows)
        for slot, row in rows.items():
            if steps:
                row.emitted.append(len(tokens[slot]))
                row.copied_steps.append(row.has_copied)
        return [(row, self._take(row, tokens[slot])) for slot, row in rows.items()]

    def _verify(self, rows: Mapping[int, Prompt], steps: int) -> dict[int, list[int]]:
        """Run one step of rows with rules: K = `steps` drafts of each, or what its grammar leaves of them."""
        proposed = self.batch.propose(rows, steps) if steps else {}
        drafts = {slot: drafts_of(row, proposed.get(slot, []), steps) for slot, row in rows.items()}
        verified = self.batch.verify(rows, drafts)
        for slot, row in rows.items():
            row.logprobs += verified[slot].logprobs
        return {slot: each.tokens for slot, each in verified.items()}

    def _take(self, row: Prompt, emitted: list[int]) -> list[int]:
        """Append a step's tokens, cut at the end of the sequence and at the limit; return those that were appended."""
        tokens = emitted[: row.limit - (len(row.tokens) - row.prompt)]
        for at, token in enumerate(tokens):
            if token in self.manifest.eos_ids:
                tokens = tokens[: at + 1]
                break
        row.tokens.extend(tokens)
        if row.grammar is not None:
            row.grammar.accept(tokens)
        self.batch.stats["tokens"] += len(tokens)
        return tokens

    def _retire(self, call: Call) -> None:
        """Remove finished rows from their slots."""
        for slot, row in enumerate(call.slots):
            if row is not None and self._finished(row):
                call.slots[slot] = None
                self.batch.ended(row)
                if self.prefixes is not None:
                    self.prefixes.end(slot, row)

    def _running(self, call: Call) -> dict[int, Prompt]:
        return {slot: row for slot, row in enumerate(call.slots) if row is not None}

    def _finished(self, row: Prompt) -> bool:
        count = len(row.tokens) - row.prompt
        full = row.position >= self.length
        return count >= row.limit or full or (count > 0 and row.tokens[-1] in self.manifest.eos_ids)

    def _result(self, row: Prompt) -> Generation:
        tokens, steps = row.tokens[row.prompt :], len(row.emitted)
        reason = "stop" if tokens[-1] in self.manifest.eos_ids else "length"
        per_step = list(row.emitted), list(row.copied_steps)
        counts = steps, sum(row.emitted) - steps
        return Generation(tokens, self.text.decode(tokens), *counts, reason, *per_step, row.logprobs[: len(tokens)])
