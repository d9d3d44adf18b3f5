"""YAML <-> plain data, with the file and line of every value. Independent of recipes.

The core schema of YAML 1.2: `0100` is 100; `1_000`, `0b11`, `1:30` and dates are text. Two exceptions: merge keys
(`<<: *anchor`) work, and `yes`, `no`, `on` and `off` stay the truth values of YAML 1.1: most other readers treat them
so. Rejects repeated keys, tags of other types, and numbers outside of 64 bits.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

from pipeline.errors import Problem, RecipeError
from pipeline.recipe.syntax import compose

Key = tuple[str | int, ...]
"""Path of a value in a document: `("shapes", "kv", 1)`."""

CORE = "tag:yaml.org,2002:"
TRUTHS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
PATTERNS = {
    "null": re.compile(r"null|Null|NULL|~|"),
    "bool": re.compile("|".join(form for word in TRUTHS for form in (word, word.capitalize(), word.upper()))),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
}
"""Type of a plain scalar -> its spellings (YAML 1.2, section 10.3.2); all others are text."""
NAMED = re.compile(r"\.(inf|nan)$", re.IGNORECASE)
MERGE = "<<"
LARGEST = 2**63
MOST_DIGITS = 100
MOST_VALUES = 100_000
"""Limit for the values of a document with aliases expanded: nested aliases in a small file can expand to billions."""


def _kind(text: str) -> str:
    return next((kind for kind, pattern in PATTERNS.items() if pattern.fullmatch(text)), "str")


class _Resolver(VersionedResolver):
    """The types of `PATTERNS`, whatever version a file names."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is ScalarNode and implicit[0]:
            return Tag(suffix=f"{CORE}{_kind(value)}")
        return super().resolve(kind, value, implicit)


class _WritingResolver(_Resolver):
    """Text that readers of YAML 1.1 take for a number or a date needs quotes, too."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        is_text = kind is ScalarNode and str(tag) == f"{CORE}str"
        return VersionedResolver.resolve(self, kind, value, implicit) if is_text else tag


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
        return f"{self.path}:1: {dotted(key)}" if key else f"{self.path}:1"

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
        RecipeError: it is not YAML 1.2, or not a mapping.

    """
    document = Document(path, {})
    document.data.update(_value(compose(path, _Resolver), (), document, ()))
    return document


def to_text(data: Mapping[str, Any]) -> str:
    """Return YAML in block style, ASCII only, keys in their order; `read` gives the same data."""
    yaml = YAML(typ="rt")  # the type that keeps the order of keys
    yaml.Resolver = _WritingResolver
    yaml.allow_unicode, yaml.width = False, 120
    out = io.StringIO()
    yaml.dump(dict(data), out)
    return out.getvalue()


def _value(node: Node, key: Key, document: Document, above: tuple[Node, ...]) -> Any:
    if len(document.lines) > MOST_VALUES:
        what = f"more than {MOST_VALUES} values after aliases are expanded"
        raise RecipeError([Problem(document.place(key[:1]), what, "replace nested aliases by their values")])
    if node in above:
        _report_loop(key, document)
        return None
    if isinstance(node, ScalarNode):
        return _scalar(node, key, document)
    if str(node.tag) not in (f"{CORE}map", f"{CORE}seq"):
        what = f"unsupported tag {str(node.tag)!r}"
        document.problems.append(Problem(document.place(key), what, "write the value without a tag"))
    if isinstance(node, MappingNode):
        return _mapping(node, key, document, above)
    for index, item in enumerate(node.value):
        document.lines[(*key, index)] = (document.path, item.start_mark.line + 1)
    return [_value(item, (*key, i), document, (*above, node)) for i, item in enumerate(node.value)]


def _report_loop(key: Key, document: Document) -> None:
    what = "an anchor that contains itself"
    document.problems.append(Problem(document.place(key), what, "replace the alias by a value"))


def _mapping(node: MappingNode, key: Key, document: Document, above: tuple[Node, ...]) -> dict[str, Any]:
    """Return a mapping: its own keys, then keys of merged mappings that it lacks."""
    data: dict[str, Any] = {}
    for name, value_node, line in _own(node, key, document):
        path = (*key, name)
        if name in data:
            where = f"{document.path}:{line}: {dotted(path)}"
            first = document.lines[path][1]
            document.problems.append(Problem(where, f"key given twice, first in line {first}", "keep one of the two"))
            continue
        document.lines[path] = (document.path, line)
        data[name] = _value(value_node, path, document, (*above, node))
    for name, value_node, line in _merged_entries(node, key, document, above):
        if name not in data:
            document.lines[(*key, name)] = (document.path, line)
            data[name] = _value(value_node, (*key, name), document, (*above, node))
    return data


def _own(node: MappingNode, key: Key, document: Document) -> Iterator[tuple[str, Node, int]]:
    """Yield key, value and line without merge keys; keys as they are written: `on` is a key, not a truth value."""
    merged = False
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, ScalarNode) or key_node.value == "":
            kind = "an empty key" if isinstance(key_node, ScalarNode) else "a key that is a list or a mapping"
            where = f"{document.path}:{line}" + (f": {dotted(key)}" if key else "")
            document.problems.append(Problem(where, kind, "write a name before the `:`"))
        elif not _is_merge(key_node):
            yield str(key_node.value), value_node, line
        elif merged:
            where = f"{document.path}:{line}: {dotted((*key, MERGE))}"
            document.problems.append(Problem(where, "key given twice", f"write {MERGE}: [*one, *other]"))
        else:
            merged = True


def _is_merge(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.value == MERGE and node.style is None


def _merged_entries(
    node: MappingNode, key: Key, document: Document, above: tuple[Node, ...]
) -> Iterator[tuple[str, Node, int]]:
    """Yield the entries of the mappings that a mapping merges, each mapping once, the first of a list first."""
    stack, seen = _merged_mappings(node, key, document)[::-1], {id(node)}
    while stack:
        merged = stack.pop()
        if merged is node or merged in above:
            _report_loop((*key, MERGE), document)
        elif id(merged) not in seen:
            seen.add(id(merged))
            yield from _own(merged, key, document)
            stack += _merged_mappings(merged, key, document)[::-1]


def _merged_mappings(node: MappingNode, key: Key, document: Document) -> list[MappingNode]:
    """Return the mappings behind the merge keys of a mapping."""
    mappings: list[MappingNode] = []
    for key_node, value_node in node.value:
        if not _is_merge(key_node):
            continue
        for item in value_node.value if isinstance(value_node, SequenceNode) else [value_node]:
            if isinstance(item, MappingNode):
                mappings.append(item)
            else:
                where = f"{document.path}:{key_node.start_mark.line + 1}: {dotted((*key, MERGE))}"
                what = "found a value that is no mapping, expected an alias of a mapping, or a list of them"
                document.problems.append(Problem(where, what, f"write {MERGE}: *anchor"))
    return mappings


def _scalar(node: ScalarNode, key: Key, document: Document) -> Any:
    tag, text = str(node.tag).removeprefix(CORE), str(node.value)
    if tag not in (*PATTERNS, "str"):
        document.problems.append(
            Problem(document.place(key), f"unsupported tag {str(node.tag)!r}", "write the value without a tag")
        )
        return text
    if tag != "str" and not PATTERNS[tag].fullmatch(text):
        what = f"tag {tag!r} does not fit {text!r}"
        document.problems.append(Problem(document.place(key), what, "write the value without a tag"))
        return text
    value = _plain(tag, text)
    if isinstance(value, int | float) and not NAMED.search(text) and not -LARGEST <= value < LARGEST:
        what = f"number outside of 64 bits: {text if len(text) <= 40 else f'{len(text)} characters'}"
        document.problems.append(Problem(document.place(key), what, "write a smaller number"))
    return value


def _plain(tag: str, text: str) -> Any:
    """Return the value of a scalar."""
    if tag == "bool":
        return TRUTHS[text.lower()]
    if tag == "int":
        return _integer(text)
    if tag == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text if tag == "str" else None


def _integer(text: str) -> int:
    """Return an integer; of more digits than Python reads, one outside of 64 bits."""
    if len(text.lstrip("+-0")) > MOST_DIGITS:
        return LARGEST
    return int(text, 0 if text[:2] in ("0x", "0o") else 10)


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if "name" in below and "name" in above and below["name"] != above["name"]:
        # Another backend: the base's settings belong to the one it named.
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}
