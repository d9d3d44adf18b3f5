"""Reading and writing YAML: the value of every spelling, and files that must not stop the reader."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import InputError, RecipeError
from pipeline.recipe.document import Document, read, to_text


def document_of(folder: Path, text: str) -> Document:
    path = folder / "file.yaml"
    path.write_bytes(text.encode())
    return read(path)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("0100", 100), ("090", 90), ("0o100", 64), ("0x40", 64), ("0b11", "0b11"), ("1_024", "1_024"),
        ("-7", -7), ("+7", 7),
        ("1e3", 1000.0), ("1e-3", 0.001), ("1.5", 1.5), (".5", 0.5), ("-.inf", float("-inf")),
        ("yes", True), ("Off", False), ("TRUE", True), ("no", False), ("oN", "oN"), ("y", "y"), ("'no'", "no"),
        ("~", None), ("null", None), ("", None), ("~/target", "~/target"),
        ("1:30", "1:30"), ("1:04.5", "1:04.5"), ("2026-11-28", "2026-11-28"), ("=", "="), ("<<", "<<"), ("'64'", "64"),
        ("!!str 5", "5"), ("!!int '5'", 5),
    ],
)  # fmt: skip
def test_read_scalar(tmp_path: Path, written: str, value: Any) -> None:
    """YAML 1.1 reads `0100` as 64, silently."""
    document = document_of(tmp_path, f"a: {written}\n")
    assert document.data == {"a": value}
    assert type(document.data["a"]) is type(value)
    assert document.problems == []


@pytest.mark.parametrize("before", ["", "# a comment\r\n", "\ufeff", "%TAG !x! tag:x\n"])
def test_read_rejects_the_directive_of_another_version(tmp_path: Path, before: str) -> None:
    """`0100` was 100 in a file that declares YAML 1.1, where it is 64."""
    with pytest.raises(RecipeError, match=r"found %YAML 1\.1, expected %YAML 1\.2") as caught:
        document_of(tmp_path, f"{before}%YAML 1.1\n---\na: 0100\n")
    assert f"file.yaml:{before.count(chr(10)) + 1}" in caught.value.where
    assert document_of(tmp_path, f"{before}%YAML 1.2\n---\na: 0100\n").data == {"a": 100}


MERGED = {
    "own keys win": ("b: &b {x: 1, y: 2}\na: {x: 3, <<: *b}\n", {"x": 3, "y": 2}),
    "the first of a list wins": ("b: &b {x: 1}\nc: &c {x: 2, z: 3}\na: {<<: [*b, *c]}\n", {"x": 1, "z": 3}),
    "merged mappings merge": ("b: &b {x: 1}\nc: &c {<<: *b, y: 2}\na:\n  <<: *c\n", {"x": 1, "y": 2}),
    "a mapping in place": ("a: {<<: {x: 1}}\n", {"x": 1}),
    "a quoted key is a key": ("a: {'<<': 1}\n", {"<<": 1}),
}


@pytest.mark.parametrize(("text", "value"), MERGED.values(), ids=MERGED)
def test_read_merge_key(tmp_path: Path, text: str, value: dict[str, Any]) -> None:
    """`<<` was an unknown key."""
    document = document_of(tmp_path, text)
    assert document.data["a"] == value
    assert document.problems == []


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: &a {<<: *a}\n", "contains itself"),
        ("a: &a {b: {<<: *a}}\n", "contains itself"),
        ("a: {<<: 5}\n", "no mapping"),
        ("a: {<<: [5]}\n", "no mapping"),
        ("a: {<<: {x: 1}, <<: {y: 1}}\n", "key given twice"),
    ],
)
def test_read_names_an_unusable_merge_key(tmp_path: Path, text: str, what: str) -> None:
    problems = document_of(tmp_path, text).problems
    assert [what in problem.what and problem.where.endswith("<<") for problem in problems] == [True]


def test_read_merges_each_mapping_once(tmp_path: Path) -> None:
    """Nine merges of nine merges of ... end."""
    rows = ["a0: &a0 {x: 1}"]
    rows += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 30)]
    assert document_of(tmp_path, "\n".join(rows)).data["a29"] == {"x": 1}


SYNTAX = {
    "tab": ("a:\t1\n", "1:3", "tab character", "spaces instead of the tab"),
    "tab at the end": ("a: 1\nb: x\t\n", "2:5", "tab character", "at the end of a line"),
    "reserved character": ("a: @x\n", "1:4", "cannot start with '@'", "quotes"),
    "colon in a value": ("a: b: c\n", "1:5", "unexpected `:`", "quote"),
    "unknown alias": ("a: *x\n", "1:4", "no anchor `&x`", "define the anchor"),
    "unknown escape": ('a: "C:\\Windows"\n', "1:8", r"unknown escape `\W`", "single quotes"),
    "open quote": ("a: 'x\n", "2:1", "quote that is not closed", "close the quote"),
    "open bracket": ("a: [1\nb: 2\n", "2:2", "starts in line 1, column 4", "close every ["),
    "open brace": ("a: {x: 1\nb: 2\n", "2:2", "`}` is missing", "close every ["),
    "no colon": ("a: b\nc\n", "3:1", "a key without `:`", "key: value"),
    "text after a quote": ("a: 'it's'\n", "1:8", "text behind a value", "same number of spaces"),
    "indentation": ("- a\nb: 1\n", "2:1", "wrong indentation", "same number of spaces"),
    "empty alias": ("a: *\n", "1:5", "name of an anchor or alias is missing", "quotes"),
    "closed bracket": ("a: ]\n", "1:4", "a value is missing", "close every ["),
    "block scalar": ("a: >-x\n", "1:6", "found 'x'", "repair the syntax"),
    "two documents": ("a: 1\n---\na: 1\n", "2:1", "another document", "one document"),
    "text behind the end": ("a: 1\n...\nfoo\n", "3:1", "another document", "one document"),
    "control character": ("a: 1\nb: \x07\n", "2:4", "control character U+0007", "remove"),
    "line separator": ("a: b\u2028c\n", "1:5", "line separator U+2028", "\\u2028"),
    "next line": ("# b\x85c\n", "1:4", "line separator U+0085", "\\u0085"),
    "deep": ("a: " + "[" * 100 + "]" * 100, "1:67", "nested too deeply", "remove brackets"),
}
"""Text -> line and column, part of what, part of fix."""


@pytest.mark.parametrize(("text", "place", "what", "fix"), SYNTAX.values(), ids=SYNTAX)
def test_read_explains_a_syntax_error(tmp_path: Path, text: str, place: str, what: str, fix: str) -> None:
    """Messages had no column, and ruamel.yaml's names of tokens: `expected <block end>, but found '<scalar>'`."""
    with pytest.raises(RecipeError) as caught:
        document_of(tmp_path, text)
    (problem,) = caught.value.problems
    assert problem.where == f"{tmp_path / 'file.yaml'}:{place}"
    assert what in problem.what
    assert fix in problem.fix
    assert "<" not in problem.what


FAULTS = {
    "key that is a list": ("a: 1\n? [b, c]\n: 1\n", "file.yaml:2", "a key that is a list or a mapping"),
    "empty key": ("a: {: 1}\n", "file.yaml:1: a", "empty key"),
    "large integer": (
        "a: [1, 99999999999999999999]\n",
        "file.yaml:1: a[1]",
        "64 bits: 99999999999999999999",
    ),
    "many digits": ("a: " + "9" * 5000, "file.yaml:1: a", "outside of 64 bits: 5000 characters"),
    "large float": ("a: 1e999\n", "file.yaml:1: a", "outside of 64 bits: 1e999"),
    "set": ("a: !!set {x, y}\n", "file.yaml:1: a", "unsupported tag"),
    "binary": ("a: !!binary aGk=\n", "file.yaml:1: a", "unsupported tag"),
    "tagged list": ("a: !x [1]\n", "file.yaml:1: a", "unsupported tag '!x'"),
    "tagged document": ("!x {a: 1}\n", "file.yaml:1", "unsupported tag '!x'"),
}


@pytest.mark.parametrize(("text", "where", "what"), FAULTS.values(), ids=FAULTS)
def test_read_names_a_value_that_is_not_plain_data(tmp_path: Path, text: str, where: str, what: str) -> None:
    """A key that is a list was the unknown key `?`; 1e999 was infinity; tags of lists and mappings were ignored."""
    (problem,) = document_of(tmp_path, text).problems
    assert problem.where == str(tmp_path / where)
    assert what in problem.what


@pytest.mark.parametrize("text", ["a: !!bool maybe\n", "a: !!int x\n", "a: !!python/name:os.system x\n", "a: !env X\n"])
def test_read_names_a_tag_that_does_not_fit(tmp_path: Path, text: str) -> None:
    (problem,) = document_of(tmp_path, text).problems
    assert problem.where.endswith("file.yaml:1: a")
    assert "tag" in problem.what


def test_read_nested_aliases_end(tmp_path: Path) -> None:
    """Nine aliases of nine aliases of ... once ran until memory was full."""
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    started = time.monotonic()
    with pytest.raises(RecipeError, match="more than 100000 values"):
        document_of(tmp_path, "\n".join(rows))
    assert time.monotonic() - started < 60


def test_read_deep_nesting_is_a_problem(tmp_path: Path) -> None:
    """Ended with a RecursionError."""
    with pytest.raises(RecipeError, match="nested too deeply"):
        document_of(tmp_path, "a: " + "[" * 1000 + "]" * 1000)


@pytest.mark.parametrize("newline", ["\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_read_line_ends_and_byte_order_mark(tmp_path: Path, newline: str, bom: str) -> None:
    document = document_of(tmp_path, bom + newline.join(["# a", "a: 1", "b:", "- c"]))
    assert document.data == {"a": 1, "b": ["c"]}
    assert document.lines[("b", 0)][1] == 4


def test_read_anchor_defined_anew_is_quiet(tmp_path: Path) -> None:
    assert document_of(tmp_path, "a: &x 1\nb: &x 2\nc: *x\n").data == {"a": 1, "b": 2, "c": 2}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_read_other_encoding_is_an_input_error(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.yaml").write_bytes("a: 1\n".encode(encoding))
    with pytest.raises(InputError, match=f"not UTF-8 text, but {encoding.upper()}"):
        read(tmp_path / "a.yaml")


def test_read_byte_of_latin_1_has_a_place(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"a: 1\r\nb: caf\xe9\r\n")
    with pytest.raises(InputError, match="not UTF-8 text: byte 0xe9") as caught:
        read(tmp_path / "a.yaml")
    assert caught.value.where == f"{tmp_path / 'a.yaml'}:2:7"


DATA = {
    "texts": ["no", "On", "1e3", "0100", "0x10", "2026-11-28", "~", "", "<<", "=", "# x", "a: b", "null", "1_0", ".5"],
    "more": ["ä", "two\nlines", "word " * 80, "tab\there", "- a", "{", "'", '"', "%", "@", "y", " x"],
    "on": True, "1": 2,
    "floats": [1e-9, float("inf"), 1.0], "empty": [{}, []], "deep": {"b": {"a": [1, [2, {"z": 1}]]}},
}  # fmt: skip


def test_to_text_reads_back_equal(tmp_path: Path) -> None:
    """In our reader, in the order of the keys; and in one for YAML 1.1, which must not take text for anything else."""
    text = to_text(DATA)
    assert text.isascii()
    document = document_of(tmp_path, text)
    assert document.data == DATA
    assert list(document.data) == list(DATA)
    assert document.problems == []
    plain = {key: DATA[key] for key in ("texts", "more")}
    assert yaml.safe_load(to_text(plain)) == plain
