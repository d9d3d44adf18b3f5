"""Activation functions of feed-forward networks."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from pipeline.models.config import Activation


def activated(activation: Activation, x: Tensor) -> Tensor:
    """Apply an activation function."""
    return functional.silu(x) if activation == "silu" else functional.gelu(x, approximate="tanh")
