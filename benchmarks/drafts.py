"""Kinds of drafts on the same data, trained for the same number of steps: objectives, depths, a head or a model.

    PYTHONPATH=. python benchmarks/drafts.py [RECIPE] [--steps 200] [--tokens 200000] [--seed 0] [--only p_eagle dflash]
        [--start HEAD] [--text FOLDER ...]

Uses what `tandem distill RECIPE` has written, or writes it. Tokens a step are those of greedy speculation on the
recipe's own prompts, which no draft is trained on. Speed is in plain decode steps: tokens of a step with the best K,
over what it reads, 1 + K times the draft's weights over the target's (decoding on a CPU waits for weights); of drafts
that propose all tokens in one pass, 1 + these weights once. `--start` trains an EAGLE-3 head further, with all of the
new weights: as what it is, and as a P-EAGLE head of two layers.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

from pipeline.distill.run import prepare
from pipeline.distill.settings import DistillSettings
from pipeline.models.draft_kind import DRAFT_KINDS, DraftMethod
from pipeline.models.weights import weight_specs
from pipeline.recipe import load

LARGEST_K = 6
KINDS: tuple[tuple[DraftMethod, str, tuple[int, ...]], ...] = (
    ("eagle3", "distribution", ()),
    ("eagle3", "token", ()),
    ("draft_model", "distribution", (0,)),
    ("draft_model", "distribution", (0, -1)),
    ("draft_model", "distribution", (0, 1, -1)),
    ("draft_model", "token", (0, 1, -1)),
    ("draft_model", "distribution", (0, 1, 2, -1)),
    ("p_eagle", "distribution", (-1,)),
    ("p_eagle", "distribution", (-2, -1)),
    ("dflash", "distribution", (-2, -1)),
)

FURTHER: tuple[tuple[DraftMethod, str, tuple[int, ...]], ...] = (
    ("eagle3", "distribution", ()),
    ("p_eagle", "distribution", (-1,)),
)


def main() -> None:
    """Train and print, one line a kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=Path("recipes/smollm2-135m-spec.yaml"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0, help="of the data and the training, as distill's")
    parser.add_argument("--only", nargs="+", metavar="METHOD", choices=sorted({method for method, *_ in KINDS}))
    parser.add_argument("--start", type=Path, help="EAGLE-3 head to train further")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="folders of more text, as distill's")
    asked = parser.parse_args()
    kinds = KINDS if asked.start is None else FURTHER
    settings = DistillSettings(
        recipe=load(asked.recipe), base=asked.recipe.parent, out=Path("unused"), tokens=asked.tokens,
        steps=asked.steps, seed=asked.seed, start=asked.start, start_share=0.0,
        text=tuple(asked.text),
    )  # fmt: skip
    job = prepare(settings)
    job.write_data()
    sequences, held_out = job.sequences(), [s for group in job.held_out().values() for s in group]
    layers = job.target.config.layers
    print(f"{len(sequences)} sequences, {asked.steps} steps each")
    print("| draft | objective | right, given those before | tokens a step, K=4 | best K | speed | training |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    whole = sum(math.prod(s.shape) for s in weight_specs(job.target.config) if s.kind != "vector")
    for method, objective, chosen in (kind for kind in kinds if asked.only is None or kind[0] in asked.only):
        chosen = tuple(layer % layers for layer in chosen)
        job = prepare(replace(settings, method=method, objective=objective, layers=chosen))
        started = time.monotonic()
        trainer = job.trainer(sequences)
        trainer.train(sequences, [])
        found = trainer.accuracy(held_out)
        took = time.monotonic() - started
        ratio = sum(weight.numel() for weight in trainer.trained.values()) / whole
        parallel = DRAFT_KINDS[method].parallel
        passes = {k: 1 if parallel else k for k in range(1, LARGEST_K + 1)}
        speeds = {k: found.tokens_per_step(k) / (1 + count * ratio) for k, count in passes.items()}
        best = max(speeds, key=lambda k: speeds[k])
        rates = ", ".join(f"{rate:.2f}" for rate in found.given_previous)
        name = f"{method} layers {', '.join(map(str, chosen))}" if chosen else method
        print(f"| {name} | {objective} | {rates} | {found.tokens_per_step(4):.2f} | {best} | {speeds[best]:.2f} | "
              f"{took:.0f} s |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
