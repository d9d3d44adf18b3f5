"""What a request asks of the target's scores, and its values for each step of a row. See `speculation.shaping`.

Shapes: T positions of a step, V vocabulary, W words of a bit for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.graphs.signature import WORD_BITS
from pipeline.graphs.verify_arguments import EVERY_TOKEN, RowRules, word_mask, words


@dataclass(frozen=True)
class Rules:
    """What a request asks beyond temperature, top-k and top-p, by vLLM's names; the defaults ask for nothing.

    `logit_bias` has token ids with what is added to their scores. An answer consists of `allowed_token_ids` alone
    (None: all), has none of the token sequences `bad_words`, and does not end before `min_tokens`. `json_schema`: it is
    JSON of this schema, as text. `logprobs`: log probabilities are reported, those of so many most probable tokens too.
    Where the rules together allow no token, the answer ends.
    """

    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    json_schema: str | None = None
    logprobs: int | None = None

    @property
    def asked(self) -> list[str]:
        """Names of the fields that differ from their defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]


NO_RULES = Rules()


def check_rules(rules: Rules, vocab: int, logprobs: int) -> None:
    """Reject rules out of range; `logprobs` is the most that the graphs report.

    Raises:
        InputError: `where` names the field.

    """
    ranges = {
        "min_p": (0 <= rules.min_p <= 1, "0 (off) to 1"),
        "presence_penalty": (-2 <= rules.presence_penalty <= 2, "-2 to 2"),
        "frequency_penalty": (-2 <= rules.frequency_penalty <= 2, "-2 to 2"),
        "repetition_penalty": (0 < rules.repetition_penalty < float("inf"), "more than 0; 1 is off"),
        "min_tokens": (rules.min_tokens >= 0, "0 or more"),
        "logprobs": (rules.logprobs is None or 0 <= rules.logprobs <= logprobs, f"0 to {logprobs}"),
        "allowed_token_ids": (rules.allowed_token_ids != (), "at least one token id"),
        "bad_words": (() not in rules.bad_words, "words of at least one token"),
    }
    for name, (fits, accepted) in ranges.items():
        if not fits:
            raise InputError(f"found {getattr(rules, name)}", where=name, fix=f"use {accepted}")
    ids = {
        "logit_bias": [token for token, _ in rules.logit_bias],
        "allowed_token_ids": list(rules.allowed_token_ids or ()),
        "bad_words": [token for word in rules.bad_words for token in word],
    }
    for name, tokens in ids.items():
        if strange := [token for token in tokens if not 0 <= token < vocab]:
            what = f"found token id {strange[0]}; the artifact's vocabulary has ids 0 to {vocab - 1}"
            raise InputError(what, where=name, fix="use ids of the artifact's own tokenizer")
    if any(value != value for _, value in rules.logit_bias):
        raise InputError("found NaN", where="logit_bias", fix="use numbers, in OpenAI's API -100 to 100")


class RuleState:
    """The values of a row's rules, which follow its tokens. `ends` are the tokens that end its answer."""

    def __init__(self, rules: Rules, prompt: Sequence[int], vocab: int, ends: Sequence[int]) -> None:
        self.rules = rules
        self._ends = tuple(token for token in ends if token < vocab)
        self._vocab, self._counted = vocab, len(prompt)
        self._prompt = len(prompt)
        self._bias_V = _bias(rules, vocab)
        self._counts_V = torch.zeros(vocab, dtype=torch.int32)
        self._prompted_V = torch.zeros(vocab, dtype=torch.bool)
        self._prompted_V[torch.tensor(list(prompt), dtype=torch.int64)] = True
        allowed = rules.allowed_token_ids
        self._allowed_W = None if allowed is None else word_mask(allowed, vocab)

    def at(self, tokens: Sequence[int], drafts: Sequence[int], grammar_TW: Tensor | None) -> RowRules:
        """Return the values at the positions after `tokens` and after each of `drafts`.

        `grammar_TW` int32 [at least drafts + 1, W]: the tokens that a grammar allows there.
        """
        for token in tokens[self._counted :]:
            self._counts_V[token] += 1
        self._counted = len(tokens)
        rules = self.rules
        return RowRules(
            self._bias_V, self._counts_V, self._prompted_V, self._allowed(tokens, drafts, grammar_TW), rules.min_p,
            rules.presence_penalty, rules.frequency_penalty, rules.repetition_penalty,
        )  # fmt: skip

    def _allowed(self, tokens: Sequence[int], drafts: Sequence[int], grammar_TW: Tensor | None) -> Tensor | None:
        banned = [self._banned(tokens, drafts[:place]) for place in range(len(drafts) + 1)]
        if grammar_TW is None and self._allowed_W is None and not any(banned):
            return None
        allowed_TW = torch.full((len(drafts) + 1, words(self._vocab)), EVERY_TOKEN, dtype=torch.int32)
        if grammar_TW is not None:
            allowed_TW &= grammar_TW[: len(drafts) + 1]
        if self._allowed_W is not None:
            allowed_TW &= self._allowed_W
        for place, of_place in enumerate(banned):
            for token in of_place:
                allowed_TW[place, token // WORD_BITS] &= ~_bit(token)
            if not bool(allowed_TW[place].any()):  # the rules exclude each other: the answer ends
                for token in self._ends:
                    allowed_TW[place, token // WORD_BITS] |= _bit(token)
        return allowed_TW

    def _banned(self, tokens: Sequence[int], drafts: Sequence[int]) -> set[int]:
        """Return the tokens that must not follow: ends of a short answer, and the last tokens of bad words."""
        so_far = [*tokens[self._prompt :], *drafts]
        banned = set(self._ends) if len(so_far) < self.rules.min_tokens else set()
        for *before, last in self.rules.bad_words:
            if not before or so_far[-len(before) :] == before:
                banned.add(last)
        return {token for token in banned if token < self._vocab}  # a tokenizer may have more ids than the model


def _bias(rules: Rules, vocab: int) -> Tensor | None:
    if not rules.logit_bias:
        return None
    bias_V = torch.zeros(vocab)
    for token, value in rules.logit_bias:
        bias_V[token] = value
    return bias_V


def _bit(token: int) -> int:
    """Return the bit of a token in its word, as int32."""
    place = token % WORD_BITS
    return -(1 << place) if place == WORD_BITS - 1 else 1 << place
