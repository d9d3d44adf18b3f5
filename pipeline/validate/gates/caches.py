"""Keys and values that `score` graphs leave in the caches, compared with goldens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.graphs.spec import PairSpec, Role
from pipeline.models.weights import BASE, DELTA, RECENT
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
        both = torch.stack([torch.zeros_like(golden.caches), golden.caches_noise - golden.caches]).double()
        both[0, :, self._attention] = (cached - golden.caches[:, self._attention]).double()
        for layer in set(self._layers) - set(self._attention):
            both[:, :, layer] = self._recurrent(layer, row, golden)
        return both.pow(2).sum(-1)

    @property
    def _layers(self) -> tuple[int, ...]:
        """Layers that keep something: the first ones, since others share what an earlier one keeps."""
        return self.pair.models.config_of(self.model).keeping

    @property
    def _has_rings(self) -> bool:
        return any(self.pair.cache_length(self.model, layer) < self.pair.length for layer in self._layers)

    @property
    def _attention(self) -> list[int]:
        """Layers that have keys and values."""
        config = self.pair.models.config_of(self.model)
        return [layer for layer in self._layers if config.layer(layer).delta_net is None]

    def _read(self, row: int, positions_T: Tensor) -> Tensor:
        """Return projections of keys and values of layers that have them, float32 [T, layers, key or value, R']."""
        layers = [
            torch.stack([self._projected(f"{part}.{layer}", layer, row, positions_T) for part in "kv"], dim=1)
            for layer in self._attention
        ]
        return torch.stack(layers, dim=1)

    def _recurrent(self, layer: int, row: int, golden: Golden) -> Tensor:
        """Return errors and noise of the inputs that a row keeps of a recurrent layer, as keys; 0 of other tokens.

        These are the inputs of the last tokens and of those that a convolution sees before them. A fault of the layer
        itself shows in the layers after it. float64 [error or noise, T, key or value, R'].
        """
        recent_LX = self.state[f"{self.model}/{RECENT}.{layer}"][row]
        heads = self.state[f"{self.model}/{DELTA}.{layer}"].shape[1]
        first = int(self.state[f"{self.model}/{BASE}"][row]) - len(recent_LX) + self.pair.replayed
        positions_L = torch.arange(first, first + len(recent_LX))
        inside_L = (positions_L >= 0) & (positions_L < len(golden.caches))
        places = positions_L[inside_L]
        found = project_cache(recent_LX[None, inside_L.to(recent_LX.device), : -2 * heads].cpu())
        wanted, noisy = golden.caches[:, layer], golden.caches_noise[:, layer]
        both = torch.zeros(2, *wanted.shape, dtype=torch.float64)
        both[0, places, 0] = (found - wanted[places, 0]).double()
        both[1, places] = (noisy - wanted)[places].double()
        return both

    def _projected(self, name: str, layer: int, row: int, positions_T: Tensor) -> Tensor:
        cache = self.state[f"{self.model}/{name}"]
        is_ring = self.pair.cache_length(self.model, layer) < self.pair.length
        slots_T = positions_T % (cache.shape[2] - 1) if is_ring else positions_T
        return project_cache(cache[row][:, slots_T.to(cache.device)].cpu())
