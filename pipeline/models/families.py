"""Select the family of a `config.json` and read it to a `ModelConfig`. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from pipeline.errors import SourceError
from pipeline.models import eagle3, mtp
from pipeline.models.config import ModelConfig
from pipeline.models.fields import Fields
from pipeline.models.other_drafts import refuse_other_kinds
from pipeline.models.quantisation import read_quantisation

FAMILIES = {
    "gemma2": "pipeline.models.gemma2",
    "gemma3_text": "pipeline.models.gemma3",
    "gemma4_text": "pipeline.models.gemma4",
    "glm4": "pipeline.models.glm4",
    "gpt_oss": "pipeline.models.gpt_oss",
    "granite": "pipeline.models.granite",
    "granitemoe": "pipeline.models.granitemoe",
    "granitemoehybrid": "pipeline.models.granitemoehybrid",
    "llama": "pipeline.models.llama",
    "llama4_text": "pipeline.models.llama4",
    "ministral3": "pipeline.models.ministral3",
    "mistral": "pipeline.models.mistral",
    "mixtral": "pipeline.models.mixtral",
    "olmo2": "pipeline.models.olmo2",
    "olmo3": "pipeline.models.olmo3",
    "olmoe": "pipeline.models.olmoe",
    "phi3": "pipeline.models.phi3",
    "qwen2": "pipeline.models.qwen2",
    "qwen2_moe": "pipeline.models.qwen2_moe",
    "qwen3": "pipeline.models.qwen3",
    "qwen3_5_moe_text": "pipeline.models.qwen3_5",
    "qwen3_5_text": "pipeline.models.qwen3_5",
    "qwen3_moe": "pipeline.models.qwen3_moe",
    "qwen3_next": "pipeline.models.qwen3_next",
    "smollm3": "pipeline.models.smollm3",
}


def config_of(config_json: Mapping[str, Any], where: str) -> ModelConfig:
    """Read a checkpoint's `config.json`; `where` names it in errors.

    Raises:
        SourceError: an unsupported architecture or field, by name and value.

    """
    read_quantisation(config_json, where)
    refuse_other_kinds(config_json, config_json.get(eagle3.TENSORS) or {}, where)
    if mtp.is_module(config_json):
        return mtp.of_layer(config_of({name: of for name, of in config_json.items() if name != mtp.MARK}, where))
    if eagle3.is_head(config_json):
        return eagle3.read_config(config_json, where)
    family = config_json.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise SourceError(
            f"model_type {family!r} is not supported",
            where=where,
            fix=f"use a model of one of these families: {', '.join(sorted(FAMILIES))}",
        )
    config: ModelConfig = import_module(FAMILIES[family]).read_config(Fields(config_json, family, where))
    return config
