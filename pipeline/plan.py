"""Recipe -> Plan: graphs, shards, memory, size and time estimates. Pure; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.errors import Problem, RecipeError
from pipeline.models.config import ModelConfig
from pipeline.models.weights import local_shape
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from pipeline.signature import PairShape

Phase = Literal["prefill", "decode", "speculate", "score"]
Role = Literal["pair", "target", "draft"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4}
GIB = 1 << 30
CORE_MEMORY = {("trn2", 1): 12 * GIB, ("trn2", 2): 24 * GIB, ("trn1", 1): 16 * GIB, ("inf2", 1): 16 * GIB}
"""Device memory of a logical core, by chip and LNC (Neuron SDK, feature guide)."""

SECONDS_PER_LAYER_PASS = 2.0
"""Compile time on one core of a layer of the target or of one draft pass, measured with the inductor backend."""


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
    """Bytes on one rank."""

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
    pair: PairShape
    graphs: tuple[GraphSpec, ...]
    memory: Memory

    def compile_seconds(self, spec: GraphSpec) -> float:
        """Estimate for one graph on one core."""
        passes = {"speculate": spec.draft_tokens, "prefill": 1, "decode": 0, "score": 0}[spec.phase]
        layers = self.pair.draft.layers if spec.model == "draft" else self.pair.target.layers
        return 15 + SECONDS_PER_LAYER_PASS * (layers + passes * self.pair.draft.layers)


def make_plan(recipe: Recipe, target: ModelConfig, draft: ModelConfig) -> Plan:
    """Decide graphs and memory.

    Raises:
        RecipeError: the recipe does not fit these models or the chip; every conflict at once.
    """
    from pipeline.signature import PairShape

    problems = list(_conflicts(recipe, target, draft))
    if problems:
        raise RecipeError(problems)
    pair = PairShape(
        target=target,
        draft=draft,
        target_dtype=recipe.target.dtype,
        draft_dtype=recipe.draft.dtype or recipe.target.dtype,
        tp=recipe.parallel.tensor,
        draft_replicated=recipe.draft.placement == "replicated",
        rows=recipe.shapes.batch[-1],
        length=recipe.shapes.kv[-1],
        candidates=recipe.speculation.candidates,
    )
    plan = Plan(recipe, pair, tuple(_graphs(recipe)), _memory(pair))
    _check_device(plan)
    return plan


def _graphs(recipe: Recipe) -> list[GraphSpec]:
    """Every graph of a recipe, the most expensive phase first, so that compiling in parallel ends evenly."""
    shapes, spec = recipe.shapes, recipe.speculation
    first = "stochastic" if "stochastic" in spec.sampling else "greedy"
    steps = [(b, s, how) for b in shapes.batch for s in shapes.kv for how in spec.sampling]
    return [
        *(GraphSpec("speculate", b, k + 1, s, k, how) for k in spec.draft_tokens for b, s, how in steps),
        *(GraphSpec("prefill", b, t, shapes.kv[-1], 0, first) for b in shapes.batch for t in shapes.prefill),
        *(GraphSpec("decode", b, 1, s, 0, how) for b, s, how in steps),
        *(
            GraphSpec("score", shapes.batch[-1], shapes.prefill[0], s, model=model)
            for s in shapes.kv
            for model in ("target", "draft")
        ),
    ]  # type: ignore[list-item,arg-type,unused-ignore]


def _conflicts(recipe: Recipe, target: ModelConfig, draft: ModelConfig) -> list[Problem]:
    tp, found = recipe.parallel.tensor, []
    sharded = [("target", target)] + ([("draft", draft)] if recipe.draft.placement == "sharded" else [])
    for name, config in sharded:
        fits = [n for n in range(1, config.heads + 1) if _fits(config, n)]
        if not _fits(config, tp):
            what = (
                f"{tp} ranks do not divide the {name}'s num_attention_heads={config.heads}, "
                f"num_key_value_heads={config.kv_heads} and intermediate_size={config.intermediate}"
            )
            found.append(Problem("parallel.tensor", what, f"use one of {fits}"))
        if recipe.shapes.kv[-1] > config.max_position:
            what = f"bucket {recipe.shapes.kv[-1]} is longer than the {name}'s {config.max_position} positions"
            found.append(Problem("shapes.kv", what, f"use kv buckets up to {config.max_position}"))
    if target.vocab != draft.vocab:
        what = f"the draft's vocab_size={draft.vocab}, the target's {target.vocab}"
        found.append(Problem("draft", what, "use a draft with the target's tokenizer"))
    return found


def _fits(config: ModelConfig, tp: int) -> bool:
    kv = config.kv_heads % tp == 0 or tp % config.kv_heads == 0
    return config.heads % tp == 0 and config.intermediate % tp == 0 and kv


def _memory(pair: PairShape) -> Memory:
    def weights(model: str) -> int:
        from pipeline.signature import stored_weights

        config, tp, size = pair.config_of(model), pair.tp_of(model), DTYPE_BYTES[pair.dtype_of(model)]
        return sum(math.prod(local_shape(s, config, tp)) * size for s in stored_weights(pair, model))

    def kv(model: str) -> int:
        config = pair.config_of(model)
        heads = max(config.kv_heads // pair.tp_of(model), 1)
        per_token = 2 * config.layers * heads * config.head_dim * DTYPE_BYTES[pair.dtype_of(model)]
        return pair.rows * pair.length * per_token

    scratch = 4 * pair.rows * 512 * (pair.target.hidden * 4 + pair.target.intermediate // pair.tp * 2)
    return Memory(weights("target"), weights("draft"), kv("target"), kv("draft"), scratch)


def _check_device(plan: Plan) -> None:
    backend = plan.recipe.backend
    if backend.name != "neuron":
        return
    room = CORE_MEMORY[backend.target, backend.lnc]
    if plan.memory.total > room:
        what = (
            f"a rank needs {plan.memory.total / GIB:.1f} GiB; a core of {backend.target} with lnc={backend.lnc} "
            f"has {room / GIB:.0f} GiB"
        )
        raise RecipeError([Problem("parallel.tensor", what, "use more ranks, smaller batch or kv buckets")])
