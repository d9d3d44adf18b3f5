"""Prompt files: what a line needs, and what is said of one that lacks it."""

import pytest

from pipeline.errors import InputError
from pipeline.validate.prompts import SHIPPED, Prompt, load_prompts


def refusal(tmp_path, *lines: str) -> InputError:
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
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
    ("line", "what", "column"),
    [
        ('{"id": "a", "prompt": "x"}', "missing key: `class`", 1),
        ('{"id": "a"}', "missing key: `class`, `prompt`", 1),
        ("[]", "not a JSON object: found an array", 1),
        ("3", "not a JSON object: found a number", 1),
        ("{", "not JSON: Expecting property name enclosed in double quotes", 2),
        ('{"class": "chat", "prompt": null}', "`prompt`: found null, expected a string", 29),
        ('{"class": "chat", "prompt": 5}', "`prompt`: found a number, expected a string", 29),
        ('{"class": ["chat"], "prompt": "x"}', "`class`: found an array, expected a string", 11),
        (
            '{"class": "chat", "prompt": "x", "id": 1.5}',
            "`id`: found a number, expected a string or a whole number",
            40,
        ),
        ('{"class": "chat", "prompt": "x", "id": null}', "`id`: found null, expected a string or a whole number", 40),
        ('{"class": "chat", "prompt": " \u2028 "}', "empty prompt", 29),
    ],
)
def test_malformed_line_is_named_without_pythons_words(tmp_path, line, what, column):
    """The message used to be an exception's `repr`; `null` became the text `None`, and a number its digits."""
    error = refusal(tmp_path, '{"id": "first", "class": "chat", "prompt": "x"}', line)
    assert error.what == what
    assert error.where.endswith(f"p.jsonl:2:{column}")
    assert '"class", "prompt" and optionally "id"' in error.fix or error.fix == "remove the line"


def test_two_prompts_with_one_id_are_refused(tmp_path):
    """Their answers would be compared with each other's references; a default id can be another line's own."""
    error = refusal(tmp_path, '{"id": "2", "class": "chat", "prompt": "x"}', '{"class": "chat", "prompt": "y"}')
    assert error.what == "duplicate id: '2', also in line 1"
    assert error.where.endswith("p.jsonl:2:1")


def test_shipped_prompts_load():
    assert len(load_prompts(SHIPPED)) > 16
