"""Changed values in the text of a recipe: what differs afterwards, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.recipe.edit import RecipeText, read_text


def edited(text: str) -> str:
    recipe = RecipeText(text)
    recipe.put("speculation", "draft_tokens", [2, 8], behind="draft_tokens")
    recipe.put("speculation", "step_costs", [1.2, 1.8], behind="draft_tokens")
    return recipe.text()


KEPT = {
    "comments and blank lines": (
        "# top\n\nname: head  # mine\n\nspeculation:\n  # K\n  draft_tokens: [1, 2]   # chosen\n\n"
        "  # a head\n  method: eagle3\n\n# end\n",
        "# top\n\nname: head  # mine\n\nspeculation:\n  # K\n  draft_tokens: [2, 8]   # chosen\n"
        "  step_costs: [1.2, 1.8]\n\n  # a head\n  method: eagle3\n\n# end\n",
    ),
    "indentation": (
        "a:\n    - 1\n    -   b: 2\nspeculation:\n     draft_tokens: [1]\n     sampling:\n"
        "       - greedy\nshapes:\n  kv:\n  - 64\n",
        "a:\n    - 1\n    -   b: 2\nspeculation:\n     draft_tokens: [2, 8]\n"
        "     step_costs: [1.2, 1.8]\n     sampling:\n       - greedy\nshapes:\n  kv:\n  - 64\n",
    ),
    "quotes, spaces and long lines": (
        "'name':   \"head\"\ntarget: { source:  'x',\n   dtype: float32 }  # LONG\n"
        "speculation: {draft_tokens: [1], method: 'eagle3'}\n",
        "'name':   \"head\"\ntarget: { source:  'x',\n   dtype: float32 }  # LONG\n"
        "speculation: {draft_tokens: [2, 8], step_costs: [1.2, 1.8], method: 'eagle3'}\n",
    ),
    "numbers and truth values": (
        "validate: {near_tie_rate: 1e-3, a: 0100, b: yes, c: 1_000, d: 0x1F, e: ~}\n"
        "speculation: {draft_tokens: [1], x: 1e-3}\n",
        "validate: {near_tie_rate: 1e-3, a: 0100, b: yes, c: 1_000, d: 0x1F, e: ~}\n"
        "speculation: {draft_tokens: [2, 8], step_costs: [1.2, 1.8], x: 1e-3}\n",
    ),
    "comments of lists in block style": (
        "speculation:\n  step_costs:  # measured\n    - 1.0\n    - 2.0\n  # then\n"
        "  draft_tokens:\n  - 1\n  - 2\n# end\nname: head\n",
        "speculation:\n  step_costs: [1.2, 1.8]  # measured\n  # then\n  draft_tokens: [2, 8]\n# end\nname: head\n",
    ),
    "no line end at the end": (
        "name: head\nspeculation:\n  draft_tokens: [1]",
        "name: head\nspeculation:\n  draft_tokens: [2, 8]\n  step_costs: [1.2, 1.8]\n",
    ),
    "merge keys": (
        "base: &b {draft_tokens: [1], step_costs: [9]}\nspeculation:\n  <<: *b\n  sampling: [greedy]\n",
        "base: &b {draft_tokens: [1], step_costs: [9]}\nspeculation:\n  <<: *b\n  sampling: [greedy]\n"
        "  draft_tokens: [2, 8]\n  step_costs: [1.2, 1.8]\n",
    ),
    "braces around the file": (
        "{name: head, speculation: {draft_tokens: [1]}}\n",
        "{name: head, speculation: {draft_tokens: [2, 8], step_costs: [1.2, 1.8]}}\n",
    ),
}
"""Text before and after; LONG stands for a long comment."""


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["", "bom"])
def test_put_changes_the_values_alone(name: str, newline: str, bom: str) -> None:
    before, after = (text.replace("LONG", "long " * 60) for text in KEPT[name])
    assert edited(bom + before.replace("\n", newline)) == bom + after.replace("\n", newline)


def test_put_again_changes_nothing() -> None:
    once = edited(KEPT["indentation"][0])
    assert edited(once) == once


def test_text_without_a_change_is_the_text() -> None:
    text = "a:   {b:  [1,\n  2]}  # c\n"
    assert RecipeText(text).text() == text


def test_put_into_a_section_over_several_lines() -> None:
    """A list in brackets over several lines comes in one line; other sections keep theirs."""
    text = "shapes: {batch: [1,\n  2]}\nspeculation:\n  draft_tokens: [1,\n    2]  # K\n  method: eagle3\n"
    after = "speculation:\n  draft_tokens: [2, 8]  # K\n  step_costs: [1.2, 1.8]\n  method: eagle3\n"
    assert edited(text) == "shapes: {batch: [1,\n  2]}\n" + after


def test_put_refuses_to_lose_a_comment() -> None:
    recipe = RecipeText("speculation: {method: eagle3,  # a head\n  draft_tokens: [1]}\n")
    recipe.put("speculation", "draft_tokens", [2], behind="draft_tokens")
    with pytest.raises(InputError, match="comments inside"):
        recipe.text()


@pytest.mark.parametrize("value", ["&k [1, 2]", "*k"])
def test_put_refuses_a_value_with_an_anchor(value: str) -> None:
    recipe = RecipeText(f"shapes: {{batch: &k [1, 4]}}\nspeculation:\n  draft_tokens: {value}\n")
    with pytest.raises(InputError, match="anchor `&k`"):
        recipe.put("speculation", "draft_tokens", [2], behind="draft_tokens")


def test_put_without_the_key_that_it_goes_behind() -> None:
    with pytest.raises(InputError, match=r"has no `speculation.draft_tokens`"):
        RecipeText("base: other.yaml\n").put("speculation", "step_costs", [1.0], behind="draft_tokens")


@pytest.mark.parametrize("text", ["base: other.yaml\n", "speculation: fast\n", "", "- a\n", "speculation:\n"])
def test_has_is_false_where_the_file_has_no_such_section(text: str) -> None:
    assert not RecipeText(text).has("speculation", "draft_tokens")


@pytest.mark.parametrize(
    ("content", "what", "place"),
    [(None, "cannot read", ""), (b"\xff\xfe", "not UTF-8", ""), (b"a: [1\n", "not YAML: `,` or `]`", ":2:1"),
     (b"a: 1\na: 2\n", "not YAML: .*duplicate key", ":2:1"), (b"%YAML 1.1\n---\na: 1\n", "found %YAML 1.1", ":1")],
)  # fmt: skip
def test_read_text_names_the_file_and_line(tmp_path: Path, content: bytes | None, what: str, place: str) -> None:
    path = tmp_path / "pair.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=what) as caught:
        read_text(path)
    assert caught.value.where == f"{path}{place}"
