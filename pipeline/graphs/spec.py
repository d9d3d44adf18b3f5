"""Inputs of a graph's trace: its bucket (`GraphSpec`) and its pair (`PairSpec`). Plain data; imports no torch.

Facts of weights (`ModelsSpec`) are separate from facts of graphs (`PairSpec`): shards depend on `ModelsSpec` only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from pipeline.models.config import ModelConfig
from pipeline.models.draft_kind import DraftKind
from pipeline.models.eagle3 import taps_of
from pipeline.models.weights import EMBEDDING, NarrowWeights, WeightSpec, takes_four_bits

Phase = Literal["prefill", "decode", "speculate", "score", "propose", "verify"]
Sampling = Literal["greedy", "stochastic", "shaped"]
Role = Literal["target", "draft"]
ROLES: tuple[Role, Role] = ("target", "draft")
Scope = Literal["pair", "target", "draft"]
"""Models that a graph runs: both, or one of them."""


@dataclass(frozen=True)
class GraphSpec:
    """One static-shape graph: traced once, compiled once, the same on every rank.

    `batch` rows, `tokens` query length T (prefill bucket; 1 for decode; K+1 for speculate and verify), `kv` attended
    cache length S (T for prefill of empty rows, which reads no cache), `draft_tokens` K (speculate, propose, verify;
    else 0), `model` the model or models that it runs (`score` runs one of the two, `propose` the draft), `logprobs`
    most probable tokens that a verify graph reports at each position.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    phase: Phase
    batch: int
    tokens: int
    kv: int
    draft_tokens: int = 0
    sampling: Sampling = "greedy"
    model: Scope = "pair"
    logprobs: int = 0

    @property
    def name(self) -> str:
        """Directory name inside an artifact: `<phase>[-<model>]-b<B>-t<T>-s<S>[-k<K>][-<sampling>]`."""
        phase = f"{self.phase}-{self.model}" if self.phase == "score" else self.phase
        k = f"-k{self.draft_tokens}" if self.draft_tokens else ""
        tail = "" if self.sampling == "greedy" else f"-{self.sampling}"
        return f"{phase}-b{self.batch}-t{self.tokens}-s{self.kv}{k}{tail}"

    @property
    def continues(self) -> bool:
        """Whether a prefill graph reads tokens at a position, after what the row's cache holds."""
        return self.phase == "prefill" and self.kv > self.tokens

    @property
    def kind(self) -> str:
        """Phase and sampling: graphs of one kind differ in their shapes."""
        return f"{self.phase} {self.sampling}"


@dataclass(frozen=True)
class ModelsSpec:
    """Both models as ranks hold them: configs, dtypes, split. Determines the shards, and with `PairSpec` the graphs.

    `target_weights` and `draft_weights`: how matrices are stored if narrower than the model's dtype (`int8`, `int4`).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    target: ModelConfig
    draft: ModelConfig
    target_dtype: str
    draft_dtype: str
    tp: int
    draft_replicated: bool
    target_weights: NarrowWeights | None = None
    draft_weights: NarrowWeights | None = None

    def config_of(self, role: Role) -> ModelConfig:
        """Return the config of one model."""
        return self.draft if role == "draft" else self.target

    def tp_of(self, role: Role) -> int:
        """Return the number of ranks that a model is split over."""
        return 1 if role == "draft" and self.draft_replicated else self.tp

    def kv_heads_of(self, role: Role, layer: int) -> int:
        """Return the KV heads of a layer on one rank; they are replicated if there are more ranks than heads."""
        return max(self.config_of(role).at(layer).kv_heads // self.tp_of(role), 1)

    def dtype_of(self, role: Role) -> str:
        """Return the dtype of a model's caches, and of its weights unless they are stored narrower."""
        return self.draft_dtype if role == "draft" else self.target_dtype

    def stored_dtype(self, role: Role, weight: WeightSpec) -> str:
        """Return the dtype in which a weight is stored; bytes of 4-bit codes and scales are uint8."""
        kind = weight.kind
        if kind == "index":
            return "int32"
        shared = weight.name == EMBEDDING and self.config_of(role).shares_embedding
        narrow = self.draft_weights if role == "draft" and not shared else self.target_weights
        if narrow is None or kind in ("vector", "expert_biases"):
            return self.dtype_of(role)
        return "uint8" if narrow == "int4" and takes_four_bits(weight.name) else "int8"

    @property
    def draft_kind(self) -> DraftKind:
        """The kind of draft."""
        return self.draft.draft_kind

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the target whose inputs the draft reads."""
        return taps_of(self.target, self.draft)

    @property
    def embedding_is_shared(self) -> bool:
        """Whether the draft reads the target's tensor on the same rank."""
        return self.draft.shares_embedding and self.tp_of("draft") == self.tp


@dataclass(frozen=True)
class Ring:
    """Caches of the layers with a `window`: of `slots` positions and a scratch position, for p at p modulo slots."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    window: int
    slots: int

    @property
    def back(self) -> int:
        """Most positions from the first one of a call to the end of all that is written: its window is still whole."""
        return self.slots - self.window + 1


@dataclass(frozen=True)
class PairSpec:
    """Everything about a pair that shapes its graphs: its models, the size of the caches, a step's inputs.

    `rows` and `length` of the caches, of which layers with the windows of `rings` have shorter ones; `candidates` that
    sampling graphs keep (None: all); `lookup`: speculative steps take copied tokens; `replayed`: tokens by which a row
    with recurrent states can return (0: no model has any).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    models: ModelsSpec
    rows: int
    length: int
    candidates: int | None = None
    lookup: bool = False
    rings: tuple[Ring, ...] = ()
    replayed: int = 0

    def cache_length(self, role: Role, layer: int) -> int:
        """Return the positions of a layer's caches, with the scratch position; a head over states has no rings."""
        config = self.models.config_of(role)
        window = config.layer(layer).window if config.eagle3 is None else None
        return next((ring.slots + 1 for ring in self.rings if ring.window == window), self.length)

    @property
    def target(self) -> ModelConfig:
        """The target's config."""
        return self.models.target

    @property
    def draft(self) -> ModelConfig:
        """The draft's config."""
        return self.models.draft

    def has_recurrence(self, spec: GraphSpec) -> bool:
        """Return whether a model that a graph runs has recurrent layers."""
        return any(self.models.config_of(role).delta_net is not None for role in self.roles_of(spec))

    def roles_of(self, spec: GraphSpec) -> tuple[Role, ...]:
        """Return the models that a graph runs: a draft that reads the target's states is never scored without it."""
        if spec.phase == "propose":
            return ("draft",)
        if spec.model == "pair" or (spec.model == "draft" and self.models.draft_kind.reads_target_states):
            return ("target", "draft")
        return (spec.model,)
