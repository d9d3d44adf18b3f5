"""A registry over objects: the same layout and the same guarantees in a folder and in an S3 bucket.

    blobs/sha256/<2 hex>/<sha256>    releases/<name>/<version>/manifest.json    aliases/<name>/<alias>
    signatures/<sha256 of a manifest>/<sha256 of the signature>    promotions/<sha256 of a manifest>/<sha256>
    yanks/<name>/<version>    leases/    collections/

An alias is a text that lists its moves, the newest first: the first word of the first line is its version.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.errors import CorruptError, InputError, no_string
from pipeline.files.limits import DO_NOT_USE, SIGNATURE_BYTES, SIGNATURES
from pipeline.stores.alias_text import alias_text, moves_of
from pipeline.stores.base import (
    ALIAS_BYTES,
    Alias,
    Blob,
    Bucket,
    Content,
    Move,
    Pinned,
    Removed,
    Report,
    Yank,
    in_parallel,
)
from pipeline.stores.leases import Lease, collecting, leased
from pipeline.stores.promotions import PROMOTED
from pipeline.stores.sources import Source
from pipeline.stores.yanks import YANK_BYTES, yank_of, yank_text

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
DIGEST = re.compile(r"[0-9a-f]{64}")
PARALLEL = 8
PARTS = 16
"""Parts of all uploads together that a publish holds in memory."""
LISTED = 1000
"""Objects beside a signature that are looked at, whatever their size."""


class ObjectStore:
    """See `Store`."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.lease: Lease | None = None

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Hold a lease; see `leases`."""
        self.bucket.check()
        with leased(self.bucket) as self.lease:
            try:
                yield
            finally:
                self.lease = None

    def missing(self, content: Content, files: Mapping[str, Pinned]) -> list[str]:  # noqa: ARG002 - blobs are shared
        """Return one path of each blob that is not stored with its size, small blobs first."""
        paths = {entry.sha256: path for path, entry in files.items()}
        order = sorted(paths.values(), key=lambda path: files[path].size)
        with ThreadPoolExecutor(PARALLEL, "look") as pool:
            sizes = pool.map(lambda path: self.bucket.size(_blob(files[path].sha256)), order)
            return [path for path, size in zip(order, sizes, strict=True) if size != files[path].size]

    def send(self, content: Content, paths: Sequence[str], report: Report) -> None:
        """Upload several files at a time; the first failure cancels the uploads that have not begun."""
        no_string(paths, "paths", "paths")
        parts = max(2, PARTS // min(PARALLEL, max(len(paths), 1)))

        def upload(path: str) -> None:
            entry = content.files[path]
            self.bucket.upload(_blob(entry.sha256), content.sources[path], entry.sha256, parts)
            report(entry.size)

        in_parallel(PARALLEL, upload, paths)

    def create_release(self, content: Content) -> bool:
        """Write signatures first, under the manifest's digest, then the manifest: the first writer wins.

        A host may stand still before the last request for so long that its lease ended and a collection removed blobs;
        they are sent again.
        """
        for signature in content.signatures:
            key = f"{_beside(signature.path, signature.manifest_sha256)}/{_sha256(signature.data)}"
            self.bucket.create(key, signature.data)
        if self.lease is not None:
            self.lease.check()
        created = self.bucket.create(_release(content.name, content.version), content.document)
        if self.lease is not None and self.lease.may_have_ended():
            with leased(self.bucket):
                self.send(content, self.missing(content, content.files), lambda _: None)
        return created

    def read_release(self, name: str, version: str) -> bytes | None:
        """Return a release's manifest, or None."""
        manifest = self.bucket.get(_release(name, version))
        return manifest.data if manifest else None

    def signatures(self, name: str, version: str, path: str, manifest_sha256: str) -> list[bytes]:  # noqa: ARG002 - found by digest
        """Return the signatures over a manifest; larger ones and later ones than the limits are not read."""
        listed = itertools.islice(self.bucket.list(_beside(path, manifest_sha256)), LISTED)
        small = (entry.key for entry in listed if entry.size <= SIGNATURE_BYTES)
        objects = (self.bucket.get(key, SIGNATURE_BYTES) for key in itertools.islice(small, SIGNATURES))
        return [signature.data for signature in objects if signature is not None]

    def read_blob(self, blob: Blob, offset: int, buffer: memoryview) -> int:
        """Read a part of a blob.

        Raises:
            ArtifactError: the blob is missing.

        """
        try:
            return self.bucket.read(_blob(blob.sha256), offset, buffer)
        except FileNotFoundError as error:
            what = f"blob {blob.sha256} is missing"
            raise CorruptError(what, where=self.bucket.where, fix="publish the release again") from error

    def names(self) -> list[str]:
        """Return the names that have releases."""
        return sorted({name for name, _ in self._releases("releases")})

    def versions(self, name: str) -> list[str]:
        """Return the published versions of a name."""
        return sorted(version for _, version in self._releases(f"releases/{_plain(name)}"))

    def aliases(self, name: str) -> dict[str, str]:
        """Return the aliases of a name and the versions they point at."""
        listed = sorted(entry.key.rpartition("/")[2] for entry in self.bucket.list(f"aliases/{_plain(name)}"))
        aliases = {alias: self.read_alias(name, alias) for alias in listed}
        return {key: alias.version for key, alias in aliases.items() if alias is not None}

    def read_alias(self, name: str, alias: str) -> Alias | None:
        """Return where an alias points, or None."""
        stored = self.bucket.get(_alias(name, alias), ALIAS_BYTES)
        if stored is None:
            return None
        moves = moves_of(stored.data)
        if not moves or not NAME.fullmatch(moves[0].version):
            return Alias("", stored.token)
        return Alias(moves[0].version, stored.token, moves)

    def swap_alias(self, name: str, alias: str, move: Move, was: Alias | None) -> bool:
        """Replace the text of an alias, if it has not changed since it was read."""
        text = alias_text(move, was.moves if was else ())
        return self.bucket.swap(_alias(name, alias), text, was.token if was else None)

    def yank(self, name: str, version: str, yank: Yank) -> bool:
        """Write the record, which is never replaced."""
        return self.bucket.create(_yank(name, version), yank_text(yank))

    def read_yank(self, name: str, version: str) -> Yank | None:
        """Return the record, or None."""
        stored = self.bucket.get(_yank(name, version), YANK_BYTES)
        return yank_of(stored.data, f"{self.bucket.where}/{name}@{version}") if stored else None

    def collect(self, reachable: Callable[[bytes], set[str]], *, dry_run: bool) -> Removed:
        """Remove blobs that no release refers to, unless a publish is in progress. Releases are never removed."""
        if next(self.bucket.list(""), None) is None:
            raise InputError("the registry is empty", where=self.bucket.where, fix="check the registry's address")
        self.bucket.check()
        with collecting(self.bucket) as time_left:
            blobs = list(self.bucket.list("blobs"))
            stored = {blob.key.rpartition("/")[2] for blob in blobs}
            keep: set[str] = set()
            for name, version in self._releases("releases", strict=True):
                yank = self.read_yank(name, version)
                if yank is None or not yank.retired:
                    used = reachable(self.read_release(name, version) or b"")
                    self._check_stored(f"{name}@{version}", used - stored)
                    keep |= used
            unused = [blob for blob in blobs if blob.key.rpartition("/")[2] not in keep]
            removed = freed = 0
            for blob in unused:
                if not time_left():
                    break
                if not dry_run:
                    self.bucket.delete(blob.key)
                removed, freed = removed + 1, freed + blob.size
        return Removed(removed, freed, len(blobs) - removed)

    def _check_stored(self, release: str, missing: set[str]) -> None:
        """Reject a manifest that names blobs which are not listed: it, or the list, may have changed on its way.

        Raises:
            CorruptError: blobs are missing.

        """
        if missing:
            what = f"{release} names blob {min(missing)}, which is not in the registry; nothing is removed"
            fix = "run the command again; if the blob is lost, publish the release again"
            raise CorruptError(what, where=self.bucket.where, fix=fix)

    def _releases(self, below: str, *, strict: bool = False) -> Iterator[tuple[str, str]]:
        """Yield name and version of each release.

        Raises:
            CorruptError: `strict`, and an object that is no release: its name may have changed on its way.

        """
        for entry in self.bucket.list(below):
            parts = entry.key.split("/")
            if len(parts) == 4 and parts[0] == "releases" and parts[3] == "manifest.json":
                yield parts[1], parts[2]
            elif strict:
                what = f"object among the releases that is none: {entry.key!r}; nothing is removed"
                raise CorruptError(
                    what, where=self.bucket.where, fix="run the command again; if it is there, remove it"
                )


def checked_pieces(source: Source, sha256: str, piece_bytes: int) -> Iterator[bytes]:
    """Yield a file's bytes in pieces; raises at the end, before a writer finishes, if the digest is wrong.

    Raises:
        CorruptError: a digest mismatch.

    """
    digest = hashlib.sha256()
    with source.open("rb") as file:
        while piece := file.read(piece_bytes):
            digest.update(piece)
            yield piece
    if digest.hexdigest() != sha256:
        what = f"sha256 mismatch: expected {sha256}, found {digest.hexdigest()}"
        fix = "build the artifact again" if isinstance(source, Path) else source.fix
        raise CorruptError(what, where=str(source), fix=fix)


def check_small(size: int, limit: int, where: str) -> None:
    """Reject an object that is too large for a manifest, alias or signature.

    Raises:
        CorruptError: the object is too large.

    """
    if size > limit:
        raise CorruptError(f"object too large: {size:,} bytes, limit {limit:,}", where=where, fix=DO_NOT_USE)


def _blob(sha256: str) -> str:
    assert DIGEST.fullmatch(sha256), sha256
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def _release(name: str, version: str) -> str:
    return f"releases/{_plain(name)}/{_plain(version)}/manifest.json"


def _alias(name: str, alias: str) -> str:
    return f"aliases/{_plain(name)}/{_plain(alias)}"


def _yank(name: str, version: str) -> str:
    return f"yanks/{_plain(name)}/{_plain(version)}"


def _beside(path: str, manifest_sha256: str) -> str:
    """Return the folder of the signatures over a manifest, or of the records of its promotions, by their path."""
    assert DIGEST.fullmatch(manifest_sha256), manifest_sha256
    return f"{'promotions' if path.rpartition('/')[2] == PROMOTED else 'signatures'}/{manifest_sha256}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _plain(name: str) -> str:
    """Return a name unchanged, if it is a single part of a path and not a temporary name."""
    if not NAME.fullmatch(name):
        raise InputError(f"malformed name: {name!r}", where="registry", fix="use letters, digits, . _ + -")
    return name
