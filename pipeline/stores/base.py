"""What a registry store is: blobs, releases that are created once, aliases that are compared and swapped.

A store moves bytes; what a release means, and the order of writing, are `publish.py`'s and `pull.py`'s. Imports no
client library: each store imports its own when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Protocol, TypeVar

from pipeline.errors import HostError

STORES: dict[str, str] = {
    "file": "pipeline.stores.folder:open_folder",
    "s3": "pipeline.stores.s3:open_s3",
    "hf": "pipeline.stores.hub:open_hub",
}
"""Scheme of a registry's URL -> what opens its store. A URL without a scheme is a folder."""

Item = TypeVar("Item")

SMALL_BYTES = 64 << 20
"""No manifest, alias or signature is larger: a claim that it is must not fill the memory."""

Report = Callable[[int], None]
"""Called with bytes that were moved just now, from any thread."""


class Interrupted(HostError):  # noqa: N818 - it is a HostError
    """A failure that may pass: a reset, a timeout, a server's 5xx, a body that ended early."""


class Pinned(Protocol):
    """What pins a file's contents."""

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
    """One file of a release. Where blobs are found by digest, the rest does not matter."""

    name: str
    version: str
    path: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Signature:
    """A signature over a manifest's bytes; `path` is where the release keeps it (`signature`)."""

    path: str
    manifest_sha256: str
    data: bytes


@dataclass(frozen=True)
class Content:
    """All that a release is made of. `document` becomes its `manifest.json`, `card` a page for people."""

    name: str
    version: str
    document: bytes
    files: Mapping[str, Pinned]
    sources: Mapping[str, Path]
    signatures: Sequence[Signature] = ()
    card: str = ""


@dataclass(frozen=True)
class Move:
    """One step of an alias's history. The time is the mover's clock: for people, never for deciding."""

    version: str
    when: str = ""
    who: str = ""


@dataclass(frozen=True)
class Alias:
    """The version an alias points at, the token that a swap must show, and its moves, the newest first.

    No version: its text is damaged, and can only be set again.
    """

    version: str
    token: str
    moves: tuple[Move, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Removed:
    """What a collection removed, or would remove."""

    blobs: int
    size_bytes: int
    kept: int


class Store(Protocol):
    """One registry. Readers see a whole release or none: blobs go first, the manifest last."""

    def publishing(self) -> AbstractContextManager[None]:
        """Keep what is sent, or found to be there, from being collected while the block runs.

        Raises:
            HostError: the store cannot be written, or cannot keep the promises of a registry.

        """
        ...

    def missing(self, content: Content, files: Mapping[str, Pinned]) -> list[str]:
        """Of each blob among these files of a release that must be sent one path, small ones first."""
        ...

    def send(self, content: Content, paths: Sequence[str], report: Report) -> None:
        """Store the bytes of these files of a release, in parallel; nothing of it is visible yet."""
        ...

    def create_release(self, content: Content) -> bool:
        """Create a release; False, and nothing that a reader sees changes, if there is one."""
        ...

    def read_release(self, name: str, version: str) -> bytes | None:
        """A release's manifest, or None."""
        ...

    def signatures(self, name: str, version: str, path: str, manifest_sha256: str) -> list[bytes]:
        """Signatures over a manifest of a release; `path` as in `Signature`. Nothing is known of their worth."""
        ...

    def read_blob(self, blob: Blob, offset: int, buffer: memoryview) -> int:
        """Fill the buffer from `offset` on; returns the bytes that came, fewer where the blob ends.

        Not checked: the reader knows what it asked for.

        Raises:
            ArtifactError: it is missing.
            Interrupted: worth another try.

        """
        ...

    def names(self) -> list[str]:
        """Names that have releases."""
        ...

    def versions(self, name: str) -> list[str]:
        """Published versions of a name."""
        ...

    def aliases(self, name: str) -> dict[str, str]:
        """Aliases of a name and the versions they point at."""
        ...

    def read_alias(self, name: str, alias: str) -> Alias | None:
        """Where an alias points, or None."""
        ...

    def swap_alias(self, name: str, alias: str, move: Move, was: Alias | None) -> bool:
        """Point an alias elsewhere if it still is as it was read (None: not there); False if not."""
        ...

    def collect(self, reachable: Callable[[bytes], set[str]], *, dry_run: bool) -> Removed:
        """Remove blobs that no release reaches; `reachable` tells the digests of a release's manifest."""
        ...


@dataclass(frozen=True)
class Object:
    """A small object, and the token that a swap of it must show."""

    data: bytes
    token: str


@dataclass(frozen=True)
class Listing:
    """An object as it is listed; `modified` is seconds by the store's own clock."""

    key: str
    size: int
    modified: float


class Bucket(Protocol):
    """Objects by key: what a folder and an S3 bucket have in common."""

    where: str

    def check(self) -> None:
        """Find out, once, whether create-only writes and swaps are honoured.

        Raises:
            HostError: they are not, or nothing can be written.

        """
        ...

    def size(self, key: str) -> int | None:
        """Size of an object, or None."""
        ...

    def upload(self, key: str, source: Path, sha256: str, parts: int) -> None:
        """Store a file whole, or not at all, up to so many parts at a time; bytes of another digest are refused."""
        ...

    def read(self, key: str, offset: int, buffer: memoryview) -> int:
        """Fill the buffer from `offset` on; the bytes that came. FileNotFoundError if there is no such object."""
        ...

    def get(self, key: str) -> Object | None:
        """A small object, or None."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object that must not be there yet; of several writers one gets True."""
        ...

    def swap(self, key: str, data: bytes, token: str | None) -> bool:
        """Replace a small object if its token is still this one (None: it does not exist); False if not."""
        ...

    def list(self, prefix: str) -> Iterator[Listing]:
        """Objects below `prefix/`."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        ...


def in_parallel(threads: int, work: Callable[[Item], object], items: Iterable[Item]) -> None:
    """Do work on several items at a time; the first failure stops what has not begun, and is raised."""
    with ThreadPoolExecutor(threads, "send") as pool:
        running = [pool.submit(work, item) for item in items]
        done, left = wait(running, return_when=FIRST_EXCEPTION)
        for future in left:
            future.cancel()
    for future in done:
        future.result()


def open_store(url: str) -> Store:
    """The store behind a registry's URL. Touches nothing.

    Raises:
        HostError: a kind that this version does not have, or whose client is not installed.

    """
    store: Store = _opener(url)
    return store


def open_bucket(url: str) -> Bucket:
    """The bucket behind a URL, for what is not a registry: the shared cache of compiled graphs.

    Raises:
        HostError: as `open_store`, and for a Hub, which has repositories instead.

    """
    bucket: Bucket | None = getattr(_opener(url), "bucket", None)
    if bucket is None:
        raise HostError("a Hub cannot hold a cache", where=url, fix="name a folder or s3://bucket/prefix")
    return bucket


def scheme_of(url: str) -> tuple[str, str]:
    """Kind of a registry, and the rest of its address.

    Raises:
        HostError: a kind that this version does not have.

    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "file", url
    if scheme not in STORES:
        what = f"registries of kind {scheme}:// are not supported by this version"
        accepted = ", ".join(f"{known}://..." for known in sorted(STORES))
        raise HostError(what, where=url, fix=f"accepted: a folder, {accepted}")
    return scheme, rest


def _opener(url: str) -> Store:
    scheme, rest = scheme_of(url)
    module, _, attribute = STORES[scheme].partition(":")
    try:
        return getattr(import_module(module), attribute)(rest)
    except ModuleNotFoundError as error:
        extra = {"s3": "s3", "hf": "hub"}.get(scheme, "")
        fix = f"pip install 'tandem[{extra}]'"
        raise HostError(f"{scheme}:// needs the package {error.name}", where=url, fix=fix) from error
