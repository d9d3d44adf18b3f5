"""A head as a checkpoint: its config with the shapes of its tensors, maps of its vocabulary, its target.

`models.eagle3` reads the config. Imports no torch.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.errors import SourceError
from pipeline.files.atomic import write_atomic
from pipeline.models import eagle3
from pipeline.models.dflash import MASK_EMBEDDING, mask_embedding_error
from pipeline.models.eagle3_writers import RECIPE
from pipeline.models.families import config_of
from pipeline.models.fields import is_int
from pipeline.models.weights import D2T, EMBEDDING
from pipeline.sources.checkpoint import Checkpoint, with_shared_embedding
from pipeline.sources.packed import plain
from pipeline.sources.tensors import layout, read_bytes, read_header
from pipeline.sources.weights import same_bytes, weights

T2D = "t2d"


def with_readings(checkpoint: Checkpoint, readings: Mapping[str, Any], cache: Path) -> Checkpoint:
    """Return a draft as its tensors and a recipe's readings describe it; one that is no head as it is.

    Raises:
        SourceError: a malformed head, or readings for a draft of another kind.

    """
    where = str(checkpoint.root / "config.json")
    if eagle3.may_be_head(checkpoint.config_json):
        shapes = {name: tensor.shape for name, tensor in weights(checkpoint).items()}
        config_json = eagle3.opened_config(checkpoint.config_json, shapes, readings)
        checkpoint = replace(checkpoint, config_json=config_json, config=config_of(config_json, where))
    if (checkpoint.root / MASK_EMBEDDING).exists():
        raise mask_embedding_error(str(checkpoint.root))
    if checkpoint.config.eagle3 is None:
        if readings:
            what = f"the recipe has draft.{next(iter(readings))}, but the draft is no head over the target's states"
            raise SourceError(what, where=where, fix="remove the key from the recipe")
        return checkpoint
    return _with_d2t(checkpoint, readings.get("vocabulary"), cache)


def remade(checkpoint: Checkpoint, cache: Path) -> Checkpoint:
    """Return a checkpoint of another host with the tensors that were computed there, computed here."""
    if not checkpoint.made:
        return checkpoint
    readings = checkpoint.config_json.get(RECIPE) or {}
    return _with_d2t(replace(checkpoint, made={}), readings.get("vocabulary"), cache)


def _with_d2t(checkpoint: Checkpoint, told: str | None, cache: Path) -> Checkpoint:
    """Return a head whose `d2t` is made of its `t2d`, if it has no other or the recipe says so."""
    found = weights(checkpoint)
    if checkpoint.config.draft_vocab is None or T2D not in found or (D2T in found and told != T2D):
        return checkpoint
    kept = [token for token, is_kept in enumerate(read_bytes(plain(found[T2D]))) if is_kept]
    if len(kept) != checkpoint.config.draft_vocab:
        what = f"t2d marks {len(kept)} tokens, but the head proposes from {checkpoint.config.draft_vocab}"
        raise SourceError(what, where=str(found[T2D].file), fix="use a head whose t2d and lm_head belong together")
    offsets = array("q", (token - index for index, token in enumerate(kept)))
    data = layout([(D2T, "I64", (len(kept),))], {"format": "pt"}).header + offsets.tobytes()
    path = cache / "d2t" / f"{hashlib.sha256(data).hexdigest()[:32]}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    return replace(checkpoint, made=read_header(path))


def fit(target: Checkpoint, draft: Checkpoint) -> Checkpoint:
    """Return a draft with the layers of this target that it reads, and without an embedding that equals the target's.

    Raises:
        SourceError: layers that the target does not have.

    """
    if draft.config.eagle3 is None:
        return draft
    where = str(draft.root / "config.json")
    config_json = eagle3.with_rope_of(target.config_json, draft.config_json)
    config = eagle3.fitted(target.config, config_of(config_json, where), where)
    draft = replace(draft, config=config, config_json=config_json)
    own, theirs = weights(draft).get(EMBEDDING), weights(target).get(EMBEDDING)
    if own is None or theirs is None or draft.remote or target.remote or draft.config.shares_embedding:
        return draft
    return with_shared_embedding(draft) if same_bytes(own, theirs) else draft


def verifier_of(config_json: Mapping[str, Any]) -> str | None:
    """Return the target that a head's file names, as `vllm serve` takes it from a head of speculators."""
    speculators = config_json.get("speculators_config")
    verifier = speculators.get("verifier") if isinstance(speculators, Mapping) else None
    name = verifier.get("name_or_path") if isinstance(verifier, Mapping) else None
    return name if isinstance(name, str) and name else None


def verifier_note(source: str, config_json: Mapping[str, Any]) -> str | None:
    """Return a note if a head names a target on the Hub, and the recipe's is another one there."""
    named = verifier_of(config_json)
    if named is None or not source.startswith("hf://"):
        return None
    repo = source.removeprefix("hf://").partition("@")[0]
    return None if repo.lower() == named.lower() else f"the head names the target {named}; the recipe has {repo}"


def starter_recipe(source: str, draft: Checkpoint) -> dict[str, Any]:
    """Return a recipe's data for a head and the target that its file names, with shapes for a first build.

    Raises:
        SourceError: the file names no target.

    """
    verifier = verifier_of(draft.config_json)
    if verifier is None:
        fix = "write a recipe with target.source and draft.source: docs/how-to/recipe.md"
        raise SourceError("the draft's file names no target", where=str(draft.root), fix=fix)
    target = verifier if Path(verifier).is_dir() else f"hf://{verifier}"
    name = re.sub(r"[^a-z0-9._-]+", "-", verifier.rpartition("/")[2].lower()).strip("._-")
    return {
        "name": f"{name}-spec",
        "target": {"source": target, "dtype": "bfloat16"},
        "draft": {"source": source},
        "speculation": {
            "method": draft.config.draft_kind.method,
            "draft_tokens": [_proposed(draft.config_json)],
        },
        "shapes": {"batch": [1, 4], "prefill": [128, 512], "kv": [2048]},
    }


def _proposed(config_json: Mapping[str, Any]) -> int:
    """Return the number of draft tokens that the file proposes; 3 if it names none."""
    methods = config_json["speculators_config"].get("proposal_methods")
    first = methods[0] if isinstance(methods, list) and methods else None
    tokens: Any = first.get("speculative_tokens") if isinstance(first, Mapping) else None
    return int(tokens) if is_int(tokens) and tokens > 0 else 3
