"""The stored part of a reference run: logits at the baseline's best ranks and random projections. Runs no model.

A golden is bounded whatever the vocabulary: logits at 145 ranks of the baseline, and a random projection of all.

Shapes: T tokens of a sequence, N recorded ids, V vocabulary, R rows of the projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from safetensors.torch import save
from torch import Tensor

from pipeline.validate.reference.routes import Routes

RANKS = (*range(50), *range(50, 1000, 10))
"""Ranks of the baseline whose logits are recorded: the first 50, then every tenth up to 1000."""

PROJECTIONS = 32
CACHE_PROJECTIONS = 2


@dataclass(frozen=True)
class Summary:
    """Logits of a sequence, reduced. `values` [T, N] at the golden's ids, `projected` [T, R], `lse`, `best` [T]."""

    values: Tensor
    projected: Tensor
    lse: Tensor
    best: Tensor

    def cut(self, tokens: int) -> Summary:
        """Return the first tokens only."""
        return Summary(*(tensor[:tokens] for tensor in vars(self).values()))


@dataclass(frozen=True)
class Golden:
    """Baseline and noise of one sequence. `ids` int32 [T, N] by descending baseline logit.

    `caches` and `caches_noise`, float32 [T, layers, 2, R'], are projections of every layer's keys and values; of an
    EAGLE-3 head there are T - 1. `routes` are the experts that both follow, of a head those of its target.
    """

    ids: Tensor
    baseline: Summary
    noise: Summary
    caches: Tensor
    caches_noise: Tensor
    routes: Routes | None = None

    def cut(self, tokens: int) -> Golden:
        """Return the first tokens only: attention is causal, so they are the same in a longer sequence."""
        held = tokens - (len(self.ids) - len(self.caches))
        caches = self.caches[:held], self.caches_noise[:held]
        routes = None if self.routes is None else self.routes.cut(tokens)
        return Golden(self.ids[:tokens], self.baseline.cut(tokens), self.noise.cut(tokens), *caches, routes)


def summary(logits_TV: Tensor, ids_TN: Tensor) -> Summary:
    """Reduce logits of any precision to what goldens record."""
    projected = logits_TV.double() @ projection(logits_TV.shape[-1])
    wide = logits_TV.double() if logits_TV.dtype == torch.float64 else logits_TV.float()
    values = wide.gather(-1, ids_TN.long())
    return Summary(values, projected, wide.logsumexp(-1), logits_TV.argmax(-1).int())


@lru_cache(maxsize=4)
def projection(vocab: int) -> Tensor:
    """Return scaled random signs [V, R]: the squared length of a projected difference is, on average, its mean square.

    Johnson and Lindenstrauss 1984, with the signs of Achlioptas 2003: no entry of the vocabulary escapes it.
    """
    signs = torch.randint(0, 2, (vocab, PROJECTIONS), generator=torch.Generator().manual_seed(vocab))
    return (signs.double() * 2 - 1) / (PROJECTIONS * vocab) ** 0.5


def project_cache(cache_HTD: Tensor) -> Tensor:
    """Return the random projection of one layer's keys or values at each position, float32 [T, R']."""
    heads, tokens, dim = cache_HTD.shape
    flat = cache_HTD.transpose(0, 1).reshape(tokens, heads * dim)
    return (flat.double() @ projection(heads * dim)[:, :CACHE_PROJECTIONS]).float()


def recorded_ids(logits_TV: Tensor) -> Tensor:
    """Return the vocabulary ids at `RANKS`, int32 [T, N]."""
    vocab = logits_TV.shape[-1]
    order = logits_TV.topk(min(RANKS[-1] + 1, vocab), dim=-1).indices
    return order[:, [rank for rank in RANKS if rank < vocab]].int()


def joined(parts: Sequence[Summary]) -> Summary:
    """Join summaries of stretches that follow each other."""
    return Summary(
        torch.cat([part.values for part in parts]),
        torch.cat([part.projected for part in parts]),
        torch.cat([part.lse for part in parts]),
        torch.cat([part.best for part in parts]),
    )


def pack(golden: Golden) -> bytes:
    """Return a golden as the bytes of a safetensors file."""
    tensors = {"ids": golden.ids, "caches": golden.caches, "caches_noise": golden.caches_noise}
    parts = {"baseline": golden.baseline, "noise": golden.noise} | ({"routes": golden.routes} if golden.routes else {})
    for name, part in parts.items():
        tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in vars(part).items()}
    return save(tensors)


def unpack(tensors: Mapping[str, Tensor]) -> Golden:
    """Return the golden whose tensors these are."""
    baseline, noise = _summary_in(tensors, "baseline"), _summary_in(tensors, "noise")
    names = [f"routes.{field.name}" for field in fields(Routes)]
    routes = Routes(*(tensors[name] for name in names)) if names[0] in tensors else None
    return Golden(tensors["ids"], baseline, noise, tensors["caches"], tensors["caches_noise"], routes)


def _summary_in(tensors: Mapping[str, Tensor], name: str) -> Summary:
    return Summary(*(tensors[f"{name}.{key}"] for key in ("values", "projected", "lse", "best")))
