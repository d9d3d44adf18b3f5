"""A checkpoint's tensors by the names that the models use, checked against its config. Imports no torch.

Splits fused projections and renumbers a derived draft's layers, as views: copies nothing.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence

from pipeline.errors import SourceError
from pipeline.models import eagle3, mtp
from pipeline.models.config import ModelConfig
from pipeline.models.dspark import CONFIDENCE
from pipeline.models.multimodal import PREFIXES, of_text, text_name
from pipeline.models.quantisation import KEY, read_quantisation
from pipeline.models.weights import D2T, EMBEDDING, EXPERTS, HEAD, MASK_HIDDEN, WeightSpec, weight_specs
from pipeline.sources.checkpoint import Checkpoint, weight_files
from pipeline.sources.delta_nets import taken_apart
from pipeline.sources.packed import PackedRef, Source, every, plain, transposed
from pipeline.sources.quantised import with_quantised
from pipeline.sources.tensors import TensorRef, opened, read_bytes, read_header

IGNORED = re.compile(r"(.*\.)?rotary_emb\..*|(.*\.)?masked_bias|t2d")
"""Buffers of some checkpoints that no model reads, as in transformers; `t2d` is the inverse of `d2t`."""

MTP = re.compile(r"(model\.)?mtp(_layers)?\.")
"""Start of the names of modules that predict several tokens beside a model; the model does not read them."""

LAYER_NUMBER = re.compile(r"model\.layers\.(\d+)\.")

OF_KEYS = tuple(f"self_attn.{name}." for name in ("k_proj", "v_proj", "k_norm", "v_norm"))
"""Start of the names of what makes keys and values, after the layer's prefix."""

BASE = "model."
OF_BASE = ("embed_tokens.", "layers.", "norm.", "embed_tokens_per_layer.", "per_layer_")
"""Tensors of the base model: transformers' AutoModel saves them without the prefix `model.`."""

EXPERT_NAMES = tuple(
    (re.compile(old), new)
    for old, new in (
        (r"\.shared_mlp\.input_linear\.", ".mlp.gate_up_proj."),
        (r"\.shared_mlp\.output_linear\.", ".mlp.down_proj."),
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"\.feed_forward\.", ".mlp."),
        (r"\.mlp\.router\.(layer\.)?", ".mlp.gate."),
        (r"(?<!\.mlp)\.router\.(proj\.)?", ".mlp.gate."),
        (r"(?<!\.mlp)\.experts\.", ".mlp.experts."),
        (r"\.mlp\.input_linear\.weight", ".mlp.experts.gate_up_proj.weight"),
        (r"\.mlp\.output_linear\.weight", ".mlp.experts.down_proj.weight"),
        (r"\.mlp\.experts\.(gate_up_proj|down_proj)_bias", r".mlp.experts.\1.bias"),
        (r"(\.experts\.\d+)\.w1\.", r"\1.gate_proj."),
        (r"(\.experts\.\d+)\.w3\.", r"\1.up_proj."),
        (r"(\.experts\.\d+)\.w2\.", r"\1.down_proj."),
    )
)
"""Names of experts, of routers and of the networks of Granite 4 and Llama 4 in checkpoints, and those of Qwen and
OLMoE, which models use.
"""

STACKED = re.compile(
    r"(?P<block>.*\.experts)\.(?P<leaf>gate_up_proj|gate_proj|up_proj|down_proj)(?P<end>\.weight|\.bias)?"
)

FLOATS = ("F32", "BF16", "F16")
INTEGERS = ("I32", "I64")
SHOWN_PROBLEMS = 20
COMPARE_BYTES = 16 << 20


def weights(checkpoint: Checkpoint) -> Mapping[str, Source]:
    """Return every tensor of a checkpoint by the name that the models use.

    Raises:
        SourceError: a weight file is missing, truncated or malformed, two files hold the same tensor, or a quantised
            module does not fit the config.

    """
    stored: dict[str, TensorRef] = {}
    for name in sorted(checkpoint.remote) or weight_files(checkpoint.root):
        in_file = read_header(checkpoint.file(name))
        repeated = sorted(set(in_file) & set(stored))
        if repeated:
            what = f"tensor {repeated[0]!r} is also in {stored[repeated[0]].file.name}"
            raise SourceError(what, where=str(checkpoint.file(name)), fix="download the checkpoint again")
        stored |= in_file
    head = checkpoint.config.eagle3
    if head is not None and head.mtp:
        stored = {name: tensor for name, tensor in stored.items() if mtp.tensor_name(name) is not None}
    elif any(name.startswith(PREFIXES) for name in stored):
        stored = {name: tensor for name, tensor in stored.items() if of_text(name)}
    if MASK_HIDDEN in stored:  # [1, 1, X] or [1, X] in files
        stored[MASK_HIDDEN] = stored[MASK_HIDDEN].flat()
    tensors = with_quantised(stored, read_quantisation(checkpoint.config_json, str(checkpoint.root / "config.json")))
    if head is not None and head.mtp:
        tensors = {mtp.tensor_name(name) or name: tensor for name, tensor in tensors.items()}
    elif head is not None:
        tensors = {eagle3.tensor_name(name): tensor for name, tensor in tensors.items()}
    else:
        tensors = {text_name(name): tensor for name, tensor in tensors.items()}
        tensors = {_prefixed(name, tensors): tensor for name, tensor in tensors.items()}
    tensors = dict(_unfused(dict(_renamed(tensors, checkpoint.config)), checkpoint.config))
    tensors = dict(taken_apart(tensors, checkpoint.config)) | dict(checkpoint.made)
    tensors |= _keys_as_values(tensors, checkpoint)
    return tensors if checkpoint.layers is None else dict(_renumbered(tensors, checkpoint.layers))


def shared_weights(draft: Checkpoint, target: Checkpoint) -> dict[str, Source]:
    """Return the tensors of a draft that are its target's: the embedding, the LM head, or neither."""
    theirs = weights(target) if draft.config.shares_embedding or draft.config.shares_head else {}
    shared = {EMBEDDING: theirs[EMBEDDING]} if draft.config.shares_embedding else {}
    return shared | ({HEAD: theirs[EMBEDDING if target.config.tied else HEAD]} if draft.config.shares_head else {})


def _prefixed(name: str, tensors: Mapping[str, Source]) -> str:
    """Return the name in a causal model of a tensor that AutoModel saved; both names in one checkpoint are an error."""
    whole = f"{BASE}{name}"
    return whole if name.startswith(OF_BASE) and whole not in tensors else name


def _renamed(tensors: Mapping[str, Source], c: ModelConfig) -> Iterator[tuple[str, Source]]:
    """Yield tensors by the names of experts that the models use; those of all experts in one are taken apart."""
    for old, tensor in tensors.items():
        name = old
        for pattern, new in EXPERT_NAMES:
            name = pattern.sub(new, name)
        stacked = STACKED.fullmatch(name)
        if stacked is None or len(tensor.shape) != (2 if stacked["end"] == ".bias" else 3):
            yield name, tensor
            continue
        for expert in range(tensor.shape[0]):
            part = tensor.part(expert)
            if of_experts(c, "inputs_first") and stacked["end"] is None and is_floats(part):
                part = transposed(plain(part))
            yield f"{stacked['block']}.{expert}.{stacked['leaf']}{stacked['end'] or '.weight'}", part


def of_experts(c: ModelConfig, layout: str) -> bool:
    """Return whether the experts of a checkpoint have this layout, a field of `Experts`."""
    return any(kind.experts is not None and getattr(kind.experts, layout) for kind in c.kinds)


def is_floats(source: Source) -> bool:
    """Return whether a tensor holds numbers of an accepted dtype, which it is rejected for otherwise."""
    return source.dtype in FLOATS


def _unfused(tensors: Mapping[str, Source], c: ModelConfig) -> Iterator[tuple[str, Source]]:
    """Split `qkv_proj` and `gate_up_proj`; with another number of rows it stays whole and is rejected as extra."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    in_turn = of_experts(c, "interleaved")
    inner = {c.of(kind).intermediate for kind in c.kinds} | {e.intermediate for e in c.expert_layers}
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        block, _, fused = stem.rpartition(".")
        rows = tensor.shape[0] if tensor.shape else 0
        split: tuple[tuple[str, int], ...] = ()
        if fused == "qkv_proj" and rows == q + 2 * kv:
            split = (("q_proj", q), ("k_proj", kv), ("v_proj", kv))
        elif fused == "gate_up_proj" and EXPERTS in name and in_turn and rows % 2 == 0 and is_floats(tensor):
            for phase, part in enumerate(("gate_proj", "up_proj")):
                yield f"{block}.{part}.{leaf}", every(tensor, 2, phase)
            continue
        elif fused == "gate_up_proj" and rows % 2 == 0 and rows // 2 in inner:
            split = (("gate_proj", rows // 2), ("up_proj", rows // 2))
        if not split:
            yield name, tensor
            continue
        first = 0
        for part, rows in split:
            yield f"{block}.{part}.{leaf}", tensor.rows(first, first + rows)
            first += rows


def _keys_as_values(tensors: Mapping[str, Source], checkpoint: Checkpoint) -> dict[str, Source]:
    """Return the projections of keys under the names of those of values, in layers where they are one."""
    c, numbers = checkpoint.config, checkpoint.layers or range(checkpoint.config.layers)
    layers = [number for index, number in enumerate(numbers) if c.layer(index).values_are_keys]
    names = [f"model.layers.{layer}.self_attn.{{}}_proj.{leaf}" for layer in layers for leaf in ("weight", "bias")]
    return {name.format("v"): tensors[name.format("k")] for name in names if name.format("k") in tensors}


def _renumbered(tensors: Mapping[str, Source], layers: tuple[int, ...]) -> Iterator[tuple[str, Source]]:
    """Yield the tensors of some layers under new numbers, and all tensors outside the layers."""
    for name, tensor in tensors.items():
        if not name.startswith("model.layers."):
            yield name, tensor
            continue
        _, _, number, rest = name.split(".", 3)
        for new, old in enumerate(layers):
            if str(old) == number:
                yield f"model.layers.{new}.{rest}", tensor


def check_weights(checkpoint: Checkpoint) -> None:
    """Raise one error with every difference between a checkpoint's tensors and its config.

    Raises:
        SourceError: missing and extra tensors, wrong shapes, unsupported dtypes, a `d2t` outside the vocabulary.

    """
    tensors = weights(checkpoint)
    needed = {part.name: part for spec in weight_specs(checkpoint.config) for part in spec.parts}
    if checkpoint.config.shares_embedding:
        del needed[EMBEDDING]
    if checkpoint.config.shares_head:
        del needed[HEAD]
    problems = [text for name, spec in needed.items() for text in _findings(spec, tensors.get(name))]
    if checkpoint.layers is None:
        problems += list(_extra(tensors, needed, checkpoint))
    if not problems and D2T in needed:
        problems += _offset_findings(plain(tensors[D2T]), checkpoint.config)
    if problems:
        shown = problems[:SHOWN_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        text = shown[0] if len(shown) == 1 else f"{len(problems)} problems:\n  " + "\n  ".join(shown)
        raise SourceError(text, where=str(checkpoint.root), fix=_remedy(tensors, needed, problems))


def _remedy(tensors: Mapping[str, Source], needed: Mapping[str, WeightSpec], problems: Sequence[str]) -> str:
    """Return the fix for tensors that do not match the config."""
    missing = [name for name in needed if name not in tensors]
    if missing == [HEAD]:
        return "save the model with its head (AutoModelForCausalLM), or set tie_word_embeddings if it has none"
    if len(problems) == 1 and problems[0].startswith(f"{HEAD} in "):  # differs from the embedding
        return "set tie_word_embeddings to false to use lm_head, as transformers 5 does, or remove lm_head"
    prefix = _strange_prefix(tensors, missing)
    if prefix:
        return f"remove the prefix {prefix!r} from the names of the tensors"
    return "use weights and config.json of the same model"


def _strange_prefix(tensors: Mapping[str, Source], missing: Sequence[str]) -> str:
    """Return what stands before the name of the first missing tensor in a tensor's name; empty if none ends so."""
    ends = [name for name in tensors if missing and name.endswith(f".{missing[0]}")]
    return ends[0].removesuffix(missing[0]) if ends else ""


def _findings(spec: WeightSpec, tensor: Source | None) -> Iterator[str]:
    if tensor is None:
        yield f"missing weight {spec.name} {list(spec.shape)}"
        return
    at = f"{spec.name} in {tensor.file.name}"
    if tensor.shape != spec.shape:
        yield f"wrong shape of {at}: {list(tensor.shape)}, config.json requires {list(spec.shape)}"
    accepted = INTEGERS if spec.kind == "index" else FLOATS
    if tensor.dtype not in accepted:
        narrow = tensor.dtype.startswith(("F", "I", "U")) and spec.kind != "index"
        quantised = f" (quantised, without {KEY} in config.json?)" if narrow else ""
        yield f"unsupported dtype of {at}: {tensor.dtype}{quantised}; accepted: {', '.join(accepted)}"


def _extra(
    tensors: Mapping[str, Source], needed: Mapping[str, WeightSpec], checkpoint: Checkpoint
) -> Iterator[str]:  # fmt: skip
    for name, tensor in tensors.items():
        if name in needed or IGNORED.fullmatch(name) or _is_mtp(name, checkpoint) or _is_shared(name, checkpoint):
            continue
        if checkpoint.config.draft_kind.blocks and name.startswith(CONFIDENCE):
            continue
        if name == HEAD and checkpoint.config.tied and EMBEDDING in tensors:
            if not same_bytes(tensor, tensors[EMBEDDING]):
                yield f"{HEAD} in {tensor.file.name} differs from {EMBEDDING}, but tie_word_embeddings is true"
            continue
        if name.endswith(".bias") and KEY in checkpoint.config_json and not any(read_bytes(plain(tensor))):
            continue  # early packers of GPTQ write a bias of zeros for every module
        yield f"extra weight {name} {list(tensor.shape)} in {tensor.file.name}"


def _is_mtp(name: str, checkpoint: Checkpoint) -> bool:
    """Return whether a tensor is of a module that predicts several tokens: named so, or after the model's layers."""
    more, layer = checkpoint.config_json.get("num_nextn_predict_layers"), LAYER_NUMBER.match(name)
    after = layer is not None and int(layer[1]) >= checkpoint.config.layers
    return MTP.match(name) is not None or (after and isinstance(more, int) and more > 0)


def _is_shared(name: str, checkpoint: Checkpoint) -> bool:
    """Return whether a tensor makes keys or values that its layer shares with another: transformers ignores it."""
    layer, config = LAYER_NUMBER.match(name), checkpoint.config
    if layer is None or int(layer[1]) >= config.layers or not config.layer(int(layer[1])).shares_keys:
        return False
    return name[layer.end() :].startswith(OF_KEYS)


def same_bytes(a: Source, b: Source) -> bool:
    """Return True when two tensors are equal, byte for byte; quantised ones are not compared."""
    if isinstance(a, PackedRef) or isinstance(b, PackedRef) or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with opened(a.file) as first, opened(b.file) as second:
        for at in range(0, a.nbytes, COMPARE_BYTES):
            left, right = (bytearray(min(COMPARE_BYTES, a.nbytes - at)) for _ in range(2))
            first(a.offset + at, memoryview(left))
            second(b.offset + at, memoryview(right))
            if left != right:
                return False
    return True


def _offset_findings(d2t: TensorRef, config: ModelConfig) -> list[str]:
    """Return the faults of `d2t`: two draft ids for one target id would skew the draft's distribution."""
    offsets = array("i" if d2t.dtype == "I32" else "q")
    offsets.frombytes(read_bytes(d2t))
    ids = [draft_id + offset for draft_id, offset in enumerate(offsets)]
    outside = [i for i, target_id in enumerate(ids) if not 0 <= target_id < config.vocab]
    if outside:
        first = outside[0]
        return [f"d2t[{first}]={offsets[first]} maps to token {ids[first]}, outside 0..{config.vocab - 1}"]
    if len(set(ids)) != len(ids):
        return [f"d2t maps {len(ids)} draft ids onto {len(set(ids))} target ids; expected distinct target ids"]
    return []
