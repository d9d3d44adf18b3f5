"""DFlash drafts (arXiv 2602.06036) of every writer: what in a file shows one, and how it is read. Imports no torch.

A DFlash draft is a small model that denoises a block of positions in one pass: the newest token, and masks after it.
Its caches hold keys and values that its layers make of the target's states. `models.dspark` has what DSpark adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import SourceError
from pipeline.models import dspark
from pipeline.models.config import Eagle3, TapIds, TapMeaning
from pipeline.models.dspark import CONFIDENCE, is_dspark
from pipeline.models.eagle3_writers import Writer, architectures, checked_ids, overrides, size_of
from pipeline.models.fields import Fields, is_int, shown
from pipeline.models.layer_types import SLIDING
from pipeline.models.weights import FC, MARKOV

OPTIONS = "dflash_config"
INPUT_IDS, OUTPUT_IDS = "aux_hidden_state_layer_ids", "target_layer_ids"
"""Tapped layers: of speculators, inputs of layers; of others, outputs."""

MASK_FIELD, BLOCK_FIELD = "mask_token_id", "block_size"
NON_CAUSAL_WINDOWS = "sliding_window_non_causal"
OLD_NAMES = {
    "encoder.fc.": "fc.", "encoder.output_norm_enc.": "hidden_norm.",
    "markov_w1.": f"{MARKOV}markov_w1.", "markov_w2.": f"{MARKOV}markov_w2.", "confidence_proj.": CONFIDENCE,
}  # fmt: skip
"""Starts of the names of tensors in some files, and the usual ones."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention_sink_bias": (False,),
    "attention_value_scale": (1,),
    "final_logit_softcapping": (),
    "is_neox_style": (True,),
    "mask_token": (),
    "output_multiplier": (1,),
    "projector_type": ("dflash",),
    "pure_draft_prefix_len": (0,),
    "swa_window_size": (),
    "use_swa": (False,),
}
"""Fields, at the top level or in `dflash_config`, that change the computation, and the values (null apart) that do not.
"""

OTHER_KINDS = ("conv_", "selector_", "emb_dim", "gru_hidden_dim")
"""Starts of fields of `dflash_config` that belong to drafts with further modules (Domino, DFlash2)."""

OF_DSPARK = ("markov_", "shift_label")
"""Starts of fields of `dflash_config` that DSpark drafts alone have."""

SPECULATORS_BLOCK = 8

MASK_EMBEDDING = "mask_embedding.pt"
"""File of some drafts with the embedding of the mask token, in a pickle."""


def mask_embedding_error(where: str) -> SourceError:
    """Return the error of a draft whose mask token has an embedding of its own."""
    fix = "use a draft whose mask token has its row of the target's embedding"
    return SourceError(f"a draft with {MASK_EMBEDDING} is not supported", where=where, fix=fix)


def is_dflash(config: Mapping[str, Any]) -> bool:
    """Return whether a config is a DFlash draft's."""
    return (
        config.get("speculators_model_type") == "dflash"
        or is_dspark(config)
        or any(name.lower().startswith("dflash") for name in architectures(config))
        or isinstance(config.get(OPTIONS), Mapping)
    )


def writer_of(config: Mapping[str, Any]) -> Writer:
    """Return the tool that wrote a flat config: SpecForge's files and those of the paper's authors are alike."""
    return "speculators" if "speculators_model_type" in config else "specforge"


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the fields that `description` reads, for the reader of all models' fields."""
    return {key: value for key, value in config.items() if key not in ("is_causal", OPTIONS)}


def description(fields: Fields, tensors: Mapping[str, Sequence[int]]) -> Eagle3:
    """Return how a DFlash draft is read.

    Raises:
        SourceError: a field that is missing, or that names another computation.

    """
    _refuse_others(fields)
    target_hidden = fields.optional_size("target_hidden_size") or fields.size("hidden_size")
    written = _taps(fields)
    count = len(written.ids) if written is not None else 3
    width = size_of(fields, tensors, FC, 1) if FC in tensors else count * target_hidden
    if width != count * target_hidden:
        what = f"fc.weight reads {width} values, target_hidden_size={target_hidden}, but {count} layers are read"
        raise SourceError(what, where=fields.where, fix="list one layer for each state that fc reads: draft.taps")
    return Eagle3(
        target_hidden=target_hidden,
        writer=writer_of(fields.config),
        tap_count=count,
        written=written,
        mask_token=_mask_token(fields),
        block=_block(fields),
        causal_layers=_causal_layers(fields),
        from_anchor=dspark.from_anchor(fields, _options(fields), writer_of(fields.config)),
        markov=dspark.markov_of(fields, _options(fields), tensors) if is_dspark(fields.config) else None,
        confidence=any(name.startswith(CONFIDENCE) for name in tensors),
    )


def _options(fields: Fields) -> Mapping[str, Any]:
    options = fields.config.get(OPTIONS) or {}
    if not isinstance(options, Mapping):
        raise fields.error(OPTIONS, options, "expected an object")
    return options


def _refuse_others(fields: Fields) -> None:
    """Raise an error for a field that names another computation."""
    options = _options(fields)
    fix = "use a draft without this option"
    for place, values in ((f"{OPTIONS}.", options), ("", fields.config)):
        for key, neutral in NEUTRAL.items():
            value = values.get(key)
            if key == "projector_type" and is_dspark(fields.config):
                continue
            if value is not None and value not in neutral:
                raise fields.error(f"{place}{key}", value, "a DFlash draft with this option is not supported", fix)
    foreign = OTHER_KINDS if is_dspark(fields.config) else (*OTHER_KINDS, *OF_DSPARK)
    for key, value in options.items():
        if key.startswith(foreign) and value:
            raise fields.error(f"{OPTIONS}.{key}", value, "a draft with this module is not supported", fix)


def _taps(fields: Fields) -> TapIds | None:
    """Return the tapped layers that a file lists, or that its writer means by none; a recipe's replace them.

    Raises:
        SourceError: not a list of ascending integers, or none and no number of the target's layers.

    """
    told = overrides(fields.config).get("taps")
    if isinstance(told, list):
        return TapIds("draft.taps of the recipe", tuple(told), "inputs")
    if told == "final":
        fix = "write the inputs of layers, for example taps: [2, 16, 29]"
        raise SourceError(
            "draft.taps: final in the recipe, but a DFlash draft reads layers", where=fields.where, fix=fix
        )
    found = _listed(fields)
    return TapIds(found.field, found.ids, told) if told and found is not None else found


def _listed(fields: Fields) -> TapIds | None:
    places: tuple[tuple[str, Any, TapMeaning], ...] = (
        (INPUT_IDS, fields.config.get(INPUT_IDS), "inputs"),
        (f"{OPTIONS}.{OUTPUT_IDS}", _options(fields).get(OUTPUT_IDS), "outputs"),
        (OUTPUT_IDS, fields.config.get(OUTPUT_IDS), "outputs"),
    )
    for field, ids, meaning in places:
        if (found := checked_ids(fields, field, ids, meaning)) is not None:
            return found
    if writer_of(fields.config) == "speculators":
        return None
    return TapIds("num_target_layers", usual_outputs(fields), "outputs")


def usual_outputs(fields: Fields) -> tuple[int, ...]:
    """Return the layers whose outputs a draft reads that lists none: spread evenly, one for each of its own layers."""
    layers, target = fields.size("num_hidden_layers"), fields.config.get("num_target_layers")
    if not is_int(target) or not isinstance(target, int) or target < 4:
        raise fields.error("num_target_layers", target, f"needed where {OPTIONS}.{OUTPUT_IDS} is missing")
    if layers == 1:
        return (target // 2,)
    return tuple(round(1 + index * (target - 4) / (layers - 1)) for index in range(layers))


def _mask_token(fields: Fields) -> int:
    told = overrides(fields.config).get(MASK_FIELD)
    listed = {MASK_FIELD: fields.config.get(MASK_FIELD), f"{OPTIONS}.{MASK_FIELD}": _options(fields).get(MASK_FIELD)}
    found = {name: value for name, value in listed.items() if value is not None}
    if told is not None:
        found = {f"draft.{MASK_FIELD}": told}
    if len({shown(value) for value in found.values()}) != 1:
        fix = f"write the token of the training in the recipe: draft: {{{MASK_FIELD}: N}}"
        value = list(found.values()) or None
        raise fields.error(f"{OPTIONS}.{MASK_FIELD}", value, "expected one token of masked positions", fix)
    name, value = next(iter(found.items()))
    vocab = fields.size("vocab_size")
    if not is_int(value) or not 0 <= value < vocab:
        raise fields.error(name, value, f"expected a token, 0 to {vocab - 1}")
    return int(value)


def _block(fields: Fields) -> int:
    """Return the positions of a block: the newest token and masks; its size bounds what a step may propose."""
    default = SPECULATORS_BLOCK if writer_of(fields.config) == "speculators" else None
    value = fields.config.get(BLOCK_FIELD, _options(fields).get(BLOCK_FIELD, default))
    if not is_int(value) or value < 2:
        raise fields.error(BLOCK_FIELD, value, "expected an integer from 2")
    return int(value)


def _causal_layers(fields: Fields) -> tuple[int, ...]:
    """Return the layers in which a position sees those of its block before it alone: usually those with a window."""
    layers = fields.size("num_hidden_layers")
    kinds = fields.value("layer_types") or ["full_attention"] * layers
    windows = tuple(layer for layer, kind in enumerate(kinds) if kind == SLIDING)
    for name, value in (
        ("is_causal", fields.config.get("is_causal")),
        (f"{OPTIONS}.causal", _options(fields).get("causal")),
    ):
        if value is not None and not isinstance(value, bool):
            raise fields.error(name, value, "expected true or false")
        if value is not None:
            return tuple(range(layers)) if value else ()
    non_causal = fields.config.get(NON_CAUSAL_WINDOWS)
    if windows and non_causal is None and writer_of(fields.config) == "speculators":
        raise fields.error(NON_CAUSAL_WINDOWS, None, "readers differ on a file with windows that leaves it out")
    return () if non_causal else windows
