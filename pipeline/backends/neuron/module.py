"""A graph as NxD's ModelBuilder wants it: weights as parameters, caches as buffers that the forward pass replaces.

The trace turns buffers into aliased state; one forward signature serves all graphs of an artifact ("ModelBuilderV2 API
Reference" and the NxD source).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.graphs.dtypes import torch_dtype
from pipeline.graphs.module import SeamsFor, run_phase
from pipeline.graphs.signature import Signature
from pipeline.graphs.spec import GraphSpec, PairSpec
from pipeline.models.parallel import Seams, State, Writes


class NeuronSeams(Seams):
    """Caches replaced instead of written in place, top-k by the compiler's own operator, NxD's collectives."""

    def __init__(self, tp: int) -> None:
        self.tp = tp

    def write(self, state: State, name: str, new_BHTD: Tensor, writes: Writes) -> Tensor:
        """A scatter into a new tensor, which takes the cache's name."""
        state[name] = state[name].index_put(writes.index, new_BHTD)
        return state[name]

    def put_row(self, state: State, name: str, rows_B: Tensor, values: Tensor) -> None:
        """A scatter into a new tensor, which takes the state's name."""
        state[name] = state[name].index_put((rows_B,), values)

    def top(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """`AwsNeuronTopK`: XLA's own top-k is a sort, which the compiler does not take."""
        from torch_neuronx.xla_impl.ops import TopK

        values, indices = TopK.apply(scores, count, dim=scores.dim() - 1)
        return values, indices.long()

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks."""
        if self.tp == 1:
            return x
        from neuronx_distributed.parallel_layers import mappings

        summed: Tensor = mappings.reduce_from_tensor_model_parallel_region(x)
        return summed

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate the last axis over ranks, in rank order."""
        if self.tp == 1:
            return x
        from neuronx_distributed.parallel_layers import mappings

        gathered: Tensor = mappings.gather_from_tensor_model_parallel_region(x)
        return gathered


class NeuronModule(nn.Module):
    """A graph as ModelBuilder wants it: weights and state inside, arguments by name, None for what a phase lacks.

    Names are those of the signature with dots for slashes: `target.model.norm.weight`, `draft.k.0`.
    """

    def __init__(self, spec: GraphSpec, pair: PairSpec, io: Signature, seams_for: SeamsFor) -> None:
        super().__init__()
        self.spec, self.pair, self.io, self.seams_for = spec, pair, io, seams_for
        for one in io.weights:
            tensor = torch.empty(one.shape, dtype=torch_dtype(one.dtype))
            owner, leaf = self._place(one.name)
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        for one in io.state:
            owner, leaf = self._place(one.name)
            owner.register_buffer(leaf, torch.zeros(one.shape, dtype=torch_dtype(one.dtype)))

    def forward(  # noqa: PLR0913 - ModelBuilder passes a graph's inputs by name
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
        uniforms: Tensor | None = None,
        copied: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the phase; state buffers are replaced."""
        arguments = {
            "tokens": tokens, "lengths": lengths, "slots": slots, "last_token": last_token, "position": position,
            "active": active, "temperature": temperature, "top_k": top_k, "top_p": top_p, "uniforms": uniforms,
            "copied": copied,
        }  # fmt: skip
        named = {name: value for name, value in arguments.items() if value is not None}
        for one in self.io.weights + self.io.state:
            owner, leaf = self._place(one.name)
            named[one.name] = getattr(owner, leaf)
        outputs = run_phase(self.spec, self.pair, named, self.seams_for)
        for one in self.io.state:
            owner, leaf = self._place(one.name)
            setattr(owner, leaf, named[one.name])
        return outputs

    def example(self) -> dict[str, Tensor]:
        """Arguments to trace with: zeros, by name."""
        return {one.name: torch.zeros(one.shape, dtype=torch_dtype(one.dtype)) for one in self.io.arguments}

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """The submodule that owns a dotted name, made where it is not there yet."""
        *path, leaf = dotted(name).split(".")
        owner: nn.Module = self
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        return owner, leaf


def dotted(name: str) -> str:
    """A signature's name as parameters and the compiled graph spell it."""
    return name.replace("/", ".")


def key(value: Any) -> str:
    """A name out of a metaneff, which holds bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)
