"""Our kernels in this process, for work that needs no artifact: writing what a draft learns from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ParamSpec, TypeVar

import torch

from pipeline.backends.inductor.backend import InductorBackend
from pipeline.backends.inductor.seams import BlockedSeams
from pipeline.graphs.dtypes import torch_dtype
from pipeline.graphs.packing import BlockPacking
from pipeline.models.weights import weight_specs
from pipeline.recipe.schema import InductorSettings
from pipeline.speculation.model import Model

P = ParamSpec("P")
R = TypeVar("R")


def usable() -> bool:
    """Whether this machine can compile."""
    return not InductorBackend(InductorSettings()).preflight()


def blocked(model: Model, dtype: str) -> Model:
    """The same model on the same caches, with a second set of weights, in blocks."""
    packing, packed = BlockPacking(), {}
    for spec in weight_specs(model.config):
        shape = packing.packed_shape(spec.shape, spec.kind, dtype)
        packed[spec.name] = torch.empty(shape, dtype=torch_dtype(dtype))
        packing.pack(model.weights[spec.name], spec.kind, packed[spec.name])
    return replace(model, weights=packed, seams=BlockedSeams())


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function` as one compiled graph: at its first call, and for the shapes of that call."""
    from pipeline.backends.inductor import block_linear_kernel, cached_attention_kernel  # noqa: F401 - known from here on

    every = InductorBackend(InductorSettings()).settings()
    settings = {name: value for name, value in every.items() if not name.startswith("aot")}
    return torch.compile(function, fullgraph=True, dynamic=False, options=settings)
