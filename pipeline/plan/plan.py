"""Recipe -> Plan: the graphs that a build compiles, and what they need. Pure; imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from pipeline.errors import Problem, RecipeError
from pipeline.graphs.packing import PACKINGS
from pipeline.graphs.spec import GraphSpec, ModelsSpec, PairSpec, Ring, Sampling, Scope
from pipeline.models.config import ModelConfig
from pipeline.plan.conflicts import conflicts
from pipeline.plan.estimates import COMPILE_COSTS, GIB, CompileCost, Memory, Work, layer_passes, rank_memory
from pipeline.plan.rings import rings_of
from pipeline.recipe.backend_settings import InductorSettings
from pipeline.recipe.schema import Recipe


@dataclass(frozen=True)
class Plan:
    """The graphs and the memory of a build, decided before it starts."""

    recipe: Recipe
    pair: PairSpec
    graphs: tuple[GraphSpec, ...]
    memory: Memory

    @property
    def memory_limit(self) -> int | None:
        """Device bytes that a rank may use; None if they depend on the host's device."""
        return self.recipe.backend.core_memory_bytes

    @property
    def shards_bytes(self) -> int:
        """Size of the shards of all ranks."""
        return self.pair.models.tp * (self.memory.target_weights + self.memory.draft_weights)

    @property
    def artifact_bytes(self) -> int:
        """Estimate of an artifact's size: the shards of all ranks and the graphs."""
        return self.shards_bytes + sum(self.graph_bytes(spec) for spec in self.graphs)

    def disk_bytes(self, graphs_bytes: int) -> int:
        """Return the disk that a build writes: an artifact links the cache's shards and graphs; subgraphs are extra."""
        return self.shards_bytes + 2 * graphs_bytes

    @property
    def stored_bytes(self) -> int:
        """Estimate of the bytes in a registry: equal shards of a replicated draft count once."""
        copies = self.pair.models.tp - 1 if self.pair.models.draft_replicated else 0
        return self.artifact_bytes - copies * self.memory.draft_weights

    def compile_seconds(self, spec: GraphSpec) -> float:
        """Estimate the time to compile one graph on one core."""
        return self._cost.seconds(layer_passes(self.pair, spec))

    def compile_memory(self, spec: GraphSpec) -> int:
        """Estimate the host memory, in bytes, for compiling one graph."""
        return self._cost.memory_bytes(layer_passes(self.pair, spec))

    def graph_bytes(self, spec: GraphSpec) -> int:
        """Estimate the size of a compiled graph."""
        return self._cost.size_bytes(layer_passes(self.pair, spec))

    @property
    def cost_kind(self) -> str:
        """The kind of compiler, a key of `COMPILE_COSTS`."""
        backend = self.recipe.backend
        whole = isinstance(backend, InductorSettings) and (self.pair.models.tp > 1 or backend.device == "cuda")
        return f"{backend.name}, whole" if whole else backend.name

    @property
    def _cost(self) -> CompileCost:
        return COMPILE_COSTS[self.cost_kind]

    def graph_digest(self, spec: GraphSpec) -> str:
        """Return a digest of what decides the cost of compiling one graph."""
        return _digest([asdict(self.pair), asdict(spec), self.recipe.backend.model_dump(mode="json")])

    def digest(self, work: Work) -> str:
        """Return a digest of what decides the cost of a build."""
        return _digest([[self.graph_digest(spec) for spec in self.graphs], asdict(work)])


READ_AGAIN = 3
"""Last tokens that a slot held which a request that shares them may read again (`runtime.prefixes`)."""


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def make_plan(recipe: Recipe, target: ModelConfig, draft: ModelConfig) -> Plan:
    """Return the plan of a recipe: graphs and memory.

    Raises:
        RecipeError: the recipe does not fit these models or the chip; every conflict at once.

    """
    if recipe.parallel.enable_expert_parallel:
        target, draft = target.with_experts_by_rank, draft.with_experts_by_rank
    problems = list(conflicts(recipe, target, draft))
    if problems:
        raise RecipeError(problems)
    graphs = tuple(_graphs(recipe))
    pair = pair_spec(recipe, target, draft, rings_of((target, draft), graphs))
    plan = Plan(recipe, pair, graphs, rank_memory(pair, PACKINGS[recipe.backend.packing], graphs))
    if plan.memory_limit is not None and plan.memory.total > plan.memory_limit:
        raise RecipeError([_overflow(plan, plan.memory_limit)])
    return plan


def pair_spec(
    recipe: Recipe, target: ModelConfig, draft: ModelConfig, rings: tuple[Ring, ...] = ()
) -> PairSpec:  # fmt: skip
    """Return the facts of a recipe and its models that shape shards and graphs."""
    models = ModelsSpec(
        target=target,
        draft=draft,
        target_dtype=recipe.target.dtype,
        draft_dtype=recipe.draft_dtype,
        tp=recipe.parallel.tensor,
        draft_replicated=recipe.draft.placement == "replicated",
        target_weights=recipe.target.weights,
        draft_weights=recipe.draft_weights,
    )
    return PairSpec(
        models=models,
        rows=recipe.shapes.batch[-1],
        length=recipe.shapes.kv[-1],
        candidates=recipe.speculation.candidates,
        lookup=recipe.speculation.lookup is not None,
        rings=rings,
        replayed=replayed_tokens(recipe, target, draft),
    )


def replayed_tokens(recipe: Recipe, *configs: ModelConfig) -> int:
    """Return by how many tokens rows must return to earlier states; 0 if no model has recurrent layers.

    A step reads up to K tokens that are rejected. A request that shares what a slot held reads its last tokens again.
    """
    recurrent = any(config.delta_net is not None for config in configs)
    return recipe.speculation.draft_tokens[-1] + READ_AGAIN if recurrent else 0


def _graphs(recipe: Recipe) -> list[GraphSpec]:
    """Return every graph, the most expensive phase first, so that parallel compiles end at about the same time."""
    shapes, speculation = recipe.shapes, recipe.speculation
    fused = [how for how in speculation.sampling if how != "shaped"]
    steps = [(b, s, how) for b in shapes.batch for s in shapes.kv for how in fused]
    scored: tuple[Scope, Scope] = ("target", "draft")
    return [
        *(GraphSpec("speculate", b, k + 1, s, k, how) for k in speculation.draft_tokens for b, s, how in steps),
        *_prefill_graphs(recipe),
        *(GraphSpec("decode", b, 1, s, 0, how) for b, s, how in steps),
        *(
            GraphSpec("score", shapes.batch[-1], min(shapes.prefill[0], s), s, model=model)
            for s in shapes.kv
            for model in scored
        ),
        *(_shaped_graphs(recipe) if "shaped" in speculation.sampling else ()),
    ]


def _prefill_graphs(recipe: Recipe) -> Iterator[GraphSpec]:
    """Yield graphs that read prompts, and chunks of prompts after what a row's cache holds.

    Where attention computes every key of a cache, seen or not, empty rows have graphs without a cache; those that
    continue then read one row at a time, or as few as the recipe has.
    """
    shapes, sampling = recipe.shapes, recipe.speculation.sampling
    how: Sampling = "stochastic" if "stochastic" in sampling else "greedy"
    fresh = not recipe.backend.skips_unseen_keys
    for batch in shapes.batch:
        for tokens in shapes.prefill:
            if fresh:
                yield GraphSpec("prefill", batch, tokens, tokens, 0, how)
            if not fresh or batch == shapes.batch[0]:
                yield GraphSpec("prefill", batch, tokens, shapes.kv[-1], 0, how)


def _shaped_graphs(recipe: Recipe) -> Iterator[GraphSpec]:
    """Yield the graphs of shaped rows: of each batch a draft's proposals, and their verification for each K.

    They attend over the whole cache: a bucket for each length would double their number.
    """
    kv, steps, logprobs = recipe.shapes.kv[-1], recipe.speculation.draft_tokens, recipe.speculation.reported_logprobs
    for batch in recipe.shapes.batch:
        for k in steps:
            yield GraphSpec("verify", batch, k + 1, kv, k, "shaped", logprobs=logprobs)
        yield GraphSpec("propose", batch, 1, kv, steps[-1], "stochastic")


def _overflow(plan: Plan, limit: int) -> Problem:
    memory = plan.memory
    parts = {
        "target weights": memory.target_weights,
        "draft weights": memory.draft_weights,
        "KV caches": memory.target_kv + memory.draft_kv,
        "scratch": memory.scratch,
    }
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    core = plan.recipe.backend.core_name
    what = f"a rank needs {memory.total / GIB:.1f} GiB ({listed}); {core} has {limit / GIB:.0f} GiB"
    fix = {
        "target weights": "use more ranks",
        "draft weights": "set draft.placement: sharded, or use a smaller draft",
        "KV caches": "use smaller batch or kv buckets",
        "scratch": "use smaller batch or prefill buckets",
    }[max(parts, key=lambda name: parts[name])]
    return Problem(plan.recipe.place("parallel.tensor"), what, fix)
