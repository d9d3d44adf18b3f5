"""Prompts that share beginnings, asked of an engine."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.runtime.engine import Engine


def tokens_of(count: int, seed: int) -> list[int]:
    """Random token ids."""
    return torch.randint(3, 200, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def calls(engine: Engine, how: dict[str, Any]) -> list[list[int]]:
    """A chat that grows, two chats in turns, and prompts with one beginning that run together; tokens and steps."""
    system, found = tokens_of(30, 0), []

    def ask(*prompts: list[int]) -> list[list[int]]:
        answers = engine.generate(list(prompts), max_new_tokens=7, **how)
        found.extend(part for answer in answers for part in (answer.tokens, answer.emitted_per_step))
        return [answer.tokens for answer in answers]

    chat, other = [*system, 5], [*system[:20], 9, 9]
    for turn in range(3):
        chat += ask(chat)[0] + tokens_of(4 + turn, turn)
        other += ask(other)[0] + tokens_of(3, 10 + turn)
    ask(*[[*system, *tokens_of(2 + 3 * number, 20 + number)] for number in range(7)])
    ask(chat, chat, other, system, system[:17], chat[:40])
    return found
