"""A pair whose steps run as HLO of the StableHLO frontend, on as many devices of XLA's CPU client as it has ranks."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.backends.neuron import hlo
from pipeline.graphs.dtypes import torch_dtype
from pipeline.graphs.spec import GraphSpec
from pipeline.models.rank_slices import vocab_offset
from pipeline.models.vocabulary import vocab_rows
from pipeline.models.weights import OFFSET
from support.pairs import Pair
from support.shards import expected_slice, in_out
from support.xla_cpu import Executable


class HloGraphs:
    """Traced and compiled once for each graph; state is carried from output to input as the runtime does."""

    def __init__(self, backend, pair: Pair, tp: int = 1) -> None:
        self.backend, self.tp = backend, tp
        self.shape = replace(pair.shape, models=replace(pair.shape.models, tp=tp))
        self.weights = [shard(pair, self.shape, rank) for rank in range(tp)]
        self.state: list[dict[str, torch.Tensor]] = [{} for _ in range(tp)]
        self.traced: dict[GraphSpec, object] = {}
        self.compiled: dict[GraphSpec, Executable] = {}

    def trace(self, spec: GraphSpec):
        if spec not in self.traced:
            self.traced[spec] = self.backend.trace(spec, self.shape)
        return self.traced[spec]

    def step(self, spec: GraphSpec, **arguments):
        """Run on all ranks, which must agree; return the results."""
        traced = self.trace(spec)
        if spec not in self.compiled:
            self.compiled[spec] = Executable(hlo.stripped(traced.program.hlo), self.tp)
        io, boundary = traced.signature, traced.program.boundary
        given = {one.name: torch.as_tensor(arguments[one.name]).to(torch_dtype(one.dtype)) for one in io.arguments}
        for state in self.state:
            for one in io.state:
                state.setdefault(one.name, torch.zeros(one.shape, dtype=torch_dtype(one.dtype)))
        held = [{**self.weights[rank], **self.state[rank], **given} for rank in range(self.tp)]
        names = [place.tensor.name for place in boundary.parameters]
        results = self.compiled[spec]([[tensors[name] for name in names] for tensors in held])
        for state, outputs in zip(self.state, results, strict=True):
            for place, source in boundary.aliases.items():
                state[names[source]] = outputs[place]
        first = results[0][: len(io.outputs)]
        if spec.phase != "score":  # whose logits are each rank's own
            for other in results[1:]:
                assert all(torch.equal(one, same) for one, same in zip(first, other, strict=False)), spec.name
        return first


def shard(pair: Pair, shape, rank: int) -> dict[str, torch.Tensor]:
    """One rank's weights, by the plain definition of each split, as the backend stores them."""
    tp, models = shape.models.tp, shape.models
    weights = {}
    for name, whole in pair.tensors.items():
        role, _, own = name.partition("/")
        config, ranks = models.config_of(role), models.tp_of(role)
        if own == OFFSET:
            rows = vocab_rows(config.out_vocab, ranks)
            weights[name] = torch.tensor([vocab_offset(rows, rank if ranks > 1 else 0)], dtype=torch.int32)
        elif ranks == 1:
            weights[name] = whole
        else:
            of_layer = config.of_weight(own)
            if ".experts." in own and any(kind.experts and kind.experts.by_rank for kind in config.kinds):
                weights[name] = whole if own.endswith("down_proj.bias") else whole.chunk(tp)[rank].contiguous()
                continue
            weights[name] = expected_slice(own, whole, rank, tp, of_layer.kv_heads, of_layer.head_dim).contiguous()
    return in_out(weights, models)
