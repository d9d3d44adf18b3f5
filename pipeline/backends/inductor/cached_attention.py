"""Attention of a few queries over a KV cache, as an operator that reads no key beyond each query's last one.

A graph is compiled for the longest sequence, but the time of a step depends on the current sequence. This module
defines the result; Inductor compiles it from `cached_attention_kernel.py`.

Shapes: B rows, N query heads, G KV heads, T queries, S_max cache length, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("tandem::cached_attention", mutates_args=())
def cached_attention(  # noqa: PLR0913 - an operator has no other form of options
    q: Tensor, k: Tensor, v: Tensor, last: Tensor, kv: int, window: int = 0, cap: float = 0.0,
    sinks: Tensor | None = None, rows: Tensor | None = None, ring: int = 0,
) -> Tensor:  # fmt: skip
    """Compute softmax attention (Vaswani et al. 2017) of grouped heads (Ainslie et al. 2023) in float32, rounded once.

    The compiled kernel rounds queries and shares to bfloat16 where caches are bfloat16 and the processor multiplies it.

    A query sees the last `window` keys (0: all), scores are bounded by `cap` (0: not) as cap tanh(score / cap), and
    each head's sink takes part in the softmax without a value. In a `ring` of so many slots, a multiple of
    `cached_attention_kernel.CHUNK` (0: none), position p is at slot p modulo their number.

    Shapes: q float32 [B, N, T, D], k and v [R >= B, G, S_max, D] of any float dtype, last int32 [B, T], the last of
    the keys 0 .. kv - 1 that a query sees, from 0, sinks float32 [N], rows int32 [B], the cache row of each (None: its
    own number) -> the caches' dtype [B, T, N, D]. All contiguous.
    """
    batch, heads, tokens, dim = q.shape
    groups = k.shape[1]
    chosen = torch.arange(batch, device=q.device) if rows is None else rows.long()
    slots = torch.arange(kv, device=q.device) % (ring or kv)
    keys, values = (cache[chosen][:, :, slots].float().repeat_interleave(heads // groups, dim=1) for cache in (k, v))
    places, last = torch.arange(kv, device=q.device), last.clamp(max=kv - 1)[:, None, :, None]
    hidden = (places > last) | (places <= last - (window or kv))
    scores = q @ keys.transpose(-1, -2) * dim**-0.5
    scores = (torch.tanh(scores / cap) * cap if cap else scores).masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(batch, -1, tokens, 1)), dim=-1)
    return (torch.softmax(scores, dim=-1)[..., :kv] @ values).transpose(1, 2).contiguous().to(k.dtype)


@cached_attention.register_fake
def _(q: Tensor, k: Tensor, *_: Any, **__: Any) -> Tensor:
    batch, heads, tokens, dim = q.shape
    return k.new_empty(batch, tokens, heads, dim)
