"""The target writes text, many rows at a time, and every hidden state that a draft learns from is kept on the way.

Rows are admitted as others end, so no pass is spent on rows that are done. Runs the same pure functions as an
artifact's graphs: prompts eagerly, steps compiled where that pays.

Shapes: B rows, T tokens, H hidden, X tapped features (3 H).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.backends.inductor import just_in_time
from pipeline.graphs.dtypes import torch_dtype
from pipeline.models.decoder import Hidden
from pipeline.models.parallel import Seams, State
from pipeline.models.weights import up_to
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.weights import weights
from pipeline.speculation.model import Model, Prompt
from pipeline.validate.reference.goldens import read_tensor

KV_STEP = 64
"""Cached positions are attended over in multiples of this many."""


CANDIDATES = 64
"""Likeliest tokens that sampling draws from."""

WORTH_COMPILING = 50_000_000
"""Weights from which on steps are compiled, on a CPU with a C++ compiler: a minute or two first, twice as fast then."""


@dataclass(frozen=True)
class Writing:
    """Tokens to continue: at most `new` more, greedily at temperature 0. `seed` decides the draws."""

    tokens: list[int]
    new: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """A finished sequence: prompt and answer, and for all tokens but the last what the target saw.

    `taps_TX` and `last_TH`, in the target's dtype, are the inputs of the tapped layers and the normalised output.
    """

    request: Writing
    tokens: list[int]
    taps_TX: Tensor
    last_TH: Tensor


@dataclass
class _Row:
    request: Writing
    tokens: list[int]
    generator: torch.Generator

    @property
    def ended(self) -> int:
        return len(self.tokens) - len(self.request.tokens)


class _Narrow(Seams):
    """Logits in the model's own dtype: text needs no more, and the head is the largest product."""

    def head(self, x_BTI: Tensor, weight: Tensor, rows: int) -> Tensor:
        return self.linear(x_BTI, weight, rows).float()


def _step(model: Model, tokens_B1: Tensor, positions_B1: Tensor, active_B: Tensor, kv: int) -> tuple[Tensor, Tensor]:
    """Read one token a row: what is kept of it [B, X + H], and logits float32 [B, V]."""
    seen = model.hidden(tokens_B1, positions_B1, active_B, kv)
    return _kept(seen)[:, 0], model.logits(seen.last_BTH)[:, 0]


def _kept(seen: Hidden) -> Tensor:
    """Tapped states and last ones, side by side: [B, T, X + H]."""
    return seen.last_BTH if seen.taps_BTX is None else torch.cat((seen.taps_BTX, seen.last_BTH), dim=-1)


@dataclass
class Writer:
    """A target loaded to write with `rows` rows of up to `length` tokens.

    A large one on a CPU is there twice, for prompts and for steps.
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
        shape = (self.rows, config.kv_heads, self.length + 1, config.head_dim)
        loaded = {n: read_tensor(ref).to(self.device, dtype) for n, ref in weights(self.checkpoint).items()}
        state: State = {
            f"{part}.{layer}": torch.zeros(shape, dtype=dtype, device=self.device)
            for layer in range(config.layers)
            for part in "kv"
        }
        self.model = self.stepped = Model(config, loaded, state, self.seams, taps=self.taps)
        self._run = _step
        large = sum(w.numel() for w in loaded.values()) >= WORTH_COMPILING
        self.compiled = large and self.device == "cpu" and just_in_time.usable()
        if self.compiled:
            self.stepped, self._run = just_in_time.blocked(self.model, self.dtype), just_in_time.compiled(_step)
        self._kept = torch.zeros(self.rows, self.length, (len(self.taps) + 1) * config.hidden, dtype=dtype)

    @torch.inference_mode()
    def write(self, requests: Iterable[Writing]) -> Iterator[Written]:
        """Finished sequences, in the order in which they end."""
        queue = iter(requests)
        rows: list[_Row | None] = [None] * self.rows
        more = True
        while more or any(rows):
            free = [slot for slot, row in enumerate(rows) if row is None]
            if more and len(free) >= max(self.rows // 8, 1):
                more = self._admit(queue, rows, free)
            else:
                self._step(rows)
            for slot, row in enumerate(rows):
                if row is not None and self._done(row):
                    yield self._finished(slot, row)
                    rows[slot] = None

    @torch.inference_mode()
    def read(self, sequences: Sequence[tuple[list[int], list[int]]]) -> Iterator[Written]:
        """Prompts with answers that the target has written before, `rows` at a time; cut at the writer's length."""
        for start in range(0, len(sequences), self.rows):
            chosen = [(prompt, [*prompt, *answer][: self.length]) for prompt, answer in sequences[start:][: self.rows]]
            seen, lengths = self._prefill(range(len(chosen)), [tokens for _, tokens in chosen])
            kept = _kept(seen).cpu()
            for row, (prompt, tokens) in enumerate(chosen):
                yield self._written(Writing(prompt, 0), tokens, kept[row, : int(lengths[row]) - 1])

    def _prefill(self, slots: Sequence[int], sequences: Sequence[list[int]]) -> tuple[Hidden, Tensor]:
        """Read sequences into empty rows in one pass: states [B, T, ..], and lengths."""
        lengths = torch.tensor([len(tokens) for tokens in sequences])
        tokens = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
        for row, given in enumerate(sequences):
            tokens[row, : len(given)] = torch.tensor(given)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        inputs = (tokens, positions, lengths, torch.tensor(list(slots)))
        return self.model.read(Prompt(*(tensor.to(self.device) for tensor in inputs))), lengths

    def _admit(self, queue: Iterator[Writing], rows: list[_Row | None], free: list[int]) -> bool:
        """Fill free rows from the queue and read their prompts in one pass; False when the queue has ended."""
        fresh = dict(zip(free, queue, strict=False))
        if not fresh:
            return False
        seen, lengths = self._prefill(list(fresh), [request.tokens for request in fresh.values()])
        kept = _kept(seen).cpu()
        for row, slot in enumerate(fresh):
            self._kept[slot, : int(lengths[row])] = kept[row, : int(lengths[row])]
        for slot, request in fresh.items():
            rows[slot] = _Row(request, list(request.tokens), torch.Generator().manual_seed(request.seed))
        ends_BH = seen.last_BTH[torch.arange(len(fresh)), lengths - 1]
        self._choose([rows[slot] for slot in fresh], self.model.logits(ends_BH[:, None])[:, 0])
        return len(fresh) == len(free)

    def _step(self, rows: list[_Row | None]) -> None:
        tokens = torch.tensor([row.tokens[-1] if row else 0 for row in rows])
        positions = torch.tensor([len(row.tokens) - 1 if row else 0 for row in rows])
        active = torch.tensor([row is not None for row in rows])
        # Compiled attention stops at each row's own end, so one graph serves all lengths.
        kv = self.length if self.compiled else min(up_to(int(positions.max()) + 1, KV_STEP), self.length)
        inputs = (tokens[:, None].to(self.device), positions[:, None].to(self.device), active.to(self.device))
        kept, logits = self._run(self.stepped, *inputs, kv)
        self._kept[torch.arange(self.rows)[active], positions[active]] = kept.cpu()[active]
        self._choose(rows, logits)

    def _choose(self, rows: list[_Row | None], logits_BV: Tensor) -> None:
        """Append a token to every row: the best one, or one drawn at the row's temperature."""
        found = logits_BV.topk(CANDIDATES, dim=-1)
        best, logits = found.indices.cpu(), found.values.cpu()
        for place, row in enumerate(rows):
            if row is None:
                continue
            rank = 0
            if row.request.temperature > 0:
                probs = torch.softmax(logits[place] / row.request.temperature, dim=-1)
                rank = int(torch.multinomial(probs, 1, generator=row.generator))
            row.tokens.append(int(best[place, rank]))

    def _done(self, row: _Row) -> bool:
        full = len(row.tokens) > self.length
        return row.ended >= row.request.new or full or row.tokens[-1] in self.checkpoint.config.eos_ids

    def _finished(self, slot: int, row: _Row) -> Written:
        return self._written(row.request, row.tokens, self._kept[slot, : len(row.tokens) - 1].clone())

    def _written(self, request: Writing, tokens: list[int], kept: Tensor) -> Written:
        split = len(self.taps) * self.checkpoint.config.hidden
        return Written(request, tokens, kept[:, :split], kept[:, split:])
