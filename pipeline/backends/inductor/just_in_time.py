"""Compile functions with our kernels in this process, without an artifact: to generate training data for drafts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from pipeline.backends.inductor.backend import InductorBackend
from pipeline.backends.inductor.compiler import Compiler, explained, from_environment, use
from pipeline.backends.inductor.scratch import move_headers
from pipeline.backends.inductor.seams import BlockedSeams
from pipeline.files.temporary import SAFE, prepared_folder, temporary_folder
from pipeline.graphs.dtypes import torch_dtype
from pipeline.graphs.packing import BlockPacking
from pipeline.models.weights import weight_specs
from pipeline.recipe.backend_settings import InductorSettings
from pipeline.speculation.model import Model

FIX = "set CXX to a C++ compiler that works, or unset it for g++"
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
    compiler = prepared()
    # Registers our kernels. Not at the top: it imports Inductor, which takes seconds and only compiling needs.
    from pipeline.backends.inductor import (  # noqa: F401
        block_experts_kernel,
        block_linear_kernel,
        cached_attention_kernel,
        sample_all_kernel,
    )

    options = InductorBackend(InductorSettings()).settings()
    settings = {name: value for name, value in options.items() if not name.startswith("aot")}
    graph = torch.compile(function, fullgraph=True, dynamic=False, options=settings)

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with explained(compiler, FIX):
            return graph(*args, **kwargs)

    return run


def prepared() -> Compiler:
    """Let this process use the compiler of `CXX` and a usable folder for temporary files, from now on.

    Raises:
        HostError: no folder is usable.

    """
    compiler, parent = from_environment(), temporary_folder()
    os.environ["TMPDIR"] = tempfile.tempdir = str(parent)
    if SAFE.fullmatch(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")) is None:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]  # torch then uses its folder in `parent`
    own = prepared_folder(parent)
    use(compiler, own / "compilers")
    move_headers(own / "headers")
    return compiler
