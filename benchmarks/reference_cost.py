"""Processor seconds and memory that references take: `python benchmarks/reference_cost.py RECIPE [SEQUENCES] [TOKENS]`.

Processor seconds of one thread, because those change least with the load of the machine.
"""

import resource
import sys
import time

import torch

from pipeline.cache.local import default_root
from pipeline.recipe import find, load
from pipeline.sources.pair import resolve_pair
from pipeline.validate.reference.layers import Reference


def main(name: str, sequences: int, tokens: int) -> None:
    torch.set_num_threads(1)
    path = find(name)
    recipe = load(path)
    target, _ = resolve_pair(recipe, base=path.parent, cache=default_root() / "sources")
    size = sum(digest.size for digest in target.files.values())
    token_rows = [[(7 * row + 3 * place) % target.config.vocab for place in range(tokens)] for row in range(sequences)]
    before, started = _peak(), time.process_time()
    goldens = list(Reference(target, target, recipe.target.dtype).goldens(token_rows))
    spent, stored = time.process_time() - started, sum(t.nbytes for golden in goldens for t in _tensors(golden))
    total = sequences * tokens
    print(f"{name}: {total} tokens, {recipe.target.dtype}, checkpoint {size / 1e9:.2f} GB")
    print(f"processor {spent:.1f} s, {spent / total * 1e3:.1f} ms a token; kept {stored / total:.0f} bytes a token")
    print(f"peak memory {_peak() / 1e9:.2f} GB, of which {(_peak() - before) / 1e9:.2f} GB are the reference's")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _tensors(golden) -> list[torch.Tensor]:
    parts = [*vars(golden.baseline).values(), *vars(golden.noise).values()]
    return [golden.ids, golden.caches, golden.caches_noise, *parts]


if __name__ == "__main__":
    numbers = [int(value) for value in sys.argv[2:]]
    main(sys.argv[1], *(numbers or [10]), *([100] if len(numbers) < 2 else []))
