"""Requests to an OCI registry: tokens, retries, clear failures. Independent of what is asked for.

Source: github.com/opencontainers/distribution-spec (spec.md, version 1.1), and
distribution.github.io/distribution/spec/auth/token for tokens.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError, NewConnectionError

from pipeline.errors import CorruptError, HostError
from pipeline.files.limits import MAX_BYTES
from pipeline.stores.base import Interrupted
from pipeline.stores.oci_login import HUB_HOSTS, Login, login_for
from pipeline.stores.ranges import LEAST_BYTES_PER_S, deadline_s

Result = TypeVar("Result")
TRIES = 6
FIRST_PAUSE_S = 0.2
CONNECT_S, READ_S = 10.0, 60.0
CONNECTIONS = 24
TOKEN_BYTES = 1 << 20
LOCAL = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")
"""Registries that are asked without TLS, as Docker does."""
PLAIN_HTTP = "TANDEM_OCI_PLAIN_HTTP"
"""Variable with more of them: hosts, with their ports, between commas."""
CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
TOO_MANY, SERVER_FAULTS = 429, 500
READ, WRITE = "pull", "pull,push"
"""Actions that a token allows."""


@dataclass(frozen=True)
class Answer:
    """A response: status, headers in lower case, and a small body."""

    status: int
    headers: Mapping[str, str]
    data: bytes


class OciSession:
    """A registry by its host, and the tokens that it gave. Creating it sends no request."""

    def __init__(self, host: str) -> None:
        self.host = host
        server = "registry-1.docker.io" if host in HUB_HOSTS else host
        more = os.environ.get(PLAIN_HTTP, "")
        plain = LOCAL.fullmatch(host) or host in re.split(r"[,\s]+", more)
        self.url = f"{'http' if plain else 'https'}://{server}"
        self.pool = _pool(self.url)
        self._tokens: dict[tuple[str, str], str] = {}
        self._logins: dict[str, Login | None] = {}

    def where(self, repo: str) -> str:
        """Return how messages name a repository."""
        return f"oci://{self.host}/{repo}".rstrip("/")

    def token(self, repo: str) -> str | None:
        """Return the header `Authorization` for reading a repository, once the registry gave a token."""
        return self._tokens.get((repo, READ))

    def request(
        self,
        method: str,
        repo: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | Iterator[bytes] | None = None,
        fine: tuple[int, ...] = (200,),
    ) -> Answer:
        """Send a request, with retries unless its body is streamed; statuses that are not `fine` are errors."""

        def send() -> Answer:
            answer = self._answer(method, repo, path, headers or {}, body)
            if answer.status in fine:
                return answer
            raise self.failure(answer, method, repo)

        return send() if isinstance(body, Iterator) else retried(send)

    def _answer(
        self, method: str, repo: str, path: str, headers: Mapping[str, str], body: bytes | Iterator[bytes] | None
    ) -> Answer:
        url = path if "://" in path else f"{self.url}/v2/{repo}/{path}" if repo else f"{self.url}/v2/{path}"
        scope = READ if method in ("GET", "HEAD") and "/uploads/" not in url else WRITE
        for renewed in (False, True):
            response = self.send_once(method, url, self.authorized(url, repo, scope, headers), body, repo)
            try:
                data = small_body(response, self.where(repo)) if method != "HEAD" else b""
                found = {key.lower(): value for key, value in response.headers.items()}
            finally:
                response.release_conn()
            unauthorised = response.status == 401 and not renewed and not isinstance(body, Iterator)
            if not (unauthorised and self.log_in(found.get("www-authenticate", ""), repo, scope)):
                break
        return Answer(response.status, found, data)

    def send_once(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | Iterator[bytes] | None, repo: str
    ) -> Any:
        """Send one request and return its response, whose body is not read yet.

        Raises:
            Interrupted: no response.

        """
        try:
            return self.pool.request(
                method, url, headers=dict(headers), body=body, redirect=False, retries=False, preload_content=False
            )
        except (HTTPError, OSError) as error:
            raise self.broken(error, repo) from error

    def authorized(self, url: str, repo: str, scope: str, headers: Mapping[str, str]) -> dict[str, str]:
        """Return headers with the token of this registry; another server gets none."""
        token = self._tokens.get((repo, scope)) if url.startswith(f"{self.url}/") else None
        return {**headers, **({"Authorization": token} if token else {})}

    def log_in(self, challenge: str, repo: str, scope: str) -> bool:
        """Get the token that a challenge asks for; returns False if nothing can be tried."""
        kind, _, rest = challenge.partition(" ")
        login = self._login(repo)
        if kind.lower() == "basic":
            if login is None or not login.username:
                return False
            self._tokens[repo, scope] = login.basic
            return True
        named = dict(CHALLENGE.findall(rest))
        realm = named.get("realm", "")
        if kind.lower() != "bearer" or not realm.startswith(("https://", "http://")):
            return False
        if realm.startswith("http://") and self.url.startswith("https://"):
            what = "the registry asks for the password at an address without TLS"
            raise HostError(what, where=self.where(repo), fix="report this to the operator of the registry")
        actions = named.get("scope") or (f"repository:{repo}:{scope}" if repo else "registry:catalog:*")
        self._tokens[repo, scope] = f"Bearer {self._token(realm, named.get('service', ''), actions, login)}"
        return True

    def _token(self, realm: str, service: str, scope: str, login: Login | None) -> str:
        if login is not None and not login.username:
            form = {
                "grant_type": "refresh_token", "refresh_token": login.secret, "service": service, "scope": scope,
                "client_id": "tandem",
            }  # fmt: skip
            response = self.send_once(
                "POST", realm, {"Content-Type": "application/x-www-form-urlencoded"}, urlencode(form).encode(), ""
            )  # fmt: skip
        else:
            query = urlencode({"service": service, "scope": scope})
            headers = {"Authorization": login.basic} if login else {}
            response = self.send_once("GET", f"{realm}{'&' if '?' in realm else '?'}{query}", headers, None, "")
        data = small_body(response, self.where(""), TOKEN_BYTES)
        response.release_conn()
        if response.status != 200:
            raise self.failure(Answer(response.status, {}, data), "GET", "")
        found = json_of(data)
        token = found.get("token") or found.get("access_token")
        if not isinstance(token, str):
            raise HostError("the registry's token server gave no token", where=self.where(""), fix="try again")
        return token

    def _login(self, repo: str) -> Login | None:
        if repo not in self._logins:
            self._logins[repo] = login_for(self.host, repo)
        return self._logins[repo]

    def broken(self, error: Exception, repo: str) -> Interrupted:
        """Return the error for a connection that failed."""
        where = self.where(repo)
        if isinstance(error, NewConnectionError):
            return Interrupted("the registry is unreachable", where=where, fix="check the network and the host's name")
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            fix = "set SSL_CERT_FILE to the certificate of its authority"
            return Interrupted("the registry's certificate is not trusted", where=where, fix=fix)
        if "WRONG_VERSION_NUMBER" in str(error) or "record layer failure" in str(error):
            fix = f"for a registry without TLS set {PLAIN_HTTP}={self.host}"
            return Interrupted("the registry does not speak TLS", where=where, fix=fix)
        what = "the connection to the registry broke, or it did not answer in time"
        return Interrupted(what, where=where, fix="try again: completed transfers are kept")

    def failure(self, answer: Answer, method: str, repo: str) -> HostError:
        """Return the error for a status. No part of the request is shown: it might hold credentials."""
        where, code = self.where(repo), _code(answer.data)
        said = f"HTTP status {answer.status}{f' ({code})' if code else ''}"
        if answer.status == TOO_MANY or answer.status >= SERVER_FAULTS:
            return Interrupted(said, where=where, fix="try again: completed transfers are kept")
        if answer.status in (401, 403):
            verb = "read" if method in ("GET", "HEAD") else "write"
            what = f"access denied: these credentials do not allow to {verb} this repository"
            if self._login(repo) is None:
                what = f"access denied, and no credentials for {self.host} were found"
            return HostError(what, where=where, fix=f"run `docker login {self.host}` with an account that may {verb}")
        if answer.status == 404 and method != "GET":
            return HostError("no such repository", where=where, fix="create it there: this registry does not by itself")
        return HostError(said, where=where, fix="see the documentation or log of that registry")


def _pool(url: str) -> urllib3.PoolManager:
    parts = urlsplit(url)
    timeout = urllib3.Timeout(connect=CONNECT_S, read=READ_S)
    proxy = getproxies().get(parts.scheme)
    if proxy and not proxy_bypass(parts.hostname or ""):
        return urllib3.ProxyManager(proxy, maxsize=CONNECTIONS, timeout=timeout)
    return urllib3.PoolManager(maxsize=CONNECTIONS, timeout=timeout)


def retried(call: Callable[[], Result]) -> Result:
    """Call again, with growing pauses, after failures that may pass; raise the last one."""
    for attempt in range(TRIES):
        try:
            return call()
        except Interrupted:
            if attempt == TRIES - 1:
                raise
        time.sleep(FIRST_PAUSE_S * 2**attempt)
    raise AssertionError


def small_body(response: Any, where: str, limit: int = MAX_BYTES) -> bytes:
    """Return a small body, within the time that a slow server may take for it.

    Raises:
        CorruptError: a larger one. Interrupted: the connection broke, or the server is too slow.

    """
    data = bytearray()
    for piece in pieces_of(response, time.monotonic() + deadline_s(0), where):
        data += piece
        if len(data) > limit:
            response.close()
            what = f"the registry's answer has over {limit:,} bytes"
            raise CorruptError(what, where=where, fix="use another version")
    return bytes(data)


def pieces_of(response: Any, ends: float, where: str) -> Iterator[bytes]:
    """Yield a body as it arrives, until a moment of the monotonic clock; each moment allows the bytes that came.

    Raises:
        Interrupted: the connection broke, or the server is too slow.

    """
    try:
        while piece := response.read1(1 << 20, decode_content=False):
            ends += len(piece) / LEAST_BYTES_PER_S
            if time.monotonic() > ends:
                response.close()
                raise Interrupted("the registry sends too slowly", where=where, fix="try again")
            yield piece
    except (HTTPError, OSError) as error:
        what = "the connection to the registry broke, or it did not answer in time"
        raise Interrupted(what, where=where, fix="try again: completed transfers are kept") from error


def json_of(data: bytes) -> Mapping[str, Any]:
    """Return an answer's JSON object; an empty one for anything else."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _code(data: bytes) -> str:
    """Return the first error code of an answer: a word that the specification defines, never free text."""
    errors = json_of(data).get("errors")
    first = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else {}
    code = str(first.get("code", ""))
    return code if re.fullmatch(r"[A-Z_]{1,40}", code) else ""
