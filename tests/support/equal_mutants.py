"""Programs that show that a mutant is equal: what the original and the mutant compute, over a whole small domain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pipeline.graphs.packing import BlockPacking
from pipeline.models.parallel import Pass, Seams
from pipeline.models.rank_slices import local_heads
from pipeline.models.weights import WeightSpec
from pipeline.speculation.acceptance import Emitted
from pipeline.speculation.drafters import TAIL, DraftModel, Eagle3, take
from pipeline.speculation.model import Model, Rows
from pipeline.stages.windows import ColumnRange, Window, _packs_whole
from support.mutants import Mutant

Outputs = Iterator[Any]


def taken() -> Outputs:
    """Every position of features of up to three rows, positions and numbers."""
    for rows, positions, size in product((1, 2, 3), repeat=3):
        features_BTH = torch.arange(rows * positions * size).view(rows, positions, size).float()
        for index in product(range(positions), repeat=rows):
            yield take(features_BTH, torch.tensor(index)).tolist()


def heads() -> Outputs:
    """Every split of up to 16 heads over ranks that divide, or are divided by, the key heads."""
    for kv_heads, group, tp in product(range(1, 9), range(1, 9), range(1, 17)):
        if tp % kv_heads == 0 or kv_heads % tp == 0:
            yield local_heads(SimpleNamespace(heads=kv_heads * group, kv_heads=kv_heads), tp)  # type: ignore[arg-type]


def model(vocab: int, partner: int | None) -> Any:
    """Return what `readable` reads of a model whose partner has another vocabulary, or the same (None)."""
    of = SimpleNamespace(config=SimpleNamespace(vocab=vocab), partner_vocab=partner, seams=Seams(), state={})
    of.readable = lambda tokens_BT: Model.readable(of, tokens_BT)  # type: ignore[arg-type]
    return of


def vocabularies() -> Iterator[tuple[int, int | None, int]]:
    """Yield a draft's vocabulary, its target's where it differs, and the number of tokens that there are."""
    for own, target in product(range(2, 6), repeat=2):
        yield own, None if own == target else target, target


def read() -> Outputs:
    """Every token of every two vocabularies."""
    for own, partner, tokens in vocabularies():
        yield model(own, partner).readable(torch.arange(tokens)[None]).tolist()


def steps(tokens: int) -> Iterator[tuple[Rows, Emitted]]:
    """Yield every step of one row with up to two drafts: what it emits, none where the row is inactive."""
    for most, count in ((1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3)):
        for emitted in product(range(tokens), repeat=count):
            row = torch.tensor([[*emitted, *[-1] * (most + 1 - count)]])
            rows = Rows(torch.tensor([1]), torch.tensor([3]), torch.tensor([count > 0]), 16)
            yield rows, Emitted(row, torch.tensor([count]))


def tails() -> Outputs:
    """The tail of a draft model after every step."""
    for rows, emitted in steps(3):
        of = model(3, None)
        of.state = {TAIL: torch.tensor([7], dtype=torch.int32)}
        DraftModel(of).after_verify(rows, emitted, None)  # type: ignore[arg-type]
        yield of.state[TAIL].tolist()


@dataclass(frozen=True)
class Recorder(Eagle3):
    """A head that records what it would read, instead of a layer."""

    seen: list[Any] = field(default_factory=list)

    def _features(self, states: Any) -> Tensor:
        return states

    def _write_cache(self, tokens_BT: Tensor, features_BTH: Tensor, run: Pass) -> None:
        places_BT = run.writes.index[2]
        self.seen.append([x.tolist() for x in (self.model.readable(tokens_BT), features_BTH, places_BT)])


def rewritten() -> Outputs:
    """What a head reads of every step, where its vocabulary is smaller than its target's, as large, or larger."""
    for own, partner, tokens in vocabularies():
        for rows, emitted in steps(tokens):
            of = model(own, partner)
            of.state = {"k.0": torch.zeros(1, 1, 16, 2), "feature": torch.zeros(1, 2)}
            of.usable = lambda kv: kv - 1
            head = Recorder(of)
            head.after_verify(rows, emitted, torch.ones(1, emitted.tokens.shape[1], 2))  # type: ignore[arg-type]
            yield head.seen, of.state["feature"].tolist()


def packed() -> Outputs:
    """Every range of columns of a matrix of up to seven."""
    for width, dtype in product(range(1, 8), ("F32", "BF16")):
        for first, last in combinations(range(width + 1), 2):
            spec = WeightSpec("w", (32, width), "columns", "linear")
            unread: Any = None
            of = Window(unread, spec, dtype, rows=32, real=32, parts=(ColumnRange(first, last, (0,)),))
            yield _packs_whole(of, BlockPacking())


DOMAINS: dict[str, Callable[[], Outputs]] = {
    "take: 1 -> 2": taken,
    "local_heads: tp <= config.kv_heads -> ": heads,
    "self.partner_vocab > self.config.vocab -> ": read,
    "after_verify: history.shape[1] - 2 -> ": tails,
    "Eagle3.after_verify: self.model.config.vocab - 1 -> ": rewritten,
    "_packs_whole: part.last - part.first -> part.last + ": packed,
}
"""What shows that the mutants with a text in their description are equal."""


def is_equal(mutant: Mutant, domain: Callable[[], Outputs]) -> bool:
    """Return whether a mutant computes what the original does, over a domain; one that fails does not."""
    original = list(domain())
    try:
        with mutant.planted():
            return list(domain()) == original
    except (RuntimeError, IndexError, ValueError, TypeError):
        return False
