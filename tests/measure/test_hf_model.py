"""transformers as a contender of `tandem bench`: it does the artifact's work."""

from __future__ import annotations

import pytest

from pipeline.measure.hf_model import transformers_answers
from pipeline.sources.pair import resolve_pair
from support.defaults import recipe_with_defaults, target_with
from support.eager import make_engine

PROMPT = [5, 9, 3]


@pytest.mark.usefixtures("one_thread")
def test_transformers_stops_where_the_artifact_stops(tmp_path, monkeypatch):
    """It applied the checkpoint's repetition penalty, and did not stop at the tokenizer's end-of-sequence token."""
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    target_with(tmp_path, {"repetition_penalty": 5.0, "eos_token_id": 500})
    recipe = recipe_with_defaults()
    pair = resolve_pair(recipe, base=tmp_path, cache=tmp_path / "sources")
    [free] = make_engine(recipe, pair).generate([PROMPT], max_new_tokens=12, temperature=0.0)
    target_with(tmp_path, {"repetition_penalty": 5.0, "eos_token_id": free.tokens[4]})
    pair = resolve_pair(recipe, base=tmp_path, cache=tmp_path / "sources")
    [expected] = make_engine(recipe, pair).generate([PROMPT], max_new_tokens=12, temperature=0.0)
    assert len(expected.tokens) < 12
    for name, answer in transformers_answers(recipe, tmp_path, 12).items():
        arrivals = answer(PROMPT).arrivals
        assert sum(arrival.tokens for arrival in arrivals) == len(expected.tokens), name
