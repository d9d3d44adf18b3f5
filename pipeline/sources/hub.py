"""Checkpoints from a Hugging Face Hub: `hf://org/name@revision`. Downloads what a pair needs and nothing else.

Files land in the Hub's own cache (`HF_HUB_CACHE`), so models that are already there are not downloaded again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import HostError, SourceError
from pipeline.files.atomic import write_atomic
from pipeline.models.families import config_of
from pipeline.progress import Progress
from pipeline.sources.checkpoint import (
    CONFIG_FILES,
    INDEX,
    SINGLE,
    TOKENIZER_FILES,
    indexed_files,
    refuse_without_weights,
)

LOCATION = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
DOWNLOADS = 4
READ_BYTES = 8 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it: large ones by sha256, small ones by git's id."""

    name: str
    size: int
    sha256: str | None
    blob_id: str | None


@dataclass(frozen=True)
class Hub:
    """One Hub and who asks; None means the environment's (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_CACHE`)."""

    endpoint: str | None = None
    token: str | None = None
    cache_dir: Path | None = None

    def fetch(self, location: str, notes: Path, progress: Progress) -> tuple[Path, str]:
        """Folder and commit of `org/name[@revision]`. A commit fetched before, whole, needs no network.

        Raises:
            SourceError: no such repository or revision, no access, no safetensors, an unsupported model, damage.
            HostError: no network, or the Hub fails.

        """
        repo, revision = _parse(location)
        where = f"hf://{location}"
        known = _fetched(notes, repo, revision)
        if known is not None:
            return known, revision
        with _explained(where, repo, revision):
            commit, listing = self._list(repo, revision)
        note = _note(notes, repo, commit)
        known = _fetched(notes, repo, commit)
        if known is not None:
            return known, commit
        refuse_without_weights(listing, where)
        with _explained(where, repo, revision):
            root, names = self._download(repo, commit, listing, where, progress)
        note.parent.mkdir(parents=True, exist_ok=True)
        sizes = {name: listing[name].size for name in names}
        write_atomic(note, json.dumps({"root": str(root), "sizes": sizes}).encode())
        return root, commit

    def _list(self, repo: str, revision: str) -> tuple[str, dict[str, RemoteFile]]:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint or os.environ.get("HF_ENDPOINT"), token=self.token)
        info = api.model_info(repo, revision=revision, files_metadata=True)
        files = {
            s.rfilename: RemoteFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id)
            for s in info.siblings or ()
        }
        return str(info.sha), files

    def _download(
        self, repo: str, commit: str, listing: dict[str, RemoteFile], where: str, progress: Progress
    ) -> tuple[Path, list[str]]:
        """Config first: a model that is not supported is refused before its weights come."""
        get = self._getter(repo, commit)
        if "config.json" not in listing:
            raise SourceError("the repository has no config.json", where=where, fix="name a model repository")
        config = get(listing["config.json"])
        config_of(json.loads(config.read_bytes()), f"{where}/config.json")
        names = [n for n in (*CONFIG_FILES, *TOKENIZER_FILES) if n in listing]
        if INDEX in listing:
            shards = indexed_files(json.loads(get(listing[INDEX]).read_bytes()), f"{where}/{INDEX}")
            names += [INDEX, *shards]
        else:
            names += [SINGLE] if SINGLE in listing else [n for n in listing if n.endswith(".safetensors")]
        missing = [name for name in names if name not in listing]
        if missing:
            raise SourceError(f"the index names {missing[0]}, which the repository lacks", where=where)
        total, done = sum(listing[name].size for name in names), 0
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            for name, _ in zip(names, pool.map(get, [listing[name] for name in names]), strict=True):
                done += listing[name].size
                progress(f"downloading {repo}", done, total)
        return config.parent, names

    def _getter(self, repo: str, commit: str) -> Callable[[RemoteFile], Path]:
        from huggingface_hub import hf_hub_download

        def get(file: RemoteFile, *, again: bool = False) -> Path:
            path = Path(
                hf_hub_download(
                    repo,
                    file.name,
                    revision=commit,
                    endpoint=self.endpoint or os.environ.get("HF_ENDPOINT"),
                    token=self.token,
                    cache_dir=self.cache_dir,
                    force_download=again,
                    tqdm_class=_silent_bar(),
                )
            )
            if _intact(path, file):
                return path
            if again:
                raise SourceError(
                    f"{file.name} does not have the digest that the Hub lists, twice",
                    where=f"hf://{repo}@{commit}",
                    fix="try another network, or report it to the repository's owner",
                )
            return get(file, again=True)

        return get


def fetch(location: str, cache: Path, progress: Progress) -> tuple[Path, str]:
    """Folder and commit of `org/name[@revision]` on the environment's Hub."""
    return Hub().fetch(location, cache / "hub", progress)


def _parse(location: str) -> tuple[str, str]:
    match = LOCATION.fullmatch(location)
    if match is None:
        raise SourceError("not a Hub location", where=f"hf://{location}", fix="write hf://org/name@revision")
    return match["repo"], match["revision"] or "main"


def _note(notes: Path, repo: str, commit: str) -> Path:
    return notes / f"{repo.replace('/', '--')}--{commit}.json"


def _fetched(notes: Path, repo: str, commit: str) -> Path | None:
    """Folder of a commit that was fetched and checked before, if its files are still there."""
    if not COMMIT.fullmatch(commit):
        return None
    try:
        note = json.loads(_note(notes, repo, commit).read_bytes())
        root = Path(note["root"])
        whole = all((root / name).stat().st_size == size for name, size in note["sizes"].items())
    except (OSError, ValueError, KeyError):
        return None
    return root if whole else None


def _intact(path: Path, file: RemoteFile) -> bool:
    """Whether a file has the digest that the Hub lists: huggingface_hub itself only checks sizes."""
    if file.sha256:
        digest, wanted = hashlib.sha256(), file.sha256
    elif file.blob_id:
        digest, wanted = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False), file.blob_id
    else:
        return True
    with path.open("rb") as stream:
        while chunk := stream.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == wanted


def _silent_bar() -> Any:
    """huggingface_hub draws bars on stderr unless it is given one that does not."""
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):  # type: ignore[type-arg,misc,unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))

    return Silent


@contextmanager
def _explained(where: str, repo: str, revision: str) -> Iterator[None]:
    """Say what a failure of the Hub means for the user."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        fix = f"accept its terms on the model's page, then set HF_TOKEN (repository {repo})"
        raise SourceError("access to this model is restricted", where=where, fix=fix) from error
    except errors.RevisionNotFoundError as error:
        fix = "use a branch, tag or commit of that repository"
        raise SourceError(f"no such revision: {revision!r}", where=where, fix=fix) from error
    except errors.RepositoryNotFoundError as error:
        fix = "check the name; for a private model set HF_TOKEN to a token that may read it"
        raise SourceError(f"no such repository, or no access: {repo}", where=where, fix=fix) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            fix = "set HF_TOKEN to a valid token, or unset it"
            raise SourceError(f"the Hub refuses the token (HTTP {status})", where=where, fix=fix) from error
        raise HostError(f"the Hub fails: HTTP {status}", where=where, fix="try again later") from error
    except errors.LocalEntryNotFoundError as error:
        raise HostError(f"no connection to the Hub: {_root_cause(error)}", where=where, fix=NETWORK) from error
    except json.JSONDecodeError as error:
        raise SourceError(f"a file of the repository is not JSON: {error}", where=where) from error
    except (OSError, _transport_error()) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free space, or set HF_HUB_CACHE to a folder on another disk"
            raise HostError("no space left for the download", where=where, fix=fix) from error
        raise HostError(f"no connection to the Hub: {_root_cause(error)}", where=where, fix=NETWORK) from error


NETWORK = "connect to the network, set HF_ENDPOINT to a mirror, or give the checkpoint as a folder"


def _transport_error() -> type[Exception]:
    """The exception of whichever HTTP client this huggingface_hub uses for connections that fail."""
    from huggingface_hub import errors

    bases = errors.HfHubHTTPError.__mro__
    client_error = next((base for base in bases if base.__name__ == "HTTPError"), OSError)
    return client_error if issubclass(client_error, Exception) else OSError


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__
