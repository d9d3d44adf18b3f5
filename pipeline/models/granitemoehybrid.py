"""Granite 4 without layers of Mamba-2: Granite 3 with another name of its networks, with or without RoPE."""

from __future__ import annotations

from pipeline.models.config import ModelConfig
from pipeline.models.fields import Fields, shown
from pipeline.models.granite import multipliers
from pipeline.models.layer_types import FULL
from pipeline.models.shared import reject_null_head_dim, shared_fields

ATTENTION = ("attention", FULL)
"""Names of a layer of attention in published configs and in transformers 5."""

ROPE, WITHOUT_ROPE = "rope", (None, "nope")


def read_config(fields: Fields) -> ModelConfig:
    """Translate a `GraniteMoeHybridConfig`.

    Raises:
        SourceError: layers of Mamba-2, experts, or an unknown embedding of positions, by field and value.

    """
    reject_null_head_dim(fields)
    _reject_other_layers(fields)
    if (count := fields.value("num_local_experts")) != 0:
        what = "experts beside a shared network are not supported"
        raise fields.error("num_local_experts", count, what, "use a dense model (num_local_experts=0)")
    positions = fields.value("position_embedding_type")
    if positions != ROPE and positions not in WITHOUT_ROPE:
        raise fields.error("position_embedding_type", positions, f"expected {ROPE}, nope or null")
    bias, layers = fields.value("attention_bias"), fields.size("num_hidden_layers")
    return shared_fields(
        fields, qkv_bias=bias, out_bias=bias, **multipliers(fields),
        intermediate=fields.size("shared_intermediate_size"), turned=[positions == ROPE] * layers,
    )  # fmt: skip


def _reject_other_layers(fields: Fields) -> None:
    """Reject layers that are not of attention: without `layer_types` all are of Mamba-2."""
    types, layers = fields.value("layer_types"), fields.size("num_hidden_layers")
    if types is None:
        what = "layers of Mamba-2, which all are without this field, are not supported"
        raise fields.error("layer_types", None, what, f"use a model whose layers are all {ATTENTION[0]}")
    if unknown := sorted(set(types) - set(ATTENTION)):
        what = f"not supported: {', '.join(map(shown, unknown))}"
        raise fields.error("layer_types", unknown, what, f"use a model whose layers are all {ATTENTION[0]}")
    if len(types) != layers:
        raise fields.error("layer_types", types, f"{len(types)} layers, but num_hidden_layers={layers}")
