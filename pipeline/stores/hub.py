"""A registry on a Hugging Face Hub: `hf://org`, or `hf://org/name` for one name alone.

A name is a repository, a release a commit, a version a tag.
An alias is a branch whose head holds the files of the release it points at, so the Hub's own clients can read it; its
moves are its commits. Races are decided by the Hub: a tag is created once, a commit names the parent it was made for.
Large files go through huggingface_hub's own path (Xet or LFS), which sends nothing that the repository has.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar
from urllib.parse import quote, urlsplit

import httpx2 as httpx
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, errors
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, get_session, hf_raise_for_status

from pipeline.errors import ArtifactError, HostError, InputError
from pipeline.stores.base import SMALL_BYTES, Alias, Blob, Content, Interrupted, Move, Pinned, Removed, Report

LOCATION = re.compile(r"(?P<org>[\w-][\w.-]*)(/(?P<name>[\w-][\w.-]*))?")
MAIN = "main"
TAG = "tandem"
"""What our cards are tagged with."""
KEPT = (".gitattributes",)
TRIES = 6
GROUP_BYTES = 256 << 20
GROUP_FILES = 100
UPLOADS = 8
TIMEOUT_S = 60.0
RELEASE, POINT = "Release ", "Point {alias} at "
HOW_TO_WRITE = "set HF_TOKEN to a token that may write there"
Operation: TypeAlias = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete
Result = TypeVar("Result")


def open_hub(location: str) -> HubStore:
    """The registry of an organisation or user. Asks nobody yet.

    Raises:
        InputError: not a name.

    """
    match = LOCATION.fullmatch(location)
    if match is None:
        fix = "write hf://org or hf://org/name; a release is hf://org/name@version"
        raise InputError("not an organisation, user or repository", where=f"hf://{location}", fix=fix)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=os.environ.get("HF_TOKEN") or None)
    return HubStore(match["org"], match["name"], api)


class HubStore:
    """See `Store`."""

    def __init__(self, org: str, only: str | None, api: HfApi) -> None:
        disable_progress_bars()
        self.org, self.only, self.api = org, only, api
        self.added: dict[str, CommitOperationAdd] = {}
        self.located: dict[tuple[str, str, str], str] = {}
        self.commits: dict[tuple[str, str], str] = {}
        self.lock = threading.Lock()

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Nothing is collected on a Hub while a branch or tag reaches it."""
        self.added.clear()
        yield

    def missing(self, content: Content, files: Mapping[str, Pinned]) -> list[str]:
        """Paths of what main's head lacks, by sha256 (large files) or git's id (small ones), small ones first."""
        tree = self._tree(content.name, MAIN)
        large = {one.lfs.sha256 for one in tree.values() if one.lfs}
        order = sorted({entry.sha256: path for path, entry in files.items()}.values(), key=lambda p: files[p].size)
        return [p for p in order if files[p].sha256 not in large and not self._same(tree.get(p), content, p)]

    def send(self, content: Content, paths: Sequence[str], report: Report) -> None:
        """Create the repository if need be, and upload large files in groups. Small ones travel with the commit."""
        repo = self._repo(content.name)
        with self._explained(repo):
            self._retried(lambda: self.api.create_repo(repo, exist_ok=True))
            for group in _groups(paths, content.files):
                self._upload(repo, [self._add(content, path) for path in group])
                report(sum(content.files[path].size for path in group))

    def create_release(self, content: Content) -> bool:
        """Commit on main, for exactly the parent that was looked at; then the tag, which only one can create."""
        repo = self._repo(content.name)
        with self._explained(repo):
            self._retried(lambda: self.api.create_repo(repo, exist_ok=True))
            for attempt in range(TRIES):
                if content.version in self._refs(repo)[1]:
                    return False
                commit = self._commit_release(repo, content)
                if commit is not None:
                    return self._tag(repo, content.version, commit)
                time.sleep(0.2 * 2**attempt)
        raise Interrupted("others commit to this repository all the time", where=self._where(repo), fix="try again")

    def read_release(self, name: str, version: str) -> bytes | None:
        """`manifest.json` at the tag."""
        commit = self._commit_of(name, version)
        return self._read_small(name, commit, "manifest.json") if commit else None

    def signatures(self, name: str, version: str, path: str, manifest_sha256: str) -> list[bytes]:  # noqa: ARG002 - found by path
        """The signature that was committed with the release."""
        commit = self._commit_of(name, version)
        found = self._read_small(name, commit, path) if commit else None
        return [found] if found is not None else []

    def read_blob(self, blob: Blob, offset: int, length: int) -> bytes:
        """A range of a file at the release's commit."""
        if length == 0:
            return b""
        commit = self._commit_of(blob.name, blob.version)
        found = self._get(blob.name, commit or blob.version, blob.path, (offset, length))
        if found is None:
            what = f"{blob.path} is missing"
            raise ArtifactError(what, where=self._where(blob.name), fix="publish the release again")
        return found

    def names(self) -> list[str]:
        """Repositories of the organisation that carry our tag."""
        if self.only is not None:
            return [self.only]
        with self._explained(self.org):
            found = self.api.list_models(author=self.org, filter=TAG)
            return sorted(one.id.rpartition("/")[2] for one in found)

    def versions(self, name: str) -> list[str]:
        """Tags."""
        return sorted(self._refs_or_none(name)[1])

    def aliases(self, name: str) -> dict[str, str]:
        """Branches other than main, and the releases that they hold."""
        found = {alias: self.read_alias(name, alias) for alias in sorted(self._refs_or_none(name)[0].keys() - {MAIN})}
        return {alias: points.version for alias, points in found.items() if points is not None}

    def read_alias(self, name: str, alias: str) -> Alias | None:
        """Head of the branch, and the moves that its commits tell of."""
        head = self._refs_or_none(name)[0].get(alias) if alias != MAIN else None
        if head is None:
            return None
        moves, point = [], POINT.format(alias=alias)
        with self._explained(self._repo(name)):
            for commit in self._retried(lambda: self.api.list_repo_commits(self._repo(name), revision=head)):
                start, version = commit.title.startswith(RELEASE), commit.title.rpartition(" ")[2]
                if start or commit.title.startswith(point):
                    when = commit.created_at.strftime("%Y-%m-%dT%H:%M:%SZ")
                    moves.append(Move(version, when, ", ".join(commit.authors)))
                if start:
                    break
        if not moves:
            raise ArtifactError(f"branch {alias!r} is not an alias", where=self._where(name), fix="use another name")
        return Alias(moves[0].version, head, tuple(moves))

    def swap_alias(self, name: str, alias: str, move: Move, was: Alias | None) -> bool:
        """Create the branch, or commit the release's files onto it, if its head is what was read."""
        repo, commit = self._repo(name), self._commit_of(name, move.version)
        if alias == MAIN or commit is None:
            raise InputError(f"alias {alias!r} cannot point at {move.version!r}", where=self._where(name))
        with self._explained(repo):
            try:
                if was is None:
                    self.api.create_branch(repo, branch=alias, revision=commit)
                    return True
                operations = self._copies(name, commit, was.token)
                if not operations:  # it points there already, unless somebody moved it
                    return self._refs(repo)[0].get(alias) == was.token
                title = POINT.format(alias=alias) + move.version
                self.api.create_commit(
                    repo, operations, commit_message=title, revision=alias, parent_commit=was.token
                )  # fmt: skip
            except errors.HfHubHTTPError as error:
                if error.response.status_code in (409, 412):
                    return False
                raise
        return True

    def collect(self, reachable: Callable[[bytes], set[str]], *, dry_run: bool) -> Removed:  # noqa: ARG002
        """Nothing: every blob is reached by a commit, and commits are the Hub's history."""
        return Removed(0, 0, sum(len(self._tree(name, MAIN)) for name in self.names()))

    def _upload(self, repo: str, added: list[CommitOperationAdd]) -> None:
        self._retried(lambda: self.api.preupload_lfs_files(repo, additions=added, num_threads=UPLOADS))

    def _commit_release(self, repo: str, content: Content) -> str | None:
        """The commit that holds the release; None if somebody else committed meanwhile, or the Hub failed."""
        head = self._refs(repo)[0].get(MAIN)
        operations = list(self._changes(content))
        if not operations and head:
            return head  # an earlier publish was killed before it could tag
        try:
            made = self.api.create_commit(
                repo, operations, commit_message=f"{RELEASE}{content.version}", parent_commit=head, num_threads=UPLOADS
            )  # fmt: skip
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status == 412 or status >= 500:
                return None
            raise
        except httpx.TransportError:
            return None
        return str(made.oid)

    def _changes(self, content: Content) -> Iterator[Operation]:
        """From main's head to the release: files that differ, texts, and what is not of this release any more."""
        tree = self._tree(content.name, MAIN)
        texts = {"manifest.json": content.document, "README.md": content.card.encode()}
        texts |= {one.path: one.data for one in content.signatures}
        for path in content.files:
            if not self._same(tree.get(path), content, path):
                yield self._add(content, path)
        for path, data in texts.items():
            if path not in tree or _git_id(data) != tree[path].blob_id:
                yield CommitOperationAdd(path, data)
        for path in tree.keys() - content.files.keys() - texts.keys() - set(KEPT):
            yield CommitOperationDelete(path)

    def _copies(self, name: str, commit: str, head: str) -> list[Operation]:
        """From an alias's head to a release, without sending a byte."""
        new, old = self._tree(name, commit), self._tree(name, head)
        changed = [p for p, one in new.items() if p not in old or old[p].blob_id != one.blob_id]
        copies: list[Operation] = [CommitOperationCopy(path, path, src_revision=commit) for path in changed]
        return copies + [CommitOperationDelete(path) for path in old.keys() - new.keys()]

    def _add(self, content: Content, path: str) -> CommitOperationAdd:
        """An addition whose digest need not be computed again; one that was uploaded stays so."""
        entry = content.files[path]
        with self.lock:
            found = self.added.get(path)
            if found is None or found.upload_info.sha256.hex() != entry.sha256:
                found = CommitOperationAdd(path, content.sources[path])
                found.upload_info.sha256 = bytes.fromhex(entry.sha256)
                self.added[path] = found
        if content.sources[path].stat().st_size != entry.size:
            raise ArtifactError("changed while it was published", where=str(content.sources[path]), fix="publish again")
        return found

    def _same(self, there: RepoFile | None, content: Content, path: str) -> bool:
        if there is None or there.size != content.files[path].size:
            return False
        if there.lfs is not None:
            return bool(there.lfs.sha256 == content.files[path].sha256)
        return bool(there.blob_id == _git_id(content.sources[path].read_bytes()))

    def _tag(self, repo: str, version: str, commit: str) -> bool:
        try:
            self._retried(lambda: self.api.create_tag(repo, tag=version, revision=commit))
        except errors.HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            return self._refs(repo)[1].get(version) == commit  # ours, of a request that was tried again
        return True

    def _tree(self, name: str, revision: str) -> dict[str, RepoFile]:
        repo = self._repo(name)
        with self._explained(repo):
            try:
                found = self._retried(lambda: list(self.api.list_repo_tree(repo, recursive=True, revision=revision)))
            except (errors.RevisionNotFoundError, errors.RepositoryNotFoundError) as error:
                if isinstance(error, errors.GatedRepoError) or _refused(error):
                    raise
                return {}
        return {one.path: one for one in found if isinstance(one, RepoFile)}

    def _refs(self, repo: str) -> tuple[dict[str, str], dict[str, str]]:
        """Branches and tags, with their commits."""
        refs = self._retried(lambda: self.api.list_repo_refs(repo))
        branches, tags = ({one.name: one.target_commit for one in kind} for kind in (refs.branches, refs.tags))
        return branches, tags

    def _refs_or_none(self, name: str) -> tuple[dict[str, str], dict[str, str]]:
        repo = self._repo(name)
        with self._explained(repo):
            try:
                return self._refs(repo)
            except errors.RepositoryNotFoundError as error:
                if isinstance(error, errors.GatedRepoError) or _refused(error):
                    raise
                return {}, {}

    def _commit_of(self, name: str, version: str) -> str | None:
        """The commit of a version's tag, which does not move."""
        if (name, version) not in self.commits:
            found = self._refs_or_none(name)[1].get(version)
            if found is None:
                return None
            self.commits[name, version] = found
        return self.commits[name, version]

    def _read_small(self, name: str, commit: str, path: str) -> bytes | None:
        for attempt in range(TRIES):
            try:
                return self._get(name, commit, path, (0, SMALL_BYTES))
            except Interrupted:
                if attempt == TRIES - 1:
                    raise
                time.sleep(0.2 * 2**attempt)
        return None

    def _get(self, name: str, commit: str, path: str, part: tuple[int, int] | None = None) -> bytes | None:
        """A file or a part of it; None if there is none. Large files lie elsewhere, under a URL that expires."""
        key = (name, commit, path)
        url = f"{self.api.endpoint}/{self._repo(name)}/resolve/{quote(commit, safe='')}/{quote(path)}"
        with self._explained(self._repo(name)):
            answer = self._ask(self.located.get(key, url), url, part)
            if answer.status_code in (401, 403, 404) and key in self.located:
                answer = self._ask(self.located.pop(key, url) and url, url, part)
            if answer.status_code == 404 and answer.headers.get("X-Error-Code") in ("EntryNotFound", None):
                return None
            hf_raise_for_status(answer)
        if str(answer.url) != url:
            self.located[key] = str(answer.url)
        data = answer.content
        return data[part[0] : sum(part)] if part and answer.status_code == 200 else data

    def _ask(self, url: str, home: str, part: tuple[int, int] | None) -> Any:
        own = urlsplit(url).netloc == urlsplit(home).netloc
        headers = build_hf_headers(token=self.api.token) if own else {}
        if part is not None:
            headers["Range"] = f"bytes={part[0]}-{part[0] + part[1] - 1}"
        headers["Accept-Encoding"] = "identity"
        return get_session().get(url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S)

    def _retried(self, call: Callable[[], Result]) -> Result:
        """Try again what may pass: the Hub's 5xx and 429, and broken connections."""
        for attempt in range(TRIES):
            try:
                return call()
            except (errors.HfHubHTTPError, httpx.TransportError) as error:
                status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 503
                if attempt == TRIES - 1 or (status < 500 and status != 429):
                    raise
                time.sleep(0.2 * 2**attempt)
        raise AssertionError

    def _repo(self, name: str) -> str:
        if self.only not in (None, name):
            what = f"this repository is for {self.only!r}, the artifact is {name!r}"
            raise InputError(what, where=f"hf://{self.org}/{self.only}", fix=f"use hf://{self.org}")
        return f"{self.org}/{name}"

    def _where(self, name: str) -> str:
        return f"hf://{name}" if "/" in name else f"hf://{self.org}/{name}"

    @contextmanager
    def _explained(self, repo: str) -> Iterator[None]:
        """Say what a failure of the Hub means for the user."""
        where = self._where(repo)
        try:
            yield
        except errors.GatedRepoError as error:
            fix = "accept its terms on the repository's page, then set HF_TOKEN"
            raise InputError("access to this repository is restricted", where=where, fix=fix) from error
        except errors.LocalTokenNotFoundError as error:
            raise HostError("the Hub needs a token", where=where, fix=HOW_TO_WRITE) from error
        except errors.HfHubHTTPError as error:
            raise _failure(error, where) from error
        except (httpx.TransportError, ConnectionError) as error:
            raise Interrupted("the Hub cannot be reached, or breaks off", where=where, fix="try again") from error


def _failure(error: errors.HfHubHTTPError, where: str) -> HostError | InputError:
    status = error.response.status_code if error.response is not None else 0
    if _refused(error):
        return HostError("the Hub does not know this token", where=where, fix=HOW_TO_WRITE)
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            "no such repository, or no access to it", where=where, fix=f"check the name, or {HOW_TO_WRITE}"
        )
    if status in (401, 403):
        what = "the Hub needs a token" if status == 401 else "this token may not do that"
        return HostError(what, where=where, fix=HOW_TO_WRITE)
    if status >= 500 or status == 429:
        return Interrupted(f"the Hub answers {status}", where=where, fix="try again: what was moved is kept")
    message = (error.server_message or str(error)).splitlines()[0]
    return HostError(f"the Hub answers {status}: {message}", where=where, fix="see the Hub's message")


def _refused(error: errors.HfHubHTTPError) -> bool:
    """Whether the token itself was refused; the Hub answers so for public repositories, too."""
    return "Invalid credentials" in error.response.headers.get("X-Error-Message", "")


def _groups(paths: Sequence[str], files: Mapping[str, Pinned]) -> Iterator[list[str]]:
    group: list[str] = []
    for path in paths:
        if group and (len(group) == GROUP_FILES or sum(files[p].size for p in group) + files[path].size > GROUP_BYTES):
            yield group
            group = []
        group.append(path)
    if group:
        yield group


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
