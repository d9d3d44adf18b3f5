"""Answers of the engine to all prompts, and the token sequences that gates score. Compares nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from pipeline.graphs.spec import ModelsSpec
from pipeline.models.rank_slices import padded_vocab
from pipeline.progress import Progress
from pipeline.runtime.calls import Generation
from pipeline.validate.gates.inputs import GateInputs, StageClock
from pipeline.validate.lengths import longest_prompt

PLAIN_PROMPTS = 16
"""Number of prompts that plain decode answers as well. All answers are compared with the reference by token."""


@dataclass(frozen=True)
class Answers:
    """Prompts as tokens with their greedy answers, by K; `plain` are plain decode's, of the prompts `plain_indices`."""

    encoded: list[list[int]]
    cut_prompts: tuple[str, ...]
    """Prompts that do not fit the caches with an answer: only their last tokens ran."""
    speculative: dict[int, list[Generation]]
    plain: list[Generation]
    plain_indices: range


@dataclass(frozen=True)
class ScoredSequence:
    """Tokens to score: a prompt with its answer, or a probe that fills the cache. The first `prompt` are the prompt.

    The first `checked` are compared with the reference (None: all).
    """

    name: str
    kind: str
    tokens: list[int]
    prompt: int
    checked: int | None = None

    @property
    def reference(self) -> list[int]:
        """Tokens that the reference runs."""
        return self.tokens[: self.checked]


@dataclass(frozen=True)
class Sequences:
    """All that is scored: prompts with their answers, and probes, one for each cache row."""

    prompts: tuple[ScoredSequence, ...]
    probes: tuple[ScoredSequence, ...]

    @property
    def all(self) -> tuple[ScoredSequence, ...]:
        """Prompts first, as the report numbers them."""
        return (*self.prompts, *self.probes)

    @property
    def probe_tokens(self) -> list[list[int]]:
        """Return the tokens of each probe."""
        return [probe.tokens for probe in self.probes]


def answer_prompts(inputs: GateInputs, clock: StageClock) -> Answers:
    """Answer all prompts with each K, and some of them by plain decode."""
    encoded, cut = encode(inputs)
    speculative: dict[int, list[Generation]] = {}
    for steps in inputs.recipe.speculation.draft_tokens:
        with clock.stage(f"speculation with K={steps}"):
            speculative[steps] = generate(inputs, encoded, steps)
    indices = plain_indices(encoded)
    with clock.stage(f"plain decode of {len(indices)} prompts"):
        plain = generate(inputs, [encoded[i] for i in indices], None)
    return Answers(encoded, cut, speculative, plain, indices)


def plain_indices(encoded: Sequence[list[int]]) -> range:
    """Return which prompts plain decode answers."""
    return range(0, len(encoded), max(len(encoded) // PLAIN_PROMPTS, 1))


def encode(inputs: GateInputs) -> tuple[list[list[int]], tuple[str, ...]]:
    """Return prompts as tokens, cut to the end that fits the caches with an answer, and the names of those cut."""
    longest = longest_prompt(inputs.engine.manifest.shapes, inputs.recipe.validate_.max_new_tokens)
    encoded = [inputs.engine.text.encode_prompt(prompt.text) for prompt in inputs.prompts]
    cut = [prompt.id for prompt, tokens in zip(inputs.prompts, encoded, strict=True) if len(tokens) > longest]
    return [tokens[-longest:] for tokens in encoded], tuple(cut)


def generate(inputs: GateInputs, encoded: list[list[int]], steps: int | None) -> list[Generation]:
    """Answer prompts greedily with K = `steps`, or by plain decode."""
    limit = inputs.recipe.validate_.max_new_tokens
    tokens = _TokenProgress(inputs.progress, len(encoded) * limit)
    answers = inputs.engine.generate(
        encoded,
        max_new_tokens=limit,
        temperature=0.0,
        speculate=steps is not None,
        draft_tokens=steps,
        on_tokens=tokens,
    )
    tokens.end()
    return answers


def sequences_of(inputs: GateInputs, answers: Answers) -> Sequences:
    """Return prompts with their answers, and probes: the same tokens end to end, rotated, as long as the cache."""
    first = answers.speculative[inputs.recipe.speculation.draft_tokens[0]]
    texts = [[*prompt, *answer.tokens] for prompt, answer in zip(answers.encoded, first, strict=True)]
    prompts = (
        ScoredSequence(prompt.id, prompt.kind, tokens, len(encoded))
        for prompt, tokens, encoded in zip(inputs.prompts, texts, answers.encoded, strict=True)
    )
    rows = range(inputs.engine.rows)
    probes = (_probe(row, texts[(start := row * len(texts) // len(rows)) :] + texts[:start], inputs) for row in rows)
    return Sequences(tuple(prompts), tuple(probes))


def _probe(row: int, texts: Sequence[list[int]], inputs: GateInputs) -> ScoredSequence:
    """Return a probe that fills a row. The reference runs those of the first and the last row to their ends.

    The other rows differ from these by their place alone, which a quarter shows; graphs are compared at their ends.
    """
    length, longest = inputs.engine.length, inputs.engine.manifest.shapes.prefill[-1]
    edges = rank_edges(inputs.engine.manifest.pair.models)[: length // 4]
    tokens = edges + list(islice(cycle(token for text in texts for token in text), length - len(edges)))
    is_outer = row in (0, inputs.engine.rows - 1)
    checked = length if is_outer else min(max(length // 4, longest + 1), length)
    return ScoredSequence(f"probe-{row + 1}", "probe", tokens, length, checked)


def rank_edges(models: ModelsSpec) -> list[int]:
    """Return the target's first and last tokens of each rank's part of the vocabulary; none if one rank has all.

    A cut that is one row off changes these tokens alone, which no prompt may have.
    """
    if models.tp == 1:
        return []
    vocab, rows = models.target.vocab, padded_vocab(models.target.vocab, models.tp) // models.tp
    ids = (token for rank in range(models.tp) for token in (rank * rows, (rank + 1) * rows - 1))
    return [token for token in ids if token < vocab]


@dataclass
class _TokenProgress:
    """Reports the number of tokens of a generation that arrived; answers may end before the limit."""

    progress: Progress
    most: int
    arrived: int = 0

    def __call__(self, index: int, new: list[int]) -> None:  # noqa: ARG002 - the engine's callback
        self.arrived += len(new)
        self.progress("tokens", self.arrived, self.most)

    def end(self) -> None:
        """Report that no more tokens arrive."""
        self.progress("tokens", self.most, self.most)
