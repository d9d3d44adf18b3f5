"""A checkpoint's tokenizer as one `tokenizer.json`, and the comparison of two checkpoints' tokenizers.

Imports no torch at import; transformers, imported for folders without a `tokenizer.json`, does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import SourceError, reason
from pipeline.sources.checkpoint import Checkpoint, read_json

SHOWN_IDS = 3
VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json"}
JSON_FIX = "download the checkpoint again"
FIX = "use a draft of the target's own family and tokenizer, or `derive: {from: target, layers: [...]}`"


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return an artifact's tokenizer files: the checkpoint's, with a `tokenizer.json` that needs no other file.

    Transformers makes that file from the folder, so added tokens, begin-of-sequence settings and older formats
    (sentencepiece, vocab and merges) keep their meaning, and readers need only `tokenizers`.

    Raises:
        SourceError: the checkpoint has no tokenizer, or transformers cannot read it.

    """
    require_tokenizer(checkpoint)
    files = {name: (checkpoint.root / name).read_bytes() for name in checkpoint.tokenizer_files}
    return {**files, "tokenizer.json": _as_transformers(checkpoint.root).encode()}


def require_tokenizer(checkpoint: Checkpoint) -> None:
    """Reject a target without a vocabulary.

    Raises:
        SourceError: the checkpoint has no tokenizer.

    """
    if not VOCABULARIES & set(checkpoint.tokenizer_files):
        fix = f"add one of {', '.join(sorted(VOCABULARIES))} to the folder"
        raise SourceError("the target has no tokenizer", where=str(checkpoint.root), fix=fix)


def vocabulary_size(checkpoint: Checkpoint) -> int:
    """Return the largest id of the checkpoint's tokenizer plus one; 0 without a tokenizer."""
    if not checkpoint.tokenizer_files:
        return 0
    return max(_ids(_tokenizer_json(checkpoint.root)), default=-1) + 1


def end_of_sequence_id(checkpoint: Checkpoint) -> int | None:
    """Return the id of the tokenizer's end-of-sequence token, as transformers reads it; None without one.

    Asks transformers, which imports torch, only where the files do not name the token: its tokenizer classes do.

    Raises:
        SourceError: transformers cannot read the tokenizer.

    """
    if not VOCABULARIES & set(checkpoint.tokenizer_files):
        return None
    token = _named_end_of_sequence(checkpoint.root)
    if token is not None and (checkpoint.root / "tokenizer.json").is_file():
        ids = [number for number, text in _ids(_tokenizer_json(checkpoint.root)).items() if text == token]
        if len(ids) == 1:
            return ids[0]
    own: int | None = _transformers_tokenizer(checkpoint.root).eos_token_id
    return own


def _named_end_of_sequence(root: Path) -> str | None:
    """Return the end-of-sequence token if tokenizer_config.json names one, and no other file another."""
    texts: set[str] = set()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = (read_json(root / name, JSON_FIX) if (root / name).is_file() else {}).get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
        if name == "tokenizer_config.json" and not isinstance(text, str):
            return None
        if text is not None:
            texts.add(str(text))
    return texts.pop() if len(texts) == 1 else None


def check_tokenizers(target: Checkpoint, draft: Checkpoint) -> None:
    """Raise an error if the draft's tokenizer differs from its target's; without tokenizer files it uses the target's.

    Raises:
        SourceError: the differences: sizes and first ids, merges, added tokens, normalizer or pre-tokenizer.

    """
    if not draft.tokenizer_files or draft.root == target.root:
        return
    same = "tokenizer.json"
    if same in draft.files and target.files.get(same) == draft.files[same]:
        return
    differing = differences(_tokenizer_json(target.root), _tokenizer_json(draft.root))
    if differing:
        what = f"the draft's tokenizer differs from the target's: {'; '.join(differing)}"
        raise SourceError(what, where=str(draft.root), fix=FIX)


def differences(target: Mapping[str, Any], draft: Mapping[str, Any]) -> list[str]:
    """Return the differences of two parsed `tokenizer.json` that change how text is tokenized."""
    ids, draft_ids = _ids(target), _ids(draft)
    lines = []
    if ids != draft_ids:
        differing = sorted(i for i in ids.keys() | draft_ids.keys() if ids.get(i) != draft_ids.get(i))
        shown = ", ".join(f"id {i}: {ids.get(i)!r} against {draft_ids.get(i)!r}" for i in differing[:SHOWN_IDS])
        lines.append(f"{len(ids)} tokens against {len(draft_ids)}, {len(differing)} ids differ ({shown})")
    merges, draft_merges = _merges(target), _merges(draft)
    if merges != draft_merges:
        at = next((i for i, (a, b) in enumerate(zip(merges, draft_merges, strict=False)) if a != b), "the end")
        lines.append(f"{len(merges)} merges against {len(draft_merges)}, the first difference at {at}")
    steps = ("normalizer", "pre_tokenizer")
    changed = [step for step in steps if target.get(step) != draft.get(step)]
    return lines + [f"{step} {_short(target.get(step))} against {_short(draft.get(step))}" for step in changed]


def _tokenizer_json(root: Path) -> dict[str, Any]:
    path = root / "tokenizer.json"
    try:
        if not path.is_file():
            return dict(json.loads(_as_transformers(root)))
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise SourceError(
            f"malformed tokenizer: {error}", where=str(path), fix="download the checkpoint again"
        ) from error
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise SourceError("malformed tokenizer: no `model`", where=str(path), fix="download the checkpoint again")
    return data


def _as_transformers(root: Path) -> str:
    """Return the folder's tokenizer, as transformers reads it, as the text of a `tokenizer.json`."""
    return str(_transformers_tokenizer(root).backend_tokenizer.to_str())


def _transformers_tokenizer(root: Path) -> Any:
    """Return the folder's tokenizer as an object of transformers."""
    from transformers import AutoTokenizer  # here, because it imports torch

    try:
        return AutoTokenizer.from_pretrained(root, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception
        what, fix = f"cannot read the tokenizer: {reason(error)}", "add a complete tokenizer.json to the folder"
        raise SourceError(what, where=str(root), fix=fix) from error


def _ids(tokenizer: Mapping[str, Any]) -> dict[int, str]:
    """Return token by id, added tokens included."""
    vocab = tokenizer["model"].get("vocab", {})
    pairs = vocab.items() if isinstance(vocab, dict) else ((piece[0], i) for i, piece in enumerate(vocab))
    ids = {int(i): str(token) for token, i in pairs}
    return ids | {int(token["id"]): str(token["content"]) for token in tokenizer.get("added_tokens") or []}


def _merges(tokenizer: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the merges, written as "a b" or as ["a", "b"]."""
    merges = tokenizer["model"].get("merges") or []
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
