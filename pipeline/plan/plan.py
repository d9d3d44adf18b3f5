"""Recipe -> Plan: graphs, memory, size and time estimates, and every conflict with the models. Pure; imports no torch.

Weights and caches are counted exactly, from the tables that the sharder and the graphs use. Scratch, compile time and
compile memory are estimates, and say so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.errors import Problem, RecipeError
from pipeline.models.config import ModelConfig
from pipeline.models.weights import local_shape
from pipeline.recipe.schema import Recipe, Sampling

if TYPE_CHECKING:
    from pipeline.graphs.signature import PairSpec

Phase = Literal["prefill", "decode", "speculate", "score"]
Role = Literal["pair", "target", "draft"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "int8": 1}
GIB = 1 << 30
MIB = 1 << 20
CORE_MEMORY = {("trn2", 1): 12 * GIB, ("trn2", 2): 24 * GIB, ("trn1", 1): 16 * GIB, ("inf2", 1): 16 * GIB}
"""Device memory of a logical core, by chip and LNC (Neuron SDK, feature guide)."""


@dataclass(frozen=True)
class Cost:
    """What compiling one graph takes, and what comes out: a fixed part and a part for each layer pass."""

    seconds: float
    seconds_per_pass: float
    memory_bytes: int
    memory_per_pass: int
    size_bytes: int
    size_per_pass: int


COSTS = {
    # Measured on one core: SmolLM2-135M, speculate with K=4, 42 passes: 92 s, 1.25 GiB in two processes, 6.2 MB.
    "inductor": Cost(15, 2.0, 1000 * MIB, 8 * MIB, MIB // 4, 140 << 10),
    # Not measured here: from public reports of neuronx-cc, to tell minutes from hours.
    "neuron": Cost(60, 8.0, 8 * GIB, 128 * MIB, 16 * MIB, MIB),
}
ATTENTION_TILE = 512
"""Keys for which a fused attention kernel holds scores at a time."""


@dataclass(frozen=True)
class GraphSpec:
    """One static-shape graph: traced once, compiled once, the same on every rank.

    `batch` rows, `tokens` query length T (prefill bucket; 1 for decode; K+1 for speculate), `kv` attended cache
    length S, `draft_tokens` K (speculate only, else 0), `model` which model(s) it runs (`score` runs one of the two).
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


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. All but `scratch`, an estimate, are exact."""

    target_weights: int
    draft_weights: int
    target_kv: int
    draft_kv: int
    scratch: int

    @property
    def total(self) -> int:
        """Everything a rank holds while it serves."""
        return self.target_weights + self.draft_weights + self.target_kv + self.draft_kv + self.scratch


@dataclass(frozen=True)
class Plan:
    """All that a build will do, decided before it starts."""

    recipe: Recipe
    pair: PairSpec
    graphs: tuple[GraphSpec, ...]
    memory: Memory

    @property
    def target(self) -> ModelConfig:
        """The target's config."""
        return self.pair.target

    @property
    def draft(self) -> ModelConfig:
        """The draft's config."""
        return self.pair.draft

    @property
    def memory_limit(self) -> int | None:
        """Device bytes that a rank may use; None where the device is whatever the host has."""
        backend = self.recipe.backend
        return CORE_MEMORY[backend.target, backend.lnc] if backend.name == "neuron" else None

    @property
    def artifact_bytes(self) -> int:
        """Estimate of an artifact's size: the shards of all ranks and the graphs."""
        shards = self.pair.tp * (self.memory.target_weights + self.memory.draft_weights)
        return shards + sum(self.graph_bytes(spec) for spec in self.graphs)

    @property
    def stored_bytes(self) -> int:
        """As `artifact_bytes`, with the equal shards of a replicated draft counted once: what a registry stores."""
        copies = self.pair.tp - 1 if self.pair.draft_replicated else 0
        return self.artifact_bytes - copies * self.memory.draft_weights

    def layer_passes(self, spec: GraphSpec) -> int:
        """How often a graph runs a layer: K times for each of the draft's in `speculate`, else once."""
        if spec.phase == "score":
            return self.pair.config_of(spec.model).layers
        passes = {"speculate": spec.draft_tokens, "prefill": 1, "decode": 0}[spec.phase]
        return self.target.layers + passes * self.draft.layers

    def compile_seconds(self, spec: GraphSpec) -> float:
        """Estimate for one graph on one core."""
        return self._cost.seconds + self._cost.seconds_per_pass * self.layer_passes(spec)

    def compile_memory(self, spec: GraphSpec) -> int:
        """Estimate of the host memory, in bytes, that compiling one graph takes."""
        return self._cost.memory_bytes + self._cost.memory_per_pass * self.layer_passes(spec)

    def graph_bytes(self, spec: GraphSpec) -> int:
        """Estimate of a compiled graph's size."""
        return self._cost.size_bytes + self._cost.size_per_pass * self.layer_passes(spec)

    @property
    def _cost(self) -> Cost:
        return COSTS[self.recipe.backend.name]


def make_plan(recipe: Recipe, target: ModelConfig, draft: ModelConfig) -> Plan:
    """Decide graphs and memory.

    Raises:
        RecipeError: the recipe does not fit these models or the chip; every conflict at once.

    """
    problems = list(_conflicts(recipe, target, draft))
    if problems:
        raise RecipeError(problems)
    pair, graphs = _pair_shape(recipe, target, draft), tuple(_graphs(recipe))
    plan = Plan(recipe, pair, graphs, _memory(recipe, pair, graphs))
    if plan.memory_limit is not None and plan.memory.total > plan.memory_limit:
        raise RecipeError([_overflow(plan, plan.memory_limit)])
    return plan


def _pair_shape(recipe: Recipe, target: ModelConfig, draft: ModelConfig) -> PairSpec:
    from pipeline.graphs.signature import PairSpec

    return PairSpec(
        target=target,
        draft=draft,
        target_dtype=recipe.target.dtype,
        draft_dtype=recipe.draft.dtype or recipe.target.dtype,
        tp=recipe.parallel.tensor,
        draft_replicated=recipe.draft.placement == "replicated",
        rows=recipe.shapes.batch[-1],
        length=recipe.shapes.kv[-1],
        candidates=recipe.speculation.candidates,
        target_weights=recipe.target.weights,
        draft_weights=recipe.draft_weights,
        lookup=recipe.speculation.lookup is not None,
    )


def _graphs(recipe: Recipe) -> list[GraphSpec]:
    """Every graph of a recipe, the most expensive phase first, so that compiling in parallel ends evenly."""
    shapes, spec = recipe.shapes, recipe.speculation
    first: Sampling = "stochastic" if "stochastic" in spec.sampling else "greedy"
    steps = [(b, s, how) for b in shapes.batch for s in shapes.kv for how in spec.sampling]
    models: tuple[Role, Role] = ("target", "draft")
    return [
        *(GraphSpec("speculate", b, k + 1, s, k, how) for k in spec.draft_tokens for b, s, how in steps),
        *(GraphSpec("prefill", b, t, shapes.kv[-1], 0, first) for b in shapes.batch for t in shapes.prefill),
        *(GraphSpec("decode", b, 1, s, 0, how) for b, s, how in steps),
        *(
            GraphSpec("score", shapes.batch[-1], min(shapes.prefill[0], s), s, model=model)
            for s in shapes.kv
            for model in models
        ),
    ]


def _conflicts(recipe: Recipe, target: ModelConfig, draft: ModelConfig) -> Iterator[Problem]:
    tp = recipe.parallel.tensor
    sharded = [("target", target)] + ([("draft", draft)] if recipe.draft.placement == "sharded" else [])
    fits = [n for n in range(1, target.heads + 1) if all(_fits(config, n) for _, config in sharded)]
    for name, config in sharded:
        for size, value in _undivided(config, tp):
            what = f"found {tp}, which does not divide the {name}'s {size}={value}"
            alone = "" if name == "target" or not _fits(target, tp) else ", or draft.placement: replicated"
            yield Problem(recipe.place("parallel.tensor"), what, f"use one of {fits}{alone}")
    for name, config in (("target", target), ("draft", draft)):
        for index, bucket in enumerate(recipe.shapes.kv):
            if bucket > config.max_position:
                what = f"found {bucket}, longer than the {name}'s max_position_embeddings={config.max_position}"
                yield Problem(recipe.place(f"shapes.kv[{index}]"), what, f"use kv buckets up to {config.max_position}")
            elif bucket > (config.window or bucket):
                what = (
                    f"found {bucket}, longer than the {name}'s sliding_window={config.window}, which is not supported"
                )
                yield Problem(recipe.place(f"shapes.kv[{index}]"), what, f"use kv buckets up to {config.window}")
    yield from _pair_conflicts(recipe, target, draft)


def _pair_conflicts(recipe: Recipe, target: ModelConfig, draft: ModelConfig) -> Iterator[Problem]:
    where = recipe.place("draft")
    if target.vocab != draft.vocab and (draft.shares_embedding or draft.draft_vocab):
        what = f"the draft has vocab_size={draft.vocab}, the target, whose vocabulary it uses, {target.vocab}"
        yield Problem(where, what, "use a draft that was made for this target")
    if draft.shares_embedding and target.hidden != draft.hidden:
        what = f"the draft uses the target's embedding, but has hidden_size={draft.hidden}, the target {target.hidden}"
        yield Problem(where, what, "use a draft that was made for this target")
    yield from _method_conflicts(recipe, target, draft)
    dtype = recipe.draft.dtype or recipe.target.dtype
    if draft.shares_embedding and dtype != recipe.target.dtype:
        what = f"found {dtype}, but the draft uses the target's embedding, which is {recipe.target.dtype}"
        yield Problem(recipe.place("draft.dtype"), what, f"use {recipe.target.dtype}, or leave it out")
    candidates = recipe.speculation.candidates
    vocab = min(target.vocab, draft.vocab)
    if recipe.backend.name == "neuron" and candidates is None and "stochastic" in recipe.speculation.sampling:
        what = "neuron samples from the best N tokens; found no N for its stochastic graphs"
        yield Problem(recipe.place("speculation.candidates"), what, "write candidates: 256")
    if candidates is not None and candidates > vocab:
        what = f"found {candidates}, more than the vocabulary of {vocab}"
        yield Problem(recipe.place("speculation.candidates"), what, "use less, or leave it out to keep all")


def _method_conflicts(recipe: Recipe, target: ModelConfig, draft: ModelConfig) -> Iterator[Problem]:
    method = "draft_model" if draft.eagle3 is None else "eagle3"
    if recipe.speculation.method != method:
        what = f"found {recipe.speculation.method}, but the draft is made for {method}"
        yield Problem(recipe.place("speculation.method"), what, f"write method: {method}, or name another draft")
    if draft.eagle3 is None:
        return
    dtype = recipe.draft.dtype or recipe.target.dtype
    if dtype != recipe.target.dtype:
        what = f"found {dtype}, but the draft reads the target's hidden states, which are {recipe.target.dtype}"
        yield Problem(recipe.place("draft.dtype"), what, f"use {recipe.target.dtype}, or leave it out")
    if recipe.draft.placement == "sharded" and recipe.parallel.tensor > 1:
        what = "found sharded; an EAGLE-3 head is whole on each rank, as the states that it reads are"
        yield Problem(recipe.place("draft.placement"), what, "write placement: replicated")
    if draft.vocab != target.vocab:
        what = f"the draft has vocab_size={draft.vocab}, the target, whose tokens it reads, {target.vocab}"
        yield Problem(recipe.place("draft"), what, "use a draft that was made for this target")


def _undivided(config: ModelConfig, tp: int) -> Iterator[tuple[str, int]]:
    """Sizes of a model that `tp` ranks cannot share; more ranks than KV heads replicate them, whole."""
    if config.heads % tp:
        yield "num_attention_heads", config.heads
    if config.kv_heads % tp and tp % config.kv_heads:
        yield "num_key_value_heads", config.kv_heads
    if config.intermediate % tp:
        yield "intermediate_size", config.intermediate


def _fits(config: ModelConfig, tp: int) -> bool:
    return not any(_undivided(config, tp))


def _memory(recipe: Recipe, pair: PairSpec, graphs: tuple[GraphSpec, ...]) -> Memory:
    return Memory(
        _weights(recipe, pair, "target"),
        _weights(recipe, pair, "draft"),
        _kv(pair, "target"),
        _kv(pair, "draft"),
        max(_scratch(pair, spec) for spec in graphs),
    )


def _weights(recipe: Recipe, pair: PairSpec, model: str) -> int:
    """Bytes of one rank's shard, as the backend lays it out."""
    from pipeline.graphs.packing import BlockPacking, PlainPacking
    from pipeline.graphs.signature import stored_weights

    blocked = recipe.backend.name == "inductor" and recipe.backend.device == "cpu"
    packing = BlockPacking() if blocked else PlainPacking()
    config, tp = pair.config_of(model), pair.tp_of(model)
    return DTYPE_BYTES["int32"] + sum(  # and the vocabulary offset
        math.prod(packing.packed_shape(local_shape(s, config, tp), s.kind, dtype)) * DTYPE_BYTES[dtype]
        for s in stored_weights(pair, model)
        for dtype in (pair.stored_dtype(model, s.kind),)
    )


def _kv(pair: PairSpec, model: str) -> int:
    config = pair.config_of(model)
    heads = max(config.kv_heads // pair.tp_of(model), 1)
    per_token = 2 * config.layers * heads * config.head_dim * DTYPE_BYTES[pair.dtype_of(model)]
    return pair.rows * pair.length * per_token


def _scratch(pair: PairSpec, spec: GraphSpec) -> int:
    """Estimate of a graph's live activations, in float32: one layer's, tiles of attention scores, and the logits."""
    from pipeline.graphs.signature import models_of

    def layer(model: str) -> int:
        config, tp = pair.config_of(model), pair.tp_of(model)
        rows, heads = spec.batch * spec.tokens, config.heads // tp
        wide = 4 * config.hidden + 3 * heads * config.head_dim + 2 * config.intermediate // tp
        return 4 * rows * (wide + heads * min(spec.kv, ATTENTION_TILE))

    scored = spec.tokens if spec.phase in ("score", "speculate") else 1
    copies = 4 if spec.sampling == "stochastic" else 2
    logits = 4 * spec.batch * scored * pair.target.vocab * copies
    return max(layer(model) for model in models_of(spec, pair)) + logits


def _overflow(plan: Plan, limit: int) -> Problem:
    backend, memory = plan.recipe.backend, plan.memory
    parts = {
        "target weights": memory.target_weights,
        "draft weights": memory.draft_weights,
        "KV caches": memory.target_kv + memory.draft_kv,
        "scratch": memory.scratch,
    }
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    lnc = f" with lnc={backend.lnc}" if backend.name == "neuron" else ""
    what = f"a rank needs {memory.total / GIB:.1f} GiB ({listed}); a core{lnc} has {limit / GIB:.0f} GiB"
    fix = {
        "target weights": "use more ranks",
        "draft weights": "set draft.placement: sharded, or use a smaller draft",
        "KV caches": "use smaller batch or kv buckets",
        "scratch": "use smaller batch or prefill buckets",
    }[max(parts, key=lambda name: parts[name])]
    return Problem(plan.recipe.place("parallel.tensor"), what, fix)
