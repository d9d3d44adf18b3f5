"""The header of a GGUF file, walked before gguf's own reader reads it. Imports no torch.

The reader goes by the counts that a file states: an array of 2^40 numbers in a small file fills the memory. Here
every count and length is compared with the bytes that are left.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a value -> its size; the other two are below."""

TEXT, ARRAY = 8, 9
DEEPEST = 4
"""Limit for arrays inside each other."""

MOST_AXES = 8
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass
class _Cursor:
    """A position in a file's bytes."""

    data: mmap.mmap
    at: int = 0

    def number(self, kind: struct.Struct) -> int:
        """Return the next number."""
        self.skip(kind.size)
        return int(kind.unpack_from(self.data, self.at - kind.size)[0])

    def skip(self, size: int) -> None:
        """Go on; raises beyond the end."""
        if size > len(self.data) - self.at:
            raise ValueError("the header goes beyond the end of the file")
        self.at += size

    def value(self, kind: int, depth: int = 0) -> None:
        """Go behind a value of a type."""
        if kind in BYTES:
            self.skip(BYTES[kind])
        elif kind == TEXT:
            self.skip(self.number(U64))
        elif kind == ARRAY and depth < DEEPEST:
            self.array(depth)
        else:
            raise ValueError(f"unknown type of a value: {kind}")

    def array(self, depth: int) -> None:
        """Go behind an array."""
        kind, count = self.number(U32), self.number(U64)
        if kind in BYTES:
            self.skip(count * BYTES[kind])
            return
        self.reserve(count, U64.size)
        for _ in range(count):
            self.value(kind, depth + 1)

    def reserve(self, count: int, size: int) -> None:
        """Raise if so many parts of at least `size` bytes cannot follow."""
        if count * size > len(self.data) - self.at:
            raise ValueError(f"the header states {count:,} entries, more than the file can hold")


def check_header(path: Path) -> None:
    """Check that counts and lengths of a GGUF file's header stay within the file.

    Raises:
        ValueError: they do not, or the file is not GGUF, or of another version or byte order.

    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data)
        cursor.skip(len(MAGIC))
        if data[: len(MAGIC)] != MAGIC:
            raise ValueError("not a GGUF file")
        if (version := cursor.number(U32)) not in VERSIONS:
            raise ValueError(f"version {version}, or big-endian; accepted: {VERSIONS}, little-endian")
        tensors, values = cursor.number(U64), cursor.number(U64)
        cursor.reserve(values, U64.size + U32.size)
        for _ in range(values):
            cursor.skip(cursor.number(U64))
            cursor.value(cursor.number(U32))
        cursor.reserve(tensors, 2 * U64.size + 2 * U32.size)
        for _ in range(tensors):
            cursor.skip(cursor.number(U64))
            if (axes := cursor.number(U32)) > MOST_AXES:
                raise ValueError(f"a tensor of {axes:,} axes")
            cursor.skip(axes * U64.size + U32.size + U64.size)
