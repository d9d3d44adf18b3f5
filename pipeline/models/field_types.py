"""The JSON type and the default of a field of `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Kind(Enum):
    """The JSON type of a field, in the words of an error."""

    BOOL = "true or false"
    INT = "an integer"
    INT_OR_NULL = "an integer or null"
    FLOAT = "a decimal number"
    FLOAT_OR_NULL = "a decimal number or null"
    NUMBER = "a number"
    NUMBER_OR_NULL = "a number or null"
    BOOL_OR_NULL = "true, false or null"
    INTS_OR_NULL = "a list of integers or null"
    TEXT = "a string"
    TEXT_OR_NULL = "a string or null"
    TOKEN_IDS = "a token id, a list of token ids, or null"  # noqa: S105 - not a password
    NAMES_OR_NULL = "a list of strings or null"


@dataclass(frozen=True)
class Field:
    """A field of a config class: the value of an absent field, and what the class accepts."""

    default: Any
    kind: Kind
