"""Requests of a registry to a Hugging Face Hub: trees, references, ranges of files; with retries and clear failures.

Independent of releases. Repositories are named `org/name`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx2 as httpx
from huggingface_hub import HfApi, errors
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, get_session, hf_raise_for_status

from pipeline.addresses import hub_endpoint
from pipeline.errors import HostError, InputError
from pipeline.stores.base import SMALL_BYTES, Interrupted
from pipeline.stores.ranges import Ranges, deadline_s

TRIES = 6
TIMEOUT_S = 60.0
OF_THE_BODY = ("content-encoding", "content-length", "transfer-encoding")
"""Headers that are not those of the bytes that were read."""
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, RecursionError, httpx.HTTPError, httpx.InvalidURL)
"""Errors of the client over an answer that is not one of a Hub."""

HOW_TO_WRITE = "set HF_TOKEN to a token that may write there"
Result = TypeVar("Result")


class Hub:
    """A Hub and an account on it, by default those of HF_ENDPOINT and HF_TOKEN. Creating it sends no request."""

    def __init__(self, endpoint: str | None = None, token: str | None = None) -> None:
        disable_progress_bars()
        self.api = HfApi(endpoint=endpoint or hub_endpoint(), token=token or os.environ.get("HF_TOKEN") or None)
        self.ranges = Ranges()
        self._located: dict[str, str] = {}

    def tree(self, repo: str, revision: str) -> dict[str, RepoFile]:
        """Return the files at a revision by path; an empty dict if there is no such repository or revision."""
        with self.explained(repo):
            try:
                entries = self.retried(lambda: list(self.api.list_repo_tree(repo, recursive=True, revision=revision)))
            except (errors.RevisionNotFoundError, errors.RepositoryNotFoundError) as error:
                if isinstance(error, errors.GatedRepoError) or _refused(error):
                    raise
                return {}
            return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def refs(self, repo: str) -> tuple[dict[str, str], dict[str, str]]:
        """Return the branches and tags, with their commits."""
        refs = self.retried(lambda: self.api.list_repo_refs(repo))
        branches, tags = ({ref.name: ref.target_commit for ref in kind} for kind in (refs.branches, refs.tags))
        return branches, tags

    def refs_or_none(self, repo: str) -> tuple[dict[str, str], dict[str, str]]:
        """Return `refs`; two empty dicts if there is no such repository."""
        with self.explained(repo):
            try:
                return self.refs(repo)
            except errors.RepositoryNotFoundError as error:
                if isinstance(error, errors.GatedRepoError) or _refused(error):
                    raise
                return {}, {}

    def read(self, repo: str, commit: str, path: str, offset: int, buffer: memoryview) -> int | None:
        """Fill the buffer from a file at a commit; returns the number of bytes, or None if there is no such file.

        Large files are stored at another origin, under a URL that expires.
        """
        url, part, response = self._url(repo, commit, path), (offset, len(buffer)), None
        with self.explained(repo):
            location = self._located.get(url)
            if location is None:
                response = self._request(url, part, follow=False)
                location = _other_origin(response, url)
            if location is not None:
                self._located[url] = location
                if (count := self.ranges.read(location, offset, buffer)) is not None:
                    return count
                self._located.pop(url, None)  # it may have expired
            if response is None or response.is_redirect:
                response = self._request(url, part, follow=True)
            piece = _content(response)
        if piece is None:
            return None
        buffer[: len(piece)] = piece
        return len(piece)

    def read_small(self, repo: str, commit: str, path: str) -> bytes | None:
        """Return a small file at a commit, or None if there is no such file."""
        for attempt in range(TRIES):
            try:
                with self.explained(repo):
                    part = (0, SMALL_BYTES)
                    return _content(self._request(self._url(repo, commit, path), part, follow=True))
            except Interrupted:
                if attempt == TRIES - 1:
                    raise
                time.sleep(0.2 * 2**attempt)
        return None

    def retried(self, call: Callable[[], Result]) -> Result:
        """Retry transient failures: the Hub's 5xx and 429, and broken connections."""
        for attempt in range(TRIES):
            try:
                return call()
            except (errors.HfHubHTTPError, httpx.TransportError) as error:
                status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 503
                if attempt == TRIES - 1 or (status < 500 and status != 429):
                    raise
                time.sleep(0.2 * 2**attempt)
        raise AssertionError

    @contextmanager
    def explained(self, repo: str) -> Iterator[None]:
        """Translate failures of the Hub into a `TandemError` with a fix."""
        where = f"hf://{repo}"
        try:
            yield
        except errors.GatedRepoError as error:
            fix = "accept the terms on the repository's page, then set HF_TOKEN"
            raise InputError("access to this repository is restricted", where=where, fix=fix) from error
        except errors.LocalTokenNotFoundError as error:
            raise HostError("the Hub needs a token", where=where, fix=HOW_TO_WRITE) from error
        except errors.HfHubHTTPError as error:
            raise _failure(error, where) from error
        except (httpx.TransportError, httpx.DecodingError, ConnectionError) as error:
            what = "the Hub is unreachable or closed the connection"
            raise Interrupted(what, where=where, fix="try again") from error
        except MALFORMED as error:
            what = "the Hub's answer is not one of a Hub"
            raise HostError(what, where=where, fix="check HF_ENDPOINT, and proxies on the way to it") from error

    def _url(self, repo: str, commit: str, path: str) -> str:
        return f"{self.api.endpoint}/{repo}/resolve/{quote(commit, safe='')}/{quote(path)}"

    def _request(self, url: str, part: tuple[int, int], *, follow: bool) -> httpx.Response:
        """Send a request and read the wanted bytes; the client drops the token at a redirect to another origin."""
        headers = build_hf_headers(token=self.api.token)
        headers |= {"Range": f"bytes={part[0]}-{sum(part) - 1}", "Accept-Encoding": "identity"}
        with get_session().stream(
            "GET", url, headers=headers, follow_redirects=follow, timeout=TIMEOUT_S
        ) as response:  # fmt: skip
            data = b"" if response.is_redirect else _bounded(response, part)
            kept = {name: value for name, value in response.headers.items() if name.lower() not in OF_THE_BODY}
            return httpx.Response(response.status_code, headers=kept, content=data, request=response.request)


def _bounded(response: httpx.Response, part: tuple[int, int]) -> bytes:
    """Return the wanted bytes of a response; no more are read, and no slower than a server may send them."""
    skip, data, started = part[0] if response.status_code == 200 else 0, bytearray(), time.monotonic()
    seen = 0
    for piece in response.iter_bytes():
        data += piece[skip:]
        skip, seen = max(0, skip - len(piece)), seen + len(piece)
        if len(data) >= part[1]:
            break
        if time.monotonic() - started > deadline_s(seen):
            raise httpx.ReadTimeout("the server is too slow", request=response.request)
    return bytes(data[: part[1]])


def _other_origin(response: Any, url: str) -> str | None:
    """Return the target of a redirect to another origin, which must not see the token, or None."""
    location: str = response.headers.get("Location", "") if response.is_redirect else ""
    return location if urlsplit(location).netloc not in ("", urlsplit(url).netloc) else None


def _content(response: httpx.Response) -> bytes | None:
    if response.status_code == 404 and response.headers.get("X-Error-Code") in ("EntryNotFound", None):
        return None
    hf_raise_for_status(response)
    return response.content


def _failure(error: errors.HfHubHTTPError, where: str) -> HostError | InputError:
    status = error.response.status_code if error.response is not None else 0
    if _refused(error):
        return HostError("the Hub rejects this token", where=where, fix=HOW_TO_WRITE)
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            "no such repository, or no access to it", where=where, fix=f"check the name, or {HOW_TO_WRITE}"
        )
    if status in (401, 403):
        what = "the Hub needs a token" if status == 401 else "this token lacks the permission"
        return HostError(what, where=where, fix=HOW_TO_WRITE)
    if status >= 500 or status == 429:
        return Interrupted(
            f"HTTP status {status} from the Hub", where=where, fix="try again: completed transfers are kept"
        )
    message = (error.server_message or str(error)).splitlines()[0]
    return HostError(f"HTTP status {status} from the Hub: {message}", where=where, fix="see the Hub's message")


def _refused(error: errors.HfHubHTTPError) -> bool:
    """Return whether the Hub rejects the token itself, which it also does for public repositories."""
    return "Invalid credentials" in error.response.headers.get("X-Error-Message", "")
