"""Drafts of kinds that are not supported, recognised by their configs and refused by name. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import SourceError
from pipeline.models.dspark import DSPARK_NAMES, DSPARK_TYPE
from pipeline.models.eagle3_writers import architectures
from pipeline.models.p_eagle import MODEL_TYPES, is_p_eagle

EAGLE1 = "EAGLE-1"
DSPARK_OTHER = "DSpark over layers of another family than Qwen3"
KINDS: Mapping[str, tuple[str, ...]] = {
    "DFlash2": ("dflash2",),
    DSPARK_OTHER: ("dspark",),
    "Domino": ("domino",),
    "EAGLE-3 with MLA attention (DeepSeek)": ("eagle3deepseek", "deepseekv2eagle3", "deepseekv3eagle3"),
    "EAGLE-3 of several layers": ("eagle3deep",),
    "Medusa": ("medusa",),
    "MLP speculator": ("mlpspeculator", "mlp_speculator"),
    EAGLE1: ("eagleforcausallm", "eaglellama", "forcausallmeagle", "eaglemistral", "eagleqwen", "eaglespeculator"),
    "XPress": ("xpress",),
    "MTP": ("mtpspeculator", "mtpdraft"),
}
"""Kind of draft -> parts of the names of its architectures, in lower case."""

BY_FIELD: Mapping[str, str] = {
    "pard_token": "PARD, a parallel draft model",
    "dspark_noise_token_id": "DSpark inside a target",
}
"""Field of a config -> kind of draft."""

BY_TENSOR: Mapping[str, str] = {
    "parallel_draft_heads": "EAGLE-3 with parallel draft heads",
    "model.layers.0.self_attn.q_a_proj": "EAGLE-3 with MLA attention (DeepSeek)",
    "eh_proj": "EAGLE-3 with eh_proj",
    "fc.bias": "EAGLE-3 with a bias of fc",
}
"""Start of a tensor's name -> kind of draft."""

SPECULATORS = "speculators_model_type"
READ_TYPES = ("eagle3", "eagle-3", "dflash", DSPARK_TYPE, *MODEL_TYPES)
FIX = "use an EAGLE-3 or P-EAGLE head, a DFlash or DSpark draft, a smaller model, or train one: tandem distill RECIPE"


def refuse_other_kinds(config: Mapping[str, Any], tensors: Mapping[str, Any], where: str) -> None:
    """Raise an error for a draft of a kind that is not supported.

    Raises:
        SourceError: names the kind and what shows it.

    """
    for kind, shown in _signs(config, tensors):
        raise SourceError(f"a draft of this kind is not supported: {kind} ({shown})", where=where, fix=FIX)


def _is_read(kind: str, name: str) -> bool:
    """Return whether an architecture, in lower case, is of a draft that is read although its name has a kind's part."""
    return (kind == EAGLE1 and "eagle3" in name) or (kind == DSPARK_OTHER and name in DSPARK_NAMES)


def _signs(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    kind = config.get(SPECULATORS)
    if isinstance(kind, str) and kind not in READ_TYPES:
        known = [name for name, parts in KINDS.items() if kind.lower().replace("-", "") in parts]
        found.append((known[0] if known else kind, f"{SPECULATORS}: {kind}"))
    for name in architectures(config):
        kinds = (known for known, parts in KINDS.items() if any(part in name.lower() for part in parts))
        found += [(known, f"architecture {name}") for known in kinds if not _is_read(known, name.lower())]
    fields = {} if is_p_eagle(config, tensors) else BY_FIELD
    found += [(known, f"field {field}") for field, known in fields.items() if config.get(field) is not None]
    found += [
        (known, f"tensor {name}") for start, known in BY_TENSOR.items() for name in tensors if name.startswith(start)
    ]
    return found
