"""Which tool wrote an EAGLE-3 head, and what its fields mean there. Reads plain JSON; imports no torch.

The same field differs between tools: ids of tapped layers are inputs of layers in one file and outputs in another, and
a switch that is left out is on in one and off in another. This module has all of these differences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pipeline.errors import SourceError
from pipeline.models.config import TapIds, TapMeaning
from pipeline.models.fields import Fields, is_int, shown

Writer = Literal["tandem", "speculators", "amazon", "specforge", "modelopt", "angelslim", "safeailab"]

CREATED_BY, TANDEM = "created_by", "tandem distill"
"""Field, and its value, that mark a head of this project."""

OPTIONS = "eagle_config"
TAPPED = "eagle_aux_hidden_state_layer_ids"
"""Tapped layers: at the top level inputs of layers (vLLM, speculators), in `eagle_config` mostly outputs (SGLang)."""

ANGELSLIM_TAPPED = "aux_hidden_states_layer_ids"
CAPTURED = "eagle3_layers_to_capture"
"""TensorRT-LLM's option: outputs of layers, -1 for the target's output after its last norm."""

HEADS = ("eagle3", "peagle")
"""Parts of the names of architectures of heads."""

SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
"""Switches of a head's norms: fields of `Eagle3`, and of configs."""

FINAL = (-1,)
NESTED = "transformer_layer_config"
RECIPE = "recipe"
"""Field, added when a head is opened, with the readings that a recipe overrides."""

MODELOPT_OPTIONS = frozenset(
    ("use_input_layernorm_in_first_layer", "use_last_layernorm", "use_mtp_layernorm", "next_layer_regular")
)
REFUSED_OPTIONS: Mapping[str, Any] = {
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "eh_proj_before_attn": False,
}
"""Options of `eagle_config` that name another layer than that of EAGLE-3, and the values that do not."""


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a head's config with its sizes at the top level: speculators nests them, and writes null for absent."""
    inner = config.get(NESTED)
    if not isinstance(inner, Mapping):
        return dict(config)
    outer = {key: value for key, value in config.items() if key != NESTED and value is not None}
    return {**inner, **outer}


def architectures(config: Mapping[str, Any]) -> list[str]:
    """Return the names in `architectures`."""
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []


def writer_of(config: Mapping[str, Any]) -> Writer:
    """Return the tool that wrote a flat config; early heads of `tandem distill` look like SpecForge's."""
    names = architectures(config)
    if config.get(CREATED_BY) == TANDEM:
        return "tandem"
    if "speculators_model_type" in config or "speculators_config" in config:
        return "speculators"
    if ANGELSLIM_TAPPED in config or "Eagle3LlamaForCausalLM" in names:
        return "angelslim"
    if "ptd_token_id" in config:
        return "amazon"
    options = config.get(OPTIONS)
    if isinstance(options, Mapping) and MODELOPT_OPTIONS & options.keys():
        return "modelopt"
    return "specforge" if any(part in name.lower() for name in names for part in HEADS) else "safeailab"


def options_of(fields: Fields) -> Mapping[str, Any]:
    """Return `eagle_config`.

    Raises:
        SourceError: not an object, or an option that names another layer than EAGLE-3's.

    """
    options = fields.config.get(OPTIONS) or {}
    if not isinstance(options, Mapping):
        raise fields.error(OPTIONS, options, "expected an object")
    for key, neutral in REFUSED_OPTIONS.items():
        if options.get(key, neutral) != neutral:
            raise _unsupported(fields, f"{OPTIONS}.{key}", options[key])
    if fields.config.get("bias"):
        raise _unsupported(fields, "bias", fields.config["bias"])
    return options


def _unsupported(fields: Fields, key: str, value: Any) -> SourceError:
    return fields.error(key, value, "a head with this option is not supported", "use a head without it")


def size_of(fields: Fields, tensors: Mapping[str, Any], name: str, dimension: int) -> int:
    """Return the size of a dimension of a head's tensor.

    Raises:
        SourceError: the tensor has fewer dimensions.

    """
    shape = tensors[name]
    sizes = list(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else []
    if dimension >= len(sizes) or not is_int(sizes[dimension]):
        what = f"{name} has the shape {shown(shape)}, without dimension {dimension}"
        raise SourceError(what, where=fields.where, fix="download the head again")
    return int(sizes[dimension])


def written_taps(fields: Fields) -> TapIds | None:
    """Return the tapped layers that a head's file lists; None if it lists none.

    A recipe's `draft.taps` says what the ids mean, or replaces them.

    Raises:
        SourceError: not a list of ascending integers.

    """
    told = overrides(fields.config).get("taps")
    if isinstance(told, list):
        return TapIds("draft.taps of the recipe", tuple(told), "inputs")
    found = next(_listed(fields), None)
    if told not in ("inputs", "outputs"):
        return found
    if found is None:
        what = f"draft.taps={told!r} in the recipe, but the file lists no tapped layers"
        raise SourceError(what, where=fields.where, fix="write the inputs of layers, for example taps: [2, 16, 29]")
    return TapIds(found.field, found.ids, told)


def _listed(fields: Fields) -> Iterator[TapIds]:
    options = options_of(fields)
    places: tuple[tuple[str, Any, TapMeaning], ...] = (
        (TAPPED, fields.config.get(TAPPED), "inputs"),
        (ANGELSLIM_TAPPED, fields.config.get(ANGELSLIM_TAPPED), "outputs"),
        (CAPTURED, fields.config.get(CAPTURED), "outputs"),
        (f"{OPTIONS}.{TAPPED}", options.get(TAPPED), "unclear"),
    )
    for field, ids, meaning in places:
        if (found := checked_ids(fields, field, ids, meaning)) is not None:
            yield found


def checked_ids(fields: Fields, field: str, ids: Any, meaning: TapMeaning) -> TapIds | None:
    """Return the ids of a field of a draft's file; None if it has none.

    Raises:
        SourceError: not a list of ascending integers.

    """
    if ids is None or ids == []:
        return None
    if not isinstance(ids, list) or not all(map(is_int, ids)):
        raise fields.error(field, ids, "expected a list of integers")
    if ids != sorted(set(ids)):
        raise fields.error(field, ids, "expected ascending layers", "sort them, and the columns of fc.weight alike")
    return TapIds(field, tuple(ids), meaning)


def inputs_of(written: TapIds, layers: int) -> tuple[int, ...]:
    """Return listed taps as layers whose inputs are read, in a target of `layers` layers.

    Unclear ids are outputs, as SpecForge and ModelOpt write them, unless they end at the target's depth or begin with
    2, the first of the usual inputs (SGLang's exceptions for gpt-oss and Kimi).
    """
    is_inputs = written.meaning == "inputs"
    if written.meaning == "unclear":
        is_inputs = written.ids[-1] == layers or written.ids[0] == 2
    return written.ids if is_inputs else tuple(k + 1 for k in written.ids)


def usual_taps(layers: int) -> tuple[int, ...]:
    """Return the layers whose inputs a head reads that lists none: low, middle and high."""
    return (2, layers // 2, layers - 3)


def overrides(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the readings that a recipe overrides."""
    told = config.get(RECIPE)
    return told if isinstance(told, Mapping) else {}


def switch(fields: Fields, name: str, *, absent: bool = False, aliases: tuple[str, ...] = ()) -> bool:
    """Return a switch: the recipe's, that of the file at the top level or in `eagle_config`, or `absent`.

    Raises:
        SourceError: a value that is not true or false.

    """
    told, options = overrides(fields.config).get(name), options_of(fields)
    if told is not None:
        return bool(told)
    for key in (name, *aliases):
        for place, values in ((f"{OPTIONS}.{key}", options), (key, fields.config)):
            value = values.get(key)
            if value is None:
                continue
            if not isinstance(value, bool):
                raise fields.error(place, value, "expected true or false")
            return value
    return absent


def norm_output(fields: Fields, writer: Writer) -> bool:
    """Return whether a head's own output is fed back after its last norm (EAGLE 3.1).

    SpecForge up to 0.2.0 means another thing by `norm_output: true`: the LM head reads the normalised output, as in
    every head, and the output before the norm is fed back.
    """
    told = overrides(fields.config).get("norm_output")
    read = switch(fields, "norm_output", aliases=("return_hidden_post_norm",))
    return read if told is not None or writer != "specforge" else False


def doubts(fields: Fields, written: TapIds | None, writer: Writer) -> tuple[str, ...]:
    """Return what a file leaves open, each with the recipe's key that decides it."""
    found = []
    if written is not None and written.meaning == "unclear":
        found.append(f"{written.field}={shown(list(written.ids))} may be outputs or inputs of layers: draft.taps")
    if writer == "specforge" and "norm_output" not in overrides(fields.config) and fields.config.get("norm_output"):
        found.append("SpecForge's norm_output=true feeds back the raw output up to 0.2.0: draft.norm_output")
    return tuple(found)
