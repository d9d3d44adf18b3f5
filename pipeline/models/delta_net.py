"""A gated delta net (Yang et al. 2024, arXiv:2412.06464): attention whose memory is a matrix for each head.

A token decays the matrix S of a head, and corrects what S answers to its key k towards its value v:
S <- exp(decay) S + beta k (v - k exp(decay) S). Its output is q S. A short convolution over the last tokens makes
queries, keys and values.

A matrix cannot forget a rejected token, so a row keeps S as it was some tokens ago, and the inputs of the tokens since
(`recurrence.Recurrence`). Each pass replays those that were accepted, in the same products as its own tokens.

Shapes: B rows, T tokens of the pass, L kept inputs, N tokens of the recurrence (replayed and new), R value heads (of
this rank), D size of keys, E size of values, C channels of the convolution, K its kernel, X = C + 2 R, Z = L + T, P
tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.blocks import RECURRENT_CHUNK
from pipeline.models.config import DeltaNet
from pipeline.models.parallel import Seams, State
from pipeline.models.recurrence import Recurrence
from pipeline.models.weights import DELTA, RECENT

EPS = 1e-6
"""Added to the squared length of queries and keys, as in transformers."""

QKV, BETA, DECAY, GATE = ("q_proj", "k_proj", "v_proj"), "in_proj_b", "in_proj_a", "z_proj"


class Heads(NamedTuple):
    """Queries, keys [B, R, N, D] and values [B, R, N, E], decays (logarithms) and betas [B, R, N], all float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor


def mixed(
    net: DeltaNet, w: Mapping[str, Tensor], projected_BTX: Tensor, state: State, how: Recurrence, seams: Seams
) -> Tensor:  # fmt: skip
    """Return the outputs of all heads, float32 [B, T, R, E], of tokens whose projections are q, k, v, b, a in a row.

    Advances the state of the layer: `DELTA` float32 [rows, R, D, E], `RECENT` [rows, L, X] in the model's dtype. `net`
    is that of this rank.
    """
    tokens = projected_BTX.shape[1]
    held_BLX = state[RECENT][how.rows_B[:, None], how.slots_BL]
    held_BLX = torch.where(how.held_BL[..., None], held_BLX, torch.zeros_like(held_BLX))
    read_BT1 = how.read_BN[:, -tokens:, None]  # what linear layers have for tokens that are not live may be anything
    projected_BTX = torch.where(read_BT1, projected_BTX, torch.zeros_like(projected_BTX))
    whole_BZX = torch.cat((held_BLX, projected_BTX), dim=1)
    index = how.stored_BL[..., None].expand(-1, -1, whole_BZX.shape[-1])
    seams.put_row(state, RECENT, how.rows_B, whole_BZX.gather(1, index))
    heads = heads_of(net, w, whole_BZX, how)
    before = state[DELTA][how.rows_B]
    before = torch.where(how.empty_B[:, None, None, None], torch.zeros_like(before), before)
    out, after = scan(heads, before, how.kept_BN)
    seams.put_row(state, DELTA, how.rows_B, after)
    return out[:, :, -tokens:].transpose(1, 2)


def heads_of(net: DeltaNet, w: Mapping[str, Tensor], whole_BZX: Tensor, how: Recurrence) -> Heads:
    """Return what the recurrence reads of its tokens; those that it must not read change nothing."""
    channels = 2 * net.keys + net.values
    conv = torch.cat([w[f"linear_attn.{name[0]}_conv.weight"] for name in QKV]).view(channels, net.kernel)
    qkv = functional.silu(convolved(whole_BZX[..., :channels], conv))
    of_tokens = whole_BZX[:, net.kernel - 1 :, channels:]
    beta, decay = of_tokens.split((net.value_heads, net.value_heads), dim=-1)
    q, k, v = qkv.split((net.keys, net.keys, net.values), dim=-1)
    group = net.value_heads // net.key_heads

    def unit(x_BNC: Tensor) -> Tensor:
        x = x_BNC.unflatten(-1, (net.key_heads, net.key_dim)).float()
        x = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPS)
        return x.repeat_interleave(group, dim=2).transpose(1, 2)

    rate_R = w["linear_attn.A_log"].float().exp()
    decay = -rate_R * functional.softplus(decay.float() + w["linear_attn.dt_bias"].float())
    read_B1N = how.read_BN[:, None]
    return Heads(
        unit(q) * net.key_dim**-0.5,
        unit(k),
        v.unflatten(-1, (net.value_heads, net.value_dim)).transpose(1, 2).float(),
        torch.where(read_B1N, decay.transpose(1, 2), 0.0),
        torch.where(read_B1N, torch.sigmoid(beta).transpose(1, 2).float(), 0.0),
    )


def convolved(x_BZC: Tensor, conv_CK: Tensor) -> Tensor:
    """Convolve each channel with its own kernel, summed in float32: the outputs that see K inputs, [B, N, C]."""
    kernel = conv_CK.shape[1]
    count = x_BZC.shape[1] - kernel + 1
    wide, taps = x_BZC.float(), conv_CK.float().unbind(1)
    parts = [wide[:, tap : tap + count] * taps[tap] for tap in range(kernel)]
    return sum(parts[1:], parts[0]).to(x_BZC.dtype)


def scan(heads: Heads, state: Tensor, kept_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs [B, R, N, E], and the state after the kept tokens, which are the first ones of each row.

    Chunks are condensed to products (section 3.3 of the paper); only the state goes from one to the next.
    Shapes: state float32 [B, R, D, E], kept_BN bool.
    """
    tokens = heads.q.shape[2]
    size = min(RECURRENT_CHUNK, tokens)
    chunks = -(-tokens // size)
    of_chunks = Heads(*(in_chunks(x, 2, chunks, size) for x in heads))
    kept = in_chunks(kept_BN, 1, chunks, size)[:, None]
    q, k = of_chunks.q, of_chunks.k
    sums = up_to(of_chunks.decay)
    low = lower(size, q.device)
    between = torch.exp(torch.where(low, sums[..., None] - sums[..., None, :], -math.inf))
    betas = of_chunks.beta[..., None]
    keys_t = k.transpose(-1, -2)
    inverse = unit_inverse(torch.where(strictly(low), (k * betas) @ keys_t * between, 0.0))
    new_values = inverse @ (of_chunks.v * betas)
    old_keys = inverse @ (k * betas * torch.exp(sums)[..., None])
    attention, decayed_q = (q @ keys_t) * between, q * torch.exp(sums)[..., None]
    writes, shrinks = weighted_keys(k, sums, None)
    kept_sums = up_to(torch.where(kept, of_chunks.decay, 0.0))
    kept_writes, kept_shrinks = weighted_keys(k, kept_sums, kept)
    out, after = [], state
    for chunk in range(chunks):
        corrections = new_values[:, :, chunk] - old_keys[:, :, chunk] @ state
        out.append(decayed_q[:, :, chunk] @ state + attention[:, :, chunk] @ corrections)
        after = after * kept_shrinks[:, :, chunk] + kept_writes[:, :, chunk] @ corrections
        if chunk + 1 < chunks:
            state = state * shrinks[:, :, chunk] + writes[:, :, chunk] @ corrections
    return (torch.cat(out, dim=2) if chunks > 1 else out[0])[:, :, :tokens], after


def weighted_keys(k: Tensor, sums: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return keys [.., D, P], decayed up to a chunk's end, and by how much the state before it decays, [.., 1, 1]."""
    last = sums[..., -1:]
    weights = torch.exp(last - sums)
    if kept is not None:
        weights = torch.where(kept, weights, 0.0)
    return (k * weights[..., None]).transpose(-1, -2), torch.exp(last)[..., None]


def in_chunks(x: Tensor, axis: int, chunks: int, size: int) -> Tensor:
    """Divide an axis into chunks; zeros (False) fill the last one."""
    missing = chunks * size - x.shape[axis]
    if missing:
        pad = x.new_zeros(*x.shape[:axis], missing, *x.shape[axis + 1 :])
        x = torch.cat((x, pad), dim=axis)
    return x.unflatten(axis, (chunks, size))


def lower(size: int, device: torch.device) -> Tensor:
    """Return which entries [P, P] are on or below the diagonal."""
    places = torch.arange(size, device=device)
    return places[:, None] >= places


def strictly(low: Tensor) -> Tensor:
    """Return which of these are below the diagonal."""
    return low & ~low.t()


def up_to(x: Tensor) -> Tensor:
    """Return sums along the last axis, each up to its own entry: a product, for compilers without running sums."""
    return x @ lower(x.shape[-1], x.device).t().to(x.dtype)


def unit_inverse(below: Tensor) -> Tensor:
    """Return the inverse of I + `below`, which is strictly lower triangular: [.., P, P].

    By blocks that double: [[A, 0], [C, B]] has the inverse [[A', 0], [-B' C A', B']]. As stable as substitution, in
    log2(P) products.
    """
    size = below.shape[-1]
    places = torch.arange(size, device=below.device)
    inverse = torch.eye(size, dtype=below.dtype, device=below.device).expand_as(below)
    block = 1
    while block < size:
        number = places // block
        joins = (number[:, None] % 2 == 1) & (number == number[:, None] - 1)
        inverse = inverse - inverse @ torch.where(joins, below, 0.0) @ inverse
        block *= 2
    return inverse
