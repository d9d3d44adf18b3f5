"""What the engine refuses, before it runs anything."""

import pytest
from eager import make_engine
from reports import recipe_of

from pipeline.errors import InputError
from pipeline.sources import resolve_pair

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    work = tmp_path_factory.mktemp("engine")
    recipe = recipe_of("llama", 1, "float32", ("greedy", "stochastic"))
    return make_engine(recipe, resolve_pair(recipe, base=work, cache=work / "sources"))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0),
     ("top_p", 1.5)],
)  # fmt: skip
def test_settings_out_of_range_name_field_and_value(engine, setting, value):
    with pytest.raises(InputError) as caught:
        engine.generate([[1, 2, 3]], **{"max_new_tokens": 4, setting: value})
    assert caught.value.where == setting
    assert str(value) in caught.value.what
    assert caught.value.fix
    assert engine.stats()["prefills"] == 0
