"""Text of the target, many rows at a time, with the hidden states that a draft learns from.

A new row takes the place of a finished one, so no pass is spent on finished rows. Runs the same pure functions as an
artifact's graphs: prompts eagerly, steps compiled for large models.

Shapes: B rows, T tokens, H hidden, X tapped features (3 H).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.backends.inductor import just_in_time
from pipeline.graphs.dtypes import torch_dtype
from pipeline.models.caches import empty_caches
from pipeline.models.decoder import Hidden
from pipeline.models.parallel import Seams
from pipeline.models.weights import up_to, weight_specs
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.values import read_weight
from pipeline.sources.weights import weights
from pipeline.speculation.model import Model, Prompt

KV_STEP = 64
"""Attention covers cached positions in multiples of this number."""

CANDIDATES = 64
"""Sampling draws from this many most likely tokens."""

WORTH_COMPILING = 50_000_000
"""Steps of models with at least so many weights are compiled, on a CPU with a C++ compiler: after one or two minutes
they are twice as fast."""


@dataclass(frozen=True)
class Writing:
    """Tokens to continue with at most `new` tokens, greedily at temperature 0. `seed` decides the draws."""

    tokens: list[int]
    new: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Transcript:
    """Tokens of a prompt, and of the answer that the target wrote to it before."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Written:
    """A finished sequence: prompt and answer, and the target's hidden states at all tokens but the last.

    `taps_TX` and `last_TH`, in the target's dtype, are the inputs of the tapped layers and the normalised output.
    """

    writing: Writing
    tokens: list[int]
    taps_TX: Tensor
    last_TH: Tensor


@dataclass
class _Row:
    writing: Writing
    tokens: list[int]
    generator: torch.Generator

    @property
    def new(self) -> int:
        """Tokens written so far."""
        return len(self.tokens) - len(self.writing.tokens)


def _written(rows: Sequence[_Row | None]) -> int:
    """Return the number of tokens that these rows have written."""
    return sum(row.new for row in rows if row is not None)


class _Narrow(Seams):
    """Computes logits in the model's dtype: enough for text, and the head is the largest product."""

    def head(self, x_BTI: Tensor, weight: Tensor, rows: int) -> Tensor:
        return self.linear(x_BTI, weight, rows).float()


def _step(model: Model, tokens_B1: Tensor, positions_B1: Tensor, active_B: Tensor, kv: int) -> tuple[Tensor, Tensor]:
    """Read one token per row; return its states [B, X + H], and logits float32 [B, V]."""
    hidden = model.hidden(tokens_B1, positions_B1, active_B, kv)
    return _states(hidden)[:, 0], model.logits(hidden.last_BTH)[:, 0]


def _states(hidden: Hidden) -> Tensor:
    """Return tapped and last states side by side: [B, T, X + H]."""
    return hidden.last_BTH if hidden.taps_BTX is None else torch.cat((hidden.taps_BTX, hidden.last_BTH), dim=-1)


@dataclass
class Writer:
    """A target loaded to write `rows` rows of up to `length` tokens at a time.

    A large target on a CPU is in memory twice, for prompts and for steps.
    """

    checkpoint: Checkpoint
    dtype: str
    rows: int
    length: int
    taps: tuple[int, ...]
    device: str = "cpu"
    seams: Seams = field(default_factory=_Narrow)

    def __post_init__(self) -> None:
        config, dtype = self.checkpoint.config, torch_dtype(self.dtype)
        refs = weights(self.checkpoint)
        loaded = {s.name: read_weight(refs, s).to(self.device, dtype) for s in weight_specs(config)}
        state = empty_caches(config, self.rows, self.length + 1, dtype, self.device)
        self.model = self.stepped = Model(config, loaded, state, self.seams, taps=self.taps)
        self._run = _step
        large = sum(w.numel() for w in loaded.values()) >= WORTH_COMPILING
        self.compiled = large and self.device == "cpu" and just_in_time.usable()
        if self.compiled:
            self.stepped, self._run = just_in_time.blocked(self.model, self.dtype), just_in_time.compiled(_step)
        self._states = torch.zeros(self.rows, self.length, (len(self.taps) + 1) * config.hidden, dtype=dtype)

    @torch.inference_mode()
    def write(self, writings: Iterable[Writing], wrote: Callable[[int], None] | None = None) -> Iterator[Written]:
        """Yield finished sequences, in the order in which they end; `wrote` is called with the tokens of each pass."""
        queue = iter(writings)
        rows: list[_Row | None] = [None] * self.rows
        more = True
        while more or any(rows):
            free, before = [slot for slot, row in enumerate(rows) if row is None], _written(rows)
            if more and len(free) >= max(self.rows // 8, 1):
                more = self._admit(queue, rows, free)
            else:
                self._step(rows)
            if wrote is not None and (new := _written(rows) - before):
                wrote(new)
            for slot, row in enumerate(rows):
                if row is not None and self._done(row):
                    yield self._finished(slot, row)
                    rows[slot] = None

    @torch.inference_mode()
    def read(self, transcripts: Sequence[Transcript]) -> Iterator[Written]:
        """Yield transcripts with their hidden states, `rows` at a time, cut at the writer's length."""
        for start in range(0, len(transcripts), self.rows):
            group = transcripts[start : start + self.rows]
            sequences = [[*transcript.prompt, *transcript.answer][: self.length] for transcript in group]
            hidden, lengths = self._prefill(range(len(group)), sequences)
            states = _states(hidden).cpu()
            for row, (transcript, tokens) in enumerate(zip(group, sequences, strict=True)):
                yield self._written(Writing(transcript.prompt, 0), tokens, states[row, : int(lengths[row]) - 1])

    def _prefill(self, slots: Sequence[int], sequences: Sequence[list[int]]) -> tuple[Hidden, Tensor]:
        """Read sequences into empty rows in one pass; return states [B, T, ..] and lengths."""
        lengths = torch.tensor([len(tokens) for tokens in sequences])
        tokens = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)] = torch.tensor(sequence)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        inputs = (tokens, positions, lengths, torch.tensor(list(slots)))
        on_device = [tensor.to(self.device) for tensor in inputs]
        return self.model.read(Prompt(on_device[0], on_device[1], on_device[2], on_device[3])), lengths

    def _admit(self, queue: Iterator[Writing], rows: list[_Row | None], free: list[int]) -> bool:
        """Fill free rows from the queue and read their prompts in one pass; return False at the end of the queue."""
        admitted = dict(zip(free, queue, strict=False))
        if not admitted:
            return False
        hidden, lengths = self._prefill(list(admitted), [writing.tokens for writing in admitted.values()])
        states = _states(hidden).cpu()
        for row, slot in enumerate(admitted):
            self._states[slot, : int(lengths[row])] = states[row, : int(lengths[row])]
        for slot, writing in admitted.items():
            rows[slot] = _Row(writing, list(writing.tokens), torch.Generator().manual_seed(writing.seed))
        ends_BH = hidden.last_BTH[torch.arange(len(admitted)), lengths - 1]
        self._choose([rows[slot] for slot in admitted], self.model.logits(ends_BH[:, None])[:, 0])
        return len(admitted) == len(free)

    def _step(self, rows: list[_Row | None]) -> None:
        tokens = torch.tensor([row.tokens[-1] if row else 0 for row in rows])
        positions = torch.tensor([len(row.tokens) - 1 if row else 0 for row in rows])
        active = torch.tensor([row is not None for row in rows])
        # Compiled attention ends at each row's length, so one graph is enough for all lengths.
        kv = self.length if self.compiled else min(up_to(int(positions.max()) + 1, KV_STEP), self.length)
        inputs = (tokens[:, None].to(self.device), positions[:, None].to(self.device), active.to(self.device))
        states, logits = self._run(self.stepped, *inputs, kv)
        self._states[torch.arange(self.rows)[active], positions[active]] = states.cpu()[active]
        self._choose(rows, logits)

    def _choose(self, rows: list[_Row | None], logits_BV: Tensor) -> None:
        """Append a token to every row: the most likely one, or a draw at the row's temperature."""
        top = logits_BV.topk(CANDIDATES, dim=-1)
        ids, logits = top.indices.cpu(), top.values.cpu()
        for index, row in enumerate(rows):
            if row is None:
                continue
            rank = 0
            if row.writing.temperature > 0:
                probs = torch.softmax(logits[index] / row.writing.temperature, dim=-1)
                rank = int(torch.multinomial(probs, 1, generator=row.generator))
            row.tokens.append(int(ids[index, rank]))

    def _done(self, row: _Row) -> bool:
        full = len(row.tokens) > self.length
        return row.new >= row.writing.new or full or row.tokens[-1] in self.checkpoint.config.eos_ids

    def _finished(self, slot: int, row: _Row) -> Written:
        return self._written(row.writing, row.tokens, self._states[slot, : len(row.tokens) - 1].clone())

    def _written(self, writing: Writing, tokens: list[int], states: Tensor) -> Written:
        split = len(self.taps) * self.checkpoint.config.hidden
        return Written(writing, tokens, states[:, :split], states[:, split:])
