"""Would trees of drafts pay? Rows to verify against their cost against acceptance, for a recipe's EAGLE-3 head.

    PYTHONPATH=.:benchmarks python benchmarks/trees.py [RECIPE] [--tokens 96] [--nodes 2 4 6 8 12 16] [--rounds 20]

Compiles no model. The target answers the recipe's prompts greedily, in eager mode. At every position of an answer, the
head drafts along the true tokens, and the rank of each true token among the head's choices is kept. A tree of drafts is
a set of paths of ranks, the same for every step (Medusa, arXiv 2401.10774; Sequoia, arXiv 2402.12374): a step accepts
the longest path that the true ranks follow. Half of the answers say which nodes a tree has, the most frequent ones up
to each depth; the others are walked with it. A chain of K drafts is the tree of K first ranks.

A step costs what the recipe's `step_costs` say of a chain of the same depth (a draft pass for each level, as a tree
needs), and the products of the further rows, which this run measures with the artifact's kernel.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from block_linear import SHAPES, VOCAB, Ours, package, stored, timed
from torch import Tensor

from pipeline.cache.local import default_root
from pipeline.models.eagle3 import taps_of
from pipeline.models.weights import D2T, weight_specs
from pipeline.recipe import Recipe, find, load
from pipeline.sources.pair import resolve_pair
from pipeline.sources.tokenizer import tokenizer_files
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import weights
from pipeline.speculation.chains import guesses
from pipeline.validate.draft.target import answer
from pipeline.validate.lengths import encoded_prompts
from pipeline.validate.prompts import recipe_prompts

DEPTH, WIDTH = 6, 8
"""Most levels of a tree, and most choices of a level."""
LAYERS = 30

Ranks = list[tuple[int, ...]]
"""Ranks of the true tokens after each position of an answer; `WIDTH` for all that are lower."""
Tree = frozenset[tuple[int, ...]]


def measured_ranks(recipe: Recipe, base: Path, tokens: int) -> list[Ranks]:
    """Ranks of the true tokens, by answer."""
    target, draft = resolve_pair(recipe, base=base, cache=default_root() / "sources")
    prompts = encoded_prompts(recipe_prompts(recipe, base), tokenizer_files(target))
    taps = taps_of(target.config, draft.config)
    own, theirs = weights(draft), weights(target)
    tensors = {each.name: read_tensor(own.get(each.name) or theirs[each.name]) for each in weight_specs(draft.config)}
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    ids_V = torch.arange(draft.config.out_vocab)
    ids_V = ids_V + tensors[D2T] if D2T in tensors else ids_V
    found: list[Ranks] = []
    for states in answer(target, prompts, tokens, taps, recipe.target.dtype):
        batch = states.batch(taps)
        ranks_BTD = torch.full((*batch.learn_BT.shape, DEPTH), WIDTH)
        with torch.inference_mode():
            for depth, guess in enumerate(guesses(draft.config, tensors, batch, DEPTH)):
                true_M = batch.tokens_BT1[guess.rows_M, guess.positions_M + 1]
                ranks_BTD[guess.rows_M, guess.began_M, depth] = ranks_of(guess.logits_MV, ids_V, true_M)
        for row, learn_T in zip(ranks_BTD, batch.learn_BT, strict=True):
            found.append([tuple(ranks) for ranks in row[learn_T].tolist()])
    return found


def ranks_of(logits_MV: Tensor, ids_V: Tensor, true_M: Tensor) -> Tensor:
    """Rank of each true token among the head's best ones, int64 [M]."""
    best_MW = ids_V[logits_MV.topk(WIDTH, dim=-1).indices]
    equal_MW = best_MW == true_M[:, None]
    return torch.where(equal_MW.any(-1), equal_MW.int().argmax(-1), WIDTH)


def best_tree(answers: Sequence[Ranks], nodes: int, depth: int) -> Tree:
    """The most frequent paths of ranks, at most so deep."""
    seen = Counter(
        path[:level]
        for ranks in answers
        for path in ranks
        for level in range(1, depth + 1)
        if WIDTH not in path[:level]
    )
    return frozenset(path for path, _ in seen.most_common(nodes))


def tokens_per_step(answers: Sequence[Ranks], tree: Tree) -> float:
    """Tokens of a step, over walks through the answers."""
    tokens = steps = 0
    for ranks in answers:
        at = 0
        while at < len(ranks):
            accepted = next((level for level in range(DEPTH) if ranks[at][: level + 1] not in tree), DEPTH)
            at, tokens, steps = at + accepted + 1, tokens + accepted + 1, steps + 1
    return tokens / steps


def row_times(rows: Sequence[int], rounds: int) -> dict[int, float]:
    """Milliseconds of the products of a small target's step with so many rows: never more than with further rows."""
    flat = [torch.randn(shape).bfloat16() * 0.05 for shape in [*SHAPES * LAYERS, (VOCAB, SHAPES[0][1])]]
    packed = [stored(weight, "bfloat16") for weight in flat]
    took = {}
    for count in rows:
        x = torch.randn(count, SHAPES[0][1]).bfloat16()
        run = package(Ours(LAYERS), (x, packed)).run
        took[count] = sorted(timed(partial(run, [x, *packed]), 1) for _ in range(rounds))[rounds // 2] * 1e3
    return {count: min(took[more] for more in took if more >= count) for count in took}


def chain_cost(costs: dict[int, float], depth: int) -> float:
    """Cost of a chain: on the line through the two values of `step_costs` that are next to it."""
    known = {0: 1.0} | costs
    if depth in known:
        return known[depth]
    low = max(k for k in known if k < depth) if depth < max(known) else sorted(known)[-2]
    high = min(k for k in known if k > low)
    return known[low] + (known[high] - known[low]) * (depth - low) / (high - low)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="smollm2-135m-spec")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 6, 8, 12, 16])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--decode-ms", type=float, default=7.2, help="a decode step, by benchmarks/step.py")
    asked = parser.parse_args()
    path = find(asked.recipe, Path("recipes"))
    recipe = load(path)
    costs = recipe.speculation.step_costs
    assert costs is not None
    of_one = costs[min(costs)] if isinstance(costs, dict) else costs
    known = dict(zip(recipe.speculation.draft_tokens, of_one, strict=True))
    answers = measured_ranks(recipe, path.parent, asked.tokens)
    chosen, walked = answers[::2], answers[1::2]
    times = row_times(sorted({*range(2, DEPTH + 2), *(nodes + 1 for nodes in asked.nodes)}), asked.rounds)
    print(f"{len(chosen)} answers choose trees, {len(walked)} are walked; products of rows, ms: "
          + ", ".join(f"{rows}: {took:.2f}" for rows, took in times.items()))  # fmt: skip
    print("| drafts | shape | depth | tokens per step | cost (x) | speed-up |")
    print("| --- | --- | --- | --- | --- | --- |")
    for nodes in asked.nodes:
        shapes = [("chain", frozenset((0,) * level for level in range(1, nodes + 1)))] if nodes <= DEPTH else []
        trees = [best_tree(chosen, nodes, depth) for depth in range(1, min(DEPTH, nodes) + 1)]
        shapes += [("best tree", max(trees, key=lambda tree: figures(chosen, tree, known, times, asked.decode_ms)[2]))]
        for name, tree in shapes:
            tokens, cost, gain = figures(walked, tree, known, times, asked.decode_ms)
            depth = max(map(len, tree))
            print(f"| {nodes} | {name} | {depth} | {tokens:.2f} | {cost:.2f} | {gain:.2f} |", flush=True)


def figures(
    answers: Sequence[Ranks], tree: Tree, known: dict[int, float], times: dict[int, float], decode_ms: float
) -> tuple[float, float, float]:
    """Tokens per step, cost in decode steps, and their quotient."""
    depth = max(map(len, tree))
    cost = chain_cost(known, depth) + (times[len(tree) + 1] - times[depth + 1]) / decode_ms
    tokens = tokens_per_step(answers, tree)
    return tokens, cost, tokens / cost


if __name__ == "__main__":
    main()
