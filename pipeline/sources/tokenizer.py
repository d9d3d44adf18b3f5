"""A checkpoint's tokenizer as files that every reader reads alike, and the comparison of two checkpoints' tokenizers.

Imports no torch at import; transformers, imported for folders without a `tokenizer.json`, does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import SourceError, reason
from pipeline.files.limits import parse_json
from pipeline.files.unfinished import work_folder
from pipeline.sources.checkpoint import Checkpoint, read_json

SHOWN_IDS = 3
VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json"}
JSON_FIX = "download the checkpoint again"
FIX = "use a draft of the target's own family and tokenizer, or `derive: {from: target, layers: [...]}`"

FAST_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return an artifact's tokenizer files: `tokenizer.json` and `tokenizer_config.json`, which need no other file.

    Transformers makes both from the folder, so added tokens, begin-of-sequence settings, defaults of tokenizer classes
    and older formats (sentencepiece, vocab and merges) keep their meaning. The files have no state of single calls
    (truncation, padding, the length limit) and no setting that a reader would apply a second time.

    Raises:
        SourceError: the checkpoint has no tokenizer, or transformers cannot read it.

    """
    require_tokenizer(checkpoint)
    tokenizer = _as_transformers(checkpoint)
    data = _checked(tokenizer.backend_tokenizer, checkpoint.root)
    config = _config(tokenizer, json.loads(data), checkpoint)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return {"tokenizer.json": data.encode(), "tokenizer_config.json": text.encode()}


def _checked(tokenizer: Any, root: Path) -> str:
    """Return the text of a tokenizer that can be read back.

    Raises:
        SourceError: it cannot: two tokens have one id, for example, and a merge names the lost one.

    """
    try:
        return serialized(tokenizer)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises bare Exception, and its panics are none
        what = f"the tokenizer contradicts itself: {reason(error)}"
        raise SourceError(what, where=str(root), fix=JSON_FIX) from error


def serialized(tokenizer: Any) -> str:
    """Return a `tokenizers.Tokenizer` as the text of a `tokenizer.json` that has the same special tokens in a text.

    A special token that was added before the normalizer is found as it is written; read from a file, it is normalized
    first, for example to a word with a space before it. Converted sentencepiece models have such tokens.
    """
    from tokenizers import Tokenizer  # here: an extra

    text = str(tokenizer.to_str())
    data, stored = json.loads(text), Tokenizer.from_str(text)
    for token in data.get("added_tokens") or []:
        probe = f"a{token['content']}"
        if token["special"] and token["normalized"] and stored.encode(probe).ids != tokenizer.encode(probe).ids:
            token["normalized"] = False
    return json.dumps(data, ensure_ascii=False)


def _config(tokenizer: Any, data: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the `tokenizer_config.json` with which transformers takes `tokenizer.json` as it is."""
    named = {key: str(token) for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    others = [str(token) for token in tokenizer.all_special_tokens if str(token) not in named.values()]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    if others:
        config["additional_special_tokens"] = others
    prefix = _prefix_space(data.get("pre_tokenizer") or {})
    if prefix is not None:  # without a value, transformers sets False
        config["add_prefix_space"] = prefix
    if tokenizer.split_special_tokens:
        config["split_special_tokens"] = True
    if template := tokenizer.chat_template or _legacy_template(checkpoint):
        config["chat_template"] = _as_stored(template)
    return config


def _prefix_space(pre_tokenizer: Mapping[str, Any]) -> bool | None:
    """Return whether a pre-tokenizer adds a space before the text; None if it has no such setting."""
    parts = (pre_tokenizer, *pre_tokenizer.get("pretokenizers", ()))
    return next((part["add_prefix_space"] for part in parts if "add_prefix_space" in part), None)


def _as_stored(template: Any) -> Any:
    """Return a chat template as `tokenizer_config.json` stores it: several by name are a list."""
    if not isinstance(template, dict):
        return template
    return [{"name": name, "template": text} for name, text in template.items()]


def _legacy_template(checkpoint: Checkpoint) -> Any:
    """Return the template in `chat_template.json`, a file of processors that transformers' tokenizers do not read."""
    if "chat_template.json" not in checkpoint.tokenizer_files:
        return None
    return _read_json(checkpoint.root / "chat_template.json").get("chat_template")


def require_tokenizer(checkpoint: Checkpoint) -> None:
    """Reject a target without a vocabulary.

    Raises:
        SourceError: the checkpoint has no tokenizer.

    """
    if not VOCABULARIES & set(checkpoint.tokenizer_files):
        fix = f"add one of {', '.join(sorted(VOCABULARIES))} to the folder"
        raise SourceError("the target has no tokenizer", where=str(checkpoint.root), fix=fix)


def fast_tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the files of a tokenizer that `runtime.text` reads as they are; empty if it has another form.

    Transformers, which imports torch, reads the other forms: `tokenizer_files`.
    """
    root = checkpoint.root
    if not (root / "tokenizer.json").is_file():
        return {}
    return {name: (root / name).read_bytes() for name in FAST_FILES if (root / name).is_file()}


def vocabulary_size(checkpoint: Checkpoint) -> int:
    """Return the largest id of the checkpoint's tokenizer plus one; 0 without a tokenizer."""
    if not checkpoint.tokenizer_files:
        return 0
    return max(_ids(_tokenizer_json(checkpoint)), default=-1) + 1


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
        ids = [number for number, text in _ids(_tokenizer_json(checkpoint)).items() if text == token]
        if len(ids) == 1:
            return ids[0]
    own: int | None = _as_transformers(checkpoint).eos_token_id
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
    differing = differences(_tokenizer_json(target), _tokenizer_json(draft))
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


def _tokenizer_json(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.root / "tokenizer.json"
    if not path.is_file():
        return dict(json.loads(_as_transformers(checkpoint).backend_tokenizer.to_str()))
    data = _read_json(path)
    if not isinstance(data.get("model"), dict):
        raise SourceError("malformed tokenizer: no `model`", where=str(path), fix=JSON_FIX)
    try:
        _ids(data)
        _merges(data)
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
        what = "malformed tokenizer: `model.vocab`, `model.merges` or `added_tokens` has another form"
        raise SourceError(what, where=str(path), fix=JSON_FIX) from error
    return data


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = parse_json(path.read_bytes())
    except ValueError as error:
        raise SourceError(f"malformed tokenizer: {error}", where=str(path), fix=JSON_FIX) from error
    if not isinstance(data, dict):
        raise SourceError("malformed tokenizer: not a JSON object", where=str(path), fix=JSON_FIX)
    return data


def _as_transformers(checkpoint: Checkpoint) -> Any:
    """Return the tokenizer as transformers reads it, without its state of single calls.

    Transformers sees only the files that belong to the checkpoint, so no other file of the folder can change the
    tokens.
    """
    with work_folder("tokenizer") as folder:
        for name in (*checkpoint.tokenizer_files, "config.json"):
            (folder / name).symlink_to((checkpoint.root / name).absolute())
        return _read(folder, checkpoint.root)


def _read(folder: Path, root: Path) -> Any:
    """Return the tokenizer in `folder`; errors name `root`."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # here, because it imports torch

    fix = "add a complete tokenizer.json to the folder"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises bare Exception, and its panics are none
        what = f"cannot read the tokenizer: {reason(error)}".replace(str(folder), str(root))
        raise SourceError(what, where=str(root), fix=fix) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        what = f"cannot read the tokenizer: its class {type(tokenizer).__name__} has no tokenizer.json"
        raise SourceError(what, where=str(root), fix=fix)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


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
