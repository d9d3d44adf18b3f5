"""How often the gates catch planted faults, and pass clean pairs, over seeds: `python benchmarks/fault_rates.py 5`.

`python benchmarks/fault_rates.py 5 experts` is the part of pairs with experts. Runs eagerly, so that what is measured
is the gates and not the compiler.
"""

import math
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from pipeline.validate.gates.run import GateRun
from pipeline.validate.limits import SLICE_TOKENS
from support import planted, planted_experts
from support.other_rounding import other_rounding
from support.reports import gates_of, recipe_of

SAMPLED = ("greedy", "stochastic")
EXPERTS = ("mixtral", "qwen3-moe", "qwen2-moe", "gpt-oss", "granite-moe", "olmoe")


def main(seeds: int, part: str = "") -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if part != "experts":
            _dense(Path(folder), seeds)
        for family in EXPERTS:
            for dtype in ("float32", "bfloat16"):
                _of_experts(Path(folder), family, dtype, seeds)


def _dense(work: Path, seeds: int) -> None:
    for dtype in ("float32", "bfloat16"):
        faults = [*planted.NUMERIC, *(planted.FLOAT32_ONLY if dtype == "float32" else ())]
        for fault in (None, *faults):
            runs = [gates_of(work, recipe_of("llama", 10 + s, dtype), fault, s) for s in range(seeds)]
            caught = sum(not run.passed for run in runs)
            name = fault.__name__ if fault else "clean"
            ratios = sorted(_worst(run) for run in runs)
            print(
                f"{dtype:<9} {name:<24} caught {caught} of {seeds}, worst ratio {ratios[0]:.2f} to {ratios[-1]:.2f}",
                flush=True,
            )
    for dtype in ("float32", "bfloat16"):
        for fault in (None, *planted.ACCEPTANCE, *planted.SAMPLING):
            recipes = [recipe_of("llama", 10 + s, dtype, SAMPLED, (2,)) for s in range(seeds)]
            runs = [gates_of(work, recipe, fault, s) for s, recipe in enumerate(recipes)]
            caught = sum(bool(run.findings["distribution"]) for run in runs)
            name = fault.__name__ if fault else "clean"
            print(f"{dtype:<9} sampling  {name:<32} caught {caught} of {seeds}", flush=True)


def _of_experts(work: Path, family: str, dtype: str, seeds: int) -> None:
    """Print the rates of a family with experts; right pairs also with the rounding of compiled kernels."""
    roots = [work / f"{family}-{dtype}-{seed}" for seed in range(seeds)]
    recipes = [planted_experts.expert_recipe(family, root, dtype, seed + 10) for seed, root in enumerate(roots)]
    own = (planted_experts.ungated_shared_expert,) if family == "qwen2-moe" else ()
    for fault in (None, other_rounding, *planted_experts.FAULTS, *own):
        runs = [planted_experts.gates_of_experts(*pair, fault) for pair in zip(roots, recipes, strict=True)]
        caught = sum(bool(run.findings["parity"]) for run in runs)
        ties = [of.near_ties for run in runs if (of := run.parity.section.models["target"].experts)]
        ratios = sorted(_worst(run) for run in runs)
        name = fault.__name__ if fault else "clean"
        print(
            f"{dtype:<9} {family:<11} {name:<26} caught {caught} of {seeds}, worst ratio {ratios[0]:.2f} to "
            f"{ratios[-1]:.2f}, router near-ties {min(ties)} to {max(ties)}",
            flush=True,
        )


def _worst(run: GateRun) -> float:
    """The largest ratio to noise that a gate looks at: over all tokens, of a slice, of a layer."""
    models = run.parity.section.models.values()
    layers = [ratio for of in models for pair in of.layers for ratio in pair]
    slices = [s.error_over_noise for of in models for s in of.slices if s.tokens >= SLICE_TOKENS]
    ratios = (*layers, *slices, *(of.error_over_noise for of in models))
    return max(math.inf if ratio is None else ratio for ratio in ratios)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, *sys.argv[2:3])
