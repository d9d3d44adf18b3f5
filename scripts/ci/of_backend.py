"""Of recipe names, a JSON list on stdin, print those that BACKEND builds, as a list again: `of_backend.py BACKEND`.

A recipe that cannot be read stays, so that its error is seen. The others are named on stderr.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipeline.errors import RecipeError
from pipeline.recipe import load


def is_of(backend: str, name: str) -> bool:
    """Whether that backend builds the recipe."""
    try:
        return load(Path("recipes") / f"{name}.yaml").backend.name == backend
    except RecipeError:
        return True


if __name__ == "__main__":
    backend, names = sys.argv[1], json.load(sys.stdin)
    kept = [name for name in names if is_of(backend, name)]
    left = [name for name in names if name not in kept]
    sys.stderr.writelines(f"{name}: left out, it is not for {backend}\n" for name in left)
    sys.stdout.write(json.dumps(kept) + "\n")
