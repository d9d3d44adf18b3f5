"""What S3's failures mean to a user, from the texts that the client raises."""

from __future__ import annotations

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from chaos import server
from pipeline.errors import HostError
from support.commands import invoke
from support.fault_proxy import Fault

pytest.importorskip("obstore")

from pipeline.stores.s3 import CREDENTIALS, TRIES, S3Bucket

NO_ROLE = (
    "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 41ms - Server returned "
    "non-2xx status code: 403 Forbidden: denied destination"
)
REFUSED = (
    "Generic S3 error: Error performing list request: Error performing GET http://127.0.0.1:9/bucket - "
    "HTTP error: error sending request HttpError { kind: Connect, source: ConnectionRefused }"
)
UNKNOWN = REFUSED.replace("ConnectionRefused", 'ConnectError("dns error", ..)')
PLAIN = "Generic S3 error: Error performing GET http://s3/bucket - Server returned non-2xx status code: {}: <html>"
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
    assert error.what == "connection refused: no server listens at this address"
    assert bucket._failure(Exception(UNKNOWN), "list", "x").what.startswith("unknown host")
    assert "unreachable" in bucket._failure(Exception(CUT), "list", "x").what
    assert "http://127.0.0.1:9" in error.fix
    assert "kept" not in error.fix


@pytest.mark.parametrize(("verb", "kept"), [("put", True), ("get", True), ("list", False), ("head", False)])
def test_failure_in_between_keeps_transfers_where_there_were_some(bucket, verb, kept):
    assert ("completed transfers are kept" in bucket._failure(Exception(CUT), verb, "x").fix) == kept


@pytest.mark.parametrize("status", ["404 Not Found", "405 Method Not Allowed", "501 Not Implemented"])
def test_failure_of_a_plain_web_server_names_the_endpoint_and_the_bucket(bucket, status):
    """`publish` said `this server does not support conditional writes`, `ls` `see the documentation of that server`."""
    error = bucket._failure(Exception(PLAIN.format(status)), "put", "x")
    code = status.partition(" ")[0]
    assert error.what == f"no S3 server, or no such bucket: HTTP status {code}, without an error code of S3"
    assert error.fix == "check AWS_ENDPOINT_URL (http://127.0.0.1:9) and the bucket (bucket)"
    with_code = bucket._failure(Exception(PLAIN.format(status) + "<Code>NotImplemented</Code>"), "put", "x")
    assert "no S3 server" not in with_code.what


@pytest.mark.parametrize("kind", ["cut", "short", "reset", "503"])
def test_list_whose_answer_breaks_off_is_read_again(tmp_path, monkeypatch, kind):
    """The client repeats requests, but not answers that break off: `alias set` failed."""
    for name in ("a", "b"):
        (tmp_path / "registry/aliases/small").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"registry/aliases/small/{name}").write_text("1\n")
    with server.running(tmp_path) as proxy:
        for name, value in server.environ(proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        proxy.faults = [Fault("GET .*list-type", kind, times=2)]
        listed = [entry.key for entry in S3Bucket(server.BUCKET, "registry").list("aliases")]
        assert proxy.broken == 2
    assert listed == ["aliases/small/a", "aliases/small/b"]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_absence_whose_answer_breaks_off_is_asked_for_again(tmp_path, monkeypatch, times):
    """The answer that an object is absent has a text; one that broke off ended `publish`."""
    with server.running(tmp_path) as proxy:
        for name, value in server.environ(proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        proxy.faults = [Fault("GET", "cut", times=times)]
        assert S3Bucket(server.BUCKET, "registry").get("yanks/small/3") is None
        assert proxy.broken == times


@pytest.mark.parametrize("skip", range(6))
@pytest.mark.parametrize("times", [1, 2])
def test_commands_survive_answers_that_break_off(tmp_path, monkeypatch, skip, times):
    """The answer that rejects a conditional write is not repeated by the client: one that broke off ended commands."""
    (tmp_path / "registry").mkdir()
    with server.running(tmp_path) as proxy:
        for name, value in server.environ(proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        proxy.faults = [Fault("PUT", "cut", times=times, skip=skip)]
        S3Bucket(server.BUCKET, "registry").check()


def test_list_that_never_ends_well_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.stores.s3.PAUSE_S", 0.01)
    (tmp_path / "registry").mkdir()
    with server.running(tmp_path) as proxy:
        for name, value in server.environ(proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        proxy.faults = [Fault("GET .*list-type", "short", times=1000)]
        with pytest.raises(HostError, match="closed the connection"):
            list(S3Bucket(server.BUCKET, "registry").list("aliases"))
        assert proxy.broken == TRIES


class PlainServer(SimpleHTTPRequestHandler):
    """The web server of Python, quiet."""

    def log_message(self, *_: object) -> None:
        """No-op."""


def test_commands_with_a_plain_web_server_as_endpoint(bucket, monkeypatch, tmp_path):
    handler = partial(PlainServer, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as plain:
        Thread(target=plain.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{plain.server_address[1]}")
        shown = invoke("ls", "s3://bucket/x")
        plain.shutdown()
    assert shown.exit_code == 3
    assert "s3://bucket/x: no S3 server, or no such bucket: HTTP status 404" in shown.stderr
