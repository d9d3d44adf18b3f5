"""Products of 16-bit matrices in float32, rounded once: what the CPU's own instructions give, where it has none.

Without such instructions torch computes a bfloat16 product 7 times slower (Linear layers of SmolLM2-135M, one core of
an AMD EPYC with AVX2). Both sum in float32 and round the result; only the order of the sum differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pipeline.artifact.host import multiplies

PRODUCTS = {functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__}
NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class WideProducts(TorchFunctionMode):
    """Within it, a product of 16-bit matrices is computed in float32 where that is faster."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes = {dtype for name, dtype in NARROW.items() if not multiplies(name)}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute a product in float32 and round it; leave everything else as it is."""
        options: Mapping[str, Any] = kwargs or {}
        if func in PRODUCTS and args and args[0].dtype in self.dtypes and args[0].device.type == "cpu":
            return func(*map(_wide, args), **{n: _wide(value) for n, value in options.items()}).to(args[0].dtype)
        return func(*args, **options)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value
