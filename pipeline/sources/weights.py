"""A checkpoint's tensors by the names that the models use, checked against what its config needs. Imports no torch.

Fused projections are split and a derived draft's layers renumbered here, as views: nothing is copied.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator, Mapping

from pipeline.errors import SourceError
from pipeline.models.config import ModelConfig
from pipeline.models.weights import D2T, EMBEDDING, HEAD, WeightSpec, weight_specs
from pipeline.sources.checkpoint import Checkpoint, weight_files
from pipeline.sources.tensors import TensorRef, read_header

IGNORED = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias)|t2d")
"""Buffers that some checkpoints carry and no model here reads; `t2d` is the inverse of `d2t`."""

FLOATS = ("F32", "BF16", "F16")
INTEGERS = ("I32", "I64")
SHOWN_PROBLEMS = 20
COMPARE_BYTES = 16 << 20


def weights(checkpoint: Checkpoint) -> Mapping[str, TensorRef]:
    """Every tensor of a checkpoint by the name that the models use, wherever it lies.

    Raises:
        SourceError: a weight file is missing, truncated or malformed, or two files hold the same tensor.

    """
    found: dict[str, TensorRef] = {}
    for name in weight_files(checkpoint.root):
        tensors = read_header(checkpoint.root / name)
        twice = sorted(set(tensors) & set(found))
        if twice:
            what = f"tensor {twice[0]!r} is also in {found[twice[0]].file.name}"
            raise SourceError(what, where=str(checkpoint.root / name), fix="download the checkpoint again")
        found |= tensors
    if checkpoint.config.eagle3 is not None:
        found = {_head_name(name): tensor for name, tensor in found.items()}
    found = dict(_unfused(found, checkpoint.config))
    return found if checkpoint.layers is None else dict(_renumbered(found, checkpoint.layers))


def _head_name(name: str) -> str:
    """The name of an EAGLE-3 head's tensor as a decoder has it: public heads say `midlayer` or `layers.0`, `norm`."""
    name = name.removeprefix("model.")
    for layer in ("midlayer.", "layers.0."):
        if name.startswith(layer):
            return f"model.layers.0.{name.removeprefix(layer)}"
    return f"model.{name}" if name.startswith(("norm.", "embed_tokens.")) else name


def _unfused(tensors: Mapping[str, TensorRef], c: ModelConfig) -> Iterator[tuple[str, TensorRef]]:
    """Split `qkv_proj` and `gate_up_proj`; one whose rows do not add up stays as it is, to be refused as extra."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    parts = {
        "qkv_proj": (("q_proj", q), ("k_proj", kv), ("v_proj", kv)),
        "gate_up_proj": (("gate_proj", c.intermediate), ("up_proj", c.intermediate)),
    }
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        block, _, fused = stem.rpartition(".")
        split = parts.get(fused, ())
        if not split or not tensor.shape or tensor.shape[0] != sum(rows for _, rows in split):
            yield name, tensor
            continue
        first = 0
        for part, rows in split:
            yield f"{block}.{part}.{leaf}", tensor.rows(first, first + rows)
            first += rows


def _renumbered(tensors: Mapping[str, TensorRef], layers: tuple[int, ...]) -> Iterator[tuple[str, TensorRef]]:
    """The tensors of some layers, in a new order, and everything outside the layers."""
    for name, tensor in tensors.items():
        if not name.startswith("model.layers."):
            yield name, tensor
            continue
        _, _, number, rest = name.split(".", 3)
        for new, old in enumerate(layers):
            if str(old) == number:
                yield f"model.layers.{new}.{rest}", tensor


def check_weights(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose tensors are not exactly what its config needs; every finding in one error.

    Raises:
        SourceError: missing and extra tensors, wrong shapes, unsupported dtypes, a `d2t` that leaves the vocabulary.

    """
    found = weights(checkpoint)
    needed = {spec.name: spec for spec in weight_specs(checkpoint.config)}
    if checkpoint.config.shares_embedding:
        del needed[EMBEDDING]
    problems = [text for name, spec in needed.items() for text in _findings(spec, found.get(name))]
    if checkpoint.layers is None:
        problems += list(_extra(found, needed, checkpoint.config))
    if not problems and D2T in needed:
        problems += _offset_findings(found[D2T], checkpoint.config)
    if problems:
        shown = problems[:SHOWN_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        text = shown[0] if len(shown) == 1 else f"{len(problems)} problems:\n  " + "\n  ".join(shown)
        raise SourceError(text, where=str(checkpoint.root), fix="weights and config.json must belong together")


def _findings(spec: WeightSpec, tensor: TensorRef | None) -> Iterator[str]:
    if tensor is None:
        yield f"missing weight {spec.name} {list(spec.shape)}"
        return
    at = f"{spec.name} in {tensor.file.name}"
    if tensor.shape != spec.shape:
        yield f"wrong shape of {at}: {list(tensor.shape)}, config.json says {list(spec.shape)}"
    accepted = INTEGERS if spec.kind == "index" else FLOATS
    if tensor.dtype not in accepted:
        quantised = " (a quantised checkpoint?)" if tensor.dtype[0] in "FIU" and spec.kind != "index" else ""
        yield f"unsupported dtype of {at}: {tensor.dtype}{quantised}, accepted are {', '.join(accepted)}"


def _extra(found: Mapping[str, TensorRef], needed: Mapping[str, WeightSpec], config: ModelConfig) -> Iterator[str]:
    for name, tensor in found.items():
        if name in needed or IGNORED.fullmatch(name):
            continue
        if name == HEAD and config.tied and EMBEDDING in found:
            if not same_bytes(tensor, found[EMBEDDING]):
                yield f"{HEAD} in {tensor.file.name} differs from {EMBEDDING}, but tie_word_embeddings is true"
            continue
        yield f"extra weight {name} {list(tensor.shape)} in {tensor.file.name}"


def same_bytes(a: TensorRef, b: TensorRef) -> bool:
    """True when two tensors are equal, byte for byte."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with a.file.open("rb") as first, b.file.open("rb") as second:
        for at in range(0, a.nbytes, COMPARE_BYTES):
            size = min(COMPARE_BYTES, a.nbytes - at)
            if os.pread(first.fileno(), size, a.offset + at) != os.pread(second.fileno(), size, b.offset + at):
                return False
    return True


def _offset_findings(d2t: TensorRef, config: ModelConfig) -> list[str]:
    """Every draft id must land on a target id of its own: two ids for one token would skew the draft's distribution."""
    offsets = array("i" if d2t.dtype == "I32" else "q")
    with d2t.file.open("rb") as file:
        offsets.frombytes(os.pread(file.fileno(), d2t.nbytes, d2t.offset))
    ids = [draft_id + offset for draft_id, offset in enumerate(offsets)]
    outside = [i for i, target_id in enumerate(ids) if not 0 <= target_id < config.vocab]
    if outside:
        first = outside[0]
        return [f"d2t[{first}]={offsets[first]} leads to token {ids[first]}, outside 0..{config.vocab - 1}"]
    if len(set(ids)) != len(ids):
        return [f"d2t maps {len(ids)} draft ids onto {len(set(ids))} target ids; each needs its own"]
    return []
