"""Kinds of rotary embeddings (`rope_type`), as the functions of transformers compute them. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import SourceError
from pipeline.models.fields import LARGEST, LIMIT, Fields, is_int
from pipeline.models.rope_types import DividedRope, LinearRope, Llama3Rope, RopeScaling, YarnRope

ORIGINAL = "original_max_position_embeddings"
YARN_FAST, YARN_SLOW = 32.0, 1.0
"""Defaults of `beta_fast` and `beta_slow`: turns over the original length between which YaRN mixes."""

APART = 0.001
"""Distance of the ends of YaRN's mix where both are the same pair."""

SUPPORTED = "supported: default, linear, llama3, dynamic, yarn, longrope"


@dataclass(frozen=True)
class RopeObject:
    """A rotary embedding in a config: its values, and `layout`, the name of the object that holds them."""

    fields: Fields
    layout: str
    values: Mapping[str, Any]
    by_layer: bool = False

    def name(self, key: str) -> str:
        """Return the name of a value in errors."""
        return f"{self.layout}.{key}" if self.layout else key

    def error(self, key: str, value: Any, expected: str, fix: str = "correct config.json") -> SourceError:
        """Return the error of a value."""
        return self.fields.error(self.name(key), value, expected, fix)

    def kind(self) -> str:
        """Return the kind; `type` is the older name. Where both differ, the versions of transformers do too."""
        kinds = {key: self.values[key] for key in ("rope_type", "type") if key in self.values}
        for key, value in kinds.items():
            if not isinstance(value, str):
                raise self.error(key, value, "expected a string", SUPPORTED)
        if len(set(kinds.values())) > 1:
            expected = f"{self.name('type')}={kinds['type']!r} differs"
            raise self.error("rope_type", kinds["rope_type"], expected, "remove one of the two")
        return str(kinds.get("rope_type", kinds.get("type", "default")))

    def positive(self, key: str, default: float | None = None) -> float:
        """Return a positive number; required without a `default`, which also replaces null."""
        if default is not None and self.values.get(key) is None:
            return default
        if key not in self.values:
            where, fix = self.fields.where, f"add {key} to {self.layout} in config.json"
            raise SourceError(f"{self.name(key)} is missing", where=where, fix=fix)
        value = self.values[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value <= LARGEST:
            raise self.error(key, value, "expected a positive number", "write a number without quotes in config.json")
        return float(value)

    def original(self) -> int:
        """Return the context length before scaling: transformers 5 fills in `max_position_embeddings`, 4.57 needs it.

        transformers 5 prefers the field outside the object, 4.57 the one inside: they must agree.
        """
        named = {self.name(ORIGINAL): self.values[ORIGINAL]} if ORIGINAL in self.values else {}
        if not self.by_layer and (ORIGINAL in self.fields.config or self.fields.has(ORIGINAL)):
            outside = self.fields.value(ORIGINAL) if self.fields.has(ORIGINAL) else self.fields.config[ORIGINAL]
            named[ORIGINAL] = outside
        for name, value in named.items():
            if not is_int(value) or not 0 < value < LIMIT:
                raise self.fields.error(name, value, "expected a positive integer")
        values = list(named.values()) or [self.max_position]
        if len(set(values)) > 1:
            what = f"{self.name(ORIGINAL)}={values[0]} differs"
            raise self.fields.error(ORIGINAL, values[1], what, "remove one of the two")
        return int(values[0])

    @property
    def max_position(self) -> int:
        """`max_position_embeddings`."""
        return self.fields.size("max_position_embeddings")


def scaled(rope: RopeObject, kind: str, theta: float, dim: int) -> tuple[RopeScaling | None, float]:
    """Return how a kind scales frequencies, and by what cosines and sines are multiplied.

    Raises:
        SourceError: an unsupported kind, or a missing or malformed value, by its name.

    """
    if kind == "default":
        return None, 1.0
    if kind == "dynamic":  # as the default up to `max_position_embeddings`, which no cache exceeds
        rope.positive("factor")
        return None, 1.0
    if kind == "linear":
        return LinearRope(rope.positive("factor")), 1.0
    if kind == "llama3":
        return _llama3(rope), 1.0
    if kind == "yarn":
        return _yarn(rope, theta, dim)
    if kind == "longrope":
        return _longrope(rope, dim)
    raise rope.error("rope_type", kind, f"rope type {kind!r} is not supported", SUPPORTED)


def _llama3(rope: RopeObject) -> Llama3Rope:
    low, high = (rope.positive(f"{name}_freq_factor") for name in ("low", "high"))
    if high < low:
        raise rope.error("high_freq_factor", high, f"expected at least low_freq_factor={low}")
    return Llama3Rope(
        factor=rope.positive("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=rope.original(),
    )


def _yarn(rope: RopeObject, theta: float, dim: int) -> tuple[YarnRope, float]:
    """Read YaRN (Peng et al. 2023): the pairs between which it mixes turn `beta_fast` and `beta_slow` times."""
    if theta <= 1:
        raise rope.error("rope_theta", theta, "expected more than 1 for yarn")
    factor, original = rope.positive("factor"), rope.original()
    fast, slow = rope.positive("beta_fast", YARN_FAST), rope.positive("beta_slow", YARN_SLOW)
    first, last = (dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow))
    if _truncate(rope):
        first, last = math.floor(first), math.ceil(last)
    first, last = float(max(first, 0)), float(min(last, dim - 1))
    return YarnRope(factor, first, last + APART if first == last else last), _yarn_scale(rope, factor)


def _truncate(rope: RopeObject) -> bool:
    value = rope.values.get("truncate", True)
    if not isinstance(value, bool):
        raise rope.error("truncate", value, "expected true or false")
    if not value and rope.by_layer:
        raise rope.error("truncate", value, "transformers ignores it here", "remove it")
    return value


def _yarn_scale(rope: RopeObject, factor: float) -> float:
    def of(multiple: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiple * math.log(factor) + 1

    if rope.values.get("attention_factor") is not None:
        return rope.positive("attention_factor")
    given = [rope.positive(key) for key in ("mscale", "mscale_all_dim") if rope.values.get(key) not in (None, 0)]
    return of(given[0]) / of(given[1]) if len(given) > 1 else of(1)


def _longrope(rope: RopeObject, dim: int) -> tuple[DividedRope, float]:
    """Read LongRoPE (Ding et al. 2024), as it is up to the original length: `short_factor` divides the frequencies."""
    short, _ = (_factors(rope, f"{name}_factor", dim // 2) for name in ("short", "long"))
    original = rope.original()
    if original < 2:
        raise rope.error(ORIGINAL, original, "expected more than 1 for longrope")
    factor = rope.positive("factor", rope.max_position / original)
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return DividedRope(short), rope.positive("attention_factor", scale)


def _factors(rope: RopeObject, key: str, count: int) -> tuple[float, ...]:
    values = rope.values.get(key)
    if not isinstance(values, list) or len(values) != count:
        raise rope.error(key, values, f"expected a list of {count} positive numbers")
    return tuple(RopeObject(rope.fields, rope.layout, {key: value}).positive(key) for value in values)


def _original_length(rope: RopeObject) -> int | None:
    return rope.original() if rope.original() < rope.max_position else None


LENGTH_DEPENDENT: Mapping[str, Callable[[RopeObject], int | None]] = {
    "dynamic": lambda rope: rope.max_position,
    "longrope": _original_length,
}
"""Length from which on the frequencies of a kind follow the length of the sequence; None if no cache is so long.

Keys in the cache would have to be computed again, with those of all tokens before: transformers does so for Phi-3.
"""
