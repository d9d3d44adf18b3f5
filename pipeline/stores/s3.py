"""A registry in an S3 bucket, of AWS or of any server that honours conditional writes: `s3://bucket/prefix`.

Settings come from the environment, as other AWS tools read it: AWS_ENDPOINT_URL(_S3), AWS_REGION, AWS_PROFILE and the
credentials' usual chain. Sent bytes carry a sha256 that the server checks; transient failures are retried.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore import exceptions
from obstore.store import S3Store

from pipeline.addresses import endpoint
from pipeline.errors import HostError, InputError
from pipeline.files.home import expanded, has_home
from pipeline.stores.base import SMALL_BYTES, Interrupted, Listing, Object
from pipeline.stores.objects import ObjectStore, check_small, checked_pieces
from pipeline.stores.ranges import Ranges
from pipeline.stores.sources import Source

LOCATION = re.compile(r"(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(/(?P<prefix>[\w.+/=-]*))?")
PART_BYTES = 8 << 20
SIGNED_FOR = timedelta(minutes=15)
RETRIES = 8
RETRY_S = 60.0
TRIES, PAUSE_S = 4, 0.2
"""Attempts where answers break off, and the first pause between them."""

QUICK_S = 5.0
"""The client repeats other failures for longer than this; what it gave up is not repeated again."""

Result = TypeVar("Result")
PROBE = ".tandem-registry"
PROBE_DATA = b"This bucket prefix is a registry of Tandem.\n"
NO_TAG = '"00000000000000000000000000000000"'
OWN_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the role of this machine"
CONDITIONS = "use a server that honours If-None-Match and If-Match, or a folder or a Hub as registry"
EXPLAINED = {
    "NoSuchBucket": ("no such bucket", "create the bucket, or name another one"),
    "ExpiredToken": ("the credentials have expired", "renew them, and run the same command to continue"),
    "TokenRefreshRequired": ("the credentials have expired", "renew them, and run the same command to continue"),
    "RequestTimeTooSkewed": ("this machine's clock differs from the server's", "set the clock (NTP)"),
    "SignatureDoesNotMatch": ("the secret key is wrong", CREDENTIALS),
    "InvalidAccessKeyId": ("the access key is unknown", CREDENTIALS),
    "169.254.": ("no credentials: none are set, and this machine has no role with credentials", CREDENTIALS),
    "credential": ("no usable credentials", CREDENTIALS),
}

NOT_OF_S3 = ("404", "405", "501")
"""Statuses with which S3 sends an error code, and other web servers do not."""
CLOSED = "the server is unreachable, or closed the connection"
UNREACHABLE = {
    "ConnectionRefused": "connection refused: no server listens at this address",
    "dns error": "unknown host: the name of the server has no address",
}
"""Part of the client's text -> the reason."""


def open_s3(location: str) -> ObjectStore:
    """Return the registry at `bucket/prefix`, without any request.

    Raises:
        InputError: malformed bucket or prefix.

    """
    match = LOCATION.fullmatch(location)
    if match is None:
        raise InputError("malformed bucket or prefix", where=f"s3://{location}", fix="write s3://bucket/prefix")
    return ObjectStore(S3Bucket(match["bucket"], (match["prefix"] or "").strip("/")))


class S3Bucket:
    """See `Bucket`. `strip_quotes` is for servers that compare an ETag without its quotes."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.where = f"s3://{bucket}/{prefix}".rstrip("/")
        self.bucket, self.prefix = bucket, f"{prefix}/" if prefix else ""
        self.store, self.ranges = _client(bucket), Ranges()
        self.checked = self.strip_quotes = False

    def check(self) -> None:
        """Send requests that the server must reject: creating an object twice, and swapping it with a wrong token.

        They write equal bytes, so they are sent again if an answer breaks off.

        Raises:
            HostError: the server accepts them, or rejects a swap with the right token.

        """
        if not self.checked:
            repeated(self._check)

    def _check(self) -> None:
        if self.create(PROBE, PROBE_DATA) and self.create(PROBE, PROBE_DATA):
            what = "this server ignores If-None-Match: two processes could publish the same version"
            raise HostError(what, where=self.where, fix=CONDITIONS)
        if self.swap(PROBE, PROBE_DATA, NO_TAG):
            what = "this server ignores If-Match: moves of aliases could be lost"
            raise HostError(what, where=self.where, fix=CONDITIONS)
        if not (self._swaps(strip_quotes=False) or self._swaps(strip_quotes=True)):
            raise HostError("this server rejects a correct If-Match", where=self.where, fix=CONDITIONS)
        self.checked = True

    def size(self, key: str) -> int | None:
        """Return the size of an object, or None."""
        with self._explained("head", key):
            try:
                return int(obstore.head(self.store, self.prefix + key)["size"])
            except FileNotFoundError:
                return None

    def upload(self, key: str, source: Source, sha256: str, parts: int) -> None:
        """Send a small file in one request, a large file in parallel parts. Rejects a file whose digest differs."""
        with self._explained("put", key):
            pieces = checked_pieces(source, sha256, PART_BYTES)
            first = next(pieces, b"")
            second = next(pieces, None)  # None: the digest of a small file was compared
            if second is None:
                obstore.put(self.store, self.prefix + key, first, use_multipart=False)
                return
            whole = itertools.chain((first, second), pieces)
            obstore.put(self.store, self.prefix + key, whole, chunk_size=PART_BYTES, max_concurrency=parts)

    def read(self, key: str, offset: int, buffer: memoryview, token: str | None = None) -> int:
        """Read a part of an object: by a signed URL, or, where that fails, by the client."""
        if not buffer:
            return 0
        with self._explained("get", key):
            if not os.environ.get("AWS_SKIP_SIGNATURE"):
                url = obstore.sign(self.store, "GET", self.prefix + key, SIGNED_FOR)
                if (count := self.ranges.read(url, offset, buffer, token)) is not None:
                    return count
            try:
                piece = self._piece(key, offset, len(buffer), token)
            except obstore.exceptions.PreconditionError as error:
                fix = "run the same command again: it reads the new object from its start"
                raise InputError(
                    "object was replaced while it was read", where=f"{self.where}/{key}", fix=fix
                ) from error
            kept = memoryview(piece)[: len(buffer)]  # a server may send more than the range
            buffer[: len(kept)] = kept
            return len(kept)

    def _piece(self, key: str, offset: int, length: int, token: str | None) -> obstore.Bytes:
        if token is None:
            return obstore.get_range(self.store, self.prefix + key, start=offset, length=length)
        options: obstore.GetOptions = {"range": (offset, offset + length), "if_match": self._etag(token)}
        return obstore.get(self.store, self.prefix + key, options=options).bytes()

    def get(self, key: str, limit: int = SMALL_BYTES) -> Object | None:
        """Return a small object and its ETag."""
        return repeated(lambda: self._get(key, limit))

    def _get(self, key: str, limit: int) -> Object | None:
        with self._explained("get", key):
            try:
                response = obstore.get(self.store, self.prefix + key)
                check_small(response.meta["size"], limit, f"{self.where}/{key}")
                return Object(bytes(response.bytes()), response.meta["e_tag"] or "")
            except FileNotFoundError:
                return None

    def create(self, key: str, data: bytes) -> bool:
        """Write with `If-None-Match: *`. A retried request may meet its own first attempt, which counts as success."""
        return self._conditional(key, data, "create")

    def swap(self, key: str, data: bytes, token: str | None) -> bool:
        """Write with `If-Match`, or with `If-None-Match: *` where the object must not exist."""
        if token is None:
            return self.create(key, data)
        return self._conditional(key, data, {"e_tag": self._etag(token)})

    def _etag(self, token: str) -> str:
        """Return an ETag as this server compares it."""
        return token.strip('"') if self.strip_quotes else token

    def list(self, prefix: str) -> Iterator[Listing]:
        """Yield the objects below a prefix, page by page.

        The client repeats requests, but not those whose answer breaks off: then the list is read again from its start,
        without the objects that were yielded.
        """
        seen: set[str] = set()
        pages = self._pages(prefix)
        for attempt in range(TRIES):
            started = time.monotonic()
            try:
                for listing in pages:
                    if listing.key not in seen:
                        seen.add(listing.key)
                        yield listing
            except Interrupted:
                pause(attempt, started)
                pages = self._pages(prefix)
            else:
                return

    def _pages(self, prefix: str) -> Iterator[Listing]:
        with self._explained("list", prefix):
            for page in obstore.list(self.store, self.prefix + prefix):
                for entry in page:
                    key = entry["path"].removeprefix(self.prefix)
                    yield Listing(key, entry["size"], entry["last_modified"].timestamp(), entry["e_tag"] or "")

    def delete(self, key: str) -> None:
        """Remove an object, in a request of its own: some servers have no bulk delete."""
        with self._explained("delete", key):
            try:
                obstore.delete(self.store, self.prefix + key)
            except FileNotFoundError:
                return

    def _conditional(self, key: str, data: bytes, mode: Any) -> bool:
        with self._explained("put", key):
            try:
                obstore.put(self.store, self.prefix + key, data, mode=mode, use_multipart=False)
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                return False
            except FileNotFoundError as error:
                if mode == "create" or "NoSuchBucket" in str(error):
                    raise
                return False  # the answer of some servers when the object to swap is absent
        return True

    def _swaps(self, *, strip_quotes: bool) -> bool:
        """Return whether a correct token is accepted. Concurrent checks do no harm: equal bytes keep their token."""
        self.strip_quotes = strip_quotes
        probe = self.get(PROBE)
        return probe is not None and self.swap(PROBE, PROBE_DATA, probe.token)

    @contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        """Translate failures of the server. No part of the request is shown: it might hold credentials."""
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise HostError("no such bucket", where=self.where, fix=EXPLAINED["NoSuchBucket"][1]) from error
            if verb in ("put", "list"):  # no object that could be absent
                raise self._failure(error, verb, key) from error
            raise
        except exceptions.BaseError as error:
            raise self._failure(error, verb, key) from error

    def _failure(self, error: Exception, verb: str, key: str) -> HostError:
        text = str(error)
        for sign, (what, fix) in EXPLAINED.items():
            if sign in text:
                return HostError(what, where=self.where, fix=fix)
        denied = isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
        if denied or "<Code>AccessDenied</Code>" in text:  # the client has no error class for a denied list
            what = f"access denied: these credentials do not allow `{verb}`"
            return HostError(what, where=f"{self.where}/{key}", fix=self._needed(verb))
        status = re.search(r"status code: (\d{3})", text) or re.search(r"\b(50\d|429) ", text)
        code = re.search(r"<Code>(\w+)</Code>", text)
        if "Header missing" in text or (code is None and status and status[1] in NOT_OF_S3):
            return self._no_server(f"HTTP status {status[1]}" if status else "an answer without the headers of S3")
        if status and status[1].startswith("4") and status[1] != "429":
            what = f"HTTP status {status[1]}{f' ({code[1]})' if code else ''}"
            return HostError(what, where=f"{self.where}/{key}", fix="see the documentation or log of that server")
        if status and status[1] == "501":
            what = "this server does not support conditional writes"
            return HostError(what, where=self.where, fix=CONDITIONS)
        unreachable = next((what for sign, what in UNREACHABLE.items() if sign in text), CLOSED)
        what = f"HTTP status {status[1]}" if status else unreachable
        return Interrupted(what, where=self.where, fix=self._again(text, verb))

    def _no_server(self, answer: str) -> HostError:
        """Return the error for an answer that no S3 server gives: that of another web server, or of a proxy."""
        what = f"no S3 server, or no such bucket: {answer}, without an error code of S3"
        fix = f"check AWS_ENDPOINT_URL ({_endpoint() or 'not set: AWS'}) and the bucket ({self.bucket})"
        return HostError(what, where=self.where, fix=fix)

    def _again(self, text: str, verb: str) -> str:
        """Return what to do after a failure that may pass; a list or a look transfers nothing that could be kept."""
        address = _endpoint() or "AWS: set AWS_ENDPOINT_URL for another server"
        if "kind: Connect" in text:
            return f"check the network and the address of the server ({address}), then try again"
        return "try again: completed transfers are kept" if verb in ("get", "put") else "try again"

    def _needed(self, verb: str) -> str:
        """Return what a policy must allow. Without permission to list, a missing object looks like a forbidden one."""
        bucket, objects = f"arn:aws:s3:::{self.bucket}", f"arn:aws:s3:::{self.bucket}/{self.prefix}*"
        lists = f"s3:ListBucket on {bucket}"
        return {
            "list": f"allow {lists}",
            "get": f"allow s3:GetObject on {objects} and {lists}",
            "head": f"allow s3:GetObject on {objects} and {lists}",
            "put": f"allow s3:PutObject and s3:GetObject on {objects}",
            "delete": f"allow s3:DeleteObject on {objects}",
        }[verb]


def repeated(call: Callable[[], Result]) -> Result:
    """Call again, with growing pauses, if an answer breaks off; the client repeats other failures itself."""
    for attempt in range(TRIES):
        started = time.monotonic()
        try:
            return call()
        except Interrupted:
            pause(attempt, started)
    raise AssertionError("unreachable")


def pause(attempt: int, started: float) -> None:
    """Wait before the next attempt; raise the present error after the last, or if the client took long to give up."""
    if attempt + 1 == TRIES or time.monotonic() - started > QUICK_S:
        raise
    time.sleep(PAUSE_S * 2**attempt)


def _client(bucket: str) -> S3Store:
    url = _endpoint()
    for name in [name for name, value in os.environ.items() if name.startswith("AWS_") and not value.strip()]:
        del os.environ[name]  # the client takes an empty variable for a setting
    return S3Store(
        bucket,
        config={"endpoint": url} if url else None,
        checksum_algorithm="SHA256",
        client_options={"allow_http": url.lower().startswith("http://"), "connect_timeout": "10s", "timeout": "180s"},
        retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_S)},
        disable_bulk_delete=True,
        **_credentials(),
    )


def _endpoint() -> str:
    return endpoint("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


def _credentials() -> dict[str, Any]:
    """Return a provider for profiles, which needs boto3; the client reads variables, web identity and roles itself."""
    own = [expanded("~/.aws/credentials"), expanded("~/.aws/config")] if has_home() else []
    named = [os.environ.get("AWS_SHARED_CREDENTIALS_FILE"), os.environ.get("AWS_CONFIG_FILE")]
    files = [Path(name) for name in named if name] + own
    profiles = os.environ.get("AWS_PROFILE") or any(path.is_file() for path in files)
    if any(os.environ.get(name) for name in OWN_CREDENTIALS) or not profiles:
        return {}
    from obstore.auth.boto3 import Boto3CredentialProvider  # late: loads boto3, which only profiles need

    return {"credential_provider": Boto3CredentialProvider()}
