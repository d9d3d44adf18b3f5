"""An OCI registry: manifests by tag or digest, blobs sent and read by ranges. Independent of releases.

Source: github.com/opencontainers/distribution-spec (spec.md, version 1.1).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlencode, urljoin

from pipeline.errors import CorruptError, HostError
from pipeline.stores.base import Interrupted, UnlistedError
from pipeline.stores.oci_layout import INDEX_TYPE, MANIFEST_TYPE, Document, digest_of
from pipeline.stores.oci_session import READ, Answer, OciSession, json_of, pieces_of, retried, small_body
from pipeline.stores.ranges import Ranges, deadline_s

PAGE = re.compile(r'<([^>]+)>\s*;\s*rel="?next"?')
MOST_PAGES = 1000
"""Of a list of tags or repositories, of up to 1000 entries each."""

NO_END = "a page names an earlier one as the next: see the registry's log"
BYTES = "application/octet-stream"
CHANGES_REFUSED = (400, 409, 412)
"""Statuses of registries whose tags cannot change: of AWS, Google and Harbor."""
REDIRECTS = (301, 302, 303, 307, 308)

Pieces = Callable[[], Iterator[bytes]]
"""Returns a blob's bytes, from their start each time."""


class ImmutableTagError(HostError):
    """The registry does not let a tag change."""


class OciRegistry:
    """A registry by its host. Creating it sends no request."""

    def __init__(self, host: str) -> None:
        self.session = OciSession(host)
        self.ranges = Ranges()
        self._located: dict[str, str] = {}
        self._direct: set[str] = set()

    def manifest(self, repo: str, reference: str) -> Document | None:
        """Return a manifest or an index by its tag or digest, or None.

        Raises:
            CorruptError: larger than a manifest, or of another digest than was asked for.

        """
        accept = {"Accept": f"{MANIFEST_TYPE}, {INDEX_TYPE}"}
        answer = self.session.request("GET", repo, f"manifests/{reference}", headers=accept, fine=(200, 404))
        if answer.status == 404:
            return None
        if reference.startswith("sha256:") and digest_of(answer.data) != reference:
            what = f"sha256 mismatch: expected {reference}, found {digest_of(answer.data)}"
            raise CorruptError(what, where=self.session.where(repo), fix="use another version")
        return Document(answer.headers.get("content-type", "").partition(";")[0], answer.data)

    def put_manifest(self, repo: str, reference: str, document: Document) -> bool:
        """Store a manifest under a tag or its digest; returns whether the registry lists it as a referrer.

        Raises:
            ImmutableTagError: the registry does not let the tag change.

        """
        headers, path = {"Content-Type": document.media_type}, f"manifests/{reference}"
        fine = (201, *CHANGES_REFUSED)
        answer = self.session.request("PUT", repo, path, headers=headers, body=document.data, fine=fine)
        if answer.status == 201:
            return "oci-subject" in answer.headers
        if b"immutable" in answer.data.lower():
            fix = "allow changes of this tag in the registry's settings, or use another tag"
            raise ImmutableTagError(f"tag {reference} cannot change", where=self.session.where(repo), fix=fix)
        raise self.session.failure(answer, "PUT", repo)

    def referrers(self, repo: str, digest: str) -> bytes | None:
        """Return the index of the manifests that refer to another; None if the registry has no such route."""
        answer = self.session.request("GET", repo, f"referrers/{digest}", fine=(200, 404, 405))
        return answer.data if answer.status == 200 else None

    def tags(self, repo: str) -> list[str]:
        """Return all tags of a repository; none if it does not exist."""
        return list(self._listed(repo, "tags/list?n=1000", "tags"))

    def repositories(self) -> list[str]:
        """Return the repositories of the registry.

        Raises:
            UnlistedError: it does not list them, as most public registries.

        """
        try:
            return list(self._listed("", "_catalog?n=1000", "repositories"))
        except Interrupted:
            raise
        except HostError as error:
            where = self.session.where("")
            raise UnlistedError("this registry does not list its names", where=where, fix="add a name") from error

    def has_blob(self, repo: str, digest: str) -> int | None:
        """Return the size of a blob, or None."""
        answer = self.session.request("HEAD", repo, f"blobs/{digest}", fine=(200, 404, 307, 302))
        if answer.status == 404:
            return None
        size = answer.headers.get("content-length", "")
        return int(size) if answer.status == 200 and size.isdecimal() else -1

    def put_blob(self, repo: str, digest: str, size: int, pieces: Pieces) -> None:
        """Send a blob in one request, whose digest the registry compares before it stores the blob.

        A broken request is sent again from its start: Docker's registry ends an upload that was resumed at an offset
        that its last answer did not name (`upload resumed at wrong offset`).
        """
        headers = {"Content-Type": BYTES, "Content-Length": str(size)}

        def send() -> None:
            place = _with_digest(self._new_upload(repo), digest)
            try:
                body = pieces() if size else b""
                self.session.request("PUT", repo, place, headers=headers, body=body, fine=(201,))
            except Interrupted:
                if self.has_blob(repo, digest) is None:  # else only the answer was lost
                    raise

        retried(send)

    def read_small(self, repo: str, digest: str, size: int) -> bytes:
        """Return a small blob, fewer bytes if it is shorter or absent; its digest is not checked."""
        buffer = memoryview(bytearray(size))
        count = retried(lambda: self.read_blob(repo, digest, 0, buffer)) if size else 0
        return bytes(buffer[: count or 0])

    def read_blob(self, repo: str, digest: str, offset: int, buffer: memoryview) -> int | None:
        """Fill the buffer from a blob; returns the number of bytes, or None if there is no such blob.

        Many registries send the reader to another server, under a URL that expires.
        """
        url = f"{self.session.url}/v2/{repo}/blobs/{digest}"
        place, header = self._located.get(url), ""
        if place is None and repo in self._direct:
            place, header = url, self.session.token(repo) or ""
        if place is not None:
            count = self.ranges.read(place, offset, buffer, authorization=header)
            if count is not None:
                return count
            self._located.pop(url, None)  # it may have expired
        return self._read_explained(repo, digest, offset, buffer)

    def _new_upload(self, repo: str) -> str:
        answer = self.session.request("POST", repo, "blobs/uploads/", body=b"", fine=(202,))
        if not (location := answer.headers.get("location")):
            what = "the registry named no place for an upload"
            raise HostError(what, where=self.session.where(repo), fix="try again")
        return self._at(f"{self.session.url}/v2/", location, repo)

    def _at(self, base: str, place: str, repo: str) -> str:
        """Return the address that an answer names, which may be relative.

        Raises:
            CorruptError: no address.

        """
        try:
            return urljoin(base, place)
        except ValueError as error:
            what = f"the registry named a malformed address: {place[:100]!r}"
            raise CorruptError(what, where=self.session.where(repo), fix="see the registry's log") from error

    def _read_explained(self, repo: str, digest: str, offset: int, buffer: memoryview) -> int | None:
        url = f"{self.session.url}/v2/{repo}/blobs/{digest}"
        headers = {"Range": f"bytes={offset}-{offset + len(buffer) - 1}"}
        response = self._range(url, repo, headers)
        if response.status == 401 and self.session.log_in(response.headers.get("www-authenticate", ""), repo, READ):
            response.close()
            response = self._range(url, repo, headers)
        if response.status in REDIRECTS:
            response.close()
            place = self._at(url, response.headers.get("location", ""), repo)
            self._located[url] = place
            response = self._range(place, repo, headers)
        if response.status == 404:
            response.close()
            return None
        if response.status not in (200, 206):
            raise self.session.failure(
                Answer(response.status, {}, small_body(response, self.session.where(repo))), "GET", repo
            )
        if response.status == 206 and url not in self._located:
            self._direct.add(repo)
        return self._fill(response, offset if response.status == 200 else 0, buffer, repo)

    def _range(self, url: str, repo: str, headers: Mapping[str, str]) -> Any:
        return self.session.send_once("GET", url, self.session.authorized(url, repo, READ, headers), None, repo)

    def _fill(self, response: Any, skip: int, buffer: memoryview, repo: str) -> int:
        """Read a response into the buffer, behind bytes that were not asked for; slower servers end."""
        done = 0
        try:
            for piece in pieces_of(response, time.monotonic() + deadline_s(0), self.session.where(repo)):
                wanted = piece[min(skip, len(piece)) :][: len(buffer) - done]
                skip = max(0, skip - len(piece))
                buffer[done : done + len(wanted)] = wanted
                done += len(wanted)
                if done == len(buffer):
                    break
        finally:
            response.close()
        return done

    def _listed(self, repo: str, path: str, key: str) -> Iterator[str]:
        page, seen = path, {path}
        for _ in range(MOST_PAGES):
            answer = self.session.request("GET", repo, page, fine=(200, 404) if repo else (200,))
            if answer.status == 404:
                return
            listed = json_of(answer.data).get(key)
            yield from map(str, listed if isinstance(listed, list) else [])
            following = PAGE.search(answer.headers.get("link", ""))
            if following is None:
                return
            page = self._at(f"{self.session.url}/v2/", following[1], repo)
            if page in seen:
                raise CorruptError("the registry's list has no end", where=self.session.where(repo), fix=NO_END)
            seen.add(page)
        raise CorruptError(f"the registry's list has over {MOST_PAGES} pages", where=self.session.where(repo))


def _with_digest(place: str, digest: str) -> str:
    return f"{place}{'&' if '?' in place else '?'}{urlencode({'digest': digest})}"
