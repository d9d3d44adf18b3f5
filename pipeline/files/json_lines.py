"""The reader of JSON lines: UTF-8, one object per line, fields checked by a record.

Only a line feed ends a line: U+2028, U+0085, form feeds and the like inside a string are data. A byte order mark and
CRLF are accepted, and blank lines are skipped. Errors name file, line and column. Imports no torch.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import InputError, together

BLANK = b" \t\r"
UTF8 = "save the file as UTF-8, for example: iconv -f {} -t UTF-8 FILE > NEW"
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
SPACE = re.compile(r"[ \t\r]*")
SURROGATE = re.compile("[\ud800-\udfff]")
NAMES = {
    "NoneType": "null",
    "bool": "a boolean",
    "int": "a number",
    "float": "a number",
    "str": "a string",
    "list": "an array",
    "dict": "an object",
}
"""Names of JSON's types."""


EXPECTED = {"string_type": "a string", "int_type": "a whole number", "int_from_float": "a whole number"}
"""What pydantic's errors ask for."""


class LineRecord(BaseModel):
    """The fields of a line: exact types, without conversions; other fields are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


Fields = TypeVar("Fields", bound=LineRecord)
Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_ERRORS = 10
"""Malformed lines that are shown, and after which reading ends."""


@dataclass(frozen=True)
class Place:
    """A line of a file, for errors."""

    path: Path
    number: int
    text: str

    def error(self, what: str, fix: str, *, key: str = "", column: int = 1) -> InputError:
        """Return an error at the value of a key, or at a column, from 1."""
        column = _columns(self.text).get(key, 1) if key else column
        return InputError(what, where=f"{self.path}:{self.number}:{column}", fix=fix)


@dataclass(frozen=True)
class Line(Generic[Fields]):
    """The fields of one line and its place."""

    place: Place
    fields: Fields


def read_json_lines(path: Path, record: type[Fields], *, fix: str, missing: str) -> list[Line[Fields]]:
    """Return the lines of a file.

    `fix` tells what a line should be, `missing` what to do about a file that cannot be read.

    Raises:
        InputError: the file cannot be read or has no lines, or lines are malformed; names file, line and column of
            the first ones.

    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror}", where=str(path), fix=missing) from error
    if data.startswith(UTF16):
        raise InputError("not UTF-8: the file is UTF-16", where=str(path), fix=UTF8.format("UTF-16"))
    lines = each_of(_places(data, path), lambda place: Line(place, _fields(place, record, fix)))
    if not lines:
        raise InputError("no lines in the file", where=str(path), fix=fix)
    return lines


def each_of(items: Iterable[Item], read: Callable[[Item], Result]) -> list[Result]:
    """Return what `read` returns for each item; at the end, raise its errors, the first ones, as one."""
    results: list[Result] = []
    errors: list[InputError] = []
    for item in items:
        try:
            results.append(read(item))
        except InputError as error:
            errors.append(error)
            if len(errors) == MOST_ERRORS:
                break
    if errors:
        raise together(errors)
    return results


def _places(data: bytes, path: Path) -> Iterator[Place]:
    for number, line in enumerate(data.split(b"\n"), 1):
        content = line.removeprefix(codecs.BOM_UTF8)  # also of a file appended to another
        if content.strip(BLANK):
            yield Place(path, number, _decoded(content, path, number))


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        place = Place(path, number, line[: error.start].decode())
        what, column = f"not UTF-8: byte 0x{line[error.start]:02x}", len(place.text) + 1
        raise place.error(what, UTF8.format("ISO-8859-1"), column=column) from error


def _fields(place: Place, record: type[Fields], fix: str) -> Fields:
    data = _object(place, fix)
    try:
        fields = record.model_validate(data)
    except ValidationError as error:
        raise _wrong_field(place, data, error, fix) from error
    for key in (field.alias or name for name, field in record.model_fields.items()):
        value = data.get(key)
        if isinstance(value, str) and (match := SURROGATE.search(value)):
            what = f"`{key}`: not valid Unicode: lone surrogate at index {match.start()}"
            raise place.error(what, "write the character itself, or both halves of its escape", key=key)
    return fields


def _object(place: Place, fix: str) -> dict[str, Any]:
    pairs: list[tuple[str, Any]] = []

    def keep(decoded: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = decoded  # the outermost object is decoded last
        return dict(decoded)

    try:
        data = json.loads(place.text, object_pairs_hook=keep, strict=False)
    except json.JSONDecodeError as error:
        problem = error.msg.removesuffix(" starting at").removesuffix(" at")
        raise place.error(f"not JSON: {problem}", fix, column=error.colno) from error
    except RecursionError as error:
        raise place.error("nested too deeply", fix) from error
    except ValueError as error:
        raise place.error("a number has too many digits", fix) from error
    if not isinstance(data, dict):
        raise place.error(f"not a JSON object: found {_kind(data)}", fix)
    for key, count in Counter(key for key, _ in pairs).items():
        if SURROGATE.search(key):
            raise place.error("a key is not valid Unicode: lone surrogate", "write the character itself")
        if count > 1:
            raise place.error(f"duplicate key: `{key}`", fix, key=key)
    return data


def _wrong_field(place: Place, data: Mapping[str, Any], error: ValidationError, fix: str) -> InputError:
    """Return the error of all missing fields, or of the first wrong one."""
    errors = error.errors(include_url=False)
    missing = [f"`{problem['loc'][0]}`" for problem in errors if problem["type"] == "missing"]
    if missing:
        return place.error(f"missing key: {', '.join(missing)}", fix)
    key = str(errors[0]["loc"][0])
    wanted = dict.fromkeys(EXPECTED.get(e["type"], e["msg"]) for e in errors if e["loc"][0] == key)
    return place.error(f"`{key}`: found {_kind(data[key])}, expected {' or '.join(wanted)}", fix, key=key)


def _kind(value: object) -> str:
    return NAMES[type(value).__name__]


def _columns(text: str) -> dict[str, int]:
    """Return the column of each value of an object, whose text is valid JSON."""
    decoder, columns = json.JSONDecoder(strict=False), {}
    index = _after_space(text, text.index("{") + 1)
    while text[index] != "}":
        key, index = decoder.raw_decode(text, index)
        start = _after_space(text, _after_space(text, index) + 1)  # behind the colon
        columns[str(key)] = start + 1
        _, index = decoder.raw_decode(text, start)
        index = _after_space(text, index)
        index = _after_space(text, index + 1) if text[index] == "," else index
    return columns


def _after_space(text: str, index: int) -> int:
    match = SPACE.match(text, index)
    assert match is not None
    return match.end()
