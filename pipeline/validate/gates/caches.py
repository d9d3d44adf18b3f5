"""Keys and values that `score` graphs leave in the caches, compared with goldens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.graphs.spec import PairSpec, Role
from pipeline.validate.reference.golden import Golden, project_cache


@dataclass
class CacheReader:
    """Reads the caches of one model, of one rank. Those with rings are read after every call, while all is held.

    `state` are the live tensors of an open artifact: none where ranks share the heads.
    """

    state: Mapping[str, Tensor]
    pair: PairSpec
    model: Role
    parts: dict[int, list[Tensor]] = field(default_factory=dict)

    def wrote(self, row: int, first: int, tokens: int) -> None:
        """Read what a call wrote of a row: so many tokens from position `first` on."""
        if self._has_rings and self.state:
            self.parts.setdefault(row, []).append(self._read(row, torch.arange(first, first + tokens)))

    def errors(self, row: int, golden: Golden) -> Tensor:
        """Return squares of errors and noise, of keys and values that a sequence left in a cache row.

        float64 [error or noise, T, layers, key or value].
        """
        tokens = golden.caches.shape[0]
        cached = torch.cat(self.parts[row])[:tokens] if self._has_rings else self._read(row, torch.arange(tokens))
        both = torch.stack([cached - golden.caches, golden.caches_noise - golden.caches]).double()
        return both.pow(2).sum(-1)

    @property
    def _layers(self) -> int:
        return self.pair.models.config_of(self.model).layers

    @property
    def _has_rings(self) -> bool:
        return any(self.pair.cache_length(self.model, layer) < self.pair.length for layer in range(self._layers))

    def _read(self, row: int, positions_T: Tensor) -> Tensor:
        """Return projections of all layers' keys and values, float32 [T, layers, key or value, R']."""
        layers = [
            torch.stack([self._projected(f"{part}.{layer}", layer, row, positions_T) for part in "kv"], dim=1)
            for layer in range(self._layers)
        ]
        return torch.stack(layers, dim=1)

    def _projected(self, name: str, layer: int, row: int, positions_T: Tensor) -> Tensor:
        cache = self.state[f"{self.model}/{name}"]
        is_ring = self.pair.cache_length(self.model, layer) < self.pair.length
        slots_T = positions_T % (cache.shape[2] - 1) if is_ring else positions_T
        return project_cache(cache[row][:, slots_T.to(cache.device)].cpu())
