"""Training data: sequences that the target wrote and its hidden states, in numbered parts on disk.

A part is one safetensors file, complete or absent, and its number alone decides its content: after a kill a run resumes
at the first missing part, and several processes may write parts of one folder.

Shapes: N tokens of all sequences of a part, H hidden, X tapped features (3 H).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from pipeline.distill.figures import TextCounts
from pipeline.distill.generate import Transcript, Writer, Writing, Written
from pipeline.distill.prompts import HeldOutFilter, opening, user_turn
from pipeline.distill.settings import SEEDS
from pipeline.errors import InputError
from pipeline.files.atomic import write_atomic
from pipeline.progress import Log, RateProgress, duration
from pipeline.runtime.text import Text

PROMPT_TOKENS = 96
"""Longest prompt that the target writes itself, in tokens; a prompt without an end by then is dropped."""

PROMPT_TEMPERATURE = 1.0
ANSWER_TEMPERATURE = 0.8
GREEDY_SHARE = 0.7

TENSORS = {"tokens", "lengths", "prompts", "taps", "last"}
"""Names of the tensors in a part."""

PART = 256
"""Prompts in a part; a kill loses at most one part."""


@dataclass(frozen=True)
class Conversation:
    """One sequence: `tokens` int32 [T + 1], the first `prompt` of them the prompt; features of all but the last."""

    tokens: Tensor
    prompt: int
    taps_TX: Tensor
    last_TH: Tensor


@dataclass(frozen=True)
class SeededPrompt:
    """Tokens of a prompt, and the seed of the draws in its answer."""

    seed: int
    tokens: list[int]


@dataclass(frozen=True)
class Prompts:
    """The source of prompts: `given` ones in order, or else the target itself; `seed` decides all draws."""

    text: Text
    held_out_filter: HeldOutFilter
    given: Sequence[str] = ()
    seed: int = 0

    def of(self, writer: Writer, numbers: range) -> Iterator[SeededPrompt]:
        """Yield every prompt of these numbers that may be trained on."""
        seeds = range(self.seed * SEEDS + numbers.start, self.seed * SEEDS + numbers.stop)
        if self.given:
            chosen = zip(seeds, self.given[numbers.start : numbers.stop], strict=False)
            allowed = ((seed, prompt) for seed, prompt in chosen if self.held_out_filter(prompt))
            yield from (SeededPrompt(seed, self.text.encode_prompt(prompt)) for seed, prompt in allowed)
            return
        before, after = user_turn(self.text)
        first = {seed: opening(seed) for seed in seeds}
        writings = (
            Writing(self.text.encode(before + words, special=False), PROMPT_TOKENS, PROMPT_TEMPERATURE, seed)
            for seed, words in first.items()
        )
        for written in writer.write(writings):
            if written.tokens[-1] not in writer.checkpoint.config.eos_ids:
                continue
            new = self.text.decode(written.tokens[len(written.writing.tokens) :])
            prompt = (first[written.writing.seed] + new).strip()
            if prompt and self.held_out_filter(prompt):
                yield SeededPrompt(written.writing.seed, self.text.encode(before + prompt + after, special=False))


@dataclass
class TextProgress:
    """The answer tokens written so far, and their rate in this run, with the time for prompts.

    Within a part, the rate is that of the run up to the end of the part: its prompts are written before its answers.
    """

    log: Log
    report: RateProgress
    total: int
    done: int
    wrote: int = 0
    began: float = field(default_factory=time.monotonic)
    answers: _Answers | None = None

    def start_answers(self, expected: int) -> None:
        """Start the answers of a part, of at most `expected` tokens."""
        self.answers = _Answers(expected, time.monotonic())

    def add(self, tokens: int) -> None:
        """Count tokens of answers, and report them."""
        assert self.answers is not None
        now, part = time.monotonic(), self.answers
        self.wrote, self.done, part.wrote = self.wrote + tokens, self.done + tokens, part.wrote + tokens
        rest = max(part.expected - part.wrote, 0)
        rest_s = rest * (now - part.began) / part.wrote
        elapsed_s = now - self.began + rest_s
        self.report(self.done, self.total, (self.wrote + rest) / elapsed_s if elapsed_s > 0 else 0.0)

    def end_part(self, done: int) -> None:
        """Log the answer tokens of all parts, `done`, with the rate."""
        self.done = done
        per_s = self.wrote / max(time.monotonic() - self.began, 1e-9)
        left = max(self.total - done, 0)
        rate = f"; {per_s:,.0f} per second, about {duration(left / per_s)} left" if left and per_s else ""
        self.log(f"answer tokens written: {done:,}; at least {self.total:,} are needed{rate}")


@dataclass
class _Answers:
    """The answers of one part: the most tokens that they can have, the time of their start, and the tokens written."""

    expected: int
    began: float
    wrote: int = 0


def part_path(folder: Path, number: int) -> Path:
    """Return the path of a part."""
    return folder / f"part-{number:05d}.safetensors"


def write_part(
    folder: Path, number: int, size: int, writer: Writer, prompts: Prompts, new: int, progress: TextProgress
) -> None:  # fmt: skip
    """Write one part of `size` prompts with answers of at most `new` tokens; do nothing if the part exists.

    A part is empty if none of its given prompts may be trained on.

    Raises:
        InputError: the target wrote the prompts itself, and none of them is usable.

    """
    path = part_path(folder, number)
    if path.is_file():
        return
    numbers, log = range(number * size, (number + 1) * size), progress.log
    if not prompts.given:
        log(f"part {number}: the target writes {size} prompts")
    chosen = sorted(prompts.of(writer, numbers), key=lambda prompt: prompt.seed)
    log(f"part {number}: {len(chosen)} of {size} prompts are usable; the target answers them")
    writings = []
    for prompt in chosen:
        greedy = prompt.seed % 10 < GREEDY_SHARE * 10
        room = writer.length - len(prompt.tokens)
        if room > 0:
            temperature = 0.0 if greedy else ANSWER_TEMPERATURE
            writings.append(Writing(prompt.tokens, min(new, room), temperature, prompt.seed))
    if not writings and not prompts.given:
        what = f"none of the {size} prompts that the target wrote is usable"
        raise InputError(what, where=str(path), fix="add a prompt file: --prompts FILE")
    progress.start_answers(sum(writing.new for writing in writings))
    sequences = sorted(writer.write(writings, progress.add), key=lambda written: written.writing.seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, _pack(sequences))
    log(f"part {number}: {_counts(sequences).answer_tokens} tokens")


def _counts(sequences: Sequence[Written]) -> TextCounts:
    return TextCounts(
        sequences=len(sequences),
        answer_tokens=sum(len(s.tokens) - len(s.writing.tokens) for s in sequences),
        greedy=sum(s.writing.temperature == 0 for s in sequences),
    )


def _pack(sequences: Sequence[Written]) -> bytes:
    tensors = {
        "tokens": torch.tensor([token for s in sequences for token in s.tokens], dtype=torch.int32),
        "lengths": torch.tensor([len(s.tokens) for s in sequences], dtype=torch.int32),
        "prompts": torch.tensor([len(s.writing.tokens) for s in sequences], dtype=torch.int32),
        "taps": _rows([s.taps_TX for s in sequences]),
        "last": _rows([s.last_TH for s in sequences]),
    }
    return save(tensors, {"counts": _counts(sequences).model_dump_json()})


def _rows(states: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(states)) if states else torch.empty(0, 0)


def is_part(path: Path) -> bool:
    """Return whether a file is a complete part, by its header; reads no tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return "counts" in (file.metadata() or {}) and set(file.keys()) == TENSORS
    except (SafetensorError, OSError):
        return False


def count_part(path: Path) -> TextCounts:
    """Return the counts in a part's header."""
    with safe_open(path, framework="pt") as file:
        return TextCounts.model_validate_json(file.metadata()["counts"])


def read_part(path: Path) -> list[Conversation]:
    """Return all sequences of a part; their tensors are views of the file's."""
    part = load_file(path)
    ends = torch.cat((torch.zeros(1, dtype=torch.long), part["lengths"].long().cumsum(0))).tolist()
    conversations = []
    for number, (first, last) in enumerate(pairwise(ends)):
        rows = slice(first - number, last - number - 1)
        prompt = int(part["prompts"][number])
        conversations.append(Conversation(part["tokens"][first:last], prompt, part["taps"][rows], part["last"][rows]))
    return conversations


def write_transcripts(folder: Path, name: str, transcripts: Sequence[Transcript], writer: Writer) -> None:
    """Write transcripts with their hidden states, as parts of `PART` each."""
    for start in range(0, len(transcripts), PART):
        path = folder / f"{name}-{start // PART:05d}.safetensors"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, _pack(list(writer.read(transcripts[start : start + PART]))))
