"""Mutations of inputs by their structure: of JSON and YAML documents, safetensors headers, zips, answers of servers.

All chances come from one `random.Random`, so that hypothesis can shrink them and a seed replays them.
"""

from __future__ import annotations

import copy
import io
import json
import random
import string
import zipfile
from collections.abc import Callable
from typing import Any

import yaml

INTEGERS = (0, 1, -1, 2, 7, 255, 4096, 2**31 - 1, 2**31, 2**32, -(2**31), 2**53, 2**63, 10**30, 10**400)
FLOATS = (0.0, -0.0, 0.5, 1e-300, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "", " ", "\0", "\n", "\t", "a", "0", "-1", "1e999", "null", "../x", "/etc/passwd", "a/b", "\ud800", "\u2028",
    "\ufeff",    "é" * 40, "x" * 3000, "%s%n", "{{ x }}", "{% for %}", "re:(", "[", "*", "hf://a/b@c", "s3://b/p", "pico://qwen3",
)  # fmt: skip
DEEP = 3000
BYTES = (
    b"\0",
    b"\xff",
    b"\r\n",
    b"\n",
    b",",
    b":",
    b"[",
    b"{",
    b"}",
    b'"',
    b"\\",
    b"\\u0000",
    b"-",
    b"&a",
    b"*a",
    b"<<: *a",
)
MOST_BYTES = 1 << 16
"""Limit for a mutated input."""


def mutated(data: bytes, form: str, chance: random.Random, times: int | None = None) -> bytes:
    """Return an input after a few mutations, half of them of its structure."""
    for _ in range(times or chance.choice((1, 1, 1, 2, 3, 8))):
        change = STRUCTURES.get(form) if chance.random() < 0.7 else None
        data = (change(data, chance) if change else None) or _bytes(data, chance)
    return data[:MOST_BYTES]


def _bytes(data: bytes, chance: random.Random) -> bytes:
    at, end = sorted((chance.randint(0, len(data)), chance.randint(0, len(data))))
    end = min(end, at + chance.choice((1, 2, 8, 64, 4096)))
    match chance.randrange(7):
        case 0:
            return data[:at] + data[end:]
        case 1:
            return data[:at] + data[at:end] * chance.choice((2, 3, 50)) + data[end:]
        case 2:
            return data[:at] + chance.choice(BYTES) + data[at:]
        case 3:
            return data[:at] + chance.randbytes(end - at) + data[end:]
        case 4:
            return data[:at]
        case 5:
            number = chance.choice(INTEGERS) % (1 << 64)
            size = chance.choice((1, 2, 4, 8))
            return data[:at] + (number % (1 << 8 * size)).to_bytes(size, "little") + data[at + size :]
        case _:
            flipped = bytearray(data or b"\0")
            flipped[min(at, len(flipped) - 1)] ^= 1 << chance.randrange(8)
            return bytes(flipped)


def value(chance: random.Random, depth: int = 0) -> Any:
    """Return an arbitrary JSON value."""
    match chance.randrange(8 if depth < 3 else 5):
        case 0:
            return chance.choice((None, True, False))
        case 1:
            return chance.choice(INTEGERS)
        case 2:
            return chance.choice(FLOATS)
        case 3 | 4:
            return chance.choice(TEXTS)
        case 5:
            return {chance.choice((*TEXTS, *string.ascii_lowercase)): value(chance, depth + 1) for _ in range(3)}
        case 6:
            return [value(chance, depth + 1) for _ in range(chance.choice((0, 1, 3)))]
        case _:
            return _nested(chance.choice((1, 20, DEEP)), chance)


class Nested:
    """A deep list or object; Python's own encoder cannot write it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __deepcopy__(self, _: object) -> Nested:
        return self


def _nested(depth: int, chance: random.Random) -> Nested:
    begin, end = chance.choice((("[", "]"), ('{"a":', "}")))
    return Nested(begin * depth + "0" + end * depth)


def _places(data: Any, found: list[tuple[Any, Any]], depth: int = 0) -> list[tuple[Any, Any]]:
    """Add every container and key of a document."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, inner in entries:
        found.append((data, key))
        if depth < 40:
            _places(inner, found, depth + 1)
    return found


def _document(data: Any, chance: random.Random) -> Any:
    """Return a document with one change."""
    data = copy.deepcopy(data)
    places = _places(data, [])
    if not places or chance.random() < 0.03:
        return value(chance)
    container, key = chance.choice(places)
    match chance.randrange(8):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[chance.choice((*TEXTS, f"{key}x"))] = container.pop(key)
        case 2 if isinstance(container, list):
            container[key:key] = [container[key]] * chance.choice((1, 2, 30))
        case 3:
            other, name = chance.choice(places)
            container[key] = copy.deepcopy(other[name])
        case 4:
            container[key] = [container[key]]
        case 5 if isinstance(container[key], int | float):
            container[key] = chance.choice((-container[key], container[key] + 1, container[key] * 2, 0.5, str(key)))
        case 6 if isinstance(container, dict):
            container[chance.choice(TEXTS)] = value(chance)
        case _:
            container[key] = value(chance)
    return data


def _dump(data: Any, chance: random.Random) -> bytes:
    nested: dict[str, str] = {}

    def hidden(item: Any) -> str:
        nested[f"@{len(nested)}@"] = item.text
        return f"@{len(nested) - 1}@"

    text = json.dumps(data, default=hidden, ensure_ascii=chance.random() < 0.5)
    for name, inner in nested.items():
        text = text.replace(f'"{name}"', inner)
    return text.encode(errors="surrogatepass")


def _json(data: bytes, chance: random.Random) -> bytes | None:
    try:
        return _dump(_document(json.loads(data), chance), chance)
    except (ValueError, RecursionError, OverflowError):
        return None


def _yaml(data: bytes, chance: random.Random) -> bytes | None:
    if (found := _json(data, chance)) is not None:
        return found
    try:
        document = _document(yaml.safe_load(data), chance)
        if chance.random() < 0.5:
            return yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode(errors="surrogatepass")
        return _dump(document, chance)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, OverflowError, AttributeError):
        return None


def _lines(data: bytes, chance: random.Random) -> bytes | None:
    lines = data.split(b"\n")
    at = chance.randrange(len(lines))
    match chance.randrange(4):
        case 0:
            lines[at : at + 1] = [lines[at]] * chance.choice((0, 2, 20))
        case 1:
            lines[at] = chance.choice(lines)
        case _:
            lines[at] = _json(lines[at], chance) or _bytes(lines[at], chance)
    return b"\n".join(lines)


def _safetensors(data: bytes, chance: random.Random) -> bytes | None:
    length = int.from_bytes(data[:8], "little")
    header = _json(data[8 : 8 + length], chance)
    if header is None:
        return None
    stated = len(header) + chance.choice((0, 0, 0, 0, 1, -1, 2**40))
    return (stated % 2**64).to_bytes(8, "little") + header + data[8 + length :]


def _zip(data: bytes, chance: random.Random) -> bytes | None:
    """Change a member of a zip: its name, its bytes, its mode, how it is packed; add a large one."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info, archive.read(info)) for info in archive.infolist()]
    except Exception:
        return None
    at = chance.randrange(len(members) + 1)
    info, content = members[at] if at < len(members) else (zipfile.ZipInfo("more"), b"")
    match chance.randrange(6):
        case 0:
            info = zipfile.ZipInfo(
                chance.choice(("../x", "/x", "a/../../x", "x" * 300, "a\\b", "é", f"{info.filename}/"))
            )
        case 1:
            info.external_attr = chance.choice((0o120777, 0o040755, 0o100644)) << 16
        case 2:
            content = bytes(chance.choice((0, 1, 1 << 20)))
            info.compress_type = zipfile.ZIP_DEFLATED
        case 3:
            content = _json(content, chance) or _bytes(content, chance)
        case 4:
            members = members[:at]
        case _:
            members.append(chance.choice(members or [(info, content)]))
    members[at : at + 1] = [(info, content)]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, inner in members:
            archive.writestr(member, inner)
    return buffer.getvalue()


def _answer(data: bytes, chance: random.Random) -> bytes | None:
    """Change an answer over HTTP: a header or the body; the length is mostly that of the body."""
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    if chance.random() < 0.4:
        at = chance.randrange(len(lines))
        lines[at] = chance.choice(ANSWERS) if at == 0 or chance.random() < 0.5 else _bytes(lines[at], chance)
    else:
        body = _json(body, chance) or _bytes(body, chance)
    if chance.random() < 0.8:
        lines = [line for line in lines if not line.lower().startswith(b"content-length")]
        lines.append(b"Content-Length: %d" % len(body))
    if chance.random() < 0.7 and not lines[0].startswith(b"HTTP/1."):
        lines[0:0] = [b"HTTP/1.1 200 OK"]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


STATUSES = (200, 206, 301, 307, 400, 401, 403, 404, 409, 412, 416, 429, 500, 501, 503)
ANSWERS = (
    *(b"HTTP/1.1 %d X" % status for status in STATUSES),
    b"Location: http://127.0.0.1:1/x", b"Location: //[", b"Content-Length: -1", b"Content-Length: 99999999999999",
    b"Content-Range: bytes 0-9/10", b"Content-Range: bytes x", b"ETag: x", b'ETag: ""', b"Transfer-Encoding: chunked",
    b"Content-Encoding: gzip", b"Last-Modified: never", b"Last-Modified: Mon, 01 Jan 1970 00:00:00 GMT",
    b"Link: <http://127.0.0.1:1/next>; rel=\"next\"", b"X-Error-Code: EntryNotFound", b"X-Error-Code: GatedRepo",
    b"X-Error-Code: RepoNotFound", b"X-Error-Code: RevisionNotFound", b"X-Error-Message: Invalid credentials",
    b"Content-Type: text/html",
)  # fmt: skip
"""Lines of answers."""

STRUCTURES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "json": _json, "yaml": _yaml, "lines": _lines, "safetensors": _safetensors, "zip": _zip, "answer": _answer,
}  # fmt: skip
"""Form of an input -> a mutation of its structure; None where the input has no such structure any more."""
