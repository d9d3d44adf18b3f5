"""Safetensors files by their headers: the position of each tensor, without reading its values. Imports no torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from pipeline.errors import SourceError, no_string
from pipeline.files.limits import parse_json
from pipeline.graphs.dtypes import SAFETENSORS
from pipeline.sources.remote import RemoteFile

HEADER_LIMIT_BYTES = 100_000_000
ALIGNMENT_BYTES = 64

File: TypeAlias = Path | RemoteFile
"""A file of weights, on this host or in a store."""


@dataclass(frozen=True)
class TensorRef:
    """Position of a tensor's bytes: `offset` is absolute in `file`; rows are contiguous."""

    file: File
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def rows(self, first: int, last: int) -> TensorRef:
        """Return rows [first, last) of axis 0."""
        row_bytes = self.nbytes // self.shape[0]
        return replace(
            self,
            shape=(last - first, *self.shape[1:]),
            offset=self.offset + first * row_bytes,
            nbytes=(last - first) * row_bytes,
        )

    def part(self, index: int) -> TensorRef:
        """Return one entry of axis 0."""
        return replace(self.rows(index, index + 1), shape=self.shape[1:])

    def flat(self) -> TensorRef:
        """Return the same values as a vector."""
        return replace(self, shape=(math.prod(self.shape),))


def read_bytes(ref: TensorRef) -> bytearray:
    """Return the bytes of a tensor."""
    data = bytearray(ref.nbytes)
    with opened(ref.file) as read:
        read(ref.offset, memoryview(data))
    return data


def small_bytes(ref: TensorRef) -> bytes:
    """Return the bytes of a small tensor that says how others are stored; a store sends them once."""
    return ref.file.piece(ref.offset, ref.nbytes) if isinstance(ref.file, RemoteFile) else bytes(read_bytes(ref))


def fetch_small(refs: Iterable[TensorRef]) -> None:
    """Fetch small tensors that stay in stores, so that `small_bytes` has them."""
    pieces: dict[RemoteFile, list[tuple[int, int]]] = {}
    for ref in refs:
        if isinstance(ref.file, RemoteFile):
            pieces.setdefault(ref.file, []).append((ref.offset, ref.nbytes))
    for file, of_file in pieces.items():
        file.prefetch(of_file)


@contextmanager
def opened(file: File) -> Iterator[Callable[[int, memoryview], int]]:
    """Yield a function that fills a buffer from an offset on; returns the number of bytes, fewer where the file ends.

    Raises:
        HostError: a store that cannot be read.

    """
    if isinstance(file, RemoteFile):
        yield file.read
        return
    with file.open("rb") as local:
        yield lambda offset, buffer: fill(local.fileno(), offset, buffer)


def fill(descriptor: int, offset: int, buffer: memoryview) -> int:
    """Fill a buffer from an open file; returns the number of bytes, fewer where the file ends."""
    done = 0
    while done < len(buffer) and (count := os.preadv(descriptor, [buffer[done:]], offset + done)):
        done += count
    return done


def read_header(path: File) -> dict[str, TensorRef]:
    """Return the tensors of one safetensors file by name.

    Raises:
        SourceError: the file is missing, truncated, or has a malformed header.

    """
    header, start, size = _raw_header(path)
    tensors, end = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            first, last = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise _damaged(path, f"malformed header entry of tensor {name!r}: {entry!r}") from error
        known = SAFETENSORS.get(dtype)
        if not 0 <= first <= last or (known and last - first != known.size_bytes * math.prod(shape)):
            raise _damaged(path, f"tensor {name!r}: {last - first} bytes do not match {dtype}{list(shape)}")
        tensors[name] = TensorRef(path, dtype, shape, start + first, last - first)
        end = max(end, last)
    if start + end != size:
        state = "truncated" if size < start + end else "longer than its header describes"
        raise _damaged(path, f"file is {state}: {size} bytes, the header describes {start + end}")
    return tensors


def _raw_header(path: File) -> tuple[dict[str, Any], int, int]:
    """Return the parsed header, the offset of the data, and the size of the file."""
    try:
        size = path.size if isinstance(path, RemoteFile) else path.stat().st_size
        prefix = _start(path, 8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(HEADER_LIMIT_BYTES, size - 8):
            raise _damaged(path, f"file is truncated or not safetensors: {size} bytes, header of {length}")
        header = parse_json(_start(path, 8 + length)[8:])
    except FileNotFoundError as error:
        raise SourceError("weight file is missing", where=str(path), fix="download the checkpoint again") from error
    except ValueError as error:
        raise _damaged(path, f"header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, "header is not a JSON object")
    return header, 8 + length, size


def _start(path: File, length: int) -> bytes:
    if isinstance(path, RemoteFile):
        return path.start(length)
    with path.open("rb") as file:
        return file.read(length)


def _damaged(path: File, what: str) -> SourceError:
    return SourceError(what, where=str(path), fix="delete this file and download the checkpoint again")


@dataclass(frozen=True)
class Extent:
    """A range of a file: `offset` is absolute."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """A safetensors file before it is written: its header, and the position of each tensor."""

    header: bytes
    tensors: Mapping[str, Extent]
    size: int


def layout(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> Layout:
    """Return the layout of tensors (name, safetensors dtype, shape) in the order given."""
    no_string(tensors, "tensors", "tensors")
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    extents, end = {}, 0
    for name, dtype, shape in tensors:
        nbytes = SAFETENSORS[dtype].size_bytes * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        extents[name] = Extent(end, nbytes)
        end += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Padded with spaces, as the format allows, so that mapped tensors start on a cache line.
    text += b" " * (-(len(text) + 8) % ALIGNMENT_BYTES)
    start = 8 + len(text)
    absolute = {name: Extent(start + extent.offset, extent.nbytes) for name, extent in extents.items()}
    return Layout(len(text).to_bytes(8, "little") + text, absolute, start + end)
