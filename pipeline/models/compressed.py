"""Read the `config_groups` of compressed-tensors: how the modules of each group are stored. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import SourceError
from pipeline.models.fields import is_int

PACKED = "pack-quantized"
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")
READ = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic")
MAKING = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype", "actorder")
"""Fields of `weights` that say how scales were found; the tensors tell their dtypes and the order of groups."""

Fail = Callable[..., SourceError]
"""Makes the error of a field: its name, its value, and what is wrong."""


@dataclass(frozen=True)
class Compressed:
    """One group of modules, named by `targets`: a class, a name, or a regular expression after `re:`.

    `packed`: integers of `bits` in words along the inputs; else each value is stored in a byte. `block`: rows and
    columns that share a scale; a row without, where `by_row`, or the whole matrix. `zeros`: there are zero points.
    """

    targets: tuple[str, ...]
    packed: bool
    bits: int
    kind: Literal["int", "float"]
    zeros: bool
    by_row: bool = False
    group: int | None = None
    block: tuple[int, int] | None = None


def read_groups(data: Mapping[str, Any], fail: Fail) -> tuple[tuple[Compressed, ...], str | None]:
    """Return the groups, and the field of a rounding of activations, which is not applied.

    Raises:
        SourceError: an unsupported format or field, by name and value.

    """
    groups = data.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise fail("config_groups", groups, "expected an object with groups")
    schemes, unrounded = [], None
    for name, group in groups.items():
        at = f"config_groups.{name}"
        if not isinstance(group, dict):
            raise fail(at, group, "expected an object: names of presets are not supported")
        schemes.append(_group(group, at, data.get("format"), fail))
        if group.get("input_activations") is not None:
            unrounded = unrounded or f"{at}.input_activations"
    return tuple(schemes), unrounded


def _group(group: Mapping[str, Any], at: str, whole: Any, fail: Fail) -> Compressed:
    for key, value in group.items():
        if key not in ("targets", "weights", "input_activations", "format") and value is not None:
            raise fail(f"{at}.{key}", value, "this field is not supported")
    targets = group.get("targets")
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        raise fail(f"{at}.targets", targets, "expected a list of strings")
    stored, key = (group["format"], f"{at}.format") if group.get("format") is not None else (whole, "format")
    if stored not in FORMATS:
        raise fail(key, stored, f"this format is not supported; accepted: {', '.join(FORMATS)}")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise fail(f"{at}.weights", weights, "expected an object")
    return _weights(tuple(targets), weights, f"{at}.weights", stored == PACKED, fail)


def _weights(targets: tuple[str, ...], data: Mapping[str, Any], at: str, packed: bool, fail: Fail) -> Compressed:
    for key, value in data.items():
        if key not in (*READ, *MAKING) and value is not None:
            raise fail(f"{at}.{key}", value, "this field is not supported")
    bits, kind, symmetric = data.get("num_bits", 8), data.get("type", "int"), data.get("symmetric", True)
    if kind not in ("int", "float") or (packed and kind == "float"):
        raise fail(f"{at}.type", kind, "this type is not supported")
    if not is_int(bits) or not (2 <= bits <= 8 if packed else bits == 8):
        raise fail(f"{at}.num_bits", bits, f"not supported; accepted: {'2 to 8' if packed else '8'}")
    if not isinstance(symmetric, bool):
        raise fail(f"{at}.symmetric", symmetric, "expected true or false")
    if data.get("dynamic", False) is not False:
        raise fail(f"{at}.dynamic", data["dynamic"], "not supported; accepted: false")
    by_row, group, block = _shared(data, at, fail)
    return Compressed(targets, packed, bits, kind, not symmetric, by_row, group, block)


def _shared(data: Mapping[str, Any], at: str, fail: Fail) -> tuple[bool, int | None, tuple[int, int] | None]:
    """Return whether each row has its scales, the columns of a group, and the rows and columns of a block."""
    size, shape = data.get("group_size"), data.get("block_structure")
    strategy = data.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy not in STRATEGIES:
        raise fail(f"{at}.strategy", strategy, f"not supported; accepted: {', '.join(STRATEGIES)}")
    if strategy == "group" and (not isinstance(size, int) or not is_int(size) or size <= 0):
        raise fail(f"{at}.group_size", size, "expected a positive integer")
    if strategy != "block":
        return strategy in ("channel", "group"), size if strategy == "group" else None, None
    if not isinstance(shape, list) or len(shape) != 2 or not all(is_int(one) and one > 0 for one in shape):
        raise fail(f"{at}.block_structure", shape, "expected two positive integers")
    return False, None, (shape[0], shape[1])
