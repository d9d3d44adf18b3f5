"""Faults of layers with experts to plant in an eager engine, and small pairs of families with experts for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.cache.local import Cache
from pipeline.models import decoder
from pipeline.models.config import Experts
from pipeline.models.parallel import Chosen
from pipeline.models.routing import routed
from pipeline.progress import no_log
from pipeline.recipe import Recipe, load
from pipeline.sources.pair import resolve_pair
from pipeline.validate.gates.inputs import GateInputs
from pipeline.validate.gates.run import GateRun, run_gates
from pipeline.validate.prompts import Prompt
from support import families
from support.eager import EagerRanks, make_engine
from support.heads import FLAT, VOCAB, Parts, write_head

LAYER = "target/model.layers.0.mlp"
OLMOE = families.Family("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2}, "json-config")
PAIRS = {**families.FAMILIES, "olmoe": OLMOE}


def expert_recipe(family: str, root: Path, dtype: str, seed: int = 3, kv: tuple[int, ...] = (64,)) -> Recipe:
    """Write a pair of a family below `root`; return the recipe of it."""
    return _recipe(root, dtype, families.write_pair(PAIRS[family], root, seed), kv)


def head_recipe(root: Path, dtype: str) -> Recipe:
    """Write a target with experts and an untrained EAGLE-3 head for it below `root`; return the recipe of both."""
    changes = {"vocab_size": VOCAB, "num_hidden_layers": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    families.write_pair(families.Family("Mixtral", changes, "json-config"), root)
    write_head(root / "head", FLAT, Parts())
    return _recipe(root, dtype, {"source": "./head"}, method="eagle3")


def _recipe(
    root: Path, dtype: str, draft: dict[str, Any], kv: tuple[int, ...] = (64,), **speculation: str
) -> Recipe:  # fmt: skip
    recipe = {
        "name": "experts",
        "target": {"source": "./target", "dtype": dtype},
        "draft": draft,
        "speculation": {"draft_tokens": [3], "sampling": ["greedy"], **speculation},
        "shapes": {"batch": [3], "prefill": [min(*kv, 48)], "kv": list(kv)},
        "validate": {"max_new_tokens": 8, "gates": {"tokens_per_step": 1.0}},
    }
    (root / "pair.yaml").write_text(yaml.safe_dump(recipe))
    return load(root / "pair.yaml")


def gates_of_experts(root: Path, recipe: Recipe, fault: Callable[[EagerRanks, int], None] | None = None) -> GateRun:
    """Gates that have run on an eager engine of a pair below `root`, spoiled or not."""
    return run_gates(inputs_of_experts(root, recipe, fault))


def inputs_of_experts(
    root: Path, recipe: Recipe, fault: Callable[[EagerRanks, int], None] | None = None
) -> GateInputs:  # fmt: skip
    """Inputs of gates on an eager engine of a pair below `root`, spoiled or not."""
    pair = resolve_pair(recipe, base=root, cache=root / "cache")
    engine = make_engine(recipe, pair)
    if fault is not None:
        fault(engine.ranks, 0)
    prompts = [Prompt(f"p{i}", "chat", text) for i, text in enumerate(families.PROMPTS[:4])]
    return GateInputs(engine, recipe, prompts, pair, Cache(root / "goldens", "goldens"), no_log)


def swapped_experts(ranks: EagerRanks, seed: int) -> None:
    """Two experts of one layer, in each other's place."""
    for name in ("gate", "up", "down"):
        key = f"{LAYER}.experts.{name}_proj.weight"
        weight = ranks.tensors[key].clone()
        weight[0], weight[1] = ranks.tensors[key][1], ranks.tensors[key][0]
        ranks.tensors[key] = weight


def perturbed_expert(ranks: EagerRanks, seed: int) -> None:
    """Every weight of one expert off by 3%, at random."""
    generator = torch.Generator().manual_seed(seed)
    for name in ("gate", "up", "down"):
        key = f"{LAYER}.experts.{name}_proj.weight"
        weight = ranks.tensors[key].clone()
        noise = torch.randn(weight[0].shape, generator=generator)
        weight[0] = (weight[0].float() * (1 + 0.03 * noise)).to(weight.dtype)
        ranks.tensors[key] = weight


def perturbed_router(ranks: EagerRanks, seed: int) -> None:
    """Every weight of one router off by 3%, at random."""
    generator = torch.Generator().manual_seed(seed)
    key = f"{LAYER}.gate.weight"
    weight = ranks.tensors[key]
    noise = torch.randn(weight.shape, generator=generator)
    ranks.tensors[key] = (weight.float() * (1 + 0.03 * noise)).to(weight.dtype)


def ungated_shared_expert(ranks: EagerRanks, seed: int) -> None:
    """The expert that every token uses has a gate of zeros: its share is a half."""
    key = f"{LAYER}.shared_expert_gate.weight"
    ranks.tensors[key] = torch.zeros_like(ranks.tensors[key])


def other_normalisation(ranks: EagerRanks, seed: int) -> None:
    """Shares are normalised over the chosen experts where they must not be, and not where they must."""
    models = ranks.shape.models
    kinds = tuple(
        replace(kind, experts=kind.experts and replace(kind.experts, among=not kind.experts.among))
        for kind in models.target.kinds
    )
    ranks.shape = replace(ranks.shape, models=replace(models, target=replace(models.target, kinds=kinds)))


def one_expert_less(ranks: EagerRanks, seed: int) -> None:
    """Tokens use one expert less than they should."""
    ranks.around = _routed(lambda experts, *rest: routed(replace(experts, chosen=experts.chosen - 1), *rest))


def last_expert_without_share(ranks: EagerRanks, seed: int) -> None:
    """The least of a token's experts is chosen, and has no share."""

    def changed(*arguments) -> Chosen:
        chosen = routed(*arguments)
        return Chosen(
            chosen.experts, torch.cat((chosen.shares[..., :-1], torch.zeros_like(chosen.shares[..., -1:])), -1)
        )

    ranks.around = _routed(changed)


def second_best_experts(ranks: EagerRanks, seed: int) -> None:
    """The router of one token in ten takes the next best expert in the place of its last, and shares it out rightly."""

    def changed(experts: Experts, w, seams, x_BTH) -> Chosen:
        right, wide = (
            routed(experts, w, seams, x_BTH),
            routed(replace(experts, chosen=experts.chosen + 1), w, seams, x_BTH),
        )
        order = [*range(experts.chosen - 1), experts.chosen]
        is_other = (x_BTH.float().abs().sum(-1, keepdim=True) * 1000).long() % 10 == 0
        shares = wide.shares[..., order]
        shares = shares / shares.sum(-1, keepdim=True) if experts.among else shares
        return Chosen(
            torch.where(is_other, wide.experts[..., order], right.experts), torch.where(is_other, shares, right.shares)
        )

    ranks.around = _routed(changed)


def _routed(changed: Callable[..., Chosen]):
    @contextmanager
    def around(spec, state) -> Iterator[None]:
        decoder.routed = changed
        try:
            yield
        finally:
            decoder.routed = routed

    return around


FAULTS = (
    swapped_experts, perturbed_expert, perturbed_router, other_normalisation, one_expert_less,
    last_expert_without_share, second_best_experts,
)  # fmt: skip
"""Faults of all families with experts; `ungated_shared_expert` is one of Qwen2-MoE."""
