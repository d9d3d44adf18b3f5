"""A Hugging Face Hub as registries ask it: trees, references, ranges of files; tried again, and its failures explained.

Knows nothing of releases. Repositories are named `org/name`.
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

from pipeline.errors import HostError, InputError
from pipeline.stores.base import SMALL_BYTES, Interrupted
from pipeline.stores.ranges import Ranges

TRIES = 6
TIMEOUT_S = 60.0
HOW_TO_WRITE = "set HF_TOKEN to a token that may write there"
Result = TypeVar("Result")


class Hub:
    """The Hub that HF_ENDPOINT names, with the token of HF_TOKEN. Asks nobody until it is used."""

    def __init__(self) -> None:
        disable_progress_bars()
        self.api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=os.environ.get("HF_TOKEN") or None)
        self.ranges = Ranges()
        self._located: dict[str, str] = {}

    def tree(self, repo: str, revision: str) -> dict[str, RepoFile]:
        """Files at a revision by path; none if there is no such repository or revision."""
        with self.explained(repo):
            try:
                found = self.retried(lambda: list(self.api.list_repo_tree(repo, recursive=True, revision=revision)))
            except (errors.RevisionNotFoundError, errors.RepositoryNotFoundError) as error:
                if isinstance(error, errors.GatedRepoError) or _refused(error):
                    raise
                return {}
        return {one.path: one for one in found if isinstance(one, RepoFile)}

    def refs(self, repo: str) -> tuple[dict[str, str], dict[str, str]]:
        """Branches and tags, with their commits."""
        refs = self.retried(lambda: self.api.list_repo_refs(repo))
        branches, tags = ({one.name: one.target_commit for one in kind} for kind in (refs.branches, refs.tags))
        return branches, tags

    def refs_or_none(self, repo: str) -> tuple[dict[str, str], dict[str, str]]:
        """As `refs`; nothing if there is no such repository."""
        with self.explained(repo):
            try:
                return self.refs(repo)
            except errors.RepositoryNotFoundError as error:
                if isinstance(error, errors.GatedRepoError) or _refused(error):
                    raise
                return {}, {}

    def read(self, repo: str, commit: str, path: str, offset: int, buffer: memoryview) -> int | None:
        """Fill the buffer from a file at a commit; the bytes that came, or None if there is no such file.

        Large files lie elsewhere, under a URL that expires.
        """
        url, part, answer = self._url(repo, commit, path), (offset, len(buffer)), None
        with self.explained(repo):
            place = self._located.get(url)
            if place is None:
                answer = self._ask(url, part, follow=False)
                place = _elsewhere(answer, url)
            if place is not None:
                self._located[url] = place
                if (found := self.ranges.read(place, offset, buffer)) is not None:
                    return found
                self._located.pop(url, None)  # it may have expired
            if answer is None or answer.is_redirect:
                answer = self._ask(url, part, follow=True)
            piece = _content(answer, part)
        if piece is None:
            return None
        buffer[: len(piece)] = piece
        return len(piece)

    def read_small(self, repo: str, commit: str, path: str) -> bytes | None:
        """A small file at a commit, or None if there is none."""
        for attempt in range(TRIES):
            try:
                with self.explained(repo):
                    part = (0, SMALL_BYTES)
                    return _content(self._ask(self._url(repo, commit, path), part, follow=True), part)
            except Interrupted:
                if attempt == TRIES - 1:
                    raise
                time.sleep(0.2 * 2**attempt)
        return None

    def retried(self, call: Callable[[], Result]) -> Result:
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

    @contextmanager
    def explained(self, repo: str) -> Iterator[None]:
        """Say what a failure of the Hub means for the user."""
        where = f"hf://{repo}"
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

    def _url(self, repo: str, commit: str, path: str) -> str:
        return f"{self.api.endpoint}/{repo}/resolve/{quote(commit, safe='')}/{quote(path)}"

    def _ask(self, url: str, part: tuple[int, int], *, follow: bool) -> Any:
        """The client sends the token to the Hub alone: it drops it when a redirect leads elsewhere."""
        headers = build_hf_headers(token=self.api.token)
        headers |= {"Range": f"bytes={part[0]}-{sum(part) - 1}", "Accept-Encoding": "identity"}
        return get_session().get(url, headers=headers, follow_redirects=follow, timeout=TIMEOUT_S)


def _elsewhere(answer: Any, url: str) -> str | None:
    """Where an answer sends to, if that is another origin, which must not see the token."""
    place: str = answer.headers.get("Location", "") if answer.is_redirect else ""
    return place if urlsplit(place).netloc not in ("", urlsplit(url).netloc) else None


def _content(answer: Any, part: tuple[int, int]) -> bytes | None:
    if answer.status_code == 404 and answer.headers.get("X-Error-Code") in ("EntryNotFound", None):
        return None
    hf_raise_for_status(answer)
    data: bytes = answer.content
    return data[part[0] : sum(part)] if answer.status_code == 200 else data


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
