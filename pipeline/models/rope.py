"""Read the rotary embedding of a `config.json`, in the layouts of transformers 4 and 5. Imports no torch.

`rope_scaling`, if not empty, replaces `rope_parameters` as a whole, as in transformers; `rope_theta` beside them is the
theta of the one that has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import SourceError
from pipeline.models.config import Llama3Rope
from pipeline.models.fields import Fields, is_int

DEFAULT_THETA = 10000.0
LAYOUTS = ("rope_scaling", "rope_parameters")
ORIGINAL = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"
LARGEST = 3e38
"""Largest number of float32, in which angles are computed."""

SUPPORTED = "supported: default, linear, llama3"


@dataclass(frozen=True)
class Rope:
    """A rotary embedding: theta, and how its frequencies are scaled."""

    theta: float
    llama3: Llama3Rope | None = None
    linear_factor: float = 1.0


def read_rope(fields: Fields) -> Rope:
    """Return the rotary embedding of a config.

    Raises:
        SourceError: an unsupported kind of RoPE, or a missing or malformed field, by its name and value.

    """
    layout = _layout(fields)
    rope: Mapping[str, Any] = fields.config.get(layout) or {}
    _reject_unsupported(fields, layout, rope)
    theta = _theta(fields, layout, rope)
    kind = _kind(fields, layout, rope)
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, linear_factor=_positive(fields, layout, rope, "factor"))
    if kind == "llama3":
        return Rope(theta, _llama3(fields, layout, rope))
    raise fields.error(f"{layout}.rope_type", kind, f"rope type {kind!r} is not supported", SUPPORTED)


def _layout(fields: Fields) -> str:
    """Return the name of the object that transformers reads."""
    for name in LAYOUTS:
        value = fields.config.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise fields.error(name, value, "expected an object or null")
    return "rope_scaling" if fields.config.get("rope_scaling") else "rope_parameters"


def _reject_unsupported(fields: Fields, layout: str, rope: Mapping[str, Any]) -> None:
    nested = [key for key, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        raise fields.error(f"{layout}.{nested[0]}", rope[nested[0]], "rotary embeddings by layer are not supported")
    for name, value in ((PARTIAL, fields.config.get(PARTIAL)), (f"{layout}.{PARTIAL}", rope.get(PARTIAL))):
        if value not in (None, 1):
            raise fields.error(name, value, "partial rotary embeddings are not supported", "use a model without them")


def _theta(fields: Fields, layout: str, rope: Mapping[str, Any]) -> float:
    if "rope_theta" in rope:
        return _positive(fields, layout, rope, "rope_theta")
    return _positive(fields, "", {"rope_theta": DEFAULT_THETA, **fields.config}, "rope_theta")


def _kind(fields: Fields, layout: str, rope: Mapping[str, Any]) -> str:
    """Return the kind of scaling; `type` is the older name. Where both differ, the versions of transformers do too."""
    kinds = {key: rope[key] for key in ("rope_type", "type") if key in rope}
    for key, value in kinds.items():
        if not isinstance(value, str):
            raise fields.error(f"{layout}.{key}", value, "expected a string", SUPPORTED)
    if len(set(kinds.values())) > 1:
        expected = f"{layout}.type={kinds['type']!r} differs"
        raise fields.error(f"{layout}.rope_type", kinds["rope_type"], expected, "remove one of the two")
    return kinds.get("rope_type", kinds.get("type", "default"))


def _llama3(fields: Fields, layout: str, rope: Mapping[str, Any]) -> Llama3Rope:
    low, high = (_positive(fields, layout, rope, f"{name}_freq_factor") for name in ("low", "high"))
    if high <= low:
        raise fields.error(f"{layout}.high_freq_factor", high, f"expected more than low_freq_factor={low}")
    return Llama3Rope(
        factor=_positive(fields, layout, rope, "factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=_original(fields, layout, rope),
    )


def _original(fields: Fields, layout: str, rope: Mapping[str, Any]) -> int:
    """Return the context length before scaling: transformers 5 fills in `max_position_embeddings`, 4.57 needs it.

    transformers 5 prefers the field outside `rope_scaling`, 4.57 the one inside: they must agree.
    """
    named = {f"{layout}.{ORIGINAL}": rope[ORIGINAL]} if ORIGINAL in rope else {}
    if ORIGINAL in fields.config:
        named[ORIGINAL] = fields.config[ORIGINAL]
    for name, value in named.items():
        if not is_int(value) or value < 1:
            raise fields.error(name, value, "expected a positive integer")
    values = list(named.values()) or [fields.size("max_position_embeddings")]
    if len(set(values)) > 1:
        raise fields.error(ORIGINAL, values[1], f"{layout}.{ORIGINAL}={values[0]} differs", "remove one of the two")
    return int(values[0])


def _positive(fields: Fields, layout: str, values: Mapping[str, Any], key: str) -> float:
    """Return a required positive number."""
    name = f"{layout}.{key}" if layout else key
    if key not in values:
        raise SourceError(f"{name} is missing", where=fields.where, fix=f"add {key} to {layout} in config.json")
    value = values[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= LARGEST:
        raise fields.error(name, value, "expected a positive number", "write a number without quotes in config.json")
    return float(value)


def in_both_layouts(config: Mapping[str, Any], max_position: int) -> dict[str, Any]:
    """Return a config whose rotary embedding transformers 4.57 reads as transformers 5 does.

    4.57 does not know `rope_parameters`, and fills in no `original_max_position_embeddings`: `max_position` is its
    default.
    """
    rope: dict[str, Any] = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rest = {key: value for key, value in config.items() if key not in LAYOUTS}
    if not rope:
        return rest
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    if rope["rope_type"] == "llama3":
        rope.setdefault(ORIGINAL, config.get(ORIGINAL, max_position))
    rest |= {"rope_theta": rope["rope_theta"], "rope_parameters": rope}
    return rest if rope["rope_type"] == "default" else rest | {"rope_scaling": rope}
