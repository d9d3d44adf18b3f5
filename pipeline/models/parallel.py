"""The interface between a model's mathematics and its backend: layouts of weights, collectives, the KV cache.

A decoder calls only these methods for everything that a backend may implement differently. `Seams` here is the plain,
single-rank implementation that also serves as the eager reference; backends derive from it.

Shapes: B rows, T tokens, S cache length, H KV heads on this rank, D head size, N output features, I input features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, TypeVarTuple

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.activations import activated
from pipeline.models.config import Activation, Clamp
from pipeline.models.recurrence import Recurrence
from pipeline.models.weights import DELTA, RECENT

Args = TypeVarTuple("Args")
R = TypeVar("R")
State = dict[str, Tensor]
"""Caches of one model: `k.<layer>` and `v.<layer>`, each [rows, H, S_max, D]; those with a window may be rings.

A ring has fewer positions: position p is at slot p modulo the number of slots, after which comes the scratch position.
Recurrent layers have `delta` and `recent` instead, with the `base` of each row (`Recurrence`).
"""

CACHES = ("k", "v", DELTA, RECENT)
"""States of one layer, without its number."""


def first_cache(state: State) -> Tensor:
    """Return the keys of the first layer that has some."""
    return next(cache for name, cache in state.items() if name.startswith("k."))


Block = Literal["none", "first", "any", "ring"]
"""Whether the tokens that a row keeps are a block: the first tokens of the pass, at the first positions, at any, or at
any of a ring, where a block may go on at the first slot.
"""


@dataclass(frozen=True)
class Writes:
    """Where a pass stores its keys and values: one index into every cache of a model that has `length` positions.

    `index` int64 (rows [B, 1, 1], heads [1, H, 1], positions [B, 1, T]). Tokens that are a `block` of distinct rows may
    be written as one. A cache of fewer positions is a ring, for which `around` has the index.
    """

    index: tuple[Tensor, Tensor, Tensor]
    block: Block = "none"
    length: int = 0

    def around(self, slots: int) -> Writes:
        """Return the writes into rings of `slots` slots, beside the scratch position."""
        rows, heads, places_B1T = self.index
        is_scratch = places_B1T == self.length - 1
        index = (rows, heads, torch.where(is_scratch, slots, slot_of(places_B1T, slots)))
        return Writes(index, "ring" if self.block == "any" else self.block, slots + 1)

    def of_heads(self, count: int) -> Writes:
        """Return the same for caches of so many heads."""
        rows, heads, positions = self.index
        if heads.shape[1] == count:
            return self
        return replace(self, index=(rows, torch.arange(count, device=heads.device)[None, :, None], positions))


def slot_of(positions: Tensor, slots: int) -> Tensor:
    """Return positions modulo `slots`; positions are integers from 0 to 2**24, which float32 has exactly.

    Without a division of integers or a remainder, which not every compiler has.
    """
    turns = torch.floor(positions.float() / slots).to(positions.dtype)
    rest = positions - turns * slots
    rest = torch.where(rest < 0, rest + slots, rest)  # quotients are rounded
    return torch.where(rest >= slots, rest - slots, rest)


def plan_writes(
    state: State, rows_B: Tensor, positions_BT: Tensor, keep_BT: Tensor, block: Block = "none",
    length: int | None = None,
) -> Writes:  # fmt: skip
    """Return the writes of `rows_B` at `positions_BT`; tokens with `keep_BT` False are written to the scratch position.

    The last position of every cache row is scratch: never attended over, never part of a sequence. With it a pass is
    one indexed write per cache, without a branch or a read. `length` is that of caches that are not rings (None: of the
    first one).
    """
    cache = first_cache(state)
    length = length or cache.shape[2]
    heads_H = torch.arange(cache.shape[1], device=cache.device)
    places_BT = torch.where(keep_BT, positions_BT, length - 1)
    return Writes((rows_B.long()[:, None, None], heads_H[None, :, None], places_BT.long()[:, None, :]), block, length)


@dataclass(frozen=True)
class Attend:
    """Keys that a pass attends over, up to `last_BT` (int, from 0), of `kv` cached keys or its own, and how.

    `kv` 0 means the keys of the pass itself (prefill from an empty row), where S = T. `rows_B` int32 are the cache rows
    to read (None: the first B). `bias_BTS` float32 is the same as a mask: 0 where a query sees a key, else -inf.
    Without a `window` all keys before the last are seen. Unless `ranged`, the bias alone says which keys a query sees.
    With a `ring` S is its number of slots, fewer than `kv`: a slot holds the last position of its own up to the query.

    `scale` (None: 1 / sqrt(head size)) multiplies scores, which `cap` c bounds as c tanh(x / c). `sinks_N` has a score
    for each query head that takes part in the softmax without a value.
    """

    last_BT: Tensor
    kv: int
    bias_BTS: Tensor
    window: int | None = None
    scale: float | None = None
    cap: float | None = None
    sinks_N: Tensor | None = None
    ranged: bool = True
    rows_B: Tensor | None = None
    ring: int | None = None

    def of_rows(self, cache: Tensor, batch: int) -> Tensor:
        """Return the first `kv` positions, or all slots of a ring, of the rows of a cache that `batch` rows read."""
        keys = self.ring or self.kv
        if self.rows_B is None:
            return cache[:batch, :, :keys]
        return cache[:, :, :keys][self.rows_B.long()]

    def seen(self, keys: int) -> Tensor:
        """Return which of the first `keys` keys each query sees, by `last_BT` and the window: bool [B, T, S]."""
        keys_S = torch.arange(keys, device=self.last_BT.device)
        if self.ring is None:
            seen_BTS = keys_S <= self.last_BT[..., None]
            if self.window is None:
                return seen_BTS
            return seen_BTS & (keys_S > self.last_BT[..., None].clamp(max=keys - 1) - self.window)
        assert self.window is not None
        last_BT = self.last_BT.clamp(max=self.kv - 1)
        age_BTS = slot_of(last_BT, self.ring)[..., None] - keys_S
        age_BTS = torch.where(age_BTS < 0, age_BTS + self.ring, age_BTS)  # how far before the last one
        return (age_BTS < self.window) & (age_BTS <= last_BT[..., None])

    def within(self, window: int | None, ring: int | None = None) -> Attend:
        """Return the same for the last `window` keys of each query, in a cache that is a ring of so many slots."""
        ring = ring if ring is not None and self.kv > ring else None
        keys = ring or self.bias_BTS.shape[-1]
        if window is None or (ring is None and window >= keys):
            return self
        # Unused tokens see the first key, far before the windows of their row: the kernel would read all keys between.
        last_BT = torch.maximum(self.last_BT, self.last_BT[:, :1])
        found = replace(self, last_BT=last_BT, window=window, ring=ring)
        return replace(found, bias_BTS=torch.where(found.seen(keys), 0.0, -math.inf))


def attend_up_to(last_BT: Tensor, kv: int = 0, rows_B: Tensor | None = None) -> Attend:
    """Return the `Attend` in which each query sees keys up to `last_BT`."""
    keys_S = torch.arange(kv or last_BT.shape[1], device=last_BT.device)
    return Attend(last_BT, kv, torch.where(keys_S <= last_BT[..., None], 0.0, -math.inf), rows_B=rows_B)


def written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, attend: Attend) -> Tensor:
    """Compute attention with a cap or sinks, softmax in float32: q [B, H, M, D] of M stacked queries, as the result.

    Shapes: k, v [B, H, S, D], bias float32 [B or 1, 1, M, S]; M is the query heads of a KV head times T.
    """
    scores = q.float() @ k.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if attend.scale is None else attend.scale)
    return (shares(capped(scores, attend.cap) + bias, attend.sinks_N) @ v.float()).to(v.dtype)


def capped(scores: Tensor, cap: float | None) -> Tensor:
    """Bound scores smoothly by a cap."""
    return scores if cap is None else torch.tanh(scores / cap) * cap


def shares(scores: Tensor, sinks_N: Tensor | None) -> Tensor:
    """Return the softmax of scores [B, H, M, S] along S, with the sink of each of the N / H heads stacked in M."""
    if sinks_N is None:
        return torch.softmax(scores, dim=-1)
    batch, groups, stacked, _ = scores.shape
    sinks = sinks_N.float().view(1, groups, -1, 1).expand(batch, -1, -1, stacked * groups // len(sinks_N))
    together = torch.cat((scores, sinks.reshape(batch, groups, stacked, 1)), dim=-1)
    return torch.softmax(together, dim=-1)[..., :-1]


@dataclass(frozen=True)
class Chosen:
    """Experts of each token: their numbers int64, and their shares float32, both [B, T, C] for C experts.

    `elsewhere`: experts of other ranks have the number -1 and no share.
    """

    experts: Tensor
    shares: Tensor
    elsewhere: bool = False


@dataclass(frozen=True)
class Gating:
    """How experts make their inner values of gate and up: with `biases` [E, N] of both, and SwiGLU with bounds."""

    biases: tuple[Tensor, Tensor] | None = None
    clamp: Clamp | None = None
    activation: Activation = "silu"

    def of(self, gate: Tensor, up: Tensor, experts: Tensor | slice = slice(None)) -> Tensor:
        """Return the inner values of products [.., M, N], one of each of `experts` along the first axis."""
        if self.biases is not None:
            gate, up = gate + self.biases[0][experts][:, None], up + self.biases[1][experts][:, None]
        return activated(self.activation, gate) * up if self.clamp is None else clamped(gate, up, self.clamp)


SWIGLU = Gating()


def clamped(gate: Tensor, up: Tensor, clamp: Clamp) -> Tensor:
    """Return SwiGLU with bounds."""
    gate, up = gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit)
    return gate * torch.sigmoid(gate * clamp.alpha) * (up + 1)


@dataclass(frozen=True)
class Pass:
    """One pass of a model: positions int [B, T], its caches, where it writes them, and the keys it attends over.

    `attend` is None in a pass that only writes keys and values, `recurrence` in a model without recurrent layers.
    `live_BT` bool are the tokens whose states are read afterwards, or written to a cache; None: all. Of one layer,
    `input_BTP` is its input beside the stream, and without `own_keys` its caches are those of another layer.
    """

    positions_BT: Tensor
    state: State
    writes: Writes
    attend: Attend | None = None
    live_BT: Tensor | None = None
    recurrence: Recurrence | None = None
    input_BTP: Tensor | None = None
    own_keys: bool = True

    def of_layer(self, layer: int) -> Pass:
        """Return the pass of one layer, over its caches without its number: the same for all layers of a kind."""
        names = {name: f"{name}.{layer}" for name in CACHES}
        return replace(self, state={name: self.state[key] for name, key in names.items() if key in self.state})

    def ring(self, layer: int) -> int | None:
        """Return the number of slots of a layer's caches if they are rings; None: they have all positions."""
        cache = self.state.get(f"k.{layer}")
        return None if cache is None or cache.shape[2] >= self.writes.length else cache.shape[2] - 1

    def keep(self, layer: int, caches: State) -> None:
        """Store a layer's caches after its pass, which some backends replace instead of writing in place."""
        self.state.update({f"{name}.{layer}": cache for name, cache in caches.items()})


class Seams:
    """Plain layout, one rank, caches written in place. Subclasses override what their backend does differently."""

    tp = 1
    sample_all: Callable[..., Tensor] | None = None
    """An operator in place of `speculation.sampling.sample_all`."""
    live: Tensor | None = None
    """Tokens whose linear layers a pass needs, bool [B, T]: a backend may leave out the others. None: all."""

    def of_live(self, live_BT: Tensor | None) -> Seams:
        """Return the seams of a pass that needs the linear layers of these tokens alone; here the same for any."""
        assert live_BT is None or live_BT.dim() == 2
        return self

    def once(self, function: Callable[[*Args], R], *args: *Args) -> R:
        """Call a function that a graph calls often: a backend may compile it once for all calls of the same shapes.

        It is pure, except that it may write the state tensors among its arguments.
        """
        return function(*args)

    def linear(self, x_BTI: Tensor, weight: Tensor, rows: int) -> Tensor:
        """Return `x @ weight.T` with `rows` output features: [B, T, I] -> [B, T, rows]."""
        return functional.linear(x_BTI, weight)[..., :rows]

    def linears(self, x_BTI: Tensor, weights: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        """Apply several linear layers and concatenate: [B, T, I] -> [B, T, sum of rows]."""
        parts = [self.linear(x_BTI, weight, count) for weight, count in zip(weights, rows, strict=True)]
        return torch.cat(parts, dim=-1)

    def last_outputs(self, weight: Tensor, rows: int) -> Tensor:
        """Return the last `rows` output features of a weight: of one that a backend stores fused."""
        return weight[-rows:]

    def swiglu(self, x_BTI: Tensor, gate: Tensor, up: Tensor, rows: int) -> Tensor:
        """Return `silu(x @ gate.T) * (x @ up.T)` (Shazeer 2020): -> [B, T, rows]."""
        return functional.silu(self.linear(x_BTI, gate, rows)) * self.linear(x_BTI, up, rows)

    def experts(
        self, x_BTI: Tensor, chosen: Chosen, matrices: tuple[Tensor, ...], gating: Gating = SWIGLU
    ) -> Tensor:  # fmt: skip
        """Apply each token's experts: the sum of their SwiGLU networks by their shares, [B, T, I] -> [B, T, I].

        `matrices` are gate and up [E, N, I] and down [E, I, N]. Few tokens read the matrices of their experts alone,
        many tokens those of all experts, each once. Of more tokens than N, inner values are multiplied by the shares
        and all experts are one product, since the outputs of every expert [E, M, I] would be larger than its matrices.
        """
        gate, up, down = map(self.inputs_first, matrices)
        x_MI, chosen_MC = x_BTI.reshape(-1, x_BTI.shape[-1]), chosen.experts.reshape(-1, chosen.experts.shape[-1])
        shares_MC = chosen.shares.reshape(chosen_MC.shape)
        if chosen_MC.numel() <= len(gate):
            ids = chosen_MC.reshape(-1).clamp(min=0) if chosen.elsewhere else chosen_MC.reshape(-1)
            x = x_MI.repeat_interleave(chosen_MC.shape[1], dim=0)[:, None]
            out = gating.of(x @ gate[ids], x @ up[ids], ids) @ down[ids]
            out = out.float().view(*chosen_MC.shape, -1) * shares_MC[..., None]
            return out.sum(dim=1).to(x.dtype).view(x_BTI.shape)
        is_chosen = chosen_MC[..., None] == torch.arange(len(gate), device=x_MI.device)
        shares_EM = torch.where(is_chosen, shares_MC[..., None], 0.0).sum(dim=1).t()
        inner_EMN = gating.of(x_MI[None] @ gate, x_MI[None] @ up)
        if len(x_MI) > down.shape[1]:
            inner_EMN = (inner_EMN.float() * shares_EM[..., None]).to(x_BTI.dtype)
            return (inner_EMN.transpose(0, 1).flatten(1) @ down.flatten(0, 1)).view(x_BTI.shape)
        out = inner_EMN @ down
        return (out.float() * shares_EM[..., None]).sum(dim=0).to(x_BTI.dtype).view(x_BTI.shape)

    def inputs_first(self, matrices: Tensor) -> Tensor:
        """Return the matrices of experts with their input features first: [E, N, I] -> [E, I, N]."""
        return matrices.transpose(1, 2)

    def head(self, x_BTI: Tensor, weight: Tensor, rows: int) -> Tensor:
        """Apply the LM head, accumulated and returned in float32, so that low-precision rounding cannot create ties."""
        return self.linear(x_BTI.float(), weight.float(), rows)

    def tied_head(self, x_BTI: Tensor, embedding: Tensor, rows: int) -> Tensor:
        """Apply the embedding as the LM head."""
        return self.head(x_BTI, embedding, rows)

    def embed(self, ids_BT: Tensor, weight: Tensor) -> Tensor:
        """Look up rows of an embedding: int [B, T] -> [B, T, I]."""
        return functional.embedding(ids_BT, weight)

    def attend(self, q_BNTD: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """Compute grouped-query attention (Ainslie et al. 2023): -> [B, T, N * D].

        `k` and `v` are this pass's [B, H, T, D], or whole caches [rows, H, S_max, D] where `attend.kv` is not 0. The
        query heads of one KV head are stacked on the token axis, so keys and values are never repeated in memory.
        """
        batch, heads, tokens, dim = q_BNTD.shape
        if attend.kv:
            k, v = attend.of_rows(k, batch), attend.of_rows(v, batch)
        groups, keys = k.shape[1], k.shape[2]
        q = q_BNTD.reshape(batch, groups, -1, dim)
        bias = attend.bias_BTS[:, None, None].expand(-1, 1, heads // groups, -1, -1).reshape(-1, 1, q.shape[2], keys)
        if attend.cap is not None or attend.sinks_N is not None:
            out = written_out(q, k, v, bias, attend)
        else:
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=attend.scale)
        return out.view(batch, heads, tokens, dim).transpose(1, 2).reshape(batch, tokens, heads * dim)

    def of_pass(self, tokens: int) -> Seams:
        """Return the seams of a pass over `tokens` tokens of each row, whose residual stream ranks may divide."""
        assert tokens
        return self

    def own_tokens(self, x_BTH: Tensor) -> Tensor:
        """Sum over ranks; return the tokens whose residual stream this rank has: all, unless ranks divide them."""
        return self.all_reduce(x_BTH)

    def all_tokens(self, x_BTH: Tensor) -> Tensor:
        """Return the tokens of all ranks, from those of `own_tokens`."""
        return x_BTH

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate the last axis over ranks, in rank order."""
        return x

    def top(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the `count` highest entries of the last axis, descending: values and int64 indices."""
        values, indices = torch.topk(scores, count, dim=-1, sorted=True)
        return values, indices

    def write(self, state: State, name: str, new_BHTD: Tensor, writes: Writes) -> Tensor:
        """Store `new_BHTD` in the cache `name` and return the whole cache [rows, H, S_max, D]."""
        state[name].index_put_(writes.index, new_BHTD)
        return state[name]

    def put_row(self, state: State, name: str, rows_B: Tensor, values: Tensor) -> None:
        """Write the entries of whole rows in place, in one indexed write."""
        state[name].index_put_((rows_B,), values)


PLAIN = Seams()
"""Seams of one rank without a backend."""
