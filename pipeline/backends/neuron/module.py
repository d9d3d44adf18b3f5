"""A graph in the form that NxD's ModelBuilder expects: weights as parameters, caches as buffers that forward replaces.

The trace turns buffers into aliased state; one forward signature serves all graphs of an artifact ("ModelBuilderV2 API
Reference" and the NxD source).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pipeline.graphs.dtypes import torch_dtype
from pipeline.graphs.module import SeamsFor, run_phase
from pipeline.graphs.signature import Signature
from pipeline.graphs.spec import GraphSpec, PairSpec
from pipeline.models.blocks import query_blocks
from pipeline.models.parallel import Attend, Seams, State, Writes, capped, shares

WIDEST_TOP = 4096
"""Most entries of a row of the compiler's top-k. A public report has it compile rows of 16,384 entries for 32 of them,
and fail for 32,768 (neuronx-cc 2.26); no document states a limit.
"""

BOOLEANS = frozenset(["active", "prompted"])
"""Arguments that phases take as booleans."""

SHIFTS = {Tensor.__lshift__: torch.bitwise_left_shift, Tensor.__rshift__: torch.bitwise_right_shift}


class ShiftsByTensors(TorchFunctionMode):
    """Within it, words are shifted by tensors.

    PyTorch/XLA computes a shift by a number as a product or quotient with a power of two: another result for negative
    words, and no result for 31 bits.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Give a shift its count as a tensor; leave everything else as it is."""
        if func in SHIFTS and isinstance(args[1], int):
            return SHIFTS[func](args[0], torch.full_like(args[0], args[1]))
        return func(*args, **(kwargs or {}))


class NeuronSeams(Seams):
    """Weights [in, out] (`graphs.packing.InOutPacking`), caches replaced instead of written in place, top-k by the
    compiler's own operator, NxD's collectives.
    """

    def __init__(self, tp: int) -> None:
        self.tp = tp

    def linear(self, x_BTI: Tensor, weight: Tensor, rows: int) -> Tensor:
        """Multiply by a weight [I, N] as it is stored."""
        return (x_BTI @ weight)[..., :rows]

    def last_outputs(self, weight: Tensor, rows: int) -> Tensor:
        """Return the last columns of a weight [I, N]."""
        return weight if rows == weight.shape[1] else weight[:, weight.shape[1] - rows :]

    def inputs_first(self, matrices: Tensor) -> Tensor:
        """Return the matrices of experts as they are stored."""
        return matrices

    def tied_head(self, x_BTI: Tensor, embedding: Tensor, rows: int) -> Tensor:
        """Multiply by the embedding, the only matrix that is stored [N, I]: tokens look up its rows."""
        return functional.linear(x_BTI.float(), embedding.float())[..., :rows]

    def write(self, state: State, name: str, new_BHTD: Tensor, writes: Writes) -> Tensor:
        """Scatter into a new tensor, and store it under the cache's name."""
        state[name] = state[name].index_put(writes.index, new_BHTD)
        return state[name]

    def put_row(self, state: State, name: str, rows_B: Tensor, values: Tensor) -> None:
        """Scatter into a new tensor, and store it under the state's name."""
        state[name] = state[name].index_put((rows_B,), values)

    def attend(self, q_BNTD: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """Compute attention in blocks of queries: products in the model's dtype, the softmax in float32.

        A block of a prompt reads the keys up to its own end alone, about half of the square.
        """
        batch, heads, tokens, dim = q_BNTD.shape
        if attend.kv:
            k, v = attend.of_rows(k, batch), attend.of_rows(v, batch)
        keys = k.shape[2]
        parts = []
        for first, last in query_blocks(batch * heads, tokens, keys):
            end = last if attend.ranged and not attend.kv else keys
            own = replace(attend, last_BT=attend.last_BT[:, first:last], bias_BTS=attend.bias_BTS[:, first:last])
            parts.append(self._attend_block(q_BNTD[:, :, first:last], k[:, :, :end], v[:, :, :end], own))
        out_BNTD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return out_BNTD.transpose(1, 2).reshape(batch, tokens, heads * dim)

    def _attend_block(self, q_BNTD: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """Attend with some queries: [B, N, T, D]. The heads of one KV head are stacked on the token axis."""
        batch, heads, tokens, dim = q_BNTD.shape
        groups, keys = k.shape[1], k.shape[2]
        scores = self.scores(q_BNTD.reshape(batch, groups, -1, dim), k).view(batch, heads, tokens, keys)
        scores = capped(scores * (dim**-0.5 if attend.scale is None else attend.scale), attend.cap)
        seen_BTS = attend.seen(keys) if attend.ranged else attend.bias_BTS == 0
        scores = torch.where(seen_BTS[:, None], scores, -torch.inf)
        probs = shares(scores.view(batch, groups, -1, keys), attend.sinks_N).to(v.dtype)
        return (probs @ v).view(batch, heads, tokens, dim)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Multiply queries and keys, in float32."""
        return q.float() @ k.float().transpose(-1, -2)

    def top(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Use the compiler's top-k on rows that it can compile, a wide row in groups (`top_in_groups`)."""
        return top_in_groups(scores, count, self.top_of_rows)

    def top_of_rows(self, scores_MN: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Use `AwsNeuronTopK`: XLA's own top-k is a sort, which the compiler does not support."""
        from torch_neuronx.xla_impl.ops import TopK  # of the SDK, imported only while tracing

        values, indices = TopK.apply(scores_MN, count, dim=1)
        return values, indices

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks."""
        if self.tp == 1:
            return x
        from neuronx_distributed.parallel_layers import mappings  # of the SDK, imported only while tracing

        summed: Tensor = mappings.reduce_from_tensor_model_parallel_region(x)
        return summed

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate the last axis over ranks, in rank order."""
        if self.tp == 1:
            return x
        from neuronx_distributed.parallel_layers import (  # of the SDK, imported only while tracing
            mappings,
            parallel_state,
        )

        gathered: Tensor = mappings.gather_from_tensor_model_parallel_region(x)
        return in_rank_order(gathered, parallel_state.get_tensor_model_parallel_replica_groups()[0])


def top_in_groups(
    scores: Tensor, count: int, top: Callable[[Tensor, int], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the `count` highest entries of the last axis, descending, and their indices, int64.

    `top` does so for rows [M, N] of at most `WIDEST_TOP` entries. Of a wider row, the best of each group compete, again
    in groups: an entry that is among the best of the row is among the best of its group. Groups are in the order of
    indices, so equal entries are in the order that `top` gives them.
    """
    size, limit = scores.shape[-1], max(WIDEST_TOP, 2 * count)
    groups = -(-size // limit)
    width = -(-size // groups)
    if groups * width > size:
        scores = functional.pad(scores, (0, groups * width - size), value=-torch.inf)
    values, indices = top(scores.reshape(-1, width), min(count, width))
    values, indices = (found.reshape(*scores.shape[:-1], -1) for found in (values, indices.long()))
    if groups == 1:
        return values, indices
    firsts = torch.arange(groups, device=scores.device).repeat_interleave(values.shape[-1] // groups) * width
    values, places = top_in_groups(values, count, top)
    return values, (indices + firsts).gather(-1, places)


def in_rank_order(gathered: Tensor, group: Sequence[int]) -> Tensor:
    """Return what the ranks of `group` gathered along the last axis, sorted by rank.

    With lnc=1 on trn2, NxD orders a group of 64 by the rows of the chips: ranks 0-15, 48-63, 16-47.
    """
    ranks = sorted(group)
    if list(group) == ranks:
        return gathered
    pieces = gathered.chunk(len(ranks), dim=-1)
    return torch.cat([pieces[group.index(rank)] for rank in ranks], dim=-1)


class NeuronModule(nn.Module):
    """A graph for ModelBuilder: weights and state inside, arguments by name, None for arguments that a phase lacks.

    Names are those of the signature with dots for slashes: `target.model.norm.weight`, `draft.k.0`.
    """

    def __init__(self, spec: GraphSpec, pair: PairSpec, io: Signature, seams_for: SeamsFor) -> None:
        super().__init__()
        self.spec, self.pair, self.io, self.seams_for = spec, pair, io, seams_for
        for weight in io.weights:
            tensor = torch.empty(weight.shape, dtype=torch_dtype(weight.dtype))
            owner, leaf = self._owner(weight.name)
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        for state in io.state:
            owner, leaf = self._owner(state.name)
            owner.register_buffer(leaf, torch.zeros(state.shape, dtype=torch_dtype(state.dtype)))

    def forward(  # noqa: PLR0913 - ModelBuilder reads the names of a graph's arguments from this signature
        self,
        tokens: Tensor | None = None,
        lengths: Tensor | None = None,
        slots: Tensor | None = None,
        last_token: Tensor | None = None,
        position: Tensor | None = None,
        active: Tensor | None = None,
        temperature: Tensor | None = None,
        top_k: Tensor | None = None,
        top_p: Tensor | None = None,
        seed: Tensor | None = None,
        copied: Tensor | None = None,
        drafts: Tensor | None = None,
        bias: Tensor | None = None,
        counts: Tensor | None = None,
        prompted: Tensor | None = None,
        allowed: Tensor | None = None,
        min_p: Tensor | None = None,
        presence_penalty: Tensor | None = None,
        frequency_penalty: Tensor | None = None,
        repetition_penalty: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the phase; replace the state buffers."""
        arguments = {
            "tokens": tokens, "lengths": lengths, "slots": slots, "last_token": last_token, "position": position,
            "active": active, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
            "copied": copied, "drafts": drafts, "bias": bias, "counts": counts, "prompted": prompted,
            "allowed": allowed, "min_p": min_p, "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty, "repetition_penalty": repetition_penalty,
        }  # fmt: skip
        tensors = with_booleans({name: value for name, value in arguments.items() if value is not None})
        for spec in self.io.weights + self.io.state:
            owner, leaf = self._owner(spec.name)
            tensors[spec.name] = getattr(owner, leaf)
        with ShiftsByTensors():
            outputs = run_phase(self.spec, self.pair, tensors, self.seams_for)
        for spec in self.io.state:
            owner, leaf = self._owner(spec.name)
            setattr(owner, leaf, tensors[spec.name])
        return outputs

    def example(self) -> dict[str, Tensor]:
        """Return zeros for every argument, by name, to trace with."""
        return {spec.name: torch.zeros(spec.shape, dtype=torch_dtype(spec.dtype)) for spec in self.io.arguments}

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        """Return the submodule that owns a dotted name, and the name's last part; add missing submodules."""
        *path, leaf = dotted(name).split(".")
        owner: nn.Module = self
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        return owner, leaf


def without_booleans(io: Signature) -> Signature:
    """Return a signature as the device has it: booleans as int32, because the runtime's types have no bit."""
    narrow = [replace(one, dtype="int32") if one.dtype == "bool" else one for one in io.arguments]
    return replace(io, arguments=tuple(narrow))


def with_booleans(arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return arguments as phases take them, from those of a graph `without_booleans`."""
    return {name: tensor != 0 if name in BOOLEANS else tensor for name, tensor in arguments.items()}


def dotted(name: str) -> str:
    """Convert a signature's name to the form of parameters and the compiled graph."""
    return name.replace("/", ".")


def key(value: Any) -> str:
    """Return a name of a metaneff, which stores bytes, as text."""
    return value.decode() if isinstance(value, bytes) else str(value)
