"""Several requests at once in the engine: speculation by policy beside plain decode.

    PYTHONPATH=. python benchmarks/batches.py [ARTIFACT] [--rounds 5] [--max-new-tokens 128]

Greedy, as many at once as each batch bucket has; prompts of all classes, three for each row, so that rows are refilled
as they end. The two take turns. Figures are medians of tokens a second, prompts included. Answers that reach the limit
end together only without speculation, and prompts are then read together, too: the longer answers are, the less that
favours plain decode.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

from pipeline.recipe import load as load_recipe
from pipeline.runtime.open import load
from pipeline.validate.prompts import load_prompts, prompts_path

REFILLS = 3


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path, default=Path("artifacts/smollm2-135m-spec"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    asked = parser.parse_args()
    recipe = load_recipe(asked.artifact / "recipe.yaml")
    engine = load(asked.artifact, share_prefixes=False)
    prompts = load_prompts(prompts_path(recipe.validate_.prompts, Path("recipes")))
    encoded = [engine.text.chat(p.text) for p in prompts]
    print("| at once | plain, tokens/s | by policy | ratio |")
    print("| --- | --- | --- | --- |")
    for rows in recipe.shapes.batch:
        engine.rows = rows
        chosen = [encoded[:: len(encoded) // REFILLS // rows][: REFILLS * rows]]
        chosen = [[one] for one in chosen[0]] if rows == 1 else chosen
        speeds: dict[bool, list[float]] = {False: [], True: []}
        for number in range(asked.rounds + 1):
            for speculate, found in speeds.items():
                started = time.perf_counter()
                answers = [
                    answer
                    for some in chosen
                    for answer in engine.generate(
                        some, max_new_tokens=asked.max_new_tokens, temperature=0.0, speculate=speculate
                    )
                ]
                took = time.perf_counter() - started
                if number:  # graphs are opened on first use
                    found.append(sum(len(answer.tokens) for answer in answers) / took)
        plain, paced = (median(speeds[speculate]) for speculate in (False, True))
        print(f"| {rows} | {plain:.1f} | {paced:.1f} | {paced / plain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
