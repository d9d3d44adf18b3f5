"""A trained-looking pair in a folder with defaults of generation, and an eager engine over it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.recipe.schema import Recipe
from pipeline.runtime.engine import Engine
from pipeline.sources.pair import resolve, resolve_pair
from support.eager import make_engine


def target_with(work: Path, generation: Mapping[str, Any] | None) -> Path:
    """A copy of the pico target with this generation_config.json."""
    pico = resolve("pico://llama?seed=1", base=work, cache=work / "sources")
    shutil.copytree(pico.root, work / "target", dirs_exist_ok=True)
    (work / "target/generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (work / "target/generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return work / "target"


SHAPES = {"batch": (1, 4), "prefill": (16,), "kv": (32, 160)}


def recipe_with_defaults(
    sampling: Sequence[str] = ("greedy", "stochastic"), shapes: Mapping[str, Any] = SHAPES
) -> Recipe:
    """A recipe of the folder `target`, in float32."""
    return Recipe.model_validate(
        {
            "name": "defaults",
            "target": {"source": "target", "dtype": "float32"},
            "draft": {"derive": {"from": "target", "layers": (0,)}},
            "speculation": {"draft_tokens": (2,), "sampling": tuple(sampling)},
            "shapes": shapes,
            "validate": {"max_new_tokens": 10, "gates": {"tokens_per_step": 1.0}},
        }
    )


def engine_with(
    work: Path, generation: Mapping[str, Any] | None, sampling: Sequence[str] = ("greedy", "stochastic")
) -> Engine:
    """The engine of an artifact whose target has these defaults."""
    target_with(work, generation)
    return make_engine(
        recipe := recipe_with_defaults(sampling), resolve_pair(recipe, base=work, cache=work / "sources")
    )
