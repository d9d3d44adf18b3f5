"""A checkpoint: a folder in Hugging Face layout, opened and checked. Reads headers and configs, never weights' values.

The modules of the kinds of source provide the folder. Imports no torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import InputError, SourceError, no_string
from pipeline.files.atomic import FileDigest, sha256_file, write_atomic
from pipeline.files.limits import parse_json
from pipeline.models.config import ModelConfig
from pipeline.models.families import config_of
from pipeline.models.generation import EOS, GENERATION_CONFIG, token_ids
from pipeline.models.multimodal import text_part
from pipeline.models.quantisation import MODELOPT_FILE, refuse_modelopt
from pipeline.progress import Progress, no_progress
from pipeline.records import Record
from pipeline.sources.custom_code import CODE_FILES, refuse_custom_code
from pipeline.sources.folder import other_folder
from pipeline.sources.pointers import INDEX, SINGLE, reject_pointers
from pipeline.sources.remote import RemoteFile
from pipeline.sources.tensors import TensorRef

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
CONFIG_FILES = ("config.json", GENERATION_CONFIG)
STREAM = "TANDEM_STREAM"
"""Variable that leaves the weights of hf:// sources on the Hub."""

LONGEST_NAME = 255
"""Bytes of a file's name."""

NO_FILES: Mapping[str, RemoteFile] = {}


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights, config and tokenizer in `root`.

    `files` are the files that matter, by their path under `root`; `revision` names their content. `layers` is set for a
    draft derived from a target: its layer i is layer `layers[i]` of the folder. `generation` are a target's defaults of
    generation: its `generation_config.json`, or else those in its config.
    """

    root: Path
    config: ModelConfig
    config_json: dict[str, Any]
    files: dict[str, FileDigest] = field(repr=False)
    revision: str
    layers: tuple[int, ...] | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    remote: Mapping[str, RemoteFile] = field(default_factory=dict, repr=False)
    """Weight files that are not in `root`, but read where they are stored."""
    made: Mapping[str, TensorRef] = field(default_factory=dict, repr=False)
    """Tensors that were computed from others, in place of those of the same names."""

    def file(self, name: str) -> Path | RemoteFile:
        """Return the weight file of that name."""
        return self.remote.get(name, self.root / name)

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """Names of the tokenizer's files; empty for a draft that uses its target's."""
        return tuple(name for name in self.files if name in TOKENIZER_FILES)


class FileStamp(Record):
    """Size, time and inode of a file when it had this digest."""

    size: int
    mtime_ns: int
    inode: int
    sha256: str


class Memo(Record):
    """Stamps of a folder's files by name."""

    files: dict[str, FileStamp]


def open_checkpoint(
    root: Path, *, revision: str = "", memo: Path | None = None, progress: Progress = no_progress,
    read_weights: bool = True, remote: Mapping[str, RemoteFile] = NO_FILES,
) -> Checkpoint:  # fmt: skip
    """Open a folder in Hugging Face layout.

    The folder `memo` keeps digests of unchanged files, so that opening again reads no weights. Without a `revision`,
    the revision is a digest over all files. Without `read_weights`, weight files have no digest: enough for
    checks. Weights in `remote` are not in the folder; they have the digests that their store lists.

    Raises:
        SourceError: no such folder, no config, pickled weights only, git-LFS pointers, custom code, or a model that is
            not supported.

    """
    if not root.is_dir():
        raise SourceError("no such folder", where=str(root), fix=other_folder(root))
    reject_pointers(root, [*CONFIG_FILES, *TOKENIZER_FILES, INDEX])
    _refuse_custom_code(root)
    config_json = read_config(root)
    if (root / MODELOPT_FILE).is_file():
        document = read_json(root / MODELOPT_FILE, "download the checkpoint again")
        refuse_modelopt(config_json, document, str(root / MODELOPT_FILE))
    config = config_of(config_json, str(root / "config.json"))
    weights = [] if remote else weight_files(root)
    reject_pointers(root, weights)
    names = [*CONFIG_FILES, *TOKENIZER_FILES, *(() if SINGLE in weights else (INDEX,)), *weights]
    present = [name for name in names if (root / name).is_file() and (read_weights or name not in weights)]
    files = digest_files(root, present, memo, progress)
    files |= {name: FileDigest(file.expected, file.size) for name, file in remote.items() if file.expected}
    return Checkpoint(root, config, config_json, files, revision or content_revision(files), remote=remote)


def require_local(checkpoint: Checkpoint) -> None:
    """Reject a checkpoint whose weights are not on this host.

    Raises:
        InputError: weights that are read where they are stored.

    """
    if checkpoint.remote:
        what = "this command needs the weights on this host, and they are read where they are stored"
        fix = f"download the checkpoint and name its folder, or unset {STREAM} for an hf:// source"
        raise InputError(what, where=str(next(iter(checkpoint.remote.values()))), fix=fix)


def _refuse_custom_code(root: Path) -> None:
    for name in CODE_FILES:
        if (root / name).is_file():
            refuse_custom_code((root / name).read_bytes(), str(root / name))


def content_revision(files: dict[str, FileDigest]) -> str:
    """Return a digest over the names and contents of these files."""
    text = "".join(f"{digest.sha256}  {name}\n" for name, digest in sorted(files.items()))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def read_config(root: Path) -> dict[str, Any]:
    """Return `config.json`, of a multimodal model its text part; `eos_token_id` is checked before anything reads it."""
    whole = read_json(root / "config.json", "add the checkpoint's config.json")
    config = text_part(whole, str(root / "config.json"))
    token_ids(config.get(EOS), str(root / "config.json"))
    return config


def weight_files(root: Path) -> list[str]:
    """Return the names of the safetensors files that hold the model.

    Raises:
        SourceError: no such files, or an index that names a file outside the folder.

    """
    if (root / SINGLE).is_file():  # before an index, as in transformers: `unread_index` warns
        return [SINGLE]
    if (root / INDEX).is_file():
        index = read_json(root / INDEX, "download the checkpoint again")
        return indexed_files(index, str(root / INDEX))
    candidates = sorted(path.name for path in root.glob("*.safetensors"))
    if len(candidates) == 1:
        return candidates
    names = sorted(path.name for path in root.iterdir())
    raise _no_weights(names, candidates, str(root))


CONVERT = (
    "convert the file, in a process without network and credentials: tandem draft convert SOURCE OUT; "
    "builds do not read pickled weights, because reading them can execute code"
)


def _no_weights(names: list[str], safetensors: list[str], where: str) -> SourceError:
    pickled = [name for name in names if name.endswith(PICKLED)]
    if safetensors:
        what = f"{len(safetensors)} safetensors files but no {INDEX}: {', '.join(safetensors[:4])}"
        return SourceError(what, where=where, fix="download the checkpoint again")
    if pickled:
        return SourceError(f"only pickled weights: {', '.join(pickled[:4])}", where=where, fix=CONVERT)
    return SourceError("no safetensors weights", where=where, fix="name a checkpoint with safetensors weights")


def refuse_without_weights(names: Iterable[str], where: str) -> None:
    """Raise a SourceError for a listing without safetensors, before anything is downloaded."""
    no_string(names, "names", "file names")
    names = sorted(names)
    if not any(name.endswith(".safetensors") for name in names):
        raise _no_weights(names, [], where)


def indexed_files(index: dict[str, Any], where: str) -> list[str]:
    """Return the names of the files in an index of sharded safetensors."""
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise SourceError("no weight_map in the index", where=where, fix="download the checkpoint again")
    names = sorted({str(name) for name in table.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not _is_plain(name):
            raise SourceError(
                f"weight_map names {name[:LONGEST_NAME]!r}, which is not a safetensors file in this folder", where=where
            )
    return names


def _is_plain(name: str) -> bool:
    """Return whether a file can have this name."""
    return name.isprintable() and len(name.encode()) <= LONGEST_NAME


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """Return a file's JSON object.

    Raises:
        SourceError: no such file, not JSON, or not an object.

    """
    try:
        data = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise SourceError("file is missing", where=str(path), fix=fix) from error
    except ValueError as error:
        raise SourceError(f"not JSON: {error}", where=str(path), fix=fix) from error
    if not isinstance(data, dict):
        raise SourceError("not a JSON object", where=str(path), fix=fix)
    return data


def digest_files(root: Path, names: list[str], memo: Path | None, progress: Progress) -> dict[str, FileDigest]:
    """Return sha256 and size of files under `root`; read only if size, time or inode differ from those in `memo`."""
    no_string(names, "names", "file names")
    path = memo / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]}.json" if memo else None
    known = _read_memo(path)
    stamps: dict[str, FileStamp] = {}
    total = sum((root / name).stat().st_size for name in names)
    done = 0
    for name in names:
        stat = (root / name).stat()
        stamp = known.get(name)
        if stamp is None or (stamp.size, stamp.mtime_ns, stamp.inode) != (stat.st_size, stat.st_mtime_ns, stat.st_ino):
            progress(f"hashing {root.name}", done, total)
            sha256 = sha256_file(root / name)
            stamp = FileStamp(size=stat.st_size, mtime_ns=stat.st_mtime_ns, inode=stat.st_ino, sha256=sha256)
        done += stat.st_size
        stamps[name] = stamp
    if stamps != known:
        progress(f"hashing {root.name}", total, total)
    if path and stamps != known:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, Memo(files=stamps).model_dump_json().encode())
    return {name: FileDigest(sha256=stamp.sha256, size=stamp.size) for name, stamp in stamps.items()}


def _read_memo(path: Path | None) -> Mapping[str, FileStamp]:
    """Return the stamps in a memo; an unreadable memo counts as empty, which only costs time."""
    try:
        return Memo.model_validate_json(path.read_bytes()).files if path else {}
    except (OSError, ValidationError):
        return {}


def with_shared_embedding(checkpoint: Checkpoint) -> Checkpoint:
    """Return the same checkpoint, marked as one that uses its target's embedding."""
    return replace(
        checkpoint,
        config=replace(checkpoint.config, shares_embedding=True),
        config_json=checkpoint.config_json | {"shares_embedding": True},
    )
