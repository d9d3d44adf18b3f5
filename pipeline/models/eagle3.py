"""EAGLE-3 and P-EAGLE heads of every writer, by their configs and the shapes of their tensors. Imports no torch.

`read_config` turns a head's `config.json` into one typed description, a `ModelConfig` with its `Eagle3`; differences
between writers are in `eagle3_writers`. A head is fitted to its target afterwards (`fitted`), because some readings
depend on the target's depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.errors import SourceError
from pipeline.models import dflash
from pipeline.models import eagle3_writers as writers
from pipeline.models.config import Eagle3, Limit, ModelConfig, TapIds
from pipeline.models.defaults import FIELDS
from pipeline.models.eagle3_writers import TAPPED
from pipeline.models.fields import Fields
from pipeline.models.layer_types import SLIDING
from pipeline.models.p_eagle import is_p_eagle, mask_token
from pipeline.models.rope import LAYOUTS
from pipeline.models.shared import shared_fields
from pipeline.models.weights import D2T, EMBEDDING, FC, HEAD, HIDDEN_NORM, INPUT_NORM, TAPS

__all__ = ["TAPPED", "describe", "fitted", "is_head", "opened_config", "read_config", "taps_of", "tensor_name"]

TENSORS = "tensors"
"""Field, added when a head is opened, with the shapes of its tensors by name, so that a lock describes the head."""

T2D = "t2d"
LAYER = "model.layers.0."
Shapes = Mapping[str, Sequence[int]]


def is_head(config: Mapping[str, Any]) -> bool:
    """Return whether a `config.json`, or one that `opened_config` returned, is of a draft over the target's states."""
    return (
        config.get("speculators_model_type") in ("eagle3", "eagle-3")
        or any("eagle3" in name.lower() for name in writers.architectures(config))
        or is_p_eagle(config, _tensors(config))
        or dflash.is_dflash(config)
        or FC in _tensors(config)
    )


def may_be_head(config: Mapping[str, Any]) -> bool:
    """Return whether the tensors must tell: heads of SafeAILab/EAGLE have the architecture of a whole model."""
    return is_head(config) or (config.get("draft_vocab_size") is not None and config.get("num_hidden_layers") == 1)


def opened_config(config: Mapping[str, Any], shapes: Shapes, readings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a draft's config for `read_config`: of a head flat, with its tensors and the readings of the recipe."""
    named = {tensor_name(name): list(shape) for name, shape in shapes.items()}
    opened = writers.flat(config) | {TENSORS: named}
    if not is_head(opened):
        return dict(config)
    return opened | ({writers.RECIPE: dict(readings)} if readings else {})


def read_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """Translate a head's config, with or without the shapes of its tensors.

    Raises:
        SourceError: more than one layer of an EAGLE-3 head, ids that do not match `fc`, or an unsupported field.

    """
    config, tensors = _with_own_rope(writers.flat(config)), _tensors(config)
    is_block = dflash.is_dflash(config)
    family = config.get("model_type")
    other = "qwen3" if is_block else "llama"
    fields = Fields(config, family if isinstance(family, str) and family in FIELDS else other, where)
    if config.get("num_hidden_layers") != 1 and not is_block and not is_p_eagle(config, tensors):
        problem = f"num_hidden_layers={config.get('num_hidden_layers')}, an EAGLE-3 head has 1"
        raise SourceError(problem, where=where, fix="use a head of one layer, as of SafeAILab/EAGLE")
    own_head = not tensors or HEAD in tensors
    tied = not own_head and bool(config.get("tie_word_embeddings")) and EMBEDDING in tensors
    return shared_fields(
        replace(fields, config=dflash.plain(config)) if is_block else fields,
        family="dflash" if is_block else "eagle3",
        tied=tied,
        shares_head=not own_head and not tied,
        draft_vocab=_draft_vocab(fields, tensors),
        qkv_bias=bool(config.get("attention_bias")) or f"{LAYER}self_attn.q_proj.bias" in tensors,
        out_bias=f"{LAYER}self_attn.o_proj.bias" in tensors,
        mlp_bias=f"{LAYER}mlp.gate_proj.bias" in tensors,
        qk_norm="head" if f"{LAYER}self_attn.q_norm.weight" in tensors else None,
        eagle3=dflash.description(fields, tensors) if is_block else _head(fields, tensors),
        limits=_limits(fields),
    )


def _head(fields: Fields, tensors: Shapes) -> Eagle3:
    writer, written = writers.writer_of(fields.config), writers.written_taps(fields)
    is_parallel = is_p_eagle(fields.config, tensors)
    absent = writer == "speculators" and not is_parallel
    target_hidden = fields.optional_size("target_hidden_size") or fields.size("hidden_size")
    reads_output = _reads_output(fields, tensors, written)
    before_fc = writers.switch(fields, "norm_before_fc", absent=INPUT_NORM in tensors)
    fc_norm = writers.switch(fields, "fc_norm", absent="fc_norm.0.weight" in tensors, aliases=("use_aux_norm",))
    if before_fc and fc_norm:
        raise fields.error("fc_norm", True, "norm_before_fc is true as well; readers differ on both together")
    return Eagle3(
        target_hidden=target_hidden,
        norm_before_residual=writers.switch(fields, "norm_before_residual", absent=absent),
        writer=writer,
        tap_count=1 if reads_output else _tap_count(fields, tensors, written, target_hidden),
        written=written,
        reads_output=reads_output,
        norm_before_fc=before_fc,
        fc_norm=fc_norm,
        hidden_norm=not reads_output or not tensors or HIDDEN_NORM in tensors,
        norm_output=writers.norm_output(fields, writer),
        mask_token=mask_token(fields, tensors) if is_parallel else None,
    )


def _reads_output(fields: Fields, tensors: Shapes, written: TapIds | None) -> bool:
    """Return whether a head reads the target's output after its last norm, and no layer within."""
    told = writers.overrides(fields.config).get("taps")
    if told is not None:
        return bool(told == "final")
    aux = writers.options_of(fields).get("use_aux_hidden_state", True)
    without_fc = bool(tensors) and FC not in tensors
    return aux is False or without_fc or (written is not None and written.ids == writers.FINAL)


def _tap_count(fields: Fields, tensors: Shapes, written: TapIds | None, target_hidden: int) -> int:
    """Return the number of taps: of the ids, which must match `fc`."""
    listed = len(written.ids) if written is not None else 0
    stated = fields.config.get("num_aux_hidden_states")
    count = listed or (stated if isinstance(stated, int) else 0) or TAPS
    width = writers.size_of(fields, tensors, FC, 1) if FC in tensors else count * target_hidden
    if width == count * target_hidden:
        return count
    if width % target_hidden or listed:
        ids = f"{written.field} lists {listed} layers" if written is not None else "no layers are listed"
        what = f"fc.weight reads {width} values, target_hidden_size={target_hidden}, but {ids}"
        raise SourceError(what, where=fields.where, fix="list one layer for each state that fc reads: draft.taps")
    return int(width // target_hidden)


def _draft_vocab(fields: Fields, tensors: Shapes) -> int | None:
    """Return the size of a reduced vocabulary; None for a head over the whole vocabulary.

    Raises:
        SourceError: fewer rows of the LM head than tokens, and no map between the two.

    """
    size, vocab = fields.optional_size("draft_vocab_size"), fields.size("vocab_size")
    if not tensors or D2T in tensors:
        return size or (writers.size_of(fields, tensors, D2T, 0) if D2T in tensors else None)
    rows = writers.size_of(fields, tensors, HEAD, 0) if HEAD in tensors else vocab
    if T2D in tensors and rows < vocab:
        return size or rows
    if size is not None and size != vocab:
        what = f"draft_vocab_size={size} and vocab_size={vocab}, but the file has neither d2t nor t2d"
        raise SourceError(what, where=fields.where, fix="use a complete head: d2t maps its tokens to the target's")
    return None


def _limits(fields: Fields) -> tuple[Limit, ...]:
    """Return the sliding window of a head's layer as a limit: only where the config says that it is used."""
    used = SLIDING in (fields.value("layer_types") or ()) or fields.config.get("use_sliding_window")
    size = fields.optional_size("sliding_window")
    return (Limit("sliding_window", size),) if used and size is not None else ()


def _tensors(config: Mapping[str, Any]) -> Shapes:
    found = config.get(TENSORS)
    return found if isinstance(found, Mapping) else {}


def _with_own_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without scaling of its rotary embedding, if the recipe says `rope: default`."""
    if writers.overrides(config).get("rope") != "default":
        return dict(config)
    rope = next((value for value in map(config.get, LAYOUTS) if isinstance(value, Mapping) and value), {})
    theta = {key: rope[key] for key in ("rope_theta",) if key in rope}
    return {key: value for key, value in config.items() if key not in LAYOUTS} | theta


def with_rope_of(target: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a head's config with its target's rotary embedding, if the recipe says `rope: target`."""
    if writers.overrides(config).get("rope") != "target":
        return dict(config)
    keys = (*LAYOUTS, "rope_theta")
    theirs = {key: value for key, value in target.items() if key in keys}
    return {key: value for key, value in config.items() if key not in keys} | theirs


def tensor_name(name: str) -> str:
    """Return the decoder's name for a head's tensor: public heads use `midlayer` or `layers.0`, and `norm`."""
    name = name.removeprefix("model.")
    for old, new in dflash.OLD_NAMES.items():
        if name.startswith(old):
            return f"{new}{name.removeprefix(old)}"
    for layer in ("midlayer.", "layers.0."):
        if name.startswith(layer):
            return f"{LAYER}{name.removeprefix(layer)}"
    return f"model.{name}" if name.startswith(("norm.", "embed_tokens.", "layers.")) else name


def fitted(target: ModelConfig, draft: ModelConfig, where: str = "") -> ModelConfig:
    """Return a draft's config with the layers of this target that a head reads; a draft model's as it is.

    Raises:
        SourceError: layers that the target does not have.

    """
    head = draft.eagle3
    if head is None or head.reads_output:
        return draft
    if head.written is None and head.tap_count != TAPS:
        what = f"fc.weight reads {head.tap_count} states of the target, but the file lists no layers"
        raise SourceError(what, where=where, fix="list the inputs of layers in the recipe: draft.taps")
    taps = taps_of(target, draft)
    if taps[0] < 0 or taps[-1] > target.layers or list(taps) != sorted(set(taps)):
        what = f"the head reads the inputs of layers {list(taps)}, but the target has {target.layers} layers"
        fix = "use a head that was trained for this target, or correct draft.taps in the recipe"
        raise SourceError(what, where=where, fix=fix)
    return replace(draft, eagle3=replace(head, taps=taps))


def taps_of(target: ModelConfig, draft: ModelConfig) -> tuple[int, ...]:
    """Return the layers of the target whose inputs the draft reads, ascending; their number means the last output."""
    head = draft.eagle3
    if head is None or head.reads_output:
        return ()
    if head.taps:
        return head.taps
    return writers.usual_taps(target.layers) if head.written is None else writers.inputs_of(head.written, target.layers)


def doubts(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the file of a head leaves open, each with the recipe's key that decides it."""
    fields = Fields(config, "llama", "config.json")
    if dflash.is_dflash(config):
        return ()
    return writers.doubts(fields, writers.written_taps(fields), writers.writer_of(config))


def describe(config: ModelConfig) -> str:
    """Return how a head is read, in one line."""
    head = config.eagle3
    assert head is not None
    read = "the target's output after its last norm"
    if not head.reads_output:
        read = f"the inputs of layers {', '.join(map(str, head.taps))} ({_origin(head)})"
    on = [name for name in writers.SWITCHES if vars(head)[name]]
    size = f" of {config.layers} layers, mask token {head.mask_token}," if head.mask_token is not None else ""
    if head.block is not None:
        causal = f"causal layers: {list(head.causal_layers)}" if head.causal_layers else "no causal layers"
        label = config.draft_kind.label
        return f"{label}{size} blocks of {head.block}, of {head.writer}: reads {read}; {causal}{_of_block(head)}"
    return f"{config.draft_kind.label}{size} of {head.writer}: reads {read}; {', '.join(on) or 'no optional norms'}"


def _of_block(head: Eagle3) -> str:
    """Return what a block has beside its layers."""
    parts = ["first draft token from the newest token's position"] if head.from_anchor else []
    parts += [f"{head.markov.kind} Markov head of rank {head.markov.rank}"] if head.markov is not None else []
    parts += ["confidence head unused: a step verifies all its drafts"] if head.confidence else []
    return "".join(f"; {part}" for part in parts)


def _origin(head: Eagle3) -> str:
    """Return where the taps come from."""
    if head.written is None:
        return "the usual ones; the file lists none"
    shift = "outputs" if head.taps != head.written.ids else "inputs"
    unclear = ", unclear in the file" if head.written.meaning == "unclear" else ""
    return f"{head.written.field} {list(head.written.ids)} read as {shift}{unclear}"
