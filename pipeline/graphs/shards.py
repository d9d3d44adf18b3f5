"""A rank's weights of one model from their file, mapped: all processes that open the file share its memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

if TYPE_CHECKING:
    from torch import Tensor


def read_shard(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Return the tensors of a shard by name. Starts reading the whole file: a mapping alone reads page by page."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    with safe_open(path, framework="pt", device=device) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping


def packing_of(path: Path) -> str:
    """Return the name of a shard's packing (`graphs.packing`); empty in a file that names none."""
    with safe_open(path, framework="pt") as tensors:
        return (tensors.metadata() or {}).get("packing", "")
