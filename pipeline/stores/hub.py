"""A registry on a Hugging Face Hub: `hf://org`, or `hf://org/name` for one name alone.

A name is a repository, a release a commit, a version a tag.
An alias is a branch whose head holds the files of the release it points at, so the Hub's own clients can read it; its
moves are its commits. The Hub decides races: a tag is created once, and a commit names its expected parent.
Large files go through huggingface_hub's own path (Xet or LFS), which sends no bytes that the repository has.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

import httpx2 as httpx
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, errors
from huggingface_hub.hf_api import RepoFile

from pipeline.errors import ArtifactError, CorruptError, InputError, no_string
from pipeline.files.atomic import disk_errors
from pipeline.files.limits import SIGNATURE_BYTES, SIGNATURES
from pipeline.files.unfinished import sweep, temp_folder
from pipeline.stores.base import (
    SMALL_BYTES,
    Alias,
    Blob,
    Content,
    Interrupted,
    Move,
    Pinned,
    Removed,
    Report,
    Yank,
    in_parallel,
)
from pipeline.stores.hub_api import TRIES, Hub
from pipeline.stores.objects import checked_pieces
from pipeline.stores.sources import Source
from pipeline.stores.yanks import yank_of, yank_text

LOCATION = re.compile(r"(?P<org>[\w-][\w.-]*)(/(?P<name>[\w-][\w.-]*))?")
MAIN = "main"
TAG = "tandem"
"""Tag of every release's card, by which registries of an organisation are listed."""
KEPT = (".gitattributes",)
YANKED = "yanked"
"""Folder of the records of yanked releases, on the main branch."""
GROUP_BYTES = 256 << 20
GROUP_FILES = 100
GROUPS = UPLOADS = 4
"""Groups that are uploaded at a time, and files of each."""
CHUNK_BYTES = 1 << 20
RELEASE, POINT = "Release ", "Point {alias} at "
Operation: TypeAlias = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete


def open_hub(location: str) -> HubStore:
    """Return the registry of an organisation or user, without any request.

    Raises:
        InputError: malformed name.

    """
    match = LOCATION.fullmatch(location)
    if match is None:
        fix = "write hf://org or hf://org/name; a release is hf://org/name@version"
        raise InputError("malformed organisation, user or repository", where=f"hf://{location}", fix=fix)
    return HubStore(match["org"], match["name"], Hub())


class HubStore:
    """See `Store`."""

    def __init__(self, org: str, only: str | None, hub: Hub) -> None:
        self.org, self.only, self.hub = org, only, hub
        self.added: dict[str, CommitOperationAdd] = {}
        self.commits: dict[tuple[str, str], str] = {}
        self.lock = threading.Lock()
        self.staging: Path | None = None
        self.stack = ExitStack()

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Protect nothing: a Hub does not collect files that a branch or tag refers to."""
        self.added.clear()
        with ExitStack() as self.stack:
            yield
        self.staging = None

    def missing(self, content: Content, files: Mapping[str, Pinned]) -> list[str]:
        """Return the paths that the release lacks, or main's head if there is no release; small files first.

        Large files are compared by sha256, small ones by git's id.
        """
        commit = self._commit_of(content.name, content.version)
        tree = self.hub.tree(self._repo(content.name), commit or MAIN)
        large = {file.lfs.sha256 for file in tree.values() if file.lfs}
        order = sorted({entry.sha256: path for path, entry in files.items()}.values(), key=lambda p: files[p].size)
        return [p for p in order if files[p].sha256 not in large and not self._same(tree.get(p), content, p)]

    def send(self, content: Content, paths: Sequence[str], report: Report) -> None:
        """Create the repository if it is missing, and upload large files in groups. The commit brings small files."""
        no_string(paths, "paths", "paths")
        repo = self._repo(content.name)
        with self.hub.explained(repo):
            self.hub.retried(lambda: self.hub.api.create_repo(repo, exist_ok=True))
            in_parallel(GROUPS, lambda group: self._upload(repo, content, group, report), _groups(paths, content.files))

    def create_release(self, content: Content) -> bool:
        """Commit on main with the parent that was read, then create the tag; only one process can create it."""
        repo = self._repo(content.name)
        with self.hub.explained(repo):
            self.hub.retried(lambda: self.hub.api.create_repo(repo, exist_ok=True))
            for attempt in range(TRIES):
                if content.version in self.hub.refs(repo)[1]:
                    return False
                commit = self._commit_release(repo, content)
                if commit is not None:
                    return self._tag(repo, content.version, commit)
                time.sleep(0.2 * 2**attempt)
        what = "other processes keep committing to this repository"
        raise Interrupted(what, where=self._where(repo), fix="try again")

    def read_release(self, name: str, version: str) -> bytes | None:
        """Return `manifest.json` at the tag."""
        commit = self._commit_of(name, version)
        return self.hub.read_small(self._repo(name), commit, "manifest.json") if commit else None

    def signatures(self, name: str, version: str, path: str, manifest_sha256: str) -> list[bytes]:  # noqa: ARG002 - found by path
        """Return the signatures that were committed with the release: `signature`, `signature-2` and so on."""
        commit, found = self._commit_of(name, version), list[bytes]()
        for number in range(SIGNATURES if commit else 0):
            signature = self.hub.read_small(self._repo(name), commit or "", _numbered(path, number))
            if signature is None:
                break
            found.append(signature)
        return [signature for signature in found if len(signature) <= SIGNATURE_BYTES]

    def read_blob(self, blob: Blob, offset: int, buffer: memoryview) -> int:
        """Read a range of a file at the release's commit."""
        if not buffer:
            return 0
        commit = self._commit_of(blob.name, blob.version)
        count = self.hub.read(self._repo(blob.name), commit or blob.version, blob.path, offset, buffer)
        if count is None:
            what = f"{blob.path} is missing"
            raise CorruptError(what, where=self._where(blob.name), fix="publish the release again")
        return count

    def names(self) -> list[str]:
        """Return the repositories of the organisation that carry our tag; of one repository, its name if tagged."""
        if self.only is not None:
            return [self.only] if self.versions(self.only) else []
        with self.hub.explained(self.org):
            models = self.hub.api.list_models(author=self.org, filter=TAG)
            return sorted(model.id.rpartition("/")[2] for model in models)

    def versions(self, name: str) -> list[str]:
        """Return the tags."""
        return sorted(self.hub.refs_or_none(self._repo(name))[1])

    def aliases(self, name: str) -> dict[str, str]:
        """Return the branches other than main, and the releases that they hold."""
        branches, _ = self.hub.refs_or_none(self._repo(name))
        aliases = {branch: self.read_alias(name, branch) for branch in sorted(branches.keys() - {MAIN})}
        return {branch: alias.version for branch, alias in aliases.items() if alias is not None}

    def read_alias(self, name: str, alias: str) -> Alias | None:
        """Return the head of the branch, and the moves that its commits record."""
        head = self.hub.refs_or_none(self._repo(name))[0].get(alias) if alias != MAIN else None
        if head is None:
            return None
        moves, point = [], POINT.format(alias=alias)
        with self.hub.explained(self._repo(name)):
            for commit in self.hub.retried(lambda: self.hub.api.list_repo_commits(self._repo(name), revision=head)):
                start, version = commit.title.startswith(RELEASE), commit.title.rpartition(" ")[2]
                if start or commit.title.startswith(point):
                    when = commit.created_at.strftime("%Y-%m-%dT%H:%M:%SZ")
                    moves.append(Move(version, when, ", ".join(commit.authors)))
                if start:
                    break
        if not moves:
            raise ArtifactError(f"branch {alias!r} is not an alias", where=self._where(name), fix="use another alias")
        return Alias(moves[0].version, head, tuple(moves))

    def swap_alias(self, name: str, alias: str, move: Move, was: Alias | None) -> bool:
        """Create the branch, or commit the release's files onto it, if its head has not changed since it was read."""
        repo, commit = self._repo(name), self._commit_of(name, move.version)
        if alias == MAIN or commit is None:
            what = f"alias {alias!r} cannot point at {move.version!r}: the release is missing, or the alias is {MAIN!r}"
            raise InputError(what, where=self._where(name), fix=f"use a published version and no alias {MAIN!r}")
        with self.hub.explained(repo):
            try:
                if was is None:
                    self.hub.api.create_branch(repo, branch=alias, revision=commit)
                    return True
                operations = self._copies(name, commit, was.token)
                if not operations:  # it points there already, unless another process moved it
                    return self.hub.refs(repo)[0].get(alias) == was.token
                title = POINT.format(alias=alias) + move.version
                self.hub.api.create_commit(
                    repo, operations, commit_message=title, revision=alias, parent_commit=was.token
                )  # fmt: skip
            except errors.HfHubHTTPError as error:
                if error.response.status_code in (409, 412):
                    return False
                raise
        return True

    def yank(self, name: str, version: str, yank: Yank) -> bool:
        """Commit the record on main, whose head must not have changed since it was read."""
        repo, path = self._repo(name), f"{YANKED}/{version}.json"
        addition = CommitOperationAdd(path, yank_text(yank))
        with self.hub.explained(repo):
            for attempt in range(TRIES):
                if self.read_yank(name, version) is not None:
                    return False
                head = self.hub.refs(repo)[0].get(MAIN)
                try:
                    self.hub.api.create_commit(
                        repo, [addition], commit_message=f"Yank {version}", parent_commit=head
                    )  # fmt: skip
                except errors.HfHubHTTPError as error:
                    if error.response.status_code != 412:
                        raise
                else:
                    return True
                time.sleep(0.2 * 2**attempt)
        what = "other processes keep committing to this repository"
        raise Interrupted(what, where=self._where(repo), fix="try again")

    def read_yank(self, name: str, version: str) -> Yank | None:
        """Return the record on main, or None."""
        repo = self._repo(name)
        head = self.hub.refs_or_none(repo)[0].get(MAIN)
        data = self.hub.read_small(repo, head, f"{YANKED}/{version}.json") if head else None
        return yank_of(data, f"{self._where(name)}@{version}") if data is not None else None

    def collect(self, reachable: Callable[[bytes], set[str]], *, dry_run: bool) -> Removed:  # noqa: ARG002
        """Remove nothing: commits are the Hub's history, and every blob belongs to one."""
        return Removed(0, 0, sum(len(self.hub.tree(self._repo(name), MAIN)) for name in self.names()))

    def _upload(self, repo: str, content: Content, paths: Sequence[str], report: Report) -> None:
        additions = [self._add(content, path) for path in paths]
        self.hub.retried(lambda: self.hub.api.preupload_lfs_files(repo, additions=additions, num_threads=UPLOADS))
        for addition in additions:
            if self.staging is not None and addition.path_or_fileobj == b"":  # the client needs the file no more
                (self.staging / addition.upload_info.sha256.hex()).unlink(missing_ok=True)
        report(sum(content.files[path].size for path in paths))

    def _commit_release(self, repo: str, content: Content) -> str | None:
        """Return the commit that holds the release; None if another process committed first, or the Hub failed."""
        head = self.hub.refs(repo)[0].get(MAIN)
        operations = list(self._changes(content))
        if not operations and head:
            return head  # an earlier publish was killed before it could tag
        try:
            commit = self.hub.api.create_commit(
                repo, operations, commit_message=f"{RELEASE}{content.version}", parent_commit=head, num_threads=UPLOADS
            )  # fmt: skip
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status == 412 or status >= 500:
                return None
            raise
        except httpx.TransportError:
            return None
        return str(commit.oid)

    def _changes(self, content: Content) -> Iterator[Operation]:
        """Yield the operations from main's head to the release: changed files, texts, and removals."""
        tree = self.hub.tree(self._repo(content.name), MAIN)
        texts = {"manifest.json": content.document, "README.md": content.card.encode()}
        numbers = dict.fromkeys((signature.path for signature in content.signatures), 0)
        for signature in content.signatures:
            texts[_numbered(signature.path, numbers[signature.path])] = signature.data
            numbers[signature.path] += 1
        for path in content.files:
            if not self._same(tree.get(path), content, path):
                yield self._add(content, path)
        for path, data in texts.items():
            if path not in tree or _git_id(data) != tree[path].blob_id:
                yield CommitOperationAdd(path, data)
        for path in tree.keys() - content.files.keys() - texts.keys() - set(KEPT):
            if path.startswith(f"{YANKED}/"):
                continue
            yield CommitOperationDelete(path)

    def _copies(self, name: str, commit: str, head: str) -> list[Operation]:
        """Return the operations from an alias's head to a release, which send no file contents."""
        new, old = self.hub.tree(self._repo(name), commit), self.hub.tree(self._repo(name), head)
        changed = [path for path, file in new.items() if path not in old or old[path].blob_id != file.blob_id]
        copies: list[Operation] = [CommitOperationCopy(path, path, src_revision=commit) for path in changed]
        return copies + [CommitOperationDelete(path) for path in old.keys() - new.keys()]

    def _add(self, content: Content, path: str) -> CommitOperationAdd:
        """Return an addition with its known digest; an addition that was uploaded is used again."""
        entry, source = content.files[path], content.sources[path]
        if isinstance(source, Path) and source.stat().st_size != entry.size:
            what = "file changed while it was published"
            raise ArtifactError(what, where=str(source), fix="publish again")
        with self.lock:
            addition = self.added.get(path)
        if addition is None or addition.upload_info.sha256.hex() != entry.sha256:
            addition = CommitOperationAdd(path, self._on_disk(source, entry.sha256))
            addition.upload_info.sha256 = bytes.fromhex(entry.sha256)
            with self.lock:
                self.added[path] = addition
        return addition

    def _on_disk(self, source: Source, sha256: str) -> Path:
        """Return a file that the Hub's client can read twice; one from another store is removed when it was sent."""
        if isinstance(source, Path):
            return source
        with self.lock:
            if self.staging is None:
                folder = Path(tempfile.gettempdir())
                sweep(folder)  # files of copies that were killed
                self.staging = self.stack.enter_context(temp_folder(folder / "copy"))
            path = self.staging / sha256
        with disk_errors(path), path.open("wb") as file:
            for piece in checked_pieces(source, sha256, CHUNK_BYTES):
                file.write(piece)
        return path

    def _same(self, stored: RepoFile | None, content: Content, path: str) -> bool:
        if stored is None or stored.size != content.files[path].size:
            return False
        if stored.lfs is not None:
            return bool(stored.lfs.sha256 == content.files[path].sha256)
        if stored.size > SMALL_BYTES:
            return False
        pieces = checked_pieces(content.sources[path], content.files[path].sha256, CHUNK_BYTES)
        return bool(stored.blob_id == _git_id(b"".join(pieces)))

    def _tag(self, repo: str, version: str, commit: str) -> bool:
        try:
            self.hub.retried(lambda: self.hub.api.create_tag(repo, tag=version, revision=commit))
        except errors.HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            return self.hub.refs(repo)[1].get(version) == commit  # ours, if a retried request met its first attempt
        return True

    def _commit_of(self, name: str, version: str) -> str | None:
        """Return the commit of a version's tag, which does not move."""
        if (name, version) not in self.commits:
            commit = self.hub.refs_or_none(self._repo(name))[1].get(version)
            if commit is None:
                return None
            self.commits[name, version] = commit
        return self.commits[name, version]

    def _repo(self, name: str) -> str:
        if self.only not in (None, name):
            what = f"this repository is for {self.only!r}, the artifact is {name!r}"
            raise InputError(what, where=f"hf://{self.org}/{self.only}", fix=f"use hf://{self.org}")
        return f"{self.org}/{name}"

    def _where(self, name: str) -> str:
        return f"hf://{name}" if "/" in name else f"hf://{self.org}/{name}"


def _groups(paths: Sequence[str], files: Mapping[str, Pinned]) -> Iterator[list[str]]:
    group: list[str] = []
    for path in paths:
        if group and (len(group) == GROUP_FILES or sum(files[p].size for p in group) + files[path].size > GROUP_BYTES):
            yield group
            group = []
        group.append(path)
    if group:
        yield group


def _numbered(path: str, number: int) -> str:
    """Return the path of one of several signatures over a manifest."""
    return path if number == 0 else f"{path}-{number + 1}"


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
