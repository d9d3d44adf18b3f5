"""A call of the engine: its settings, its prompts as rows, and its answers. Runs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.errors import InputError, no_string
from pipeline.graphs.arguments import Choice
from pipeline.runtime.batch import Drafts, Row
from pipeline.runtime.draft_length import DraftLengthPolicies
from pipeline.runtime.grammar import Grammar
from pipeline.runtime.logprobs import TokenLogProbs
from pipeline.runtime.rules import NO_RULES, Rules
from pipeline.runtime.text import Chat

NEW_TOKENS = 128
"""Limit of an answer, if neither the call nor `generation_config.json` sets one."""


@dataclass(frozen=True)
class Generation:
    """One answer: new token ids, their text, speculative steps, accepted draft tokens, and the reason of its end.

    For each step: the number of emitted tokens, and whether prompt lookup proposed some of them. These and `accepted`
    include tokens that the end of the answer cut off. `finish_reason` is `stop` (end-of-sequence token, which is
    included) or `length`. `logprobs` has those of each token, if the call asks for them.
    """

    tokens: list[int]
    text: str
    steps: int
    accepted: int
    finish_reason: str
    emitted_per_step: list[int] = field(default_factory=list)
    copied_per_step: list[bool] = field(default_factory=list)
    logprobs: list[TokenLogProbs] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """One call of `generate`: its limit (None: the model's), K (None: plain decode), the policies that choose K."""

    max_new_tokens: int | None
    seed: int
    choice: Choice
    rules: Rules = NO_RULES
    draft_tokens: int | None = None
    draft_length_policy: DraftLengthPolicies | None = None


@dataclass
class Prompt(Row):
    """A prompt of one call: its index, the limit of its answer, and the tokens emitted by its speculative steps."""

    index: int = 0
    limit: int = NEW_TOKENS
    emitted: list[int] = field(default_factory=list)
    copied_steps: list[bool] = field(default_factory=list)
    logprobs: list[TokenLogProbs] = field(default_factory=list)
    grammar: Grammar | None = None


@dataclass
class Call:
    """The prompts of one call: all of them, those that wait for a slot (the next one last), and those in the slots."""

    settings: Settings
    prompts: list[Prompt]
    waiting: list[Prompt]
    slots: list[Prompt | None]


def drafts_of(row: Prompt, proposed: list[int], steps: int) -> Drafts:
    """Return the drafts of a row's next step: the proposed ones, or what its grammar makes of them, at most `steps`."""
    if row.grammar is None:
        return Drafts(proposed)
    tokens = row.grammar.drafts(proposed, steps) if row.position else []
    return Drafts(tokens, row.grammar.masks(tokens))


def checked_prompts(prompts: Iterable[str | list[int] | Chat]) -> list[str | list[int] | Chat]:
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
