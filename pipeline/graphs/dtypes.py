"""The table of dtypes: our names (those of torch), the names of safetensors, and sizes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorDtype:
    """One dtype: `name` is ours and torch's, `short` is safetensors's."""

    name: str
    short: str
    size_bytes: int

    def as_torch(self) -> torch.dtype:
        """Return torch's dtype."""
        import torch  # not at the top: the plan and the sources read the table without torch

        dtype = getattr(torch, self.name)
        assert isinstance(dtype, torch.dtype)
        return dtype


_TABLE = (
    TensorDtype("float32", "F32", 4),
    TensorDtype("bfloat16", "BF16", 2),
    TensorDtype("float16", "F16", 2),
    TensorDtype("int64", "I64", 8),
    TensorDtype("int32", "I32", 4),
    TensorDtype("int8", "I8", 1),
    TensorDtype("bool", "BOOL", 1),
    # In headers of checkpoints; no graph uses these.
    TensorDtype("float64", "F64", 8),
    TensorDtype("int16", "I16", 2),
    TensorDtype("uint64", "U64", 8),
    TensorDtype("uint32", "U32", 4),
    TensorDtype("uint16", "U16", 2),
    TensorDtype("uint8", "U8", 1),
    TensorDtype("float8_e4m3fn", "F8_E4M3", 1),
    TensorDtype("float8_e5m2", "F8_E5M2", 1),
    TensorDtype("float8_e8m0fnu", "F8_E8M0", 1),
)

DTYPES = {dtype.name: dtype for dtype in _TABLE}
"""Dtypes by our name."""

SAFETENSORS = {dtype.short: dtype for dtype in _TABLE}
"""Dtypes by the name in a safetensors header."""


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for one of our names."""
    return DTYPES[name].as_torch()
