"""RMSNorm (Zhang and Sennrich 2019) in the styles of transformers' families. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.models.config import ModelConfig, NormStyle


def norm(config: ModelConfig, w: Mapping[str, Tensor], name: str | None, x: Tensor) -> Tensor:
    """Apply a layer's norm of that name; None: no norm."""
    return x if name is None else rms_norm(x, w[f"{name}.weight"], config.norm_eps, config.norm_style)


def rms_norm(x: Tensor, weight_H: Tensor, eps: float, style: NormStyle = "narrow") -> Tensor:
    """Normalise in float32, scale as transformers does in the given style."""
    return norm_scaled(normalised(x, eps), weight_H, style, x.dtype)


def normalised(x: Tensor, eps: float) -> Tensor:
    """Normalise along the last axis: float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def norm_scaled(wide: Tensor, weight_H: Tensor, style: NormStyle, dtype: torch.dtype) -> Tensor:
    """Scale normalised float32 values; return them in the model's dtype."""
    if style == "narrow":
        return weight_H * wide.to(dtype)
    scale_H = weight_H.float()
    return (wide * (1 + scale_H if style == "offset" else scale_H)).to(dtype)
