"""Caches of a model outside a graph: zeros, for all heads."""

from __future__ import annotations

import torch

from pipeline.models.config import ModelConfig
from pipeline.models.parallel import State
from pipeline.models.weights import BASE, DELTA, RECENT


def empty_caches(
    config: ModelConfig, rows: int, length: int, dtype: torch.dtype, device: str = "cpu", replayed: int = 1
) -> State:  # fmt: skip
    """Return the caches of a model on one rank: keys and values [rows, H, length, D], or recurrent states, by layer.

    `replayed` as in `graphs.spec.PairSpec`.
    """
    state: State = {}
    for layer in config.keeping:
        own, net = config.at(layer), config.layer(layer).delta_net
        if net is None:
            shape = (rows, own.kv_heads, length, own.head_dim)
            state |= {f"{part}.{layer}": torch.zeros(shape, dtype=dtype, device=device) for part in "kv"}
            continue
        matrices, inputs = (rows, net.value_heads, net.key_dim, net.value_dim), (net.kernel - 1 + replayed, net.inputs)
        state[f"{DELTA}.{layer}"] = torch.zeros(matrices, dtype=torch.float32, device=device)
        state[f"{RECENT}.{layer}"] = torch.zeros(rows, *inputs, dtype=dtype, device=device)
    if config.delta_net is not None:
        state[BASE] = torch.zeros(rows, dtype=torch.int32, device=device)
    return state
