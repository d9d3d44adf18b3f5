"""Prompts of every form, streams, and what the engine rejects before it runs anything."""

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


def test_engine_refuses_what_the_artifact_does_not_have(tmp_path):
    recipe = recipe_of("llama", 1, "float32")
    engine = make_engine(recipe, resolve_pair(recipe, base=tmp_path, cache=tmp_path / "sources"))
    with pytest.raises(InputError, match="stochastic sampling was not built"):
        engine.generate([[1]], max_new_tokens=4, temperature=1.0)
    with pytest.raises(InputError, match="1 to 47"):
        engine.generate([[1] * 48], max_new_tokens=4)
    with pytest.raises(InputError, match="K=9"):
        engine.generate([[1]], max_new_tokens=4, draft_tokens=9)
    for token in (-1, engine.manifest.vocab):
        with pytest.raises(InputError, match=f"token id {token}; the artifact's vocabulary has ids 0 to") as caught:
            engine.generate([[1], [2, token]], max_new_tokens=4)
        assert caught.value.where == "prompt 1"
    assert engine.generate([[engine.manifest.vocab - 1]], max_new_tokens=1)[0].tokens


def test_text_that_is_none_is_refused(engine):
    with pytest.raises(InputError, match="not valid Unicode: lone surrogate at index 1"):
        engine.text.encode("a\udcff")
    with pytest.raises(InputError, match="message 1: not valid Unicode: lone surrogate at index 2"):
        engine.text.encode_chat([{"role": "system", "content": "x"}, {"role": "user", "content": "ab\udcff"}])


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


CHAT = [{"role": "user", "content": "Name a colour."}]


def test_a_chat_is_answered_as_its_template_writes_it(engine):
    """The template had to be applied by hand, one user message at a time."""
    prompts = ["Name a colour.", CHAT, engine.text.chat("Name a colour.")]
    plain, chat, ids = engine.generate(prompts, max_new_tokens=6)
    assert chat.tokens == ids.tokens
    assert chat.tokens != plain.tokens


def test_a_chat_of_several_turns_has_them_all(engine):
    turns = [*CHAT, {"role": "assistant", "content": "Red."}, {"role": "user", "content": "Another."}]
    tokens = engine.text.encode_chat(turns)
    assert tokens[: len(engine.text.encode_chat(CHAT)) - 1] == engine.text.encode_chat(CHAT)[:-1]
    assert "Another." in engine.text.decode(tokens)


@pytest.mark.parametrize(
    ("prompts", "where", "what"),
    [(CHAT, "prompts", "found a message, expected a list of prompts"),
     ([["Name a colour."]], "prompt 0", "found a list of texts"),
     ([[*CHAT, 5]], "prompt 0", "found a list of texts"),
     (["a", [{"role": "user"}]], "message 0", "the message has no 'content'")],
)  # fmt: skip
def test_prompts_of_another_form_are_rejected(engine, prompts, where, what):
    with pytest.raises(InputError, match=what) as caught:
        engine.generate(prompts, max_new_tokens=4)
    assert caught.value.where == where
    assert caught.value.fix


@pytest.mark.parametrize("prompt", ["Once upon a time", CHAT, [5, 9, 3]])
@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "seed": 3}, {"speculate": False}])
def test_stream_gives_the_text_of_generate(engine, prompt, how):
    pieces = list(engine.stream(prompt, max_new_tokens=12, **how))
    assert "".join(pieces) == engine.generate([prompt], max_new_tokens=12, **how)[0].text
    assert len(pieces) > 1
    assert all(pieces)


def test_stream_never_splits_a_character(engine, monkeypatch):
    """Tokens of a byte-level vocabulary can hold a part of a character each."""
    data = list("Hällo wörld 🎉!".encode())
    monkeypatch.setattr(engine.text, "decode", lambda tokens: bytes(data[: len(tokens)]).decode(errors="replace"))
    pieces = list(engine.stream([5, 9, 3], max_new_tokens=len(data)))
    assert "".join(pieces) == bytes(data).decode()
    assert all("\ufffd" not in piece for piece in pieces)


def test_stream_checks_its_settings_before_it_is_read(engine):
    with pytest.raises(InputError, match="found 0"):
        engine.stream("a", max_new_tokens=0)
    with pytest.raises(InputError, match="vocabulary"):
        engine.stream([10**6], max_new_tokens=4)


def test_stream_that_another_call_overtook_ends_with_an_error(engine):
    """Both calls write to the same cache rows: the stream would go on with the other answer's keys."""
    stream = engine.stream([5, 9, 3], max_new_tokens=12)
    next(stream)
    expected = engine.generate([[7, 7]], max_new_tokens=4)
    with pytest.raises(InputError, match="another call of this engine started"):
        list(stream)
    assert engine.generate([[7, 7]], max_new_tokens=4) == expected


def test_engine_closes_at_the_end_of_its_block(engine, monkeypatch):
    closed = []
    monkeypatch.setattr(engine.batch, "close", lambda: closed.append(True))
    with engine as same:
        assert same is engine
        assert not closed
    assert closed == [True]
    with pytest.raises(ZeroDivisionError), engine:
        _ = 1 / 0
    assert len(closed) == 2
