"""The text part of a multimodal model: its config as that of a text model, its tensors by their names. No torch.

Images are not supported: a prompt of text alone is read as by transformers' multimodal class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import SourceError
from pipeline.models.fields import shown

TEXT = "text_config"
PREFIXES = ("model.language_model.", "language_model.")
"""Start of the names of the text part's tensors: as transformers 5 and as transformers 4 saves them."""

HEAD_PREFIX = "lm_head."
OUTER = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "quantization_config")
"""Fields of the whole model that are also those of its text part, where it has none of its own."""

TIED = "tie_word_embeddings"


@dataclass(frozen=True)
class Text:
    """The class of a multimodal model's text part, and whether embedding and head are one where no field says so."""

    model_type: str
    architecture: str
    tied: bool


CLASSES: Mapping[str, tuple[Text, ...]] = {
    "gemma3": (Text("gemma3_text", "Gemma3ForCausalLM", tied=True),),
    "gemma4": (Text("gemma4_text", "Gemma4ForCausalLM", tied=True),),
    "llama4": (Text("llama4_text", "Llama4ForCausalLM", tied=False),),
    "qwen3_5": (Text("qwen3_5_text", "Qwen3_5ForCausalLM", tied=False),),
    "qwen3_5_moe": (Text("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", tied=False),),
    "mistral3": (
        Text("mistral", "MistralForCausalLM", tied=False), Text("ministral3", "Ministral3ForCausalLM", tied=False),
    ),
}  # fmt: skip
"""Text parts by the `model_type` of the whole model; the first is that of a text part without a type."""


def text_part(config_json: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the config of a multimodal model's text part; another config as it is.

    Raises:
        SourceError: a text part of another class than the model has.

    """
    model_type = config_json.get("model_type")
    texts = CLASSES.get(model_type, ()) if isinstance(model_type, str) else ()
    if not texts:
        return dict(config_json)
    own = config_json.get(TEXT)
    found = own.get("model_type", texts[0].model_type) if isinstance(own, dict) else None
    text = next((one for one in texts if one.model_type == found), None)
    if not isinstance(own, dict) or text is None:
        what = f"{TEXT}.model_type={shown(found)}" if isinstance(own, dict) else f"{TEXT}={shown(own)}"
        fix = f"supported in {model_type}: {', '.join(one.model_type for one in texts)}"
        raise SourceError(f"{what}: not supported in a model of type {model_type}", where=where, fix=fix)
    outer = {key: config_json[key] for key in OUTER if config_json.get(key) is not None}
    tied = next((c[TIED] for c in (config_json, own) if TIED in c), text.tied)
    return own | outer | {"model_type": text.model_type, "architectures": [text.architecture], TIED: tied}


def of_text(name: str) -> bool:
    """Return whether a tensor of a multimodal model is of its text part."""
    return name.startswith((*PREFIXES, HEAD_PREFIX))


def text_name(name: str) -> str:
    """Return the name in a text model of a tensor of a text part."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            return rest if rest.startswith(("model.", HEAD_PREFIX)) else f"model.{rest}"
    return name
