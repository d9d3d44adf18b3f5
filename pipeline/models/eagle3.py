"""EAGLE-3 heads by their configs, in the convention of SafeAILab/EAGLE and SpecForge. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import SourceError
from pipeline.models.config import Eagle3, ModelConfig
from pipeline.models.defaults import FIELDS
from pipeline.models.fields import Fields, is_int
from pipeline.models.shared import SLIDING, shared_fields
from pipeline.models.weights import TAPS

TAPPED = "eagle_aux_hidden_state_layer_ids"
"""Field of `eagle_config` that lists the tapped layers."""


def is_head(config: Mapping[str, Any]) -> bool:
    """Return whether a `config.json` is an EAGLE-3 head's."""
    names = config.get("architectures")
    return isinstance(names, list) and any("eagle3" in str(name).lower() for name in names)


def read_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """Translate a head's config.

    Raises:
        SourceError: more than one layer, another number of tapped layers, or an unsupported field.

    """
    family = config.get("model_type")
    fields = Fields(config, family if isinstance(family, str) and family in FIELDS else "llama", where)
    taps = _taps(fields)
    if config.get("num_hidden_layers") != 1:
        problem = f"num_hidden_layers={config.get('num_hidden_layers')}, an EAGLE-3 head has 1"
        raise SourceError(problem, where=where, fix="use a head in the convention of SafeAILab/EAGLE")
    if taps and (len(taps) != TAPS or list(taps) != sorted(set(taps))):
        problem = f"eagle_aux_hidden_state_layer_ids={list(taps)}, expected {TAPS} layers, ascending"
        raise SourceError(problem, where=where, fix="repair config.json")
    head = Eagle3(
        target_hidden=fields.optional_size("target_hidden_size") or fields.size("hidden_size"),
        taps=taps,
        norm_before_residual=bool(config.get("norm_before_residual", False)),
    )
    bias = bool(config.get("attention_bias", False))
    return shared_fields(fields, family="eagle3", tied=False, qkv_bias=bias, eagle3=head, window=_window(fields))


def _taps(fields: Fields) -> tuple[int, ...]:
    """Return the tapped layers that a head's config lists."""
    options = fields.config.get("eagle_config") or {}
    if not isinstance(options, Mapping):
        raise fields.error("eagle_config", options, "expected an object")
    taps = options.get(TAPPED) or []
    if not isinstance(taps, list) or not all(map(is_int, taps)):
        raise fields.error(f"eagle_config.{TAPPED}", taps, "expected a list of integers")
    return tuple(taps)


def _window(fields: Fields) -> int | None:
    """Return the sliding window of a head's layer: only where the config says that it is used."""
    used = SLIDING in (fields.value("layer_types") or ()) or fields.config.get("use_sliding_window")
    return fields.optional_size("sliding_window") if used else None


def tensor_name(name: str) -> str:
    """Return the decoder's name for a head's tensor: public heads use `midlayer` or `layers.0`, and `norm`."""
    name = name.removeprefix("model.")
    for layer in ("midlayer.", "layers.0."):
        if name.startswith(layer):
            return f"model.layers.0.{name.removeprefix(layer)}"
    return f"model.{name}" if name.startswith(("norm.", "embed_tokens.")) else name


def taps_of(target: ModelConfig, draft: ModelConfig) -> tuple[int, ...]:
    """Return the layers of the target whose inputs the draft reads: its config's, else low, middle and high."""
    if draft.eagle3 is None:
        return ()
    return draft.eagle3.taps or (2, target.layers // 2, target.layers - 3)
