"""Which small faults in the code of graphs pass the gates: `python benchmarks/mutants.py [COUNT]`, or `make mutants`.

Each mutant (`tests/support/mutants.py`) runs through all gates in the eager engine: a draft model in float32 with
prompt lookup, a head with a reduced vocabulary, a draft model that mostly agrees, then the first two in bfloat16, until
a gate fails. A mutant that ends with an error is caught, too: no artifact is built. The choice of mutants is fixed:
spread evenly over the functions.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from pipeline.recipe.schema import Recipe
from support.mutants import EXPLAINED, MODULES, Mutant, executed_functions, mutants
from support.reports import SMALL, gates_of, recipe_of

TIMEOUT_S = 300
SAMPLED = ("greedy", "stochastic")


def recipes() -> Iterator[tuple[str, Recipe]]:
    """Yield the pairs that mutants run with, the quickest first."""
    agreeing = recipe_of("qwen2", 3, "float32", SAMPLED, (0,), SMALL)
    for dtype in ("float32", "bfloat16"):
        model = recipe_of("llama", 3, dtype, SAMPLED, (2,), SMALL)
        speculation = model.speculation.model_copy(update={"lookup": 2})
        yield f"draft model, {dtype}", model.model_copy(update={"speculation": speculation})
        data = recipe_of("llama", 0, dtype, SAMPLED, shapes=SMALL).model_dump(mode="json", by_alias=True)
        data["draft"] = {"source": "pico://llama?draft_vocab=128&eagle3=1"}
        data["target"] = {"source": "pico://llama", "dtype": dtype}
        data["speculation"]["method"] = "eagle3"
        yield f"head, {dtype}", Recipe.model_validate(data)
        if dtype == "float32":
            yield "draft model that agrees, float32", agreeing


def chosen(count: int, work: Path) -> list[Mutant]:
    """Return mutants of functions that run, in turn from each function."""
    with executed_functions() as seen:
        for _, recipe in list(recipes())[:2]:
            gates_of(work, recipe)
    by_function: dict[str, list[Mutant]] = defaultdict(list)
    for module in MODULES:
        for mutant in mutants(module):
            if f"{module}:{mutant.function}" in seen:
                by_function[f"{module}:{mutant.function}"].append(mutant)
    turns = zip_longest(*by_function.values())
    return [mutant for mutant in chain.from_iterable(turns) if mutant is not None][:count]


def caught_by(mutant: Mutant, work: Path) -> str | None:
    """Return what catches a mutant: a gate and the pair, or an error; None if it survives."""
    for name, recipe in recipes():
        try:
            signal.alarm(TIMEOUT_S)
            with mutant.planted():
                run = gates_of(work, recipe)
        except Exception as error:
            return f"error ({type(error).__name__}), {name}"
        finally:
            signal.alarm(0)
        if not run.passed:
            return f"{next(gate for gate, findings in run.findings.items() if findings)}, {name}"
    return None


def main(arguments: Sequence[str]) -> None:
    """Print the outcome of each mutant, then the score."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _too_slow)
    outcomes: Counter[str] = Counter()
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, recipe in recipes():
            if not (run := gates_of(work, recipe)).passed:
                sys.exit(f"{name}: gates fail without a mutant: {run.findings}")
        found = chosen(int(arguments[0]) if arguments else 80, work)
        for number, mutant in enumerate(found, 1):
            outcome = caught_by(mutant, work)
            outcomes["survived" if outcome is None else outcome.split(",")[0]] += 1
            survivors += [mutant] if outcome is None else []
            print(f"{number} of {len(found)}: {outcome or 'SURVIVED'}: {mutant}", flush=True)
    print(", ".join(f"{name}: {count}" for name, count in outcomes.most_common()))
    print(f"caught {len(found) - len(survivors)} of {len(found)}")
    for mutant in survivors:
        why = next((reason for text, reason in EXPLAINED.items() if text in str(mutant)), "NOT EXPLAINED")
        print(f"survived: {mutant} ({why})")


def _too_slow(*_: object) -> None:
    raise TimeoutError


if __name__ == "__main__":
    main(sys.argv[1:])
