"""Tokens at the edges of the ranks' parts of the vocabulary are among those that the gates score."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.recipe.schema import Recipe
from pipeline.sources.pair import resolve_pair
from pipeline.validate.gates.answers import rank_edges
from support.eager import make_engine
from support.mutants import mutants
from support.reports import SMALL, gates_of
from support.split_ranks import SplitRanks

pytestmark = pytest.mark.usefixtures("one_thread")


def recipe_of(ranks: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "edges",
            "target": {"source": "pico://llama?seed=3", "dtype": "float32"},
            "draft": {"derive": {"from": "target", "layers": [2]}},
            "speculation": {"draft_tokens": (2,)},
            "shapes": SMALL,
            "parallel": {"tensor": ranks},
            "validate": {"max_new_tokens": 10, "gates": {"tokens_per_step": 1.0}},
        }
    )


def test_edges_are_the_first_and_last_tokens_of_ranks(tmp_path):
    recipe = recipe_of(2)
    pair = resolve_pair(recipe, base=tmp_path, cache=tmp_path / "sources")
    models = make_engine(recipe, pair, SplitRanks).manifest.pair.models
    assert rank_edges(models) == [0, 255, 256, 511]
    assert rank_edges(replace(models, target=replace(models.target, vocab=500))) == [0, 255, 256]
    assert rank_edges(replace(models, tp=1)) == []


@pytest.mark.slow
def test_a_rank_that_reads_its_first_token_as_zeros_is_caught(tmp_path):
    """No prompt had the token, so every gate passed."""
    (fault,) = (m for m in mutants("pipeline.models.decoder") if "embedded: local_BT >= 0 -> local_BT > 0" in str(m))
    assert gates_of(tmp_path, recipe_of(2), make_ranks=SplitRanks).passed
    with fault.planted():
        run = gates_of(tmp_path, recipe_of(2), make_ranks=SplitRanks)
    assert run.findings["parity"]
