"""An artifact's engine that runs its graphs eagerly from a checkpoint: no compiling, and faults can be planted in it.

The gates see what they see of a compiled artifact: an `Engine` with ranks that run graphs by name. Only the compiler is
left out, so faults of every kind can be planted in seconds and over many seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from pipeline.artifact.manifest import GraphEntry, PairManifest
from pipeline.backends.base import Ranks
from pipeline.graphs.dtypes import torch_dtype
from pipeline.graphs.module import run_phase
from pipeline.graphs.packing import PlainPacking
from pipeline.graphs.signature import Signature, is_recurrent, signature, stored_weights
from pipeline.graphs.spec import GraphSpec, PairSpec
from pipeline.models.generation import generation_defaults
from pipeline.models.parallel import Seams
from pipeline.plan.plan import Plan, make_plan
from pipeline.recipe.schema import Recipe
from pipeline.runtime.engine import Engine
from pipeline.runtime.text import Text
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.values import read_weight
from pipeline.sources.weights import shared_weights, weights

RAGGED = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 8], [11, 30]]
"""Prompts of different lengths."""


def _nothing(spec: GraphSpec, state: dict[str, torch.Tensor]) -> AbstractContextManager[None]:
    return nullcontext()


def checked(io: Signature, arguments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a graph's arguments, which must have the shapes and dtypes that a compiled graph takes."""
    given = {t.name: arguments[t.name] for t in io.arguments}
    for t in io.arguments:
        found = (tuple(given[t.name].shape), given[t.name].dtype)
        assert found == (tuple(t.shape), torch_dtype(t.dtype)), f"{t.name} is {found}, not {t}"
    return given


class EagerRanks:
    """Runs graphs eagerly. Faults go into `tensors`, `shape` and `around`, a context that every run is in."""

    def __init__(self, plan: Plan, pair: tuple[Checkpoint, Checkpoint]) -> None:
        self.shape: PairSpec = plan.pair
        self.signatures: dict[GraphSpec, Signature] = {}
        self.seams: Callable[[int], Seams] = lambda tp: Seams()
        self.tensors = {}
        for model, checkpoint in zip(("target", "draft"), pair, strict=True):
            refs = dict(weights(checkpoint)) | shared_weights(checkpoint, pair[0])
            kind = torch_dtype(plan.pair.models.dtype_of(model))
            for spec in stored_weights(plan.pair.models, model):
                tensor = read_weight(refs, spec)
                self.tensors[f"{model}/{spec.name}"] = tensor.int() if spec.kind == "index" else tensor.to(kind)
        self.tensors_of_state: dict[str, torch.Tensor] = {}
        self.around: Callable[[GraphSpec, dict[str, torch.Tensor]], AbstractContextManager[None]] = _nothing

    def run(self, spec: GraphSpec, arguments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if spec not in self.signatures:
            self.signatures[spec] = signature(spec, self.shape, PlainPacking())
        io = self.signatures[spec]
        for t in io.state:
            self.tensors_of_state.setdefault(t.name, torch.zeros(t.shape, dtype=torch_dtype(t.dtype)))
        given = checked(io, arguments)
        with torch.no_grad(), self.around(spec, self.tensors_of_state):
            outputs = run_phase(spec, self.shape, {**self.tensors, **self.tensors_of_state, **given}, self.seams)
        return {t.name: out for t, out in zip(io.outputs, outputs, strict=True)}

    def copy_row(self, source: int, target: int, tokens: int) -> None:
        for name, tensor in self.tensors_of_state.items():
            if is_recurrent(name):
                tensor[target] = tensor[source]
            elif tensor.dim() == 4:
                tensor[target, :, :tokens] = tensor[source, :, :tokens]

    def reset(self) -> None:
        for tensor in self.tensors_of_state.values():
            tensor.zero_()

    def state(self) -> dict[str, torch.Tensor]:
        return self.tensors_of_state

    def close(self) -> None:
        pass


def emitted(engine: Engine, prompts: list[list[int]], count: int, **how: int) -> list[int]:
    """Return the tokens that each speculative step emits; the answers must be those of plain decode."""
    plain = engine.generate(prompts, max_new_tokens=count, speculate=False)
    engine.ranks.reset()
    speculative = engine.generate(prompts, max_new_tokens=count, **how)
    assert [answer.tokens for answer in speculative] == [answer.tokens for answer in plain]
    return [size for answer in speculative for size in answer.emitted_per_step]


MakeRanks = Callable[[Plan, tuple[Checkpoint, Checkpoint]], Ranks]


def make_engine(
    recipe: Recipe, pair: tuple[Checkpoint, Checkpoint], make_ranks: MakeRanks = EagerRanks,
    *, share_prefixes: bool = False,
) -> Engine:  # fmt: skip
    """The engine that a build of this recipe would load."""
    plan = make_plan(recipe, pair[0].config, pair[1].config)
    graphs = tuple(GraphEntry(spec=spec, key="-", file="-", io="-") for spec in plan.graphs)
    manifest = PairManifest.model_construct(
        name=recipe.name, version="eager", created="", recipe_digest=recipe.digest(), lock_digest="", toolchain={},
        backend=recipe.backend, requires={}, pair=plan.pair, step_costs=recipe.speculation.step_costs,
        lookup=recipe.speculation.lookup, graphs=graphs, shards=(), files={},
    )  # fmt: skip
    defaults = generation_defaults(pair[0].generation, "generation_config.json")
    ranks, text = make_ranks(plan, pair), Text(Path(pair[0].root))
    return Engine(manifest, ranks, text, defaults, share_prefixes=share_prefixes)
