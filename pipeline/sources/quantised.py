"""Find the quantised matrices among the tensors of a checkpoint: values, scales, zero points as one. Imports no torch.

The formats are those of their writers: DeepSeek and AutoFP8 (fp8), compressed-tensors, AutoGPTQ, AutoAWQ, and the
MXFP4 of gpt-oss. `bitsandbytes` has those of bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from pipeline.models.compressed import Compressed
from pipeline.models.quantisation import Awq, Fp8, Gptq, Quantisation, is_skipped, named
from pipeline.sources.bitsandbytes import with_bitsandbytes
from pipeline.sources.packed import Grid, PackedRef, Source
from pipeline.sources.quantised_module import Module, matrix_shape
from pipeline.sources.tensors import TensorRef, small_bytes

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in a word of each of 8 values, as AutoAWQ's kernel `gemm` wants them."""

MXFP4_VALUES = 32
"""Values that share an exponent."""

ONE_BYTE = ("F8_E4M3", "F8_E5M2", "I8")
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")

UNREAD = (
    "input_scale", "activation_scale", "input_zero_point", "input_global_scale", "k_scale", "v_scale", "q_scale",
)  # fmt: skip
"""Scales of activations and caches, which are not rounded here."""

PARTS = {
    "fp8": ("weight_scale_inv", "weight_scale"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "mxfp4": (),
}
"""Names of the tensors of a quantised matrix, by method."""

BLOCKS, EXPONENTS = "_blocks", "_scales"
"""Ends of the names of MXFP4 tensors, which hold all experts."""


def with_quantised(tensors: Mapping[str, TensorRef], quantisation: Quantisation | None) -> dict[str, Source]:
    """Return the tensors of a checkpoint with each quantised matrix as one, under the name of its weight.

    Raises:
        SourceError: a module whose tensors do not fit the config.

    """
    if quantisation is None:
        return dict(tensors)
    if quantisation.method == "mxfp4":
        return dict(_with_blocks(tensors))
    if quantisation.method == "bitsandbytes":
        return with_bitsandbytes(tensors, quantisation)
    modules: dict[str, dict[str, TensorRef]] = {}
    found: dict[str, Source] = {}
    parts = PARTS[quantisation.method]
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        if part in parts or (part == "weight" and tensor.dtype in ONE_BYTE):
            modules.setdefault(stem, {})[part] = tensor
        elif part not in UNREAD:
            found[name] = tensor
    for stem, of_module in modules.items():
        module = Module(stem, of_module)
        if is_skipped(stem, quantisation):
            raise module.error("is one that quantization_config leaves out")
        found[f"{stem}.weight"] = _matrix_of(module, quantisation)
    return found


def _matrix_of(module: Module, quantisation: Quantisation) -> PackedRef:
    scheme = quantisation.schemes[0]
    if isinstance(scheme, Fp8):
        return _fp8(module, scheme)
    if isinstance(scheme, Gptq):
        return _gptq(module, scheme)
    if isinstance(scheme, Awq):
        return _awq(module)
    return _compressed(module, _scheme_of(module, quantisation))


def _scheme_of(module: Module, quantisation: Quantisation) -> Compressed:
    """Return the group of a module: one that names it, before one that names its class."""
    schemes = [scheme for scheme in quantisation.schemes if isinstance(scheme, Compressed)]
    for scheme in schemes:
        if any(named(module.name, target) for target in scheme.targets):
            return scheme
    for scheme in schemes:
        if "Linear" in scheme.targets:
            return scheme
    raise module.error("is in no group of config_groups")


def _fp8(module: Module, scheme: Fp8) -> PackedRef:
    values = module.need("weight")
    scale = module.tensors.get("weight_scale_inv") or module.need("weight_scale")
    return _one_byte(module, values, scale, _block_of(module, values, scale, scheme.block))


def _block_of(
    module: Module, values: TensorRef, scale: TensorRef, block: tuple[int, int] | None
) -> tuple[int, int]:  # fmt: skip
    """Return the rows and columns that share a scale: all, those of a row, or of a block."""
    rows, columns = matrix_shape(values.shape)
    if math.prod(scale.shape) == 1:
        return rows, columns
    if matrix_shape(scale.shape) == (rows, 1):
        return 1, columns
    if block is None:
        raise module.error(f"has scales {list(scale.shape)}, expected one, or one for each of {rows} rows")
    return block


def _one_byte(
    module: Module, values: TensorRef, scale: TensorRef, block: tuple[int, int], zeros: TensorRef | None = None,
    *, rounded: str | None = None,
) -> PackedRef:  # fmt: skip
    """Return a matrix of values in one byte each."""
    if values.dtype not in ONE_BYTE or len(values.shape) != 2:
        raise module.error(f"has a weight {list(values.shape)} of dtype {values.dtype}")
    rows, columns = values.shape
    size = -(-rows // block[0]), -(-columns // block[1])
    return PackedRef(
        values=Grid(values, rows, columns),
        scales=module.grid("scales", _scales(module, scale, *size)),
        zeros=None if zeros is None else module.grid("weight_zero_point", Grid(zeros, *size)),
        block=block, last=rows, rounded=rounded,
    )  # fmt: skip


def _scales(module: Module, ref: TensorRef, rows: int, columns: int, *, transposed: bool = False) -> Grid:
    if ref.dtype not in SCALES:
        raise module.error(f"has scales of dtype {ref.dtype}; accepted: {', '.join(SCALES)}")
    return Grid(ref, rows, columns, transposed, codes="e8m0" if ref.dtype in ("U8", "F8_E8M0") else "number")


def _compressed(module: Module, scheme: Compressed) -> PackedRef:
    """Return a matrix of compressed-tensors; its reader computes in the dtype of the scales."""
    scale = module.need("weight_scale")
    zeros = module.need("weight_zero_point") if scheme.zeros else None
    if not scheme.packed:
        stored = module.need("weight")
        if stored.dtype.startswith("F8") != (scheme.kind == "float"):
            raise module.error(f"has values of dtype {stored.dtype}, but config_groups has type {scheme.kind!r}")
        block = _shared(scheme, *matrix_shape(stored.shape))
        return _one_byte(module, stored, scale, block, zeros, rounded=scale.dtype)
    words = module.need("weight_packed")
    rows, columns = words.shape[0], _columns(module, scheme, words, scale)
    block = _shared(scheme, rows, columns)
    size, add = (-(-rows // block[0]), -(-columns // block[1])), -(1 << (scheme.bits - 1))
    values = Grid(words, rows, columns, bits=scheme.bits, add=add)
    of_zeros = None if zeros is None else Grid(zeros, *size, bits=scheme.bits, along="rows", add=add)
    return PackedRef(
        values=module.grid("weight_packed", values),
        scales=module.grid("weight_scale", _scales(module, scale, *size)),
        zeros=None if of_zeros is None else module.grid("weight_zero_point", of_zeros),
        block=block, last=rows, index=_index(module, "weight_g_idx", columns), rounded=scale.dtype,
    )  # fmt: skip


def _shared(scheme: Compressed, rows: int, columns: int) -> tuple[int, int]:
    """Return the rows and columns that share a scale."""
    if scheme.block is not None:
        return scheme.block
    return (1 if scheme.by_row else rows), scheme.group or columns


def _columns(module: Module, scheme: Compressed, words: TensorRef, scale: TensorRef) -> int:
    """Return the columns of a packed matrix: words may hold more values than the last row's."""
    if scheme.group is not None:
        return matrix_shape(scale.shape)[1] * scheme.group
    shape = module.need("weight_shape")
    if shape.dtype not in ("I32", "I64") or shape.nbytes not in (8, 16):
        raise module.error(f"has weight_shape of dtype {shape.dtype} and shape {list(shape.shape)}")
    data, size = small_bytes(shape), shape.nbytes // 2
    rows, columns = (int.from_bytes(data[at : at + size], "little", signed=True) for at in (0, size))
    if rows != words.shape[0] or columns <= 0:
        raise module.error(f"has weight_shape {[rows, columns]}, but {words.shape[0]} rows")
    return columns


def _index(module: Module, part: str, columns: int) -> TensorRef | None:
    """Return the group of each column; None where groups are columns in a row."""
    ref = module.tensors.get(part)
    if ref is not None and (ref.dtype != "I32" or ref.shape != (columns,)):
        raise module.error(f"has {part} {list(ref.shape)} of dtype {ref.dtype}, expected [{columns}] of dtype I32")
    return ref


def _gptq(module: Module, scheme: Gptq) -> PackedRef:
    words, scale, zeros = (module.need(part) for part in ("qweight", "scales", "qzeros"))
    columns, rows = matrix_shape(words.shape)[0] * 32 // scheme.bits, matrix_shape(words.shape)[1]
    groups = matrix_shape(scale.shape)[0]
    values = Grid(words, rows, columns, transposed=True, bits=scheme.bits)
    of_zeros = Grid(
        zeros, rows, groups, transposed=True, bits=scheme.bits, along="rows", add=int(scheme.first), wraps=True
    )
    return PackedRef(
        values=module.grid("qweight", values),
        scales=module.grid("scales", _scales(module, scale, rows, groups, transposed=True)),
        zeros=module.grid("qzeros", of_zeros),
        block=(1, -(-columns // groups)), last=rows, index=_index(module, "g_idx", columns),
    )  # fmt: skip


def _awq(module: Module) -> PackedRef:
    words, scale, zeros = (module.need(part) for part in ("qweight", "scales", "qzeros"))
    columns, rows = matrix_shape(words.shape)[0], matrix_shape(words.shape)[1] * len(AWQ_ORDER)
    groups = matrix_shape(scale.shape)[0]
    values = Grid(words, rows, columns, transposed=True, bits=4, along="rows", order=AWQ_ORDER)
    of_zeros = Grid(zeros, rows, groups, transposed=True, bits=4, along="rows", order=AWQ_ORDER)
    return PackedRef(
        values=module.grid("qweight", values),
        scales=module.grid("scales", _scales(module, scale, rows, groups, transposed=True)),
        zeros=module.grid("qzeros", of_zeros),
        block=(1, -(-columns // groups)), last=rows,
    )  # fmt: skip


def _with_blocks(tensors: Mapping[str, TensorRef]) -> Iterator[tuple[str, Source]]:
    """Yield the tensors of a checkpoint with the MXFP4 matrices of each expert."""
    for name, tensor in tensors.items():
        if name.endswith(EXPONENTS) and f"{name.removesuffix(EXPONENTS)}{BLOCKS}" in tensors:
            continue
        if not name.endswith(BLOCKS):
            yield name, tensor
            continue
        block, _, leaf = name.removesuffix(BLOCKS).rpartition(".")
        module = Module(f"{block}.{leaf}", {BLOCKS: tensor} | _exponents(name, tensors))
        for expert, matrix in enumerate(mxfp4(module)):
            yield f"{block}.{expert}.{leaf}.weight", matrix


def _exponents(name: str, tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    found = tensors.get(f"{name.removesuffix(BLOCKS)}{EXPONENTS}")
    return {} if found is None else {EXPONENTS: found}


def mxfp4(module: Module) -> Iterator[PackedRef]:
    """Yield the matrix [out, in] of each expert in blocks [experts, out, in / 32, 16] and exponents."""
    blocks, scale = module.need(BLOCKS), module.need(EXPONENTS)
    if len(blocks.shape) != 4 or blocks.shape[3] * 2 != MXFP4_VALUES or (blocks.dtype, scale.dtype) != ("U8", "U8"):
        raise module.error(f"has blocks {list(blocks.shape)} of dtype {blocks.dtype}")
    if scale.shape != blocks.shape[:3]:
        raise module.error(f"has exponents {list(scale.shape)}, expected {list(blocks.shape[:3])}")
    experts, rows, groups = scale.shape
    for expert in range(experts):
        values = Grid(blocks.part(expert), rows, groups * MXFP4_VALUES, bits=4, codes="e2m1")
        yield PackedRef(
            values=module.grid("blocks", values),
            scales=module.grid("exponents", _scales(module, scale.part(expert), rows, groups)),
            block=(1, MXFP4_VALUES), last=rows,
        )  # fmt: skip
