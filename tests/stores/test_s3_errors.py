"""What S3's failures mean to a user, from the texts that the client raises."""

from __future__ import annotations

import pytest

pytest.importorskip("obstore")

from pipeline.stores.s3 import CREDENTIALS, S3Bucket

NO_ROLE = (
    "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 41ms - Server returned "
    "non-2xx status code: 403 Forbidden: denied destination"
)
REFUSED = (
    "Generic S3 error: Error performing list request: Error performing GET http://127.0.0.1:9/bucket - "
    "HTTP error: error sending request HttpError { kind: Connect, source: ConnectionRefused }"
)
CUT = "Generic S3 error: HTTP error: request or response body error"


@pytest.fixture
def bucket(monkeypatch) -> S3Bucket:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    return S3Bucket("bucket", "x")


def test_failure_without_credentials_says_how_to_give_some(bucket):
    """It said `HTTP status 403; see what this means on that server`: the server was not even asked."""
    error = bucket._failure(Exception(NO_ROLE), "list", "releases")
    assert error.what.startswith("no credentials")
    assert error.fix == CREDENTIALS


def test_failure_to_connect_names_the_address_and_claims_no_transfer(bucket):
    """`ls` said `try again: what was moved is kept`."""
    error = bucket._failure(Exception(REFUSED), "list", "releases")
    assert "unreachable" in error.what
    assert "http://127.0.0.1:9" in error.fix
    assert "kept" not in error.fix


@pytest.mark.parametrize(("verb", "kept"), [("put", True), ("get", True), ("list", False), ("head", False)])
def test_failure_in_between_keeps_transfers_where_there_were_some(bucket, verb, kept):
    assert ("completed transfers are kept" in bucket._failure(Exception(CUT), verb, "x").fix) == kept
