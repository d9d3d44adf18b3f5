"""JSON schemas as masks over the vocabulary, by llguidance: which tokens may follow at each position of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.files.limits import parse_json
from pipeline.graphs.verify_arguments import words


class Grammar:
    """The state of one answer in a grammar."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher, self._words = matcher, words(vocab)

    def drafts(self, proposed: Sequence[int], most: int) -> list[int]:
        """Return at most `most` drafts: the proposed ones that the grammar allows, then tokens without alternative."""
        valid = self._matcher.validate_tokens(list(proposed[:most]))
        kept = list(proposed[:valid])
        if len(kept) == most or not self._consumed(kept):
            return kept
        forced = [] if self._matcher.is_stopped() else self._matcher.compute_ff_tokens()
        self._matcher.rollback(len(kept))
        return [*kept, *forced][:most]

    def masks(self, drafts: Sequence[int]) -> Tensor:
        """Return the tokens allowed before and after each draft: int32 [drafts + 1, W]."""
        masks, consumed = [self._mask()], 0
        for token in drafts:
            if self._matcher.is_stopped() or not self._consumed([token]):
                break
            consumed += 1
            masks.append(self._mask())
        self._matcher.rollback(consumed)
        masks += masks[-1:] * (len(drafts) + 1 - len(masks))
        return torch.stack(masks)

    def accept(self, tokens: Sequence[int]) -> None:
        """Add tokens to the answer."""
        self._consumed(list(tokens))

    def _consumed(self, tokens: list[int]) -> bool:
        return not tokens or bool(self._matcher.consume_tokens(tokens))

    def _mask(self) -> Tensor:
        packed: bytes = self._matcher.compute_bitmask()
        return torch.frombuffer(bytearray(packed), dtype=torch.int32)[: self._words]


class Grammars:
    """Grammars for the answers of one tokenizer."""

    def __init__(self, tokenizer_json: str, vocab: int, ends: Sequence[int]) -> None:
        from llguidance import LLTokenizer  # most requests have no grammar

        self._vocab = vocab
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab, eos_token=list(ends))

    def of_schema(self, schema: str) -> Grammar:
        """Return the start of an answer that is JSON of a schema.

        Raises:
            InputError: the schema is not JSON, or is not supported.

        """
        from llguidance import LLMatcher

        try:
            parse_json(schema)
            grammar = LLMatcher.grammar_from_json_schema(schema)
        except ValueError as error:
            raise InputError(str(error), where="json_schema", fix="write a JSON schema") from error
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            what = matcher.get_error().strip().splitlines()[0]
            raise InputError(what, where="json_schema", fix="use a schema that llguidance supports")
        return Grammar(matcher, self._vocab)
