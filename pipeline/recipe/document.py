"""YAML <-> plain data, with the file and line of every value. Independent of recipes.

YAML 1.2, so `0100` is 100 and `1:30` and dates are text. Rejects repeated keys and tags. `yes`, `no`, `on` and `off`
stay the truth values of YAML 1.1: most other readers treat them so.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

from pipeline.errors import InputError, Problem, RecipeError

Key = tuple[str | int, ...]
"""Path of a value in a document: `("shapes", "kv", 1)`."""

CORE = "tag:yaml.org,2002:"
SCALARS = {"int", "float", "bool", "null", "str", "timestamp", "binary", "merge", "value"}
TRUTHS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
MOST_VALUES = 100_000
"""Limit for the values of a document with aliases expanded: nested aliases in a small file can expand to billions."""


class _Resolver(VersionedResolver):
    """YAML 1.2 with the truth values of YAML 1.1, for reading and for what must be quoted when writing."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        plain = kind is ScalarNode and implicit[0]
        if plain and value in (value.lower(), value.capitalize(), value.upper()) and value.lower() in TRUTHS:
            return Tag(suffix=f"{CORE}bool")
        return super().resolve(kind, value, implicit)


@dataclass(frozen=True)
class Document:
    """Data of one file, or of a file merged over its base. `problems` did not stop the reading."""

    path: Path
    data: dict[str, Any]
    lines: dict[Key, tuple[Path, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, key: Key) -> str:
        """Return `file:line: key`, with the line of the nearest key that the file has."""
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
    """Return `("shapes", "kv", 1)` as `shapes.kv[1]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".")


def read(path: Path) -> Document:
    """Read one file.

    Raises:
        InputError: it cannot be read.
        RecipeError: it is not YAML, or not a mapping.

    """
    try:
        yaml = YAML(typ="safe", pure=True)
        yaml.Resolver = _Resolver
        yaml.composer.warn_double_anchors = False  # YAML allows it: an alias means the last one
        root = yaml.compose(path.read_text(encoding="utf-8-sig"))
        if not isinstance(root, MappingNode):
            raise RecipeError([Problem(f"{path}:1", "not a mapping", "start with `name: ...`")])
        document = Document(path, {})
        document.data.update(_mapping(root, (), document, ()))
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", where=str(path), fix="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8 text", where=str(path), fix="save the file as UTF-8") from error
    except YAMLError as error:
        raise RecipeError([_syntax_problem(path, error)]) from error
    except RecursionError as error:
        what = "lists or mappings are nested too deeply"
        raise RecipeError([Problem(f"{path}:1", what, "remove brackets or indentation")]) from error
    return document


def to_text(data: Mapping[str, Any]) -> str:
    """Return YAML in block style, ASCII only, keys in their order; `read` gives the same data."""
    yaml = YAML(typ="rt")  # the type that keeps the order of keys
    yaml.Resolver = _Resolver
    yaml.allow_unicode, yaml.width = False, 120
    out = io.StringIO()
    yaml.dump(dict(data), out)
    return out.getvalue()


def _syntax_problem(path: Path, error: YAMLError) -> Problem:
    mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    what = str((isinstance(error, MarkedYAMLError) and error.problem) or error).splitlines()[0]
    return Problem(where, f"not YAML: {what}", "repair the syntax; indent with spaces, close every [ and {")


def _value(node: Node, key: Key, document: Document, above: tuple[Node, ...]) -> Any:
    if len(document.lines) > MOST_VALUES:
        what = f"more than {MOST_VALUES} values after aliases are expanded"
        raise RecipeError([Problem(document.place(key[:1]), what, "replace nested aliases by their values")])
    if node in above:
        document.problems.append(
            Problem(document.place(key), "an anchor that contains itself", "replace the alias by a value")
        )
        return None
    if isinstance(node, MappingNode):
        return _mapping(node, key, document, above)
    if isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            document.lines[(*key, index)] = (document.path, item.start_mark.line + 1)
        return [_value(item, (*key, i), document, (*above, node)) for i, item in enumerate(node.value)]
    return _scalar(node, key, document) if isinstance(node, ScalarNode) else None


def _mapping(node: MappingNode, key: Key, document: Document, above: tuple[Node, ...]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, value_node, line in _entries(node):
        path = (*key, name)
        if name in data:
            where = f"{document.path}:{line}: {dotted(path)}"
            first = document.lines[path][1]
            document.problems.append(Problem(where, f"key given twice, first in line {first}", "keep one of the two"))
            continue
        document.lines[path] = (document.path, line)
        data[name] = _value(value_node, path, document, (*above, node))
    return data


def _entries(node: MappingNode) -> Iterator[tuple[str, Node, int]]:
    """Yield key, value and line; keys as they are written: `on` is a key, not a truth value."""
    for key_node, value_node in node.value:
        name = key_node.value if isinstance(key_node, ScalarNode) else "?"
        yield str(name), value_node, key_node.start_mark.line + 1


def _scalar(node: ScalarNode, key: Key, document: Document) -> Any:
    tag, text = str(node.tag).removeprefix(CORE), str(node.value)
    if tag not in SCALARS:
        document.problems.append(
            Problem(document.place(key), f"unsupported tag {node.tag!r}", "write the value without a tag")
        )
        return text
    try:
        return _plain(tag, text)
    except (ValueError, KeyError):
        what = f"tag {tag!r} does not fit {text!r}"
        document.problems.append(Problem(document.place(key), what, "write the value without a tag"))
        return text


def _plain(tag: str, text: str) -> Any:
    """Return the value of a scalar; numbers of base 60 (YAML 1.1), which contain `:`, stay text."""
    if tag == "null":
        return None
    if tag == "bool":
        return TRUTHS[text.lower()]
    if tag == "int" and ":" not in text:
        return _integer(text.replace("_", "").lower())
    if tag == "float" and ":" not in text:
        return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _integer(digits: str) -> int:
    has_base = digits.lstrip("+-")[:2] in ("0x", "0o", "0b")
    return int(digits, 0 if has_base else 10)


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if "name" in below and "name" in above and below["name"] != above["name"]:
        # Another backend: the base's settings belong to the one it named.
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}
