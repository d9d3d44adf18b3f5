"""Conflicts of a recipe with its models, each with its location, the values and a fix. Pure; imports no torch.

Memory of a rank is estimated in `estimates.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.errors import Problem
from pipeline.models.config import ModelConfig
from pipeline.models.rank_slices import local_shape
from pipeline.models.weights import INT4_GROUP, takes_four_bits, weight_specs
from pipeline.recipe.schema import Recipe


def conflicts(recipe: Recipe, target: ModelConfig, draft: ModelConfig) -> Iterator[Problem]:
    """Yield every conflict of a recipe with its models."""
    tp = recipe.parallel.tensor
    sharded = [("target", target)] + ([("draft", draft)] if recipe.draft.placement == "sharded" else [])
    fits = [n for n in range(1, target.heads + 1) if all(_fits(config, n) for _, config in sharded)]
    for name, config in sharded:
        for size, value in _undivided(config, tp):
            what = f"found {tp}, which does not divide the {name}'s {size}={value}"
            alone = "" if name == "target" or not _fits(target, tp) else ", or draft.placement: replicated"
            yield Problem(recipe.place("parallel.tensor"), what, f"use one of {fits}{alone}")
    if recipe.parallel.enable_expert_parallel and not (target.expert_layers or draft.expert_layers):
        where, what = recipe.place("parallel.enable_expert_parallel"), "found true, but the models have no experts"
        yield Problem(where, what, "remove the key")
    for name, config in (("target", target), ("draft", draft)):
        yield from _length_conflicts(recipe, name, config)
    yield from _narrow_conflicts(recipe, target, draft)
    yield from _pair_conflicts(recipe, target, draft)
    yield from _method_conflicts(recipe, target, draft)
    yield from _candidate_conflicts(recipe, min(target.vocab, draft.vocab))


def _length_conflicts(recipe: Recipe, name: str, config: ModelConfig) -> Iterator[Problem]:
    for index, bucket in enumerate(recipe.shapes.kv):
        where = recipe.place(f"shapes.kv[{index}]")
        if bucket > config.max_position and config.eagle3 is None:  # a head follows its target, as in vLLM
            what = f"found {bucket}, longer than the {name}'s max_position_embeddings={config.max_position}"
            yield Problem(where, what, f"use kv buckets up to {config.max_position}")
        elif config.limits and bucket > config.longest:
            limit = min(config.limits, key=lambda one: one.length)
            what = f"found {bucket}, longer than the {name}'s {limit.field} covers, {limit.length}"
            why = "transformers computes longer sequences anew, or otherwise in decode steps, which graphs do not"
            yield Problem(where, f"{what}: {why}", f"use kv buckets up to {limit.length}")


def _narrow_conflicts(recipe: Recipe, target: ModelConfig, draft: ModelConfig) -> Iterator[Problem]:
    """Yield the first weight of each model whose inputs on a rank are not whole groups of 4-bit weights."""
    draft_tp = recipe.parallel.tensor if recipe.draft.placement == "sharded" else 1
    models = (("target", target, recipe.target.weights, recipe.parallel.tensor),)
    for name, config, weights, tp in (*models, ("draft", draft, recipe.draft_weights, draft_tp)):
        if weights != "int4" or any(True for _ in _undivided(config, tp)):
            continue
        narrow = (weight for weight in weight_specs(config) if takes_four_bits(weight.name))
        for weight in narrow:
            inputs = local_shape(weight, config, tp)[-1]
            if inputs % INT4_GROUP:
                what = f"found int4, which needs multiples of {INT4_GROUP}; {weight.name} has {inputs} inputs on a rank"
                key = f"{name}.weights" if name == "target" or recipe.draft.weights else "target.weights"
                fewer = ", or use fewer ranks" if tp > 1 else ""
                yield Problem(recipe.place(key), what, f"write weights: int8{fewer}")
                break


def _pair_conflicts(recipe: Recipe, target: ModelConfig, draft: ModelConfig) -> Iterator[Problem]:
    where = recipe.place("draft")
    if target.vocab != draft.vocab and (draft.shares_embedding or draft.draft_vocab):
        what = f"the draft uses the target's vocabulary: its vocab_size must be {target.vocab}, found {draft.vocab}"
        yield Problem(where, what, "use a draft that was made for this target")
    if draft.shares_embedding and target.hidden != draft.hidden:
        what = f"the draft uses the target's embedding: its hidden_size must be {target.hidden}, found {draft.hidden}"
        yield Problem(where, what, "use a draft that was made for this target")
    if draft.shares_embedding and recipe.draft_dtype != recipe.target.dtype:
        dtype, target_dtype = recipe.draft_dtype, recipe.target.dtype
        what = f"found {dtype}, but the draft uses the target's embedding, which is {target_dtype}"
        yield Problem(recipe.place("draft.dtype"), what, f"use {target_dtype}, or remove draft.dtype")


def _candidate_conflicts(recipe: Recipe, vocab: int) -> Iterator[Problem]:
    candidates, where = recipe.speculation.candidates, recipe.place("speculation.candidates")
    if candidates is None and recipe.backend.needs_candidates and "stochastic" in recipe.speculation.sampling:
        what = f"missing: {recipe.backend.name} needs the number of tokens that a stochastic graph samples from"
        yield Problem(where, what, "write candidates: 256")
    if candidates is not None and candidates > vocab:
        what = f"found {candidates}, more than the vocabulary of {vocab}"
        yield Problem(where, what, f"use at most {vocab}, or remove candidates to keep all tokens")


def _method_conflicts(recipe: Recipe, target: ModelConfig, draft: ModelConfig) -> Iterator[Problem]:
    method = draft.draft_kind.method
    if recipe.speculation.method != method:
        what = f"found {recipe.speculation.method}, but the draft is of method {method}"
        yield Problem(recipe.place("speculation.method"), what, f"write method: {method}, or use another draft")
    if not draft.draft_kind.reads_target_states:
        return
    if recipe.draft_dtype != recipe.target.dtype:
        dtype, target_dtype = recipe.draft_dtype, recipe.target.dtype
        what = f"found {dtype}, but the draft reads the target's hidden states, which are {target_dtype}"
        yield Problem(recipe.place("draft.dtype"), what, f"use {target_dtype}, or remove draft.dtype")
    if recipe.draft.placement == "sharded" and recipe.parallel.tensor > 1:
        kind = draft.draft_kind.label
        what = f"found sharded; replicated is needed for this draft ({kind}): every rank has whole hidden states"
        yield Problem(recipe.place("draft.placement"), what, "write placement: replicated")
    head = draft.eagle3
    most = None if head is None else head.most_drafts
    if head is not None and most is not None and recipe.speculation.draft_tokens[-1] > most:
        what = f"found {recipe.speculation.draft_tokens[-1]}; a block of this draft has {head.block} positions"
        place = f"speculation.draft_tokens[{len(recipe.speculation.draft_tokens) - 1}]"
        yield Problem(recipe.place(place), what, f"use at most {most}")
    if draft.vocab != target.vocab:
        what = f"the draft reads the target's tokens: its vocab_size must be {target.vocab}, found {draft.vocab}"
        yield Problem(recipe.place("draft"), what, "use a draft that was made for this target")


def _undivided(config: ModelConfig, tp: int) -> Iterator[tuple[str, int]]:
    """Yield sizes of a model that `tp` ranks cannot share; with more ranks than KV heads these are replicated.

    Query heads follow their KV head: they are padded where they do not fill its ranks (`rank_slices.q_heads_of`).
    """
    if config.delta_net is not None and config.delta_net.key_heads % tp:
        yield "linear_num_key_heads", config.delta_net.key_heads
    for kind in config.kinds:
        heads = config.of(kind).kv_heads
        if heads % tp and tp % heads:
            yield "num_key_value_heads", heads
        if config.has_network(kind) and config.intermediate % tp:
            yield "intermediate_size", config.intermediate
        if kind.experts is not None and kind.experts.by_rank:
            if kind.experts.count % tp:
                yield "number of experts", kind.experts.count
        elif kind.experts is not None and kind.experts.intermediate % tp:
            yield "inner size of an expert", kind.experts.intermediate
        if kind.experts is not None and (kind.experts.shared or 0) % tp:
            yield "inner size of the shared expert", kind.experts.shared or 0


def _fits(config: ModelConfig, tp: int) -> bool:
    return not any(_undivided(config, tp))
