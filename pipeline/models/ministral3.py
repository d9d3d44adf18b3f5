"""Ministral 3: Mistral with YaRN, whose queries grow with the logarithm of their position beyond the original length.

The factor is 1 up to the original length, which is therefore the limit of caches. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.errors import SourceError
from pipeline.models.config import Limit, ModelConfig
from pipeline.models.fields import LIMIT, Fields, is_int
from pipeline.models.layer_types import windows
from pipeline.models.rope_kinds import ORIGINAL
from pipeline.models.shared import shared_fields

BETA = "llama_4_scaling_beta"
ROPE: Mapping[str, Any] = {
    "type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, ORIGINAL: 16384, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale_all_dim": 1.0, "mscale": 1.0, BETA: 0.1,
}  # fmt: skip
"""The rotary embedding of a config without one."""


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `Ministral3Config`."""
    layout = "rope_scaling" if fields.config.get("rope_scaling") else "rope_parameters"
    if fields.config.get(layout) is None:
        fields = replace(fields, config={**fields.config, layout: ROPE})
    return shared_fields(fields, windows=windows(fields), limits=_limit(fields, layout))


def _limit(fields: Fields, layout: str) -> tuple[Limit, ...]:
    """Return the length up to which queries are not scaled, unless they never are."""
    rope = fields.config[layout]
    if not isinstance(rope, Mapping):
        raise fields.error(layout, rope, "expected an object or null")
    for key in (BETA, ORIGINAL):
        if rope.get(key) is None:
            where, fix = fields.where, f"add {key} to {layout} in config.json"
            raise SourceError(f"{layout}.{key} is missing", where=where, fix=fix)
    beta, length = rope[BETA], rope[ORIGINAL]
    if isinstance(beta, bool) or not isinstance(beta, int | float):
        raise fields.error(f"{layout}.{BETA}", beta, "expected a number")
    if not is_int(length) or not 0 < length < LIMIT:
        raise fields.error(f"{layout}.{ORIGINAL}", length, "expected a positive integer")
    return (Limit(f"{layout}.{BETA}", length),) if beta else ()
