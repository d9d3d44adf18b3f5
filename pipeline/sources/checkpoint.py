"""A checkpoint: a folder in Hugging Face layout, opened and checked. Reads headers and configs, never weights' values.

Where the folder comes from is the business of the other files in this package. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.errors import SourceError
from pipeline.files.atomic import FileDigest, sha256_file, write_atomic
from pipeline.models.config import ModelConfig
from pipeline.models.families import config_of
from pipeline.progress import Progress, no_progress

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
CONFIG_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights, config and tokenizer in `root`.

    `files` are the files that matter, by their path under `root`; `revision` names their content. `layers` is set for a
    draft derived from a target: its layer i is layer `layers[i]` of the folder.
    """

    root: Path
    config: ModelConfig
    config_json: dict[str, Any]
    files: dict[str, FileDigest] = field(repr=False)
    revision: str
    layers: tuple[int, ...] | None = None

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """Names of the tokenizer's files; empty for a draft that uses its target's."""
        return tuple(name for name in self.files if name in TOKENIZER_FILES)


def open_checkpoint(
    root: Path, *, revision: str = "", memo: Path | None = None, progress: Progress = no_progress
) -> Checkpoint:
    """Open a folder in Hugging Face layout.

    Digests of unchanged files are remembered in the folder `memo`, so that opening again reads no weights. Without a
    `revision`, a digest over all files is used.

    Raises:
        SourceError: no such folder, no config, pickled weights only, or a model that is not supported.

    """
    if not root.is_dir():
        raise SourceError("no such folder", where=str(root), fix="give a folder with config.json and *.safetensors")
    config_json = read_config(root)
    weights = weight_files(root)
    names = [*CONFIG_FILES, *TOKENIZER_FILES, *((INDEX,) if (root / INDEX).is_file() else ()), *weights]
    files = digest_files(root, [name for name in names if (root / name).is_file()], memo, progress)
    config = config_of(config_json, str(root / "config.json"))
    return Checkpoint(root, config, config_json, files, revision or content_revision(files))


def content_revision(files: dict[str, FileDigest]) -> str:
    """A name for the content of these files."""
    text = "".join(f"{digest.sha256}  {name}\n" for name, digest in sorted(files.items()))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def read_config(root: Path) -> dict[str, Any]:
    """`config.json`, with the end-of-sequence ids of `generation_config.json`, which transformers' generate prefers."""
    config = _read_json(root / "config.json", "a checkpoint needs its config.json")
    generation = root / "generation_config.json"
    if generation.is_file():
        eos = _read_json(generation, "").get("eos_token_id")
        if eos is not None:
            config["eos_token_id"] = eos
    return config


def weight_files(root: Path) -> list[str]:
    """Names of the safetensors files that hold the model.

    Raises:
        SourceError: there are none, or the index names a file outside the folder.

    """
    if (root / INDEX).is_file():
        index = _read_json(root / INDEX, "download the checkpoint again")
        return indexed_files(index, str(root / INDEX))
    if (root / SINGLE).is_file():
        return [SINGLE]
    found = sorted(path.name for path in root.glob("*.safetensors"))
    if len(found) == 1:
        return found
    raise SourceError(*_no_weights(sorted(p.name for p in root.iterdir()), found), where=str(root), fix=CONVERT)


CONVERT = (
    "save it with transformers' model.save_pretrained(folder), which writes safetensors; "
    "Tandem opens no pickled weights, because opening them can run code"
)


def _no_weights(names: list[str], safetensors: list[str]) -> tuple[str]:
    pickled = [name for name in names if name.endswith(PICKLED)]
    if safetensors:
        return (f"{len(safetensors)} safetensors files but no {INDEX}: {', '.join(safetensors[:4])}",)
    if pickled:
        return (f"only pickled weights: {', '.join(pickled[:4])}",)
    return ("no safetensors weights in this folder",)


def refuse_without_weights(names: Iterable[str], where: str) -> None:
    """Refuse a listing that has no safetensors, before anything is downloaded."""
    names = sorted(names)
    if not any(name.endswith(".safetensors") for name in names):
        raise SourceError(*_no_weights(names, []), where=where, fix=CONVERT)


def indexed_files(index: dict[str, Any], where: str) -> list[str]:
    """Files that an index of sharded safetensors names."""
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise SourceError("index has no weight_map", where=where, fix="download the checkpoint again")
    names = sorted({str(name) for name in table.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise SourceError(f"weight_map names {name!r}, not a safetensors file of this folder", where=where)
    return names


def _read_json(path: Path, fix: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise SourceError("file is missing", where=str(path), fix=fix) from error
    except ValueError as error:
        raise SourceError(f"not JSON: {error}", where=str(path), fix=fix) from error
    if not isinstance(data, dict):
        raise SourceError("not a JSON object", where=str(path), fix=fix)
    return data


def digest_files(root: Path, names: list[str], memo: Path | None, progress: Progress) -> dict[str, FileDigest]:
    """sha256 and size of files under `root`; read only if size, time or inode differ from what `memo` remembers."""
    note = memo / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:32]}.json" if memo else None
    known = _remembered(note)
    stamps, digests = {}, {}
    total = sum((root / name).stat().st_size for name in names)
    done = 0
    for name in names:
        stat = (root / name).stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        old = known.get(name)
        if old and old[:3] == stamp:
            sha256 = str(old[3])
        else:
            progress(f"hashing {name}", done, total)
            sha256 = sha256_file(root / name)
        done += stat.st_size
        stamps[name] = [*stamp, sha256]
        digests[name] = FileDigest(sha256=sha256, size=stat.st_size)
    if note and stamps != known:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(note, json.dumps(stamps).encode())
    return digests


def _remembered(note: Path | None) -> dict[str, list[Any]]:
    """What a memo says; a memo that cannot be read is only a slower start."""
    try:
        return dict(json.loads(note.read_bytes())) if note else {}
    except (OSError, ValueError):
        return {}


def with_shared_embedding(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint, marked as using its target's embedding."""
    return replace(
        checkpoint,
        config=replace(checkpoint.config, shares_embedding=True),
        config_json=checkpoint.config_json | {"shares_embedding": True},
    )
