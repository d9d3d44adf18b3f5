"""Checkpoints from a Hugging Face Hub: `hf://org/name@revision`. Downloads only the files that a model needs.

Files land in the Hub's own cache (`HF_HUB_CACHE`), so models that are already there are not downloaded again. With
`TANDEM_STREAM=1`, weights stay on the Hub and are read by ranges.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pipeline.addresses import hub_endpoint
from pipeline.errors import SourceError
from pipeline.extras import require
from pipeline.files.atomic import write_atomic
from pipeline.models.dflash import MASK_EMBEDDING, mask_embedding_error
from pipeline.models.families import config_of
from pipeline.models.quantisation import MODELOPT_FILE, refuse_modelopt
from pipeline.progress import Progress
from pipeline.records import Record
from pipeline.sources.base import Fetched
from pipeline.sources.checkpoint import (
    CONFIG_FILES,
    STREAM,
    TOKENIZER_FILES,
    indexed_files,
    read_config,
    read_json,
    refuse_without_weights,
)
from pipeline.sources.custom_code import CODE_FILES, refuse_custom_code
from pipeline.sources.hub_errors import hub_errors
from pipeline.sources.pointers import INDEX, SINGLE
from pipeline.sources.remote import RemoteFile

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOCATION = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
AGAIN = "report the file to the repository's owner"
DOWNLOADS = 4
READ_BYTES = 8 << 20
WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub lists it: large ones by sha256, small ones by git's id."""

    name: str
    size: int
    sha256: str | None
    blob_id: str | None


class Note(Record):
    """A downloaded and checked commit: its folder, and the size of each file."""

    root: Path
    sizes: dict[str, int]


@dataclass(frozen=True)
class Hub:
    """A Hub and an account on it; None means the environment's (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_CACHE`)."""

    endpoint: str | None = None
    token: str | None = None
    cache_dir: Path | None = None

    def fetch(self, location: str, notes: Path, progress: Progress, *, weights: bool = True) -> Fetched:
        """Return the folder and commit of `org/name[@revision]`. A commit in `notes` needs no network.

        Without `weights`, or with `TANDEM_STREAM=1`, weights stay on the Hub.

        Raises:
            SourceError: no such repository or revision, no access, no safetensors, an unsupported model, a file
                that differs from the Hub's digest.
            HostError: no network, or the Hub fails.

        """
        repo, revision = _parse(location)
        where = f"hf://{location}"
        known = _downloaded(notes, repo, revision)
        if known is not None:
            return Fetched(known, revision)
        with hub_errors(where, repo, revision):
            commit, listing = self._list(repo, revision)
        known = _downloaded(notes, repo, commit)
        if known is not None:
            return Fetched(known, commit)
        refuse_without_weights(listing, where)
        if MASK_EMBEDDING in listing:
            raise mask_embedding_error(where)
        with hub_errors(where, repo, revision):
            root, names = self._download(repo, commit, listing, where, progress, weights=weights and not streamed())
        if streamed() or not weights:
            return Fetched(root, commit, self._remote(repo, commit, [listing[name] for name in names]))
        path = _note_path(notes, repo, commit)
        path.parent.mkdir(parents=True, exist_ok=True)
        note = Note(root=root, sizes={name: listing[name].size for name in names})
        write_atomic(path, note.model_dump_json().encode())
        return Fetched(root, commit)

    def commit(self, location: str, timeout_s: float) -> str:
        """Return the commit that the revision of `org/name[@revision]` is now: one request.

        Raises:
            SourceError: no such repository or revision, or no access; HostError: no network, or the Hub fails.

        """
        repo, revision = _parse(location)
        with hub_errors(f"hf://{location}", repo, revision):
            return str(self._api().model_info(repo, revision=revision, timeout=timeout_s).sha)

    def _api(self) -> HfApi:
        from huggingface_hub import HfApi  # here, because it is slow to import and most sources are not on the Hub

        return HfApi(endpoint=self.endpoint or hub_endpoint(), token=self.token)

    def _list(self, repo: str, revision: str) -> tuple[str, dict[str, HubFile]]:
        info = self._api().model_info(repo, revision=revision, files_metadata=True)
        files = {
            s.rfilename: HubFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id)
            for s in info.siblings or ()
        }
        return str(info.sha), files

    def _download(
        self, repo: str, commit: str, listing: dict[str, HubFile], where: str, progress: Progress, *, weights: bool
    ) -> tuple[Path, list[str]]:
        """Return the folder and the names of the files; an unsupported config ends the download before the weights."""
        get = self._getter(repo, commit)
        if "config.json" not in listing:
            raise SourceError("no config.json in the repository", where=where, fix="name a model repository")
        config = get(listing["config.json"])
        for name in CODE_FILES:
            if name in listing:
                refuse_custom_code(get(listing[name]).read_bytes(), f"{where}/{name}")
        config_json = read_config(config.parent)
        if MODELOPT_FILE in listing:
            refuse_modelopt(config_json, read_json(get(listing[MODELOPT_FILE]), AGAIN), f"{where}/{MODELOPT_FILE}")
        config_of(config_json, f"{where}/config.json")
        names = [n for n in (*CONFIG_FILES, *TOKENIZER_FILES) if n in listing]
        if SINGLE in listing:  # before an index, as in a folder
            names += [SINGLE]
        elif INDEX in listing:
            shards = indexed_files(read_json(get(listing[INDEX]), AGAIN), f"{where}/{INDEX}")
            names += [INDEX, *shards]
        else:
            names += [n for n in listing if n.endswith(".safetensors")]
        missing = [name for name in names if name not in listing]
        if missing:
            raise SourceError(f"{INDEX} names {missing[0]}, which is not in the repository", where=where)
        wanted = [name for name in names if weights or not name.endswith(WEIGHTS)]
        total, done = sum(listing[name].size for name in wanted), 0
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            for name, _ in zip(wanted, pool.map(get, [listing[name] for name in wanted]), strict=True):
                done += listing[name].size
                progress(f"downloading {repo}", done, total)
        return config.parent, names

    def _remote(self, repo: str, commit: str, files: Sequence[HubFile]) -> dict[str, RemoteFile]:
        """Return the weight files of a commit, to be read by ranges."""
        require(["hub"], f"hf://{repo}")
        from pipeline.stores.hub_api import Hub as HubRanges  # here, as above

        hub = HubRanges(self.endpoint, self.token)

        def fetch(name: str, offset: int, buffer: memoryview) -> int:
            return hub.read(repo, commit, name, offset, buffer) or 0

        return {
            file.name: RemoteFile(
                file.name, file.size, f"hf://{repo}@{commit}/{file.name}", partial(fetch, file.name), file.sha256
            )
            for file in files
            if file.name.endswith(WEIGHTS)
        }

    def _getter(self, repo: str, commit: str) -> Callable[[HubFile], Path]:
        from huggingface_hub import hf_hub_download  # here, as above

        def get(file: HubFile, *, again: bool = False) -> Path:
            path = Path(
                hf_hub_download(
                    repo,
                    file.name,
                    revision=commit,
                    endpoint=self.endpoint or hub_endpoint(),
                    token=self.token,
                    cache_dir=self.cache_dir,
                    force_download=again,
                    tqdm_class=_hidden_bar(),
                )
            )
            if _intact(path, file):
                return path
            if again:
                raise SourceError(
                    f"{file.name}: digest mismatch with the Hub's listing, after two downloads",
                    where=f"hf://{repo}@{commit}",
                    fix="try another network, or report the file to the repository's owner",
                )
            return get(file, again=True)

        return get


def fetch(location: str, *, base: Path, cache: Path, progress: Progress) -> Fetched:
    """Return the folder and commit of `org/name[@revision]` on the environment's Hub."""
    del base  # of folders only
    return Hub().fetch(location, cache / "hub", progress)


def moving(location: str) -> bool:
    """Return whether a location names a branch or tag: only a whole commit always names the same files."""
    return not is_commit(_parse(location)[1])


def current_revision(location: str, *, timeout_s: float) -> str | None:
    """Return the commit that a branch or tag names now.

    Raises:
        SourceError: no such repository or revision, or no access; HostError: no network, or the Hub fails.

    """
    return Hub().commit(location, timeout_s)


def streamed() -> bool:
    """Return whether weights stay on the Hub."""
    return os.environ.get(STREAM) == "1"


def is_commit(revision: str) -> bool:
    """Return whether a revision is a whole commit id, and not a branch, tag or short id."""
    return COMMIT.fullmatch(revision) is not None


def _parse(location: str) -> tuple[str, str]:
    match = LOCATION.fullmatch(location)
    if match is None:
        raise SourceError("malformed Hub location", where=f"hf://{location}", fix="write hf://org/name@revision")
    return match["repo"], match["revision"] or "main"


def _note_path(notes: Path, repo: str, commit: str) -> Path:
    return notes / f"{repo.replace('/', '--')}--{commit}.json"


def _downloaded(notes: Path, repo: str, commit: str) -> Path | None:
    """Return the folder of a commit that was downloaded and checked before, if its files are all present."""
    if not is_commit(commit):
        return None
    try:
        note = Note.model_validate_json(_note_path(notes, repo, commit).read_bytes())
        complete = all((note.root / name).stat().st_size == size for name, size in note.sizes.items())
    except (OSError, ValidationError):
        return None
    return note.root if complete else None


def _intact(path: Path, file: HubFile) -> bool:
    """Return whether a file has the digest that the Hub lists; huggingface_hub itself only checks sizes."""
    if file.sha256:
        digest, expected = hashlib.sha256(), file.sha256
    elif file.blob_id:
        digest, expected = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False), file.blob_id
    else:
        return True
    with path.open("rb") as stream:
        while chunk := stream.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == expected


def _hidden_bar() -> Any:
    """Return a progress bar that draws nothing; huggingface_hub draws its own on stderr otherwise."""
    from huggingface_hub.utils.tqdm import tqdm  # here, as above

    class Hidden(tqdm):  # type: ignore[type-arg,misc,unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))

    return Hidden
