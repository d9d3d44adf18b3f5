"""The writer of text: rows that join and leave write what each would alone, with a compiler or without."""

import math
from dataclasses import replace

import pytest
import torch

from pipeline.distill import generate
from pipeline.distill.generate import Transcript, Writer, Writing
from pipeline.recipe.schema import Recipe
from pipeline.sources.pair import resolve, resolve_pair
from support.eager import make_engine
from support.tiny_distill import CONTENT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("writer")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[pytest.mark.compile, pytest.mark.slow])])
def test_writer_continues_as_the_engine_does(work, compiled, monkeypatch):
    """Rows that join and leave at different times write what each would alone."""
    monkeypatch.setattr(generate, "WORTH_COMPILING", 0 if compiled else math.inf)
    recipe = Recipe.model_validate(CONTENT)
    target = resolve(recipe.target.source, base=work, cache=work / "cache" / "sources")
    engine = make_engine(recipe, resolve_pair(recipe, base=work, cache=work / "cache" / "sources"))
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15], [8, 8], [3]]
    writer = Writer(target, "float32", 2, 96, (0, 1, 2))
    assert writer.compiled == compiled
    found = {w.writing.seed: w for w in writer.write(Writing(p, 5 + 9 * i, 0.0, i) for i, p in enumerate(prompts))}
    for seed, written in found.items():
        alone = engine.generate([prompts[seed]], max_new_tokens=5 + 9 * seed, speculate=False)[0]
        assert written.tokens == [*prompts[seed], *alone.tokens]
        assert written.last_TH.shape == (len(written.tokens) - 1, 64)
        again = next(writer.read([Transcript(prompts[seed], alone.tokens)]))
        assert torch.allclose(again.taps_TX, written.taps_TX, atol=1e-4)


def test_writer_without_a_compiler_writes_all_the_same(work, monkeypatch):
    monkeypatch.setattr(generate, "WORTH_COMPILING", 0)
    monkeypatch.setenv("PATH", "")
    target = resolve(CONTENT["target"]["source"], base=work, cache=work / "cache" / "sources")
    writer = Writer(target, "float32", 2, 96, (0, 1, 2))
    assert not writer.compiled
    assert len(next(writer.write([Writing([5, 6], 4)])).tokens) == 6


def test_writer_ends_with_the_first_token_where_that_is_all_there_is(work):
    """It once read a row on before it asked whether the row had ended."""
    target = resolve("pico://llama", base=work, cache=work / "cache" / "sources")
    writer = Writer(target, "float32", 2, 96, (0, 1, 2))
    counts: list[int] = []
    (one,) = writer.write([Writing([5, 6, 7], 1)], counts.append)
    assert counts == [1]
    assert one.tokens[:-1] == [5, 6, 7]
    assert one.last_TH.shape == (3, 64)
    writer.checkpoint = replace(target, config=replace(target.config, eos_ids=(one.tokens[-1],)))
    ended = list(writer.write(Writing([5, 6, 7], 9, seed=i) for i in range(5)))
    assert [w.tokens for w in ended] == [one.tokens] * 5
