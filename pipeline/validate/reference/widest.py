"""Layers of transformers that compute in float32 whatever their dtype is, in float64 where their inputs are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Widest(TorchFunctionMode):
    """Within it, float64 tensors stay float64 where code asks for float32.

    The recurrence of a gated delta net is such code. In float32 the baseline would have as much noise as the noise run,
    and the same where both round alike.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Convert a float64 tensor to float64 in place of float32; leave everything else as it is."""
        options: dict[str, Any] = dict(kwargs or {})
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if func is Tensor.to and args[0].dtype == torch.float64:
            args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        return func(*args, **options)
