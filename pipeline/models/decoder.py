"""The decoder of every supported family: RMSNorm, rotary attention over a KV cache, SwiGLU. Pure functions.

Contains no phases and no sampling. `Seams` defines how weights are stored and reduced.

Shapes: B rows, T tokens, S keys attended over, H hidden, N query heads, G KV heads, D head size, V vocabulary;
heads and vocabulary are this rank's share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.config import Llama3Rope, ModelConfig
from pipeline.models.parallel import Pass, Seams
from pipeline.models.weights import EMBEDDING, HEAD, NORM, OFFSET, local_heads, padded_vocab

Weights = Mapping[str, Tensor]
NEXT_NORM = "next_norm.weight"
"""Name, among a layer's weights, of the norm after it."""
Rotary = tuple[Tensor, Tensor]
"""Cos and sin of the rotary embedding, [B, 1, T, D]."""


class Hidden(NamedTuple):
    """Hidden states of one pass: `last_BTH` after the last norm, `taps_BTX` inputs of tapped layers concatenated."""

    last_BTH: Tensor
    taps_BTX: Tensor | None = None


class Stream(NamedTuple):
    """The residual stream before a layer, and the same after the layer's norm."""

    x_BTH: Tensor
    normed_BTH: Tensor


def hidden_states(
    config: ModelConfig,
    weights: Weights,
    seams: Seams,
    tokens_BT: Tensor,
    run: Pass,
    taps: tuple[int, ...] = (),
) -> Hidden:
    """Run all layers and write keys and values into the caches of `run`.

    `taps` lists layers whose input is returned too, for a draft that reads the target's hidden states; the number of
    layers means the output of the last one.
    Shapes: tokens_BT int32 or int64 [B, T].
    """
    x = embed(config, weights, seams, tokens_BT)
    rotary = rotary_of(config, run.positions_BT, x.dtype)
    norms = {layer: weights[f"model.layers.{layer}.input_layernorm.weight"] for layer in range(config.layers)}
    stream = Stream(x, rms_norm(x, norms[0], config.norm_eps))
    tapped = []
    for layer in range(config.layers):
        if layer in taps:
            tapped.append(stream.x_BTH)
        own = run.of_layer(layer)
        w = layer_weights(weights, layer) | {NEXT_NORM: norms.get(layer + 1, weights[NORM])}
        stream = seams.once(run_layer, config, w, seams, stream, rotary, own)
        run.keep(layer, own.state)
    if config.layers in taps:
        tapped.append(stream.x_BTH)
    return Hidden(stream.normed_BTH, torch.cat(tapped, dim=-1) if taps else None)


def run_layer(config: ModelConfig, w: Weights, seams: Seams, stream: Stream, rotary: Rotary, run: Pass) -> Stream:
    """Run one layer over its caches (`Pass.of_layer`), then the norm after it: of the next layer, or the last one.

    So a layer that is compiled alone adds its residual and computes the next norm in one loop.
    """
    x = stream.x_BTH + attention(config, w, seams, stream.normed_BTH, rotary, run)
    x = x + mlp(config, w, seams, rms_norm(x, w["post_attention_layernorm.weight"], config.norm_eps))
    return Stream(x, rms_norm(x, w[NEXT_NORM], config.norm_eps))


def logits(config: ModelConfig, weights: Weights, seams: Seams, hidden_BTH: Tensor, limit: int | None = None) -> Tensor:
    """Return this rank's slice of the logits, float32 [B, T, V]; -inf from id `limit` (None: the vocabulary) on."""
    head = weights[EMBEDDING if config.tied else HEAD]
    rows = vocab_rows(config.out_vocab, seams.tp)
    out_BTV = seams.head(hidden_BTH, head, rows)
    size = min(limit or config.out_vocab, config.out_vocab)
    if rows * seams.tp == size:
        return out_BTV
    ids_V = torch.arange(rows, device=out_BTV.device) + weights[OFFSET]
    return torch.where(ids_V < size, out_BTV, -math.inf)


def vocab_rows(vocab: int, tp: int) -> int:
    """Return the vocabulary rows of one rank: all on a single rank, whole blocks when split."""
    return vocab if tp == 1 else padded_vocab(vocab, tp) // tp


def layer_weights(weights: Weights, layer: int) -> dict[str, Tensor]:
    """Return one layer's weights, by their names without the layer's prefix."""
    prefix = f"model.layers.{layer}."
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def embed(config: ModelConfig, weights: Weights, seams: Seams, tokens_BT: Tensor) -> Tensor:
    """Embed tokens: int [B, T] -> [B, T, H], in the model's dtype."""
    table, dtype = weights[EMBEDDING], weights[NORM].dtype
    if seams.tp == 1:
        return seams.embed(tokens_BT, table).to(dtype)
    rows = vocab_rows(config.vocab, seams.tp)
    local_BT = tokens_BT - weights[OFFSET]
    mine_BT = (local_BT >= 0) & (local_BT < rows)
    x_BTH = seams.embed(local_BT.clamp(0, rows - 1), table).to(dtype)
    return seams.all_reduce(torch.where(mine_BT[..., None], x_BTH, torch.zeros_like(x_BTH)))


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Normalise in float32, scale in the model's dtype (Zhang and Sennrich 2019, as transformers computes it)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight_H * wide.to(x.dtype)


def rotary_of(config: ModelConfig, positions_BT: Tensor, dtype: torch.dtype) -> Rotary:
    """Return cos and sin [B, 1, T, D] of the rotary embedding (Su et al. 2021), angles computed in float32."""
    angles = positions_BT.float()[:, None, :, None] * rotary_frequencies(config, positions_BT.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Return the angle by which each pair of a head's values turns per position: float32 [D / 2]."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    # exp instead of theta ** x: not every compiler supports a power with a varying exponent.
    frequencies = torch.exp(exponents * -math.log(config.rope_theta)) / config.rope_linear_factor
    return frequencies if config.rope_scaling is None else _scale_llama3(frequencies, config.rope_scaling)


def _scale_llama3(frequencies: Tensor, rope: Llama3Rope) -> Tensor:
    """Scale as Llama 3.1: divide low frequencies by `factor`, keep high ones, interpolate between them."""
    wavelength = 2 * math.pi / frequencies
    low = rope.original_max_position / rope.low_freq_factor
    high = rope.original_max_position / rope.high_freq_factor
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    # Limits as tensors: XLA would compare with a Python number in float64.
    scaled = torch.where(wavelength > torch.full_like(wavelength, low), frequencies / rope.factor, between)
    return torch.where(wavelength < torch.full_like(wavelength, high), frequencies, scaled)


def rotate(x_BNTD: Tensor, rotary: Rotary) -> Tensor:
    """Apply the rotary embedding: [B, N, T, D]."""
    cos, sin = rotary
    first, second = x_BNTD.chunk(2, dim=-1)
    return x_BNTD * cos + torch.cat((-second, first), dim=-1) * sin


def project(w: Weights, seams: Seams, x_BTH: Tensor, rows: Mapping[str, int]) -> Tensor:
    """Apply linear layers with `rows` outputs each, with optional biases, and concatenate: [B, T, sum of rows]."""
    out = seams.linears(x_BTH, [w[f"{name}.weight"] for name in rows], list(rows.values()))
    biases = [w[f"{name}.bias"] for name in rows if f"{name}.bias" in w]
    return out + torch.cat(biases) if biases else out


def attention(config: ModelConfig, w: Weights, seams: Seams, x_BTX: Tensor, rotary: Rotary, run: Pass) -> Tensor:
    """Write one layer's keys and values, then attend over its cache: [B, T, H]."""
    assert run.attend is not None
    heads, kv_heads = local_heads(config, seams.tp), kv_heads_of(config, seams)
    turned, v = heads_of(config, w, seams, x_BTX, "qkv").split((heads + kv_heads, kv_heads), dim=1)
    q, k = rotate(turned, rotary).split((heads, kv_heads), dim=1)
    cached_k = seams.write(run.state, "k", k, run.writes)
    cached_v = seams.write(run.state, "v", v, run.writes)
    keys, values = (cached_k, cached_v) if run.attend.kv else (k, v)
    out_BTX = seams.attend(q, keys, values, run.attend)
    out = seams.all_reduce(seams.linear(out_BTX, w["self_attn.o_proj.weight"], config.hidden))
    bias = w.get("self_attn.o_proj.bias")
    return out if bias is None else out + bias


def store(config: ModelConfig, w: Weights, seams: Seams, x_BTX: Tensor, rotary: Rotary, run: Pass) -> None:
    """Write one layer's keys and values without attending."""
    k, v = heads_of(config, w, seams, x_BTX, "kv").chunk(2, dim=1)
    seams.write(run.state, "k", rotate(k, rotary), run.writes)
    seams.write(run.state, "v", v, run.writes)


def kv_heads_of(config: ModelConfig, seams: Seams) -> int:
    """Return the number of KV heads on this rank."""
    return max(config.kv_heads // seams.tp, 1)


def heads_of(config: ModelConfig, w: Weights, seams: Seams, x_BTX: Tensor, names: str) -> Tensor:
    """Return the heads of "qkv" or "kv" concatenated, q and k normalised where the family does so: [B, N, T, D]."""
    kv_heads = kv_heads_of(config, seams)
    counts = {name: local_heads(config, seams.tp) if name == "q" else kv_heads for name in names}
    rows = {f"self_attn.{name}_proj": count * config.head_dim for name, count in counts.items()}
    out = project(w, seams, x_BTX, rows).view(*x_BTX.shape[:2], -1, config.head_dim)
    if config.qk_norm:
        norms = [w[f"self_attn.{name}_norm.weight"].expand(counts[name], -1) for name in names if name in "qk"]
        rest, v = out.split((out.shape[2] - kv_heads, kv_heads), dim=2)
        out = torch.cat((rms_norm(rest, torch.cat(norms), config.norm_eps), v), dim=2)
    return out.transpose(1, 2)


def mlp(config: ModelConfig, w: Weights, seams: Seams, x_BTH: Tensor) -> Tensor:
    """Apply the SwiGLU feed-forward network (Shazeer 2020): [B, T, H] -> [B, T, H]."""
    rows = config.intermediate // seams.tp
    if config.mlp_bias:
        gate, up = project(w, seams, x_BTH, {"mlp.gate_proj": rows, "mlp.up_proj": rows}).chunk(2, dim=-1)
        inner = functional.silu(gate) * up
    else:
        inner = seams.swiglu(x_BTH, w["mlp.gate_proj.weight"], w["mlp.up_proj.weight"], rows)
    out = seams.all_reduce(seams.linear(inner, w["mlp.down_proj.weight"], config.hidden))
    bias = w.get("mlp.down_proj.bias")
    return out if bias is None else out + bias
