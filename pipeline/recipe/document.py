"""YAML -> plain data, with the file and line of every value, so that any later finding can name its place.

Refuses keys given twice and tags; dates and `1:30` stay text, `1e-3` is a number. Knows nothing of recipes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from pipeline.errors import InputError, Problem, RecipeError

Key = tuple[str | int, ...]
"""Path of a value in a document: `("shapes", "kv", 1)`."""

EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
SCALARS = {"int", "float", "bool", "null", "str", "timestamp", "binary"}


@dataclass(frozen=True)
class Document:
    """Data of one file, or of one merged over its base. `problems` did not stop the reading."""

    path: Path
    data: dict[str, Any]
    lines: dict[Key, tuple[Path, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, key: Key) -> str:
        """`file:line: key`, with the line of the nearest key that is there."""
        for size in range(len(key), 0, -1):
            if key[:size] in self.lines:
                path, line = self.lines[key[:size]]
                return f"{path}:{line}: {dotted(key)}"
        return f"{self.path}:1: {dotted(key)}"

    def over(self, base: Document) -> Document:
        """Put this document on top of `base`: mappings merge key by key, anything else replaces."""
        data = base.data | {key: _merged(base.data.get(key), value) for key, value in self.data.items()}
        return Document(self.path, data, base.lines | self.lines, base.problems + self.problems)


def dotted(key: Key) -> str:
    """`("shapes", "kv", 1)` as `shapes.kv[1]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".")


def read(path: Path) -> Document:
    """Read one file.

    Raises:
        InputError: it cannot be read.
        RecipeError: it is not YAML, or not a mapping.

    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", where=str(path), fix="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8 text", where=str(path), fix="save the file as UTF-8") from error
    except yaml.YAMLError as error:
        raise RecipeError([_syntax_problem(path, error)]) from error
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError([Problem(f"{path}:1", "not a mapping", "start with `name: ...`")])
    document = Document(path, {})
    document.data.update(_mapping(root, (), document, ()))
    return document


def _syntax_problem(path: Path, error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    what = str(getattr(error, "problem", None) or error).splitlines()[0]
    return Problem(where, f"not YAML: {what}", "repair the syntax; indent with spaces, close every [ and {")


def _value(node: yaml.Node, key: Key, document: Document, above: tuple[yaml.Node, ...]) -> Any:
    if node in above:
        document.problems.append(Problem(document.place(key), "an anchor that contains itself", "write the value out"))
        return None
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, key, document, above)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document.lines[(*key, index)] = (document.path, item.start_mark.line + 1)
        return [_value(item, (*key, i), document, (*above, node)) for i, item in enumerate(node.value)]
    return _scalar(node, key, document) if isinstance(node, yaml.ScalarNode) else None


def _mapping(node: yaml.MappingNode, key: Key, document: Document, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value_node, line in _entries(node):
        here = (*key, name)
        if name in found:
            where = f"{document.path}:{line}: {dotted(here)}"
            first = document.lines[here][1]
            document.problems.append(Problem(where, f"key given twice, first in line {first}", "keep one of the two"))
            continue
        document.lines[here] = (document.path, line)
        found[name] = _value(value_node, here, document, (*above, node))
    return found


def _entries(node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node, int]]:
    """Keys as they are written: `on` is a key, not a truth value."""
    for key_node, value_node in node.value:
        name = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        yield str(name), value_node, key_node.start_mark.line + 1


def _scalar(node: yaml.ScalarNode, key: Key, document: Document) -> Any:
    tag, text = node.tag.removeprefix("tag:yaml.org,2002:"), str(node.value)
    if tag not in SCALARS:
        document.problems.append(Problem(document.place(key), f"tag {node.tag!r}", "write a plain value"))
        return text
    construct = SafeConstructor()
    if tag == "int" and ":" not in text:
        return construct.construct_yaml_int(node)
    if tag == "float" and ":" not in text:
        return construct.construct_yaml_float(node)
    if tag == "bool":
        return construct.construct_yaml_bool(node)
    if tag == "null":
        return None
    if tag == "str" and node.style is None and EXPONENT.fullmatch(text):
        return float(text)
    return text


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if "name" in below and "name" in above and below["name"] != above["name"]:
        # Another backend: the base's settings belong to the one it named.
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}
