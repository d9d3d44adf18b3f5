"""Compile functions with our kernels in this process, without an artifact: to generate training data for drafts."""

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
    """Return whether this machine can compile."""
    return not InductorBackend(InductorSettings()).preflight()


def blocked(model: Model, dtype: str) -> Model:
    """Return the same model on the same caches, with a second set of weights in blocks."""
    packing, packed = BlockPacking(), {}
    for spec in weight_specs(model.config):
        shape = packing.packed_shape(spec.shape, spec.kind, dtype)
        packed[spec.name] = torch.empty(shape, dtype=torch_dtype(dtype))
        packing.pack(model.weights[spec.name], spec.kind, packed[spec.name])
    return replace(model, weights=packed, seams=BlockedSeams())


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` as one compiled graph; the first call compiles it for the shapes of its arguments."""
    # Registers our kernels. Not at the top: it imports Inductor, which takes seconds and only compiling needs.
    from pipeline.backends.inductor import block_linear_kernel, cached_attention_kernel  # noqa: F401

    options = InductorBackend(InductorSettings()).settings()
    settings = {name: value for name, value in options.items() if not name.startswith("aot")}
    return torch.compile(function, fullgraph=True, dynamic=False, options=settings)
