"""A checkpoint's tokenizer as one `tokenizer.json`; and do two checkpoints tokenize alike? Compared, never assumed.

Imports no torch itself; transformers, where it is needed, does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import SourceError
from pipeline.sources.checkpoint import Checkpoint

SHOWN_IDS = 3
VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json"}
FIX = "use a draft of the target's own family and tokenizer, or `derive: {from: target, layers: [...]}`"


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """What an artifact carries of a tokenizer: the checkpoint's files, with a `tokenizer.json` that stands alone.

    That file is made as transformers reads the folder, so added tokens, begin-of-sequence settings and older formats
    (sentencepiece, vocab and merges) mean what they mean there, and no reader needs more than `tokenizers`.

    Raises:
        SourceError: the checkpoint has no tokenizer, or one that transformers cannot read.

    """
    files = {name: (checkpoint.root / name).read_bytes() for name in checkpoint.tokenizer_files}
    if not VOCABULARIES & files.keys():
        fix = f"add one of {', '.join(sorted(VOCABULARIES))} to the folder"
        raise SourceError("the target has no tokenizer", where=str(checkpoint.root), fix=fix)
    return {**files, "tokenizer.json": _as_transformers(checkpoint.root).encode()}


def vocabulary_size(checkpoint: Checkpoint) -> int:
    """One more than the largest id of its tokenizer; 0 where it has none."""
    if not checkpoint.tokenizer_files:
        return 0
    return max(_ids(_tokenizer_json(checkpoint.root)), default=-1) + 1


def check_tokenizers(target: Checkpoint, draft: Checkpoint) -> None:
    """Refuse a draft whose tokenizer differs from its target's; one without tokenizer files uses the target's.

    Raises:
        SourceError: how they differ: sizes and first ids, merges, added tokens, normalizer or pre-tokenizer.

    """
    if not draft.tokenizer_files or draft.root == target.root:
        return
    same = "tokenizer.json"
    if same in draft.files and target.files.get(same) == draft.files[same]:
        return
    found = list(differences(_tokenizer_json(target.root), _tokenizer_json(draft.root)))
    if found:
        what = f"its tokenizer differs from the target's: {'; '.join(found)}"
        raise SourceError(what, where=str(draft.root), fix=FIX)


def differences(target: Mapping[str, Any], draft: Mapping[str, Any]) -> list[str]:
    """How two parsed `tokenizer.json` differ in what they do to text."""
    ids, draft_ids = _ids(target), _ids(draft)
    found = []
    if ids != draft_ids:
        differing = sorted(i for i in ids.keys() | draft_ids.keys() if ids.get(i) != draft_ids.get(i))
        shown = ", ".join(f"id {i}: {ids.get(i)!r} against {draft_ids.get(i)!r}" for i in differing[:SHOWN_IDS])
        found.append(f"{len(ids)} tokens against {len(draft_ids)}, {len(differing)} ids differ ({shown})")
    merges, draft_merges = _merges(target), _merges(draft)
    if merges != draft_merges:
        at = next((i for i, (a, b) in enumerate(zip(merges, draft_merges, strict=False)) if a != b), "the end")
        found.append(f"{len(merges)} merges against {len(draft_merges)}, the first difference at {at}")
    steps = ("normalizer", "pre_tokenizer")
    changed = [step for step in steps if target.get(step) != draft.get(step)]
    return found + [f"{step} {_short(target.get(step))} against {_short(draft.get(step))}" for step in changed]


def _tokenizer_json(root: Path) -> dict[str, Any]:
    path = root / "tokenizer.json"
    try:
        if not path.is_file():
            return dict(json.loads(_as_transformers(root)))
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise SourceError(f"not a tokenizer: {error}", where=str(path), fix="download the checkpoint again") from error
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise SourceError("not a tokenizer: it has no `model`", where=str(path), fix="download the checkpoint again")
    return data


def _as_transformers(root: Path) -> str:
    """The folder's tokenizer, as transformers reads it, as the text of a `tokenizer.json`."""
    from transformers import AutoTokenizer

    try:
        return str(AutoTokenizer.from_pretrained(root, local_files_only=True).backend_tokenizer.to_str())
    except Exception as error:  # the tokenizers library raises bare Exception
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SourceError(
            f"its tokenizer cannot be read: {reason}", where=str(root), fix="add a whole tokenizer.json to the folder"
        ) from error


def _ids(tokenizer: Mapping[str, Any]) -> dict[int, str]:
    """Token by id, added tokens included."""
    vocab = tokenizer["model"].get("vocab", {})
    pairs = vocab.items() if isinstance(vocab, dict) else ((piece[0], i) for i, piece in enumerate(vocab))
    ids = {int(i): str(token) for token, i in pairs}
    return ids | {int(token["id"]): str(token["content"]) for token in tokenizer.get("added_tokens") or []}


def _merges(tokenizer: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Merges, whether written as "a b" or as ["a", "b"]."""
    merges = tokenizer["model"].get("merges") or []
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
