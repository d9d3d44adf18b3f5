"""Text is UTF-8 whatever the locale: every call that reads or writes text names its encoding.

ruff's `unspecified-encoding` sees only calls on a `Path` that it can infer, so this test looks at the names of calls.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.python_source import nodes

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "docs", "examples", "pipeline", "scripts", "tandem_spec")
TEXT_METHODS = {"read_text": 0, "write_text": 1}
"""Methods of `Path`, and the position of their argument `encoding`."""
OPENERS = {"open": 1, "fdopen": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0, "SpooledTemporaryFile": 1}
"""Functions, and the position of their argument `mode`."""
BINARY_UNLESS_ASKED = {"NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile"}
PROCESSES = {"run", "Popen", "check_output", "check_call", "call"}
METADATA = "pipeline/extras.py"  # `read_text` of importlib.metadata, which is always UTF-8


def without_encoding(source: str) -> list[int]:
    """Lines of calls that read or write text without an encoding."""
    return [node.lineno for node in nodes(source) if isinstance(node, ast.Call) and _unnamed(node)]


def _unnamed(call: ast.Call) -> bool:
    names = {keyword.arg for keyword in call.keywords}
    if "encoding" in names:
        return False
    name, is_method = _name(call)
    if name in TEXT_METHODS and is_method:
        return len(call.args) <= TEXT_METHODS[name]
    if name in PROCESSES:
        return any(k.arg in ("text", "universal_newlines") and _is_true(k.value) for k in call.keywords)
    if name == "TextIOWrapper":
        return len(call.args) < 2
    return name in OPENERS and _is_text(_mode(call, name, is_method), name, is_method=is_method)


def _name(call: ast.Call) -> tuple[str, bool]:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr, not (isinstance(call.func.value, ast.Name) and call.func.value.id in ("os", "tempfile"))
    return (call.func.id if isinstance(call.func, ast.Name) else ""), False


def _mode(call: ast.Call, name: str, is_method: bool) -> str | None:
    """The mode as far as it is a constant: "" without one, None where it is another value."""
    at = OPENERS[name] - (is_method and name == "open")
    values = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] or call.args[at : at + 1]
    if not values:
        return ""
    return values[0].value if isinstance(values[0], ast.Constant) and isinstance(values[0].value, str) else None


def _is_text(mode: str | None, name: str, *, is_method: bool) -> bool:
    if mode is None or not set(mode) <= set("rwaxbt+"):
        return False  # a method `open` of another class
    if not mode:
        return name not in BINARY_UNLESS_ASKED and not is_method
    return "b" not in mode


def _is_true(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def sources() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("path.read_text()", True),
        ("path.read_text(errors='replace')", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text(text)", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("open(path)", True),
        ("open(path, 'rb')", False),
        ("path.open('a')", True),
        ("path.open('ab')", False),
        ("backend.open(root, manifest)", False),
        ("os.fdopen(handle, 'w')", True),
        ("tempfile.NamedTemporaryFile()", False),
        ("tempfile.NamedTemporaryFile('w')", True),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, capture_output=True)", False),
        ("io.TextIOWrapper(raw)", True),
    ],
)
def test_the_check_sees_calls_without_an_encoding(source: str, found: bool) -> None:
    assert bool(without_encoding(source)) is found


def test_every_call_names_its_encoding() -> None:
    """Under a Latin-1 locale, `tokenizer_config.json` used to be read as Latin-1: other tokens, exit code 0."""
    lines = {
        path.relative_to(ROOT).as_posix(): without_encoding(path.read_text(encoding="utf-8")) for path in sources()
    }
    del lines[METADATA]
    assert {name: at for name, at in lines.items() if at} == {}
