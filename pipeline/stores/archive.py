"""A release in one file, for hosts without a network: a tar whose names are the keys of a registry (see `objects`).

    blobs/sha256/<2 hex>/<sha256>    releases/<name>/<version>/manifest.json    yanks/<name>/<version>    SHA256SUMS
    signatures/<sha256 of a manifest>/<sha256>    promotions/<sha256 of a manifest>/<sha256>

`tar -x` makes a registry in a folder of it, and `sha256sum -c SHA256SUMS` checks the files. A file that is being
written has the suffix `.partial`; its whole blobs are kept when the next process continues. Of a tar that anybody may
have written only plain files with these names are read, at their places in the file: nothing is extracted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import tarfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from pipeline.errors import CorruptError, HostError, InputError
from pipeline.files.atomic import disk_errors
from pipeline.files.durable import make_folder, sync
from pipeline.progress import ByteProgress, no_byte_progress
from pipeline.stores.base import SMALL_BYTES, Listing, Object
from pipeline.stores.objects import ObjectStore, check_small, checked_pieces
from pipeline.stores.sources import Source

BLOCK = 512
CHUNK_BYTES = 1 << 20
OCTAL_BYTES = 1 << 33
"""Sizes from here on do not fit the octal digits of a header, and are written in base 256, as GNU tar does."""
MEMBERS = 200_000
"""Limit for the members of an archive, whose table is held in memory."""
SUMS, SUMS_BYTES = "SHA256SUMS", 64 << 20
WORD = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}"
HEX = r"[0-9a-f]{64}"
KEY = re.compile(
    rf"blobs/sha256/[0-9a-f]{{2}}/{HEX}|(signatures|promotions)/{HEX}/{HEX}"
    rf"|releases/{WORD}/{WORD}/manifest\.json|yanks/{WORD}/{WORD}|{SUMS}"
)
LINE = re.compile(rf"({HEX})  (\S+)")
AGAIN = "copy the file again, or write it again with `tandem save`"


@dataclass(frozen=True)
class Member:
    """The place and size of a file in an archive."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        """Offset of the next header."""
        return self.offset + self.size + -self.size % BLOCK


@dataclass
class ArchiveBucket:
    """See `Bucket`. `sums` are the digests of the members, `sizes` those of the blobs that may be written."""

    path: Path
    handle: int
    sizes: Mapping[str, int] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)
    end: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    where: str = field(init=False)

    def __post_init__(self) -> None:
        """Name the archive in errors."""
        self.where = str(self.path)

    def check(self) -> None:
        """Do nothing: one process writes the file."""

    def size(self, key: str) -> int | None:
        """Return the size of a member, or None."""
        member = self.members.get(key)
        return member.size if member else None

    def upload(self, key: str, source: Source, sha256: str, parts: int) -> None:  # noqa: ARG002 - one file, in order
        """Append a blob, with its digest checked."""
        with self.lock:
            self._append(key, self.sizes[key], sha256, checked_pieces(source, sha256, CHUNK_BYTES))

    def read(self, key: str, offset: int, buffer: memoryview, token: str | None = None) -> int:  # noqa: ARG002 - no ETags
        """Read a part of a member, at most to its end."""
        member = self.members.get(key)
        if member is None:
            raise FileNotFoundError(key)
        wanted, done = buffer[: max(0, member.size - offset)], 0
        while done < len(wanted):
            count = os.preadv(self.handle, [wanted[done:]], member.offset + offset + done)
            if not count:
                break
            done += count
        return done

    def get(self, key: str, limit: int = SMALL_BYTES) -> Object | None:
        """Return a small member, whose digest is compared with that in the list of digests.

        Raises:
            CorruptError: another digest, or too large.

        """
        member = self.members.get(key)
        if member is None:
            return None
        check_small(member.size, limit, f"{self.path}: {key}")
        data = bytearray(member.size)
        del data[self.read(key, 0, memoryview(data)) :]
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != self.sums.get(key, sha256):
            what = f"{key}: sha256 mismatch: expected {self.sums[key]}, found {sha256}"
            raise CorruptError(what, where=self.where, fix=AGAIN)
        return Object(bytes(data), sha256)

    def create(self, key: str, data: bytes) -> bool:
        """Append a small member."""
        with self.lock:
            if key in self.members:
                return False
            self._append(key, len(data), hashlib.sha256(data).hexdigest(), iter([data]))
        return True

    def list(self, prefix: str) -> Iterator[Listing]:
        """Yield the members below a prefix."""
        for key, member in self.members.items():
            if not prefix or key.startswith(f"{prefix}/"):
                yield Listing(key, member.size, 0.0)

    def swap(self, key: str, data: bytes, token: str | None) -> bool:  # noqa: ARG002 - as `Bucket`
        """Reject: an archive has no aliases."""
        self._reject(key)

    def delete(self, key: str) -> None:
        """Reject: nothing is removed from an archive."""
        self._reject(key)

    def _reject(self, key: str) -> NoReturn:
        fix = "load the archive into a registry first: tandem load FILE REGISTRY"
        raise InputError(f"an archive never changes: {key}", where=self.where, fix=fix)

    def _append(self, key: str, size: int, sha256: str, pieces: Iterator[bytes]) -> None:
        """Write a header and bytes. What a failure leaves behind the last member is overwritten, or cut off."""
        member = Member(self.end + BLOCK, size)
        self._write(self.end, header(key, size, self.where))
        offset = member.offset
        for piece in pieces:
            offset = self._write(offset, piece)
        if offset - member.offset != size:
            what = f"{key}: expected {size:,} bytes, found {offset - member.offset:,}"
            raise CorruptError(what, where=self.where, fix="publish the release again")
        self._write(offset, bytes(member.end - offset))
        self.members[key], self.sums[key], self.end = member, sha256, member.end

    def _write(self, offset: int, data: bytes) -> int:
        """Write at an offset; return the offset behind the bytes."""
        view = memoryview(data)
        with disk_errors(self.path):
            while view:
                count = os.pwrite(self.handle, view, offset)
                view, offset = view[count:], offset + count
        return offset

    def finish(self) -> None:
        """Write the list of digests and the end of the archive; make all of it durable."""
        self.create(SUMS, "".join(f"{self.sums[key]}  {key}\n" for key in self.members).encode())
        end = self._write(self.end, bytes(2 * BLOCK))
        with disk_errors(self.path):
            os.ftruncate(self.handle, end)
            os.fsync(self.handle)


class ArchiveStore(ObjectStore):
    """See `Store`. One process writes an archive, so a publish needs no lease."""

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Protect nothing: nothing is removed from an archive."""
        yield


@contextlib.contextmanager
def read_archive(path: Path) -> Iterator[ArchiveStore]:
    """Open a complete archive. The table of its members is checked here, their digests as they are read.

    Raises:
        InputError: no such file. CorruptError: truncated or damaged, or a member that `tandem save` does not write.

    """
    if not path.is_file():
        what = "not a file" if path.exists() else "no such file"
        raise InputError(what, where=str(path), fix="name a file that `tandem save` wrote")
    with path.open("rb", buffering=0) as file:
        bucket = ArchiveBucket(path, file.fileno())
        bucket.members.update(_scan(bucket))
        bucket.sums.update(_sums(bucket))
        yield ArchiveStore(bucket)


@contextlib.contextmanager
def write_archive(
    path: Path, blobs: Mapping[str, int], progress: ByteProgress = no_byte_progress
) -> Iterator[ArchiveStore]:
    """Write an archive of blobs with these digests and sizes; it appears at `path` when the block ends.

    Whole blobs in a partial file of an earlier process are kept, after their digests were checked.

    Raises:
        HostError: another process writes the archive, or the disk is full or read-only.

    """
    sizes = {f"blobs/sha256/{sha256[:2]}/{sha256}": size for sha256, size in blobs.items()}
    partial = path.with_name(f"{path.name}.partial")
    with disk_errors(path):
        make_folder(path.parent)
    with _locked(partial) as handle:
        bucket = ArchiveBucket(partial, handle, sizes)
        _keep_whole(bucket, progress)
        yield ArchiveStore(bucket)
        bucket.finish()
        with disk_errors(path):
            partial.replace(path)
            sync(path.parent)


def header(key: str, size: int, where: str) -> bytes:
    """Return the header of a member in POSIX's format, with base 256 for a size that its octal digits cannot hold.

    Raises:
        InputError: the name and version of a release are too long for it.

    """
    info = tarfile.TarInfo(key)
    info.size = size if size < OCTAL_BYTES else 0
    try:
        data = bytearray(info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
    except ValueError as error:
        what = f"{key}: name and version are too long for an archive"
        raise InputError(what, where=where, fix="publish the release under a shorter version") from error
    if size >= OCTAL_BYTES:
        data[124:136] = b"\x80" + size.to_bytes(11, "big")
        data[148:156] = b" " * 8  # the checksum is computed with spaces in its place
        data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[int]:
    """Open a partial file for this process alone. Another process may have given it its final name meanwhile."""
    while True:
        with disk_errors(partial):
            handle = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                what, fix = "another process writes this archive", "wait until it ends, or name another file"
                raise HostError(what, where=str(partial), fix=fix) from error
            except OSError:  # a disk without locks
                pass
            if partial.exists() and os.path.samestat(os.fstat(handle), partial.stat()):
                yield handle
                return
        finally:
            os.close(handle)


def _keep_whole(bucket: ArchiveBucket, progress: ByteProgress) -> None:
    """Keep the members of a partial file up to the first that is cut off, damaged, or no blob that will be written."""
    total = os.fstat(bucket.handle).st_size
    with contextlib.suppress(CorruptError):
        for key, member in _scan(bucket):
            sha256 = key.rpartition("/")[2]
            if bucket.sizes.get(key) != member.size or _digest(bucket.handle, member) != sha256:
                break
            bucket.members[key], bucket.sums[key], bucket.end = member, sha256, member.end
            progress(min(member.end, total), total)
    progress(total, total)
    os.ftruncate(bucket.handle, bucket.end)


def _digest(handle: int, member: Member) -> str:
    digest, offset = hashlib.sha256(), member.offset
    end = member.offset + member.size
    while offset < end and (piece := os.pread(handle, min(CHUNK_BYTES, end - offset), offset)):
        digest.update(piece)
        offset += len(piece)
    return digest.hexdigest()


def _scan(bucket: ArchiveBucket) -> Iterator[tuple[str, Member]]:
    """Yield the members of an archive in their order, up to the mark of its end.

    Raises:
        CorruptError: truncated, a damaged header, a member that is no plain file or has another name, or one twice.

    """
    offset, total, seen = 0, os.fstat(bucket.handle).st_size, set[str]()
    while True:
        block = os.pread(bucket.handle, BLOCK, offset)
        if len(block) == BLOCK and not any(block):
            return
        if len(block) < BLOCK:
            raise _damaged(bucket, offset, "truncated: the end of the archive is missing")
        key, size = _parsed(bucket, block, offset)
        member = Member(offset + BLOCK, size)
        if member.end > total:
            raise _damaged(bucket, offset, f"truncated: {key} needs {size:,} bytes, {total - member.offset:,} are left")
        if key in seen or len(seen) == MEMBERS:
            raise _damaged(bucket, offset, f"{key} is there twice" if key in seen else f"more than {MEMBERS:,} members")
        seen.add(key)
        yield key, member
        offset = member.end


def _parsed(bucket: ArchiveBucket, block: bytes, offset: int) -> tuple[str, int]:
    try:
        info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise _damaged(bucket, offset, "damaged header, or not an archive of `tandem save`") from error
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.size < 0 or not KEY.fullmatch(info.name):
        raise _damaged(bucket, offset, f"unexpected member {info.name[:100]!r}")
    return info.name, info.size


def _damaged(bucket: ArchiveBucket, offset: int, what: str) -> CorruptError:
    return CorruptError(what, where=f"{bucket.path}: byte {offset:,}", fix=AGAIN)


def _sums(bucket: ArchiveBucket) -> dict[str, str]:
    """Return the digests that an archive lists, of all its members.

    Raises:
        CorruptError: the list is missing or damaged, or is of other members.

    """
    listed = bucket.get(SUMS, SUMS_BYTES)
    lines = listed.data.decode("ascii", "replace").splitlines() if listed else []
    found = {match[2]: match[1] for match in map(LINE.fullmatch, lines) if match}
    if listed is None or len(found) != len(lines) or found.keys() != bucket.members.keys() - {SUMS}:
        what = f"{SUMS} is missing, damaged, or does not list the members of the archive"
        raise CorruptError(what, where=bucket.where, fix=AGAIN)
    return found
