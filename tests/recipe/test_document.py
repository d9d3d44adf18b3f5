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
        ("0100", 100), ("090", 90), ("0o100", 64), ("0x40", 64), ("0b11", 3), ("1_024", 1024), ("-7", -7), ("+7", 7),
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


def test_read_spelling_of_yaml_1_1_where_the_file_says_so(tmp_path: Path) -> None:
    assert document_of(tmp_path, "%YAML 1.1\n---\na: 0100\nb: 1:30\n").data == {"a": 100, "b": "1:30"}


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


def test_read_two_documents_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="another document"):
        document_of(tmp_path, "a: 1\n---\na: 1\n")


def test_read_anchor_defined_anew_is_quiet(tmp_path: Path) -> None:
    assert document_of(tmp_path, "a: &x 1\nb: &x 2\nc: *x\n").data == {"a": 1, "b": 2, "c": 2}


def test_read_utf16_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes("a: 1\n".encode("utf-16"))
    with pytest.raises(InputError, match="not UTF-8"):
        read(tmp_path / "a.yaml")


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
