"""The tensors of one quantised module, and the errors of those that do not fit. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import SourceError
from pipeline.sources.packed import Grid
from pipeline.sources.tensors import TensorRef


@dataclass(frozen=True)
class Module:
    """The tensors of one module by the last part of their names."""

    name: str
    tensors: Mapping[str, TensorRef]

    def need(self, part: str) -> TensorRef:
        """Return a tensor that the format requires."""
        if part not in self.tensors:
            found = ", ".join(sorted(self.tensors))
            raise self.error(f"has no {part}; found: {found}")
        return self.tensors[part]

    def error(self, what: str, fix: str = "use weights and config.json of the same model") -> SourceError:
        """Return the error of a module that is not stored as the config says."""
        where = str(next(iter(self.tensors.values())).file)
        return SourceError(f"quantised module {self.name} {what}", where=where, fix=fix)

    def grid(self, part: str, grid: Grid) -> Grid:
        """Return a grid after comparing its tensor's shape."""
        if math.prod(grid.stored) != math.prod(grid.ref.shape) or matrix_shape(grid.ref.shape) != grid.stored:
            raise self.error(f"has {part} {list(grid.ref.shape)}, expected {list(grid.stored)}")
        return grid


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return a shape as that of a matrix: a vector is a column."""
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])
