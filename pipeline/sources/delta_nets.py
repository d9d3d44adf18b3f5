"""Matrices of Qwen3-Next and Qwen3.5 that hold several of those that models use. Copies nothing; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.models.config import DeltaNet, ModelConfig
from pipeline.sources.packed import Source, every
from pipeline.sources.tensors import TensorRef

Part = tuple[str, Source]
NET, QUERIES = ".linear_attn.", ".self_attn.q_proj."


def taken_apart(tensors: Mapping[str, Source], c: ModelConfig) -> Iterator[Part]:
    """Yield tensors by the names that models use; one of another size stays whole, and is rejected as extra."""
    net = c.delta_net
    for name, tensor in tensors.items():
        rows = tensor.shape[0] if tensor.shape else 0
        if c.attention_gate and QUERIES in name and rows == 2 * c.heads * c.head_dim:
            yield name, every(tensor, 2 * c.head_dim, 0, c.head_dim)
            yield name.replace("q_proj", "q_gate_proj"), every(tensor, 2 * c.head_dim, c.head_dim, c.head_dim)
        elif net is not None and NET in name:
            yield from _of_net(name, tensor, rows, net)
        else:
            yield name, tensor


def _of_net(name: str, tensor: Source, rows: int, net: DeltaNet) -> Iterator[Part]:
    block, _, leaf = name.partition(NET)
    base = f"{block}{NET}"
    of_group, wide = net.value_heads // net.key_heads, 2 * net.keys + net.values
    values = of_group * net.value_dim
    if leaf == "in_proj_qkvz.weight" and rows == wide + net.values:
        runs = (("q", net.key_dim), ("k", net.key_dim), ("v", values), ("z", values))
        yield from _of_groups(tensor, net, {f"{base}{part}_proj.weight": run for part, run in runs})
    elif leaf == "in_proj_ba.weight" and rows == 2 * net.value_heads:
        yield from _of_groups(tensor, net, {f"{base}in_proj_{part}.weight": of_group for part in "ba"})
    elif leaf == "in_proj_qkv.weight" and rows == wide:
        for part, first, last in _ranges(net):
            yield f"{base}{part}_proj.weight", tensor.rows(first, last)
    elif leaf == "conv1d.weight" and tensor.shape == (wide, 1, net.kernel) and isinstance(tensor, TensorRef):
        for part, first, last in _ranges(net):
            yield f"{base}{part}_conv.weight", tensor.rows(first, last).flat()
    else:
        yield name.replace("in_proj_z.", "z_proj."), tensor


def _ranges(net: DeltaNet) -> Iterator[tuple[str, int, int]]:
    """Yield the rows of queries, keys and values, where they stand one after the other."""
    yield "q", 0, net.keys
    yield "k", net.keys, 2 * net.keys
    yield "v", 2 * net.keys, 2 * net.keys + net.values


def _of_groups(tensor: Source, net: DeltaNet, runs: Mapping[str, int]) -> Iterator[Part]:
    """Yield matrices of which each key head has some rows in a row: name -> number of rows."""
    phase = 0
    for name, run in runs.items():
        yield name, every(tensor, tensor.shape[0] // net.key_heads, phase, run)
        phase += run
