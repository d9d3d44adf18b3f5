"""Read the fields of a Hugging Face `config.json` as the config class of its family does. Imports no torch.

`defaults.py` has the defaults and types. transformers 5 rejects values of another type, so they are errors here too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import SourceError
from pipeline.models.defaults import FIELDS
from pipeline.models.field_types import Field, Kind
from pipeline.models.other_fields import DRAFT_FIELDS, OTHER_NAMES

LIMIT = 2**31
MOST = {"num_hidden_layers": 1000, "num_experts": 4096, "num_local_experts": 4096}
"""Limits for fields by which tables of weights are made: a config of 2^30 layers would fill the memory."""

LARGEST = 3e38
"""Largest number of float32."""

SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Fields:
    """A `config.json`, the family whose class reads it, and its place in errors."""

    config: Mapping[str, Any]
    family: str
    where: str

    def has(self, key: str) -> bool:
        """Return whether the family's class has a field."""
        return key in FIELDS[self.family]

    def value(self, key: str) -> Any:
        """Return a field's value, or the family's default if it is absent.

        Raises:
            SourceError: a value of a type that the family's class rejects.

        """
        field = FIELDS[self.family].get(key) or DRAFT_FIELDS[key]
        value = self.config.get(key, field.default)
        other = OTHER_NAMES.get(self.family, {}).get(key)
        if other is not None and other in self.config:
            if key in self.config and self.config[other] != value:
                raise self.error(other, self.config[other], f"{key}={shown(value)} differs", "remove one of the two")
            value = self.config[other]
        if not _accepted(value, field.kind):
            raise self.error(key, value, f"expected {field.kind.value}", _remedy(field))
        return value

    def size(self, key: str) -> int:
        """Return a field that is a positive integer."""
        value, limit = self.value(key), MOST.get(key, LIMIT)
        if value is None or not 0 < value < limit:
            below = "2^31" if limit == LIMIT else f"{limit:,}"
            raise self.error(key, value, f"expected a positive integer below {below}")
        return int(value)

    def optional_size(self, key: str) -> int | None:
        """Return a field that is a positive integer or null."""
        return None if self.value(key) is None else self.size(key)

    def error(self, key: str, value: Any, expected: str, fix: str = "correct config.json") -> SourceError:
        """Return the error of a field: its name, its value, and what is expected."""
        return SourceError(f"{key}={shown(value)}: {expected}", where=self.where, fix=fix)


def shown(value: Any) -> str:
    """Return a value as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def is_int(value: Any) -> bool:
    """Return whether a JSON value is an integer; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _accepted(value: Any, kind: Kind) -> bool:  # noqa: C901 - a table, not logic
    match kind:
        case Kind.BOOL:
            return isinstance(value, bool)
        case Kind.INT:
            return is_int(value)
        case Kind.INT_OR_NULL:
            return value is None or is_int(value)
        case Kind.FLOAT:
            return isinstance(value, float) and math.isfinite(value)
        case Kind.FLOAT_OR_NULL:
            return value is None or (isinstance(value, float) and math.isfinite(value))
        case Kind.NUMBER | Kind.NUMBER_OR_NULL:
            if value is None:
                return kind is Kind.NUMBER_OR_NULL
            return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
        case Kind.BOOL_OR_NULL:
            return value is None or isinstance(value, bool)
        case Kind.INTS_OR_NULL:
            return value is None or (isinstance(value, list) and all(map(is_int, value)))
        case Kind.TEXT:
            return isinstance(value, str)
        case Kind.TEXT_OR_NULL:
            return value is None or isinstance(value, str)
        case Kind.TOKEN_IDS:
            return value is None or is_int(value) or (isinstance(value, list) and all(map(is_int, value)))
        case Kind.NAMES_OR_NULL:
            return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _remedy(field: Field) -> str:
    default = f", or remove the field (default: {shown(field.default)})" if field.default is not None else ""
    quotes = "" if field.kind in (Kind.TEXT, Kind.TEXT_OR_NULL, Kind.NAMES_OR_NULL) else ", without quotes"
    return f"in config.json, write {field.kind.value}{quotes}{default}"
