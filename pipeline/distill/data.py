"""What a draft is trained on: sequences that the target wrote and the hidden states it had, in numbered parts on disk.

A part is one safetensors file, complete or absent, and decided by its number alone: a run that was killed goes on at
the first part that is missing, and several processes may write parts of one folder.

Shapes: N tokens of all sequences of a part, H hidden, X tapped features (3 H).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from pipeline.distill.generate import Writer, Writing, Written
from pipeline.distill.prompts import HeldOutFilter, opening, user_turn
from pipeline.distill.request import SEEDS
from pipeline.errors import InputError
from pipeline.files.atomic import write_atomic
from pipeline.runtime.text import Text

PROMPT_TOKENS = 96
"""Longest prompt that the target writes itself, in tokens; one that has not ended by then is dropped."""

PROMPT_TEMPERATURE = 1.0
ANSWER_TEMPERATURE = 0.8
GREEDY_SHARE = 0.7

TENSORS = {"tokens", "lengths", "prompts", "taps", "last"}
"""What a part holds."""

PART = 256
"""Prompts of a part: what a kill may cost."""


@dataclass(frozen=True)
class Conversation:
    """One sequence: `tokens` int32 [T + 1], of which `prompt` were given; features of all but the last."""

    tokens: Tensor
    prompt: int
    taps_TX: Tensor
    last_TH: Tensor


@dataclass(frozen=True)
class Prompts:
    """Where a part's prompts come from: `given` ones in turn, or written by the target; `seed` decides all draws."""

    text: Text
    held_out_filter: HeldOutFilter
    given: Sequence[str] = ()
    seed: int = 0

    def of(self, writer: Writer, numbers: range) -> Iterator[tuple[int, list[int]]]:
        """Seed and tokens of every prompt that may be trained on."""
        seeds = range(self.seed * SEEDS + numbers.start, self.seed * SEEDS + numbers.stop)
        if self.given:
            chosen = zip(seeds, self.given[numbers.start : numbers.stop], strict=False)
            yield from ((seed, self._encode(prompt)) for seed, prompt in chosen if self.held_out_filter(prompt))
            return
        before, after = user_turn(self.text)
        first = {seed: opening(seed) for seed in seeds}
        requests = (
            Writing(self.text.encode(before + words, special=False), PROMPT_TOKENS, PROMPT_TEMPERATURE, seed)
            for seed, words in first.items()
        )
        for written in writer.write(requests):
            if written.tokens[-1] not in writer.checkpoint.config.eos_ids:
                continue
            new = self.text.decode(written.tokens[len(written.request.tokens) :])
            prompt = (first[written.request.seed] + new).strip()
            if prompt and self.held_out_filter(prompt):
                yield written.request.seed, self.text.encode(before + prompt + after, special=False)

    def _encode(self, prompt: str) -> list[int]:
        return self.text.chat(prompt) if self.text.has_chat else self.text.encode(prompt)


def part_path(folder: Path, number: int) -> Path:
    """File of one part."""
    return folder / f"part-{number:05d}.safetensors"


def write_part(
    folder: Path, number: int, size: int, writer: Writer, prompts: Prompts, new: int, log: Callable[[str], None]
) -> None:
    """Write one part of `size` prompts, unless it is there; empty where none of the given ones may be trained on.

    Raises:
        InputError: the target was to write the prompts, and none is of use.

    """
    path = part_path(folder, number)
    if path.is_file():
        return
    asked = sorted(prompts.of(writer, range(number * size, (number + 1) * size)))
    log(f"part {number}: {len(asked)} prompts")
    requests = []
    for seed, tokens in asked:
        greedy = seed % 10 < GREEDY_SHARE * 10
        room = writer.length - len(tokens)
        if room > 0:
            requests.append(Writing(tokens, min(new, room), 0.0 if greedy else ANSWER_TEMPERATURE, seed))
    if not requests and not prompts.given:
        what = f"the target wrote no prompt of use, of {size}"
        raise InputError(what, where=str(path), fix="give a prompt file: --prompts FILE")
    found = sorted(writer.write(requests), key=lambda written: written.request.seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, _pack(found))
    log(f"part {number}: {sum(len(w.tokens) - len(w.request.tokens) for w in found)} tokens")


def _pack(found: Sequence[Written]) -> bytes:
    counts = {
        "sequences": len(found),
        "answer_tokens": sum(len(w.tokens) - len(w.request.tokens) for w in found),
        "greedy": sum(w.request.temperature == 0 for w in found),
    }
    tensors = {
        "tokens": torch.tensor([token for w in found for token in w.tokens], dtype=torch.int32),
        "lengths": torch.tensor([len(w.tokens) for w in found], dtype=torch.int32),
        "prompts": torch.tensor([len(w.request.tokens) for w in found], dtype=torch.int32),
        "taps": _rows([w.taps_TX for w in found]),
        "last": _rows([w.last_TH for w in found]),
    }
    return save(tensors, {"counts": json.dumps(counts)})


def _rows(states: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(states)) if states else torch.empty(0, 0)


def is_part(path: Path) -> bool:
    """Whether a file is a whole part, by its header: nothing of its tensors is read."""
    try:
        with safe_open(path, framework="pt") as file:
            return "counts" in (file.metadata() or {}) and set(file.keys()) == TENSORS
    except (SafetensorError, OSError):
        return False


def read_part(path: Path) -> list[Conversation]:
    """All sequences of a part; their tensors are views of one file's."""
    part = load_file(path)
    ends = torch.cat((torch.zeros(1, dtype=torch.long), part["lengths"].long().cumsum(0))).tolist()
    found = []
    for number, (first, last) in enumerate(pairwise(ends)):
        seen = slice(first - number, last - number - 1)
        states = part["taps"][seen], part["last"][seen]
        found.append(Conversation(part["tokens"][first:last], int(part["prompts"][number]), *states))
    return found


def write_transcripts(
    folder: Path, name: str, conversations: Sequence[tuple[list[int], list[int]]], writer: Writer
) -> None:
    """Write conversations that the target had before, prompt and answer as tokens, as parts of `PART` each."""
    for start in range(0, len(conversations), PART):
        path = folder / f"{name}-{start // PART:05d}.safetensors"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, _pack(list(writer.read(conversations[start : start + PART]))))
