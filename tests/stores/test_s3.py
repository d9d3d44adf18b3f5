"""What S3 alone does: credentials, policies, answers and servers of other makes."""

from __future__ import annotations

import pytest

from pipeline.errors import HostError, InputError
from pipeline.registry import releases as registry
from pipeline.registry.publish import publish
from pipeline.registry.pull import pull
from pipeline.stores.base import open_bucket
from support import small_artifacts as small

pytestmark = pytest.mark.server


@pytest.mark.parametrize("who", ["ro", "wrong secret", "unknown"])
def test_s3_refused(made, s3_url, s3_server, monkeypatch, who):
    publish(made, s3_url, ["latest"])
    secret = s3_server.identities["ro"][1] if who == "ro" else "a-wrong-secret-that-must-not-be-shown"
    key = "nobody" if who == "unknown" else s3_server.identities["ro"][0]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    with pytest.raises(HostError) as caught:
        publish(made, s3_url, ["again"])
    shown = f"{caught.value}{caught.value.fix}"
    assert {"ro": "access denied", "wrong secret": "secret key is wrong", "unknown": "unknown"}[who] in shown
    assert secret not in shown


def test_s3_reader_pulls(made, s3_url, s3_server, monkeypatch, options):
    """Pulling writes nothing, so a role that may only read is enough."""
    publish(made, s3_url, ["latest"])
    for name, value in s3_server.environ("ro").items():
        monkeypatch.setenv(name, value)
    assert small.digests(pull(f"{s3_url}/small@latest", **options)) == small.digests(made)


def test_s3_profile(made, s3_url, s3_server, monkeypatch, tmp_path):
    key, secret = s3_server.identities["rw"]
    (tmp_path / "credentials").write_text(f"[ci]\naws_access_key_id={key}\naws_secret_access_key={secret}\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "ci")
    assert publish(made, s3_url).fresh


def test_s3_server_without_conditions(made, s3_url, monkeypatch):
    """A server that ignores conditions is refused before anything is sent."""
    from support.plain_s3 import running

    with running() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(HostError, match="ignores If-None-Match"):
            publish(made, s3_url)


ANSWERS = [
    ("403", b"<Error><Code>RequestTimeTooSkewed</Code></Error>", "clock differs"),
    ("404", b"<Error><Code>NoSuchBucket</Code></Error>", "no such bucket"),
    ("400", b"<Error><Code>InvalidRequest</Code></Error>", r"HTTP status 400 \(InvalidRequest\)"),
    ("501", b"<Error><Code>NotImplemented</Code></Error>", "conditional writes"),
    ("503", b"", "HTTP status 503"),
]


DENIED = [  # what is refused, by what of a publish, and what a policy lacks
    ("GET .*(list-type|prefix=)", "list", "s3:ListBucket on arn:aws:s3:::tests"),
    ("GET /tests/.*releases/[^?]*manifest", "get", "s3:GetObject on arn:aws:s3:::tests/"),
    ("HEAD", "head", "s3:GetObject"),
    ("(PUT|POST)", "put", "s3:PutObject"),
    ("DELETE", "delete", "s3:DeleteObject"),
]


@pytest.mark.parametrize(("pattern", "verb", "fix"), DENIED, ids=[verb for _, verb, _ in DENIED])
def test_s3_denied_says_what_a_policy_lacks(made, s3_url, s3_server, monkeypatch, pattern, verb, fix):
    from support import fault_proxy

    denied = b"<Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>"
    with fault_proxy.before(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.faults = [fault_proxy.Fault(pattern, "403", 1000, body=denied)]
        with pytest.raises(HostError, match=f"{s3_url}/.*these credentials do not allow `{verb}`") as caught:
            publish(made, s3_url)
    assert fix in caught.value.fix


@pytest.mark.parametrize(("status", "body", "message"), ANSWERS, ids=[status for status, _, _ in ANSWERS])
def test_s3_says_what_an_answer_means(made, s3_url, s3_server, monkeypatch, status, body, message):
    from support import fault_proxy

    monkeypatch.setattr("pipeline.stores.s3.RETRY_S", 1.0)
    with fault_proxy.before(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.faults = [fault_proxy.Fault("PUT", status, 1000, body=body)]
        with pytest.raises(HostError, match=message):
            publish(made, s3_url)


def test_s3_collect_keeps_what_is_reached(tmp_path, made, s3_url, options):
    publish(made, s3_url, ["latest"])
    bucket = open_bucket(s3_url)
    (tmp_path / "junk").write_bytes(b"junk")
    sha256 = small.digests(tmp_path)["junk"]
    bucket.upload(f"blobs/sha256/{sha256[:2]}/{sha256}", tmp_path / "junk", sha256, 1)
    assert registry.collect(s3_url, dry_run=True).blobs == 1
    assert registry.collect(s3_url).blobs == 1
    assert registry.collect(s3_url).blobs == 0
    assert small.digests(pull(f"{s3_url}/small@latest", **options)) == small.digests(made)


def test_s3_range_of_a_version_is_of_that_version(s3_url):
    """Weights that stay in a bucket are read by many requests. An object may be replaced between two requests."""
    bucket = open_bucket(s3_url)
    assert bucket.create("weights", b"first version")
    (entry,) = bucket.list("")
    buffer = memoryview(bytearray(5))
    assert bucket.read("weights", 6, buffer, entry.token) == 5
    assert bytes(buffer) == b"versi"
    assert bucket.swap("weights", b"other version", bucket.get("weights").token)
    with pytest.raises(InputError, match="object was replaced while it was read"):
        bucket.read("weights", 6, buffer, entry.token)
