"""Prompt files: what a line needs, and what is said of one that lacks it."""

import pytest

from pipeline.errors import InputError
from pipeline.validate.prompts import SHIPPED, Prompt, load_prompts


def refusal(tmp_path, *lines: str) -> InputError:
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError) as caught:
        load_prompts(tmp_path / "p.jsonl")
    return caught.value


def test_id_defaults_to_the_lines_number(tmp_path):
    """A line without `id` used to end with `not a prompt: KeyError('id')`."""
    (tmp_path / "p.jsonl").write_text(
        '{"class": "chat", "prompt": "x"}\n\n'
        '{"class": "code", "prompt": "y"}\n{"id": 9, "class": "chat", "prompt": "z"}'
    )
    assert load_prompts(tmp_path / "p.jsonl") == [
        Prompt("1", "chat", "x"),
        Prompt("3", "code", "y"),
        Prompt("9", "chat", "z"),
    ]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"id": "a", "prompt": "x"}', "missing key: `class`"),
        ('{"id": "a"}', "missing key: `class`, `prompt`"),
        ("[]", "not a JSON object"),
        ("3", "not a JSON object"),
        ("{", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ],
)
def test_malformed_line_is_named_without_pythons_words(tmp_path, line, what):
    """The message used to be an exception's `repr`: `KeyError('class')`, `TypeError(...)`."""
    error = refusal(tmp_path, '{"id": "first", "class": "chat", "prompt": "x"}', line)
    assert error.what == what
    assert error.where.endswith("p.jsonl:2")
    assert '"class", "prompt" and optionally "id"' in error.fix


def test_two_prompts_with_one_id_are_refused(tmp_path):
    """Their answers would be compared with each other's references; a default id can be another line's own."""
    error = refusal(tmp_path, '{"id": "2", "class": "chat", "prompt": "x"}', '{"class": "chat", "prompt": "y"}')
    assert error.what == "duplicate id: '2', also in line 1"
    assert error.where.endswith("p.jsonl:2")


def test_shipped_prompts_load():
    assert len(load_prompts(SHIPPED)) > 16
