"""Find the matrices that bitsandbytes stored: 4-bit codes with a state, or int8. Imports no torch."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from pipeline.errors import SourceError
from pipeline.files.limits import parse_json
from pipeline.graphs.dtypes import DTYPES
from pipeline.models.fields import LARGEST, LIMIT, is_int, shown
from pipeline.models.quantisation import Bnb, Quantisation, is_skipped
from pipeline.sources.packed import TABLES, Grid, Nested, PackedRef, Source
from pipeline.sources.quantised_module import Module
from pipeline.sources.tensors import TensorRef, fetch_small, small_bytes

Kind = Literal["nf4", "fp4"]

STATE = "quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
OF_WEIGHT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(STATE + kind for kind in KINDS))
"""Tensors beside 4-bit codes: their names follow that of the weight."""

OF_MODULE = ("SCB", "weight_format")
"""Tensors beside an int8 weight."""

STATE_BYTES = 4096
"""Limit for a state, which has about 170 bytes."""

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = ("nested_blocksize", "nested_dtype", "nested_offset")
FIELDS = ("quant_type", "blocksize", "dtype", "shape", *NESTED)
MAP_TOLERANCE = 1e-6
"""Within which bitsandbytes takes two maps as equal."""

BYTE_SCALE = 7.874015718698502e-3
"""1 / 127 in float32, as bitsandbytes multiplies."""

CORRUPT = "download the checkpoint again"
UNQUANTISED = "use the unquantised checkpoint"


@dataclass(frozen=True)
class State:
    """The state of a 4-bit matrix. `dtype` is the one that values are rounded to, in the words of safetensors."""

    kind: Kind
    blocksize: int
    dtype: str
    rows: int
    columns: int
    nested: tuple[int, float] | None
    """Size of a block of scales, and what is added to each scale."""


@dataclass(frozen=True)
class Reader:
    """The JSON object of a state, and the module whose matrix it describes."""

    module: Module
    data: Mapping[str, Any]

    def error(self, key: str, expected: str) -> SourceError:
        """Return the error of a field."""
        found = shown(self.data[key]) if key in self.data else "missing"
        return self.module.error(f"has a quant_state with {key}: {found}; {expected}", CORRUPT)

    def choice(self, key: str, accepted: tuple[str | int, ...]) -> Any:
        """Return a field that has one of some values."""
        value = self.data.get(key)
        if not (isinstance(value, str) or is_int(value)) or value not in accepted:
            raise self.error(key, f"accepted: {', '.join(map(str, accepted))}")
        return value

    def shape(self) -> tuple[int, int]:
        """Return the rows and columns of the matrix."""
        value = self.data.get("shape")
        if not isinstance(value, list) or len(value) != 2 or not all(is_int(one) and 0 < one < LIMIT for one in value):
            raise self.error("shape", "expected two positive integers")
        return value[0], value[1]

    def number(self, key: str) -> float:
        """Return a field that is a number of float32."""
        value = self.data.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
            raise self.error(key, "expected a finite number")
        return float(value)


def with_bitsandbytes(tensors: Mapping[str, TensorRef], quantisation: Quantisation) -> dict[str, Source]:
    """Return the tensors of a checkpoint with each quantised matrix as one, under the name of its weight.

    Raises:
        SourceError: a module whose tensors do not fit the config, or whose state is damaged.

    """
    four = quantisation.schemes == (Bnb(4),)
    found: dict[str, Source] = {}
    modules: dict[str, dict[str, TensorRef]] = {}
    for name, tensor in tensors.items():
        stem, part = _parted(name, four=four)
        if part or (name.endswith(".weight") and tensor.dtype in ("U8", "I8")):
            modules.setdefault(stem, {})[part or "weight"] = tensor
        else:
            found[name] = tensor
    fetch_small(ref for of_module in modules.values() for ref in _read_now(of_module))
    for stem, of_module in modules.items():
        weight = found.pop(f"{stem}.weight", None)
        module = Module(stem, of_module if weight is None else of_module | {"weight": tensors[f"{stem}.weight"]})
        if is_skipped(stem, quantisation):
            raise module.error("is one that quantization_config leaves out")
        found[f"{stem}.weight"] = _four_bits(module) if four else _eight_bits(module)
    return found


def _read_now(tensors: Mapping[str, TensorRef]) -> list[TensorRef]:
    """Return the tensors of a module that are read when it is found: states, maps, layouts."""
    small = {part: ref for part, ref in tensors.items() if ref.nbytes <= STATE_BYTES}
    return [ref for part, ref in small.items() if part in ("quant_map", "weight_format") or part.startswith(STATE)]


def _parted(name: str, *, four: bool) -> tuple[str, str]:
    """Return the module of a tensor, and the last part of its name if only quantised modules have it."""
    stem, _, part = name.rpartition(".weight." if four else ".")
    if part in (OF_WEIGHT if four else OF_MODULE):
        return stem, part
    return name.removesuffix(".weight"), ""


def _four_bits(module: Module) -> PackedRef:
    state, values = _state(module), module.need("weight")
    rows, columns = state.rows, state.columns
    if columns % state.blocksize:
        what = f"has rows of {columns} values, which blocks of {state.blocksize} values straddle"
        raise module.error(what, UNQUANTISED)
    if values.dtype != "U8" or values.shape != (rows * columns // 2, 1):
        stored = f"{list(values.shape)} of dtype {values.dtype}"
        raise module.error(f"has a weight {stored}, expected [{rows * columns // 2}, 1] of dtype U8")
    _check_map(module, state.kind)
    groups = columns // state.blocksize
    scales = _vector(module, "absmax", rows * groups, "F32" if state.nested is None else "U8")
    return PackedRef(
        values=Grid(replace(values, shape=(rows, columns // 2)), rows, columns, bits=4, order=(1, 0), codes=state.kind),
        scales=Grid(replace(scales, shape=(rows, groups)), rows, groups),
        block=(1, state.blocksize), last=rows, nested=_nested(module, state, rows * groups), rounded=state.dtype,
    )  # fmt: skip


def _state(module: Module) -> State:
    """Return the state of a 4-bit matrix; its name has the type, too."""
    names = [part for part in module.tensors if part.startswith(STATE)]
    if len(names) != 1:
        found = ", ".join(sorted(module.tensors))
        raise module.error(f"has {len(names)} tensors {STATE}*, expected one; found: {found}")
    read = Reader(module, _document(module, names[0]))
    for key in read.data:
        if key not in FIELDS:
            raise module.error(f"has a quant_state with the field {shown(key)}, which is not supported", UNQUANTISED)
    kind = read.choice("quant_type", (names[0].removeprefix(STATE),))
    nested = None
    if any(part.startswith("nested_") for part in (*module.tensors, *read.data)):
        read.choice("nested_dtype", ("float32",))
        nested = read.choice("nested_blocksize", BLOCKSIZES), read.number("nested_offset")
    dtype = DTYPES[read.choice("dtype", ("bfloat16", "float16", "float32"))].short
    rows, columns = read.shape()
    return State(cast("Kind", kind), read.choice("blocksize", BLOCKSIZES), dtype, rows, columns, nested)


def _document(module: Module, name: str) -> Mapping[str, Any]:
    """Return the JSON object in a tensor."""
    ref = module.tensors[name]
    if ref.dtype != "U8" or ref.nbytes > STATE_BYTES:
        raise module.error(f"has {name} of dtype {ref.dtype} and {ref.nbytes:,} bytes, limit {STATE_BYTES:,}", CORRUPT)
    try:
        data = parse_json(small_bytes(ref))
    except ValueError as error:
        raise module.error(f"has {name} that is not JSON: {error}", CORRUPT) from error
    if not isinstance(data, dict):
        raise module.error(f"has {name} that is not a JSON object", CORRUPT)
    return data


def _vector(module: Module, part: str, count: int, dtype: str) -> TensorRef:
    """Return a tensor after comparing its shape and dtype."""
    ref = module.need(part)
    if (ref.shape, ref.dtype) != ((count,), dtype):
        found = f"{part} {list(ref.shape)} of dtype {ref.dtype}"
        raise module.error(f"has {found}, expected [{count}] of dtype {dtype}")
    return ref


def _check_map(module: Module, kind: Kind) -> None:
    """Reject a map other than that of the type, which is the one that bitsandbytes computes with."""
    table = TABLES[kind]
    found = struct.unpack(f"<{len(table)}f", small_bytes(_vector(module, "quant_map", len(table), "F32")))
    if not all(abs(one - other) <= MAP_TOLERANCE for one, other in zip(found, table, strict=True)):
        raise module.error(f"has a quant_map that is not the one of {kind}", UNQUANTISED)


def _nested(module: Module, state: State, blocks: int) -> Nested | None:
    if state.nested is None:
        return None
    size, offset = state.nested
    scales = _vector(module, "nested_absmax", -(-blocks // size), "F32")
    return Nested(scales, _vector(module, "nested_quant_map", 256, "F32"), size, offset)


def _eight_bits(module: Module) -> PackedRef:
    values = module.need("weight")
    if values.dtype != "I8" or len(values.shape) != 2:
        raise module.error(f"has a weight {list(values.shape)} of dtype {values.dtype}, expected a matrix of dtype I8")
    layout = module.tensors.get("weight_format")
    if layout is not None and (layout.dtype != "U8" or math.prod(layout.shape) != 1 or any(small_bytes(layout))):
        raise module.error("has a weight_format other than 0, which are rows", UNQUANTISED)
    rows, columns = values.shape
    scales = replace(_vector(module, "SCB", rows, "F32"), shape=(rows, 1))
    return PackedRef(Grid(values, rows, columns), Grid(scales, rows, 1), (1, columns), rows, factor=BYTE_SCALE)
