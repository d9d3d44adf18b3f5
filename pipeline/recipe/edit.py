"""Change values in the text of a recipe: comments, layout and every other line stay as they are.

Writes no file and checks no value: load the result before it replaces the file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.emitter import RoundTripEmitter
from ruamel.yaml.error import CommentMark, StringMark, YAMLError
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tokens import CommentToken

from pipeline.errors import InputError, RecipeError
from pipeline.recipe import syntax

LINE_END = re.compile(r"(?<=\n)|(?<=\r)(?!\n)")
LONGEST_LINE = 1 << 20
VALUE_COMMENT = 2
"""Index of the comment behind a value in ruamel's list of comments of a key."""


class _Emitter(RoundTripEmitter):
    """Keeps the distance between a value and its comment, where ruamel keeps the comment's column."""

    def write_comment(self, comment: Any, pre: bool = False) -> None:
        mark = comment.start_mark
        if not pre and self.column and isinstance(mark, StringMark):
            before = mark.buffer[: mark.pointer]
            gap = len(before) - len(before.rstrip(" "))
            comment = CommentToken(comment.value, CommentMark(self.column + gap))
        super().write_comment(comment, pre)


class RecipeText:
    """The text of a recipe file, with `has` and `put` for the keys of its sections, and `text` for the result."""

    def __init__(self, text: str) -> None:
        self._bom = text[: text.startswith("\ufeff")]
        body = text.removeprefix("\ufeff")
        self._newline = next((end for end in ("\r\n", "\n", "\r") if end in body), "\n")
        self._original = body if body.endswith(("\n", "\r")) else body + self._newline
        self._changed: dict[str, None] = {}
        self._data = _load(self._original)

    def has(self, section: str, key: str) -> bool:
        """Return whether this file itself, not its base, has a key."""
        values = self._section(section)
        return values is not None and key in values

    def put(self, section: str, key: str, value: Any, *, behind: str) -> None:
        """Set the value of a key; a key that the section lacks is added behind another one.

        Raises:
            InputError: the current value has an anchor, which aliases may use.

        """
        values = self._section(section)
        if values is None or behind not in values:
            raise InputError(f"the file has no `{section}.{behind}`")
        if key in values:
            _replace(values, key, _flow(value))
        else:
            values.insert(list(values).index(behind) + 1, key, _flow(value))
            _move_following_comment(values, behind, key)
        self._changed[section] = None

    def text(self) -> str:
        """Return the whole text, line ends included.

        Raises:
            InputError: a changed section has comments that ruamel does not keep.

        """
        if self._data.fa.flow_style():  # the whole file in braces
            return self._bom + self._merged(self._original, _dump(_load(self._original), 2), _dump(self._data, 2))
        parts = _parts(self._original)
        for section in self._changed:
            index, indent = list(self._data).index(section), self._data[section].lc.col
            before, after = (_parts(_dump(data, indent))[index] for data in (_load(self._original), self._data))
            parts[index] = self._merged(parts[index], before, after)
        return self._bom + "".join(parts)

    def _section(self, name: str) -> CommentedMap | None:
        values = self._data.get(name) if isinstance(self._data, CommentedMap) else None
        return values if isinstance(values, CommentedMap) else None

    def _merged(self, own: str, before: str, after: str) -> str:
        """Return a section as it is written, with the lines that differ between two dumps of it."""
        lines, before_lines, after_lines = (LINE_END.split(text) for text in (own, before, after))
        if len(lines) != len(before_lines):  # values over several lines, which a dump joins
            if own.count("#") > before.count("#"):
                raise InputError("comments inside brackets would be removed by an edit")
            return self._with_newlines(after)
        merged: list[str] = []
        for kind, start, end, new_start, new_end in SequenceMatcher(
            None, before_lines, after_lines, autojunk=False
        ).get_opcodes():
            is_kept = kind == "equal"
            merged += lines[start:end] if is_kept else map(self._with_newlines, after_lines[new_start:new_end])
        return "".join(merged)

    def _with_newlines(self, text: str) -> str:
        return text.replace("\n", self._newline)


def read_text(path: Path) -> RecipeText:
    """Return the text of a recipe file.

    Raises:
        InputError: the file cannot be read, or is not YAML.

    """
    text = syntax.read_text(path)
    syntax.compose(path, VersionedResolver)  # its limits hold for the slower reader that keeps comments
    try:
        return RecipeText(text)
    except YAMLError as error:
        raise RecipeError([syntax.syntax_problem(error, text, path)]) from error


def _yaml() -> YAML:
    yaml = YAML(typ="rt")
    yaml.Emitter = _Emitter
    yaml.preserve_quotes, yaml.width = True, LONGEST_LINE
    yaml.composer.warn_double_anchors = False
    return yaml


def _load(text: str) -> Any:
    return _yaml().load(text.replace("\r\n", "\n").replace("\r", "\n"))


def _dump(data: CommentedMap, indent: int) -> str:
    yaml = _yaml()
    yaml.indent(mapping=indent or 2)
    out = io.StringIO()
    yaml.dump(data, out)
    return out.getvalue()


def _parts(text: str) -> list[str]:
    """Return the lines of each top-level key; lines above the first key belong to it."""
    lines, data = LINE_END.split(text), _load(text)
    starts = [0, *(data.lc.key(key)[0] for key in list(data)[1:])]
    return ["".join(lines[start:end]) for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]


def _replace(values: CommentedMap, key: str, value: Any) -> None:
    present = values[key]
    if isinstance(present, CommentedMap | CommentedSeq) and present.anchor.value is not None:
        raise InputError(f"the value of `{key}` has the anchor `&{present.anchor.value}`")
    comment = _comment_of(values, key)
    values[key] = value
    _set_comment(values, key, comment)


def _flow(value: Any) -> Any:
    """Return a list or mapping that is written on one line."""
    if isinstance(value, Mapping):
        mapping = CommentedMap((key, _flow(item)) for key, item in value.items())
        mapping.fa.set_flow_style()
        return mapping
    if isinstance(value, Sequence) and not isinstance(value, str):
        sequence = CommentedSeq(map(_flow, value))
        sequence.fa.set_flow_style()
        return sequence
    return value


def _comment_of(values: CommentedMap, key: str) -> CommentToken | None:
    """Return the comment for a value on one line: the comment after the key, and that after the last item."""
    behind_key, last = _comment_at(values, key), _last_comment(values, key)
    if behind_key is None or last is None or behind_key is last:
        return behind_key or last
    _, _, following = last.value.partition("\n")
    return CommentToken(behind_key.value + following, behind_key.start_mark)


def _last_comment(container: Any, key: str | int) -> CommentToken | None:
    """Return the comment after a value: in block style, after the last of its items."""
    value = container[key]
    is_block = isinstance(value, CommentedMap | CommentedSeq) and not value.fa.flow_style()
    if is_block and len(value):
        return _last_comment(value, list(value)[-1] if isinstance(value, CommentedMap) else len(value) - 1)
    return _comment_at(container, key)


def _comment_at(container: Any, key: str | int) -> CommentToken | None:
    comments = container.ca.items.get(key) or [None] * 4
    token = comments[0 if isinstance(container, CommentedSeq) else VALUE_COMMENT]
    return token if isinstance(token, CommentToken) else None


def _set_comment(values: CommentedMap, key: str, comment: CommentToken | None) -> None:
    above = (values.ca.items.pop(key, None) or [None] * 4)[1]
    if comment is not None or above is not None:
        values.ca.items[key] = [None, above, comment, None]


def _move_following_comment(values: CommentedMap, key: str, new_key: str) -> None:
    """Move blank lines and comments below a key to the key that was added behind it."""
    comment = _comment_at(values, key)
    if comment is None:
        return
    first, _, below = comment.value.partition("\n")
    _set_comment(values, key, CommentToken(f"{first}\n", comment.start_mark) if first else None)
    _set_comment(values, new_key, CommentToken(f"\n{below}", CommentMark(0)) if below else None)
