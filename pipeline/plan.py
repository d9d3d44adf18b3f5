"""Recipe -> Plan: graphs, shards, memory, size and time estimates. Pure; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["prefill", "decode", "speculate", "score"]
Role = Literal["pair", "target", "draft"]


@dataclass(frozen=True)
class GraphSpec:
    """One static-shape graph: traced once, compiled once, the same on every rank.

    `batch` rows, `tokens` query length T (prefill bucket; 1 for decode; K+1 for speculate), `kv` attended cache length S,
    `draft_tokens` K (speculate only, else 0), `model` which model(s) it runs (`score` runs one of the two; `decode` the target).
    """

    phase: Phase
    batch: int
    tokens: int
    kv: int
    draft_tokens: int = 0
    sampling: Literal["greedy", "stochastic"] = "greedy"
    model: Role = "pair"

    @property
    def name(self) -> str:
        """Directory name inside an artifact: `<phase>[-<model>]-b<B>-t<T>-s<S>[-k<K>][-stochastic]`."""
        phase = f"{self.phase}-{self.model}" if self.phase == "score" else self.phase
        k = f"-k{self.draft_tokens}" if self.draft_tokens else ""
        tail = "-stochastic" if self.sampling == "stochastic" else ""
        return f"{phase}-b{self.batch}-t{self.tokens}-s{self.kv}{k}{tail}"
