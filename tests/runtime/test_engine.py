"""What the engine refuses before it runs anything, and that an answer is nobody else's business."""

import pytest

from pipeline.errors import InputError
from pipeline.sources.pair import resolve_pair
from support.eager import make_engine
from support.reports import recipe_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    work = tmp_path_factory.mktemp("engine")
    recipe = recipe_of("llama", 1, "float32", ("greedy", "stochastic"))
    return make_engine(recipe, resolve_pair(recipe, base=work, cache=work / "sources"))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0),
     ("top_k", 3_000_000_000), ("top_p", 1.5), ("seed", 10**14), ("seed", -1)],
)  # fmt: skip
def test_settings_out_of_range_name_field_and_value(engine, setting, value):
    with pytest.raises(InputError) as caught:
        engine.generate([[1, 2, 3]], **{"max_new_tokens": 4, setting: value})
    assert caught.value.where == setting
    assert str(value) in caught.value.what
    assert caught.value.fix
    assert engine.stats()["prefills"] == 0


def test_text_that_is_none_is_refused(engine):
    with pytest.raises(InputError, match="not valid Unicode: lone surrogate at index 1"):
        engine.text.encode("a\udcff")


def test_a_sampled_answer_does_not_depend_on_its_neighbours(engine):
    """Also where a neighbour comes to the end of the caches, and has no room for as many drafts."""
    how = {"max_new_tokens": 24, "temperature": 1.0, "seed": 5}
    longest = engine.manifest.shapes.prefill[-1]
    deep = [1 + i % 50 for i in range(longest)]
    limit = engine.length - longest + 8
    alone = engine.generate([[5, 9, 3]], **how | {"max_new_tokens": limit})[0]
    beside = engine.generate([[5, 9, 3], deep], **how | {"max_new_tokens": limit})
    assert alone.tokens == beside[0].tokens
    assert longest + len(beside[1].tokens) > engine.length, "the neighbour was to reach the end"
