"""The contract of a registry store: blobs, releases that are created once, aliases that are compared and swapped.

A store transfers bytes; `publish.py` and `pull.py` define a release and the order of writes. Imports no
client library: each store imports its own when it is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol, TypeVar, cast

from pipeline.addresses import misspelt
from pipeline.errors import HostError, InputError
from pipeline.extras import require
from pipeline.files.home import expanded
from pipeline.files.limits import MAX_BYTES
from pipeline.stores.sources import Source

STORES: dict[str, str] = {
    "file": "pipeline.stores.folder:open_folder",
    "s3": "pipeline.stores.s3:open_s3",
    "hf": "pipeline.stores.hub:open_hub",
    "oci": "pipeline.stores.oci:open_oci",
}
"""Scheme of a registry's URL -> function that opens its store. A URL without a scheme is a folder."""

EXTRAS = {"s3": "s3", "hf": "hub", "oci": "oci"}
"""Scheme of a registry's URL -> the extra with its client."""

Item = TypeVar("Item")

SMALL_BYTES = MAX_BYTES
"""Limit for small objects, so that a wrong size in a registry cannot fill the memory."""
ALIAS_BYTES = 1 << 20
"""Limit for the text of an alias: 1000 moves take about 100 KiB."""

Report = Callable[[int], None]
"""Called with the number of bytes that were just transferred, from any thread."""


class Interrupted(HostError):  # noqa: N818 - a HostError
    """A transient failure: a reset, a timeout, a server's 5xx, a truncated body."""


class UnlistedError(HostError):
    """A registry that does not tell the names it has."""


class Pinned(Protocol):
    """The digest and size that pin a file's contents."""

    @property
    def sha256(self) -> str:
        """Digest."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...


@dataclass(frozen=True)
class Blob:
    """One file of a release. A store that finds blobs by digest ignores the other fields."""

    name: str
    version: str
    path: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Signature:
    """A signature over a manifest's bytes, or its record of promotions; `path` is where the release keeps it."""

    path: str
    manifest_sha256: str
    data: bytes


@dataclass(frozen=True)
class Content:
    """The contents of a release. `document` becomes its `manifest.json`, `card` its README."""

    name: str
    version: str
    document: bytes
    files: Mapping[str, Pinned]
    sources: Mapping[str, Source]
    signatures: Sequence[Signature] = ()
    card: str = ""


@dataclass(frozen=True)
class Move:
    """One step of an alias's history. `when` is from the clock of the host that moved it: shown, never compared."""

    version: str
    when: str = ""
    who: str = ""


@dataclass(frozen=True)
class Alias:
    """The version an alias points at, the token that a swap must present, and its moves, the newest first.

    An empty version means that the alias's text is damaged and has to be set again.
    """

    version: str
    token: str
    moves: tuple[Move, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Yank:
    """The record that a release must not be used. `retired`: its files were removed by a retention rule."""

    reason: str
    when: str = ""
    who: str = ""
    retired: bool = False


@dataclass(frozen=True)
class Removed:
    """What a collection removed, or would remove."""

    blobs: int
    size_bytes: int
    kept: int


class Store(Protocol):
    """One registry. Readers see a whole release or none: blobs are written first, the manifest last."""

    def publishing(self) -> AbstractContextManager[None]:
        """Protect blobs that are sent, or already stored, from collection while the block runs.

        Raises:
            HostError: the store cannot be written, or lacks the guarantees that a registry needs.

        """
        ...

    def missing(self, content: Content, files: Mapping[str, Pinned]) -> list[str]:
        """Return one path for each blob among these files that the store lacks, small blobs first."""
        ...

    def send(self, content: Content, paths: Sequence[str], report: Report) -> None:
        """Store the bytes of these files of a release, in parallel; readers do not see them yet."""
        ...

    def create_release(self, content: Content) -> bool:
        """Create a release; returns False, and changes nothing that readers see, if it exists."""
        ...

    def read_release(self, name: str, version: str) -> bytes | None:
        """Return a release's manifest, or None."""
        ...

    def signatures(self, name: str, version: str, path: str, manifest_sha256: str) -> list[bytes]:
        """Return signatures over a manifest of a release, not verified, or its promotions; `path` as in `Signature`.

        At most `SIGNATURES`, each of at most `SIGNATURE_BYTES`; others are left out.
        """
        ...

    def read_blob(self, blob: Blob, offset: int, buffer: memoryview) -> int:
        """Fill the buffer from `offset` on; returns the number of bytes, fewer where the blob ends.

        The digest is not checked here; the caller checks it.

        Raises:
            ArtifactError: the blob is missing.
            Interrupted: a transient failure.

        """
        ...

    def names(self) -> list[str]:
        """Return the names that have releases. UnlistedError: the registry does not tell them."""
        ...

    def versions(self, name: str) -> list[str]:
        """Return the published versions of a name."""
        ...

    def aliases(self, name: str) -> dict[str, str]:
        """Return the aliases of a name and the versions they point at."""
        ...

    def read_alias(self, name: str, alias: str) -> Alias | None:
        """Return where an alias points, or None."""
        ...

    def swap_alias(self, name: str, alias: str, move: Move, was: Alias | None) -> bool:
        """Move an alias if it is still as it was read (`was`; None: absent); returns False if it is not."""
        ...

    def yank(self, name: str, version: str, yank: Yank) -> bool:
        """Record that a release must not be used; the release stays. Returns False if it was yanked before."""
        ...

    def read_yank(self, name: str, version: str) -> Yank | None:
        """Return the record of a yanked release, or None.

        Raises:
            CorruptError: the record cannot be read.

        """
        ...

    def collect(self, reachable: Callable[[bytes], set[str]], *, dry_run: bool) -> Removed:
        """Remove blobs that no release refers to; `reachable` returns the digests that a manifest refers to.

        Releases that were retired keep their manifest, and none of their blobs.
        """
        ...


@dataclass(frozen=True)
class Object:
    """A small object, and the token that a swap of it must present."""

    data: bytes
    token: str


@dataclass(frozen=True)
class Listing:
    """An entry of a listing; `modified` is seconds by the store's own clock, `token` an ETag."""

    key: str
    size: int
    modified: float
    token: str = ""


class Bucket(Protocol):
    """Objects by key: the common interface of a folder and an S3 bucket."""

    where: str

    def check(self) -> None:
        """Check, once, that create-only writes and swaps are honoured.

        Raises:
            HostError: they are not, or the bucket cannot be written.

        """
        ...

    def size(self, key: str) -> int | None:
        """Return the size of an object, or None."""
        ...

    def upload(self, key: str, source: Source, sha256: str, parts: int) -> None:
        """Store a file atomically, up to `parts` parts at a time; rejects bytes of another digest."""
        ...

    def read(self, key: str, offset: int, buffer: memoryview, token: str | None = None) -> int:
        """Fill the buffer from `offset` on; returns the number of bytes. FileNotFoundError if the object is absent.

        Raises:
            InputError: the object in S3 has another token than `token`: it was replaced.

        """
        ...

    def get(self, key: str, limit: int = SMALL_BYTES) -> Object | None:
        """Return a small object of at most `limit` bytes, or None.

        Raises:
            CorruptError: the object is larger.

        """
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object that does not exist yet; of several writers exactly one gets True."""
        ...

    def swap(self, key: str, data: bytes, token: str | None) -> bool:
        """Replace a small object if its token is still `token` (None: it does not exist); returns False if not."""
        ...

    def list(self, prefix: str) -> Iterator[Listing]:
        """Yield the objects below `prefix/`."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object, if it exists."""
        ...


def in_parallel(threads: int, work: Callable[[Item], object], items: Iterable[Item]) -> None:
    """Do work on several items at a time; the first failure cancels the items that have not begun, and is raised."""
    with ThreadPoolExecutor(threads, "send") as pool:
        running = [pool.submit(work, item) for item in items]
        done, left = wait(running, return_when=FIRST_EXCEPTION)
        for future in left:
            future.cancel()
    for future in done:
        future.result()


def open_store(url: str) -> Store:
    """Return the store behind a registry's URL, without any request.

    Raises:
        HostError: an unsupported kind of registry, or its client is not installed.

    """
    return _opener(url)


def open_bucket(url: str) -> Bucket:
    """Return the bucket behind a URL, for uses other than a registry: the shared cache of compiled graphs.

    Raises:
        HostError: as `open_store`, and for a Hub, which has repositories instead.

    """
    check_bucket(url)
    opened: Any = _opener(url)
    return cast("Bucket", opened.bucket)


def scheme_of(url: str) -> tuple[str, str]:
    """Return the kind of a registry, and the rest of its address.

    Raises:
        InputError: a misspelt address. HostError: an unsupported kind of registry.

    """
    check_spelling(url)
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "file", url
    if scheme not in STORES:
        what = f"unsupported kind of registry: {scheme}://"
        accepted = ", ".join(f"{kind}://..." for kind in sorted(STORES))
        servers = "; a server's URL belongs into AWS_ENDPOINT_URL or HF_ENDPOINT" if scheme.startswith("http") else ""
        raise HostError(what, where=url, fix=f"accepted: a folder, {accepted}{servers}")
    return scheme, rest


def check_spelling(url: str) -> None:
    """Reject a misspelt address of a registry.

    Raises:
        InputError: with the right spelling.

    """
    if mistake := misspelt(url, sorted(STORES)):
        raise InputError(mistake.what, where=url, fix=mistake.fix)


def check_exists(url: str) -> None:
    """Reject a folder that does not exist, as the URL of a registry or cache that is read. Sends no request.

    Raises:
        InputError: no such folder, or a file.

    """
    scheme, path = scheme_of(url)
    if scheme == "file" and not expanded(path).is_dir():
        what = "not a folder" if expanded(path).exists() else "no such folder"
        raise InputError(what, where=url, fix="check the address")


def check_bucket(url: str) -> None:
    """Reject the URL of a shared cache that is misspelt, unsupported or no bucket, without opening it.

    Raises:
        InputError, HostError: as `open_bucket`.

    """
    if (kind := {"hf": "a Hub", "oci": "an OCI registry"}.get(scheme_of(url)[0])) is not None:
        raise HostError(f"{kind} cannot hold a cache", where=url, fix="name a folder or s3://bucket/prefix")


def extras_of(*urls: str) -> tuple[str, ...]:
    """Return the extras that registries need, to check those of a whole command at once; none for unknown kinds."""
    schemes = [url.partition("://")[0] for url in urls if "://" in url]
    return tuple(EXTRAS[scheme] for scheme in schemes if scheme in EXTRAS)


def _opener(url: str) -> Store:
    scheme, rest = scheme_of(url)
    require(extras_of(url), url)
    module, _, attribute = STORES[scheme].partition(":")
    return cast("Store", getattr(import_module(module), attribute)(rest))
