"""Lengths of served requests, from a log (JSON lines, CSV) or a histogram (JSON, YAML). Imports no torch."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from pipeline.errors import InputError, RecipeError
from pipeline.files.json_lines import LineRecord, read_json_lines
from pipeline.recipe.document import Document
from pipeline.recipe.document import read as read_document

PROMPT = (
    "prompt_tokens", "input_tokens", "gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "ContextTokens",
    "Request tokens",
)  # fmt: skip
ANSWER = (
    "completion_tokens", "output_tokens", "gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens",
    "GeneratedTokens", "Response tokens",
)  # fmt: skip
"""Names of the two lengths: of OpenAI's `usage`, as vLLM returns it, of its later API, of OpenTelemetry's attributes
(now and earlier), of the public traces AzureLLMInferenceTrace and BurstGPT."""

COUNT = "count"
"""Requests of these lengths that an entry stands for; default: 1."""

FIX = 'write {"prompt_tokens": 310, "completion_tokens": 128}, or these two names as columns of a .csv file'
HISTOGRAM_FIX = (
    'write {"prompt_tokens": {"310": 12}, "completion_tokens": {"128": 12}}: length and number of requests; '
    'or {"310": 12}, prompts only; a log\'s name ends in .jsonl or .csv'
)
MISSING = "name a file that exists: a log (.jsonl, .csv) or a histogram (.json, .yaml)"
MOST_DIGITS = 18


@dataclass(frozen=True)
class Room:
    """What an artifact can take: `tokens` of prompt and answer together in a row of the cache of `kv` positions, which
    the models allow to grow up to `limit`.
    """

    kv: int
    limit: int

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer: the last position of the cache is reserved."""
        return self.kv - 1


@dataclass(frozen=True)
class Traffic:
    """Requests by (prompt, answer) length in tokens, each counted `copies` times.

    `has_answers` is false if only prompts are known (answer 0).
    """

    requests: Mapping[tuple[int, int], int]
    has_answers: bool = True
    copies: int = 1

    @property
    def prompts(self) -> Counter[int]:
        """Requests by length of the prompt, each counted `copies` times."""
        found: Counter[int] = Counter()
        for (prompt, _), count in self.requests.items():
            found[prompt] += count
        return found


@dataclass(frozen=True)
class _Entry:
    """The values of one request, or of equal ones, and the error for one of its keys: `fail(key, what)`."""

    values: Mapping[str, Any]
    fail: Callable[[str, str], InputError]

    def length(self, names: tuple[str, ...], kind: str, least: int) -> int:
        """Return the value of the first of several names."""
        name = next((name for name in names if name in self.values), None)
        if name is None:
            raise self.fail("", f"no {kind} length; accepted keys: {', '.join(names)}")
        return self.whole(name, least)

    def whole(self, key: str, least: int) -> int:
        """Return the value of a key, a whole number."""
        value = self.values[key]
        if type(value) is not int or value < least:
            raise self.fail(key, f"`{key}`: found {_shown(value)}, expected a whole number from {least}")
        return value


def read_traffic(path: Path, room: Room) -> Traffic:
    """Return the requests of a file; its suffix is the format.

    Raises:
        InputError: the file cannot be read, has no requests, or has lengths that are no whole numbers or do not fit the
            cache; names file and line.

    """
    formats = {
        ".jsonl": _log, ".ndjson": _log, ".log": _log, ".csv": _log, ".json": _histogram, ".yaml": _histogram,
        ".yml": _histogram,
    }  # fmt: skip
    if path.suffix.lower() not in formats:
        what = f"found the suffix {path.suffix!r}; accepted: {', '.join(formats)}"
        raise InputError(what, where=str(path), fix=MISSING)
    traffic = formats[path.suffix.lower()](path, room)
    if not any(traffic.requests.values()):
        raise InputError("no requests in the file", where=str(path), fix=FIX)
    return traffic


def _log(path: Path, room: Room) -> Traffic:
    requests: Counter[tuple[int, int]] = Counter()
    for entry in _rows(path) if path.suffix.lower() == ".csv" else _lines(path):
        prompt, answer = entry.length(PROMPT, "prompt", 1), entry.length(ANSWER, "answer", 0)
        if prompt + answer > room.tokens:
            found = f"{prompt} prompt tokens and {answer} answer tokens"
            raise _too_long(found, room, entry.fail("", ""))
        requests[prompt, answer] += entry.whole(COUNT, 0) if COUNT in entry.values else 1
    return Traffic(requests)


class _Line(LineRecord):
    """A line with any keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")


def _lines(path: Path) -> Iterator[_Entry]:
    """Yield the lines of a log; lengths may be in an object `usage`."""
    for line in read_json_lines(path, _Line, fix=FIX, missing=MISSING):
        values = dict(line.fields.model_extra or {})
        if isinstance(usage := values.get("usage"), dict):
            values |= usage
        place = line.place
        yield _Entry(values, lambda key, what, place=place: place.error(what, FIX, key=key))  # type: ignore[misc]


def _rows(path: Path) -> Iterator[_Entry]:
    """Yield the rows of a CSV file with a header."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror}", where=str(path), fix=MISSING) from error
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: byte {error.start}", where=str(path), fix="save the file as UTF-8") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            yield _Entry({key: _number(cell) for key, cell in row.items()}, _failure(where, FIX))
    except csv.Error as error:
        raise InputError(f"not CSV: {error}", where=f"{path}:{reader.reader.line_num}", fix=FIX) from error


def _failure(where: str, fix: str) -> Callable[[str, str], InputError]:
    return lambda _, what: InputError(what, where=where, fix=fix)


def _number(cell: Any) -> Any:
    """Return the number of a cell that has decimal digits only, else the cell."""
    is_number = isinstance(cell, str) and cell.strip().isascii() and cell.strip().isdecimal()
    return int(cell.strip()) if is_number and len(cell) <= MOST_DIGITS else cell


def _histogram(path: Path, room: Room) -> Traffic:
    """Return the requests of a histogram of prompts, or of two: answers are then independent of prompts."""
    try:
        document = read_document(path)
    except RecipeError as error:
        raise InputError(error.what, where=error.where, fix=HISTOGRAM_FIX) from error
    for problem in document.problems:
        raise InputError(problem.what, where=problem.where, fix=problem.fix)
    names = [next((name for name in kind if name in document.data), None) for kind in (PROMPT, ANSWER)]
    if names == [None, None]:
        prompts = _counts(document, (), 1, room)
        return Traffic({(prompt, 0): count for prompt, count in prompts.items()}, has_answers=False)
    if None in names or len(document.data) > len(names):
        what = f"found the keys {', '.join(document.data)}; expected one histogram of prompts and one of answers"
        raise InputError(what, where=f"{path}:1", fix=HISTOGRAM_FIX)
    prompts, answers = (_counts(document, (str(name),), 1 - at, room) for at, name in enumerate(names))
    requests: Counter[tuple[int, int]] = Counter()
    for (prompt, of_prompt), (answer, of_answer) in product(prompts.items(), answers.items()):
        requests[prompt, min(answer, room.tokens - prompt)] += of_prompt * of_answer
    return Traffic(requests, copies=answers.total())


def _counts(document: Document, section: tuple[str, ...], least: int, room: Room) -> Counter[int]:
    """Return the histogram in a section: lengths from `least` that fit the cache, each with its count."""
    values = document.data[section[0]] if section else document.data
    if not isinstance(values, dict):
        what = f"found {_shown(values)}, expected a histogram"
        raise InputError(what, where=document.place(section), fix=HISTOGRAM_FIX)
    counts: Counter[int] = Counter()
    for key, count in values.items():
        fail = _failure(document.place((*section, key)), HISTOGRAM_FIX)
        entry = _Entry({"length": _number(key), COUNT: count}, fail)
        length = entry.whole("length", least)
        if length > room.tokens:
            raise _too_long(f"{length} tokens", room, fail("", ""))
        counts[length] += entry.whole(COUNT, 0)
    return counts


def _too_long(found: str, room: Room, at: InputError) -> InputError:
    """Return the error of a request that no row of the cache can hold, at the place of another error."""
    what = f"{found} do not fit the largest kv bucket {room.kv}, whose rows hold {room.tokens} tokens"
    larger = f"use a larger kv bucket (the models take up to {room.limit}), or " if room.limit > room.kv else ""
    return InputError(what, where=at.where, fix=f"{larger}remove the request")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
