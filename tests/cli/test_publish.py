"""publish, sign: what was published, where it lies, and what was not done."""

from __future__ import annotations

import re

import pytest

from support import small_artifacts as small
from support.commands import answer, invoke
from support.signing_keys import key_pair


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return small.make_validated(tmp_path / "out", tmp_path / "work")


def test_publish_says_what_and_where(out):
    shown = answer("publish", "out", "--to", "r", "--version", "1.0", "--alias", "prod").stdout
    blobs = r"sent \d+ blobs, 5\d\.\d KiB, not signed; prod -> 1\.0\n"
    assert re.fullmatch(rf"published small@1\.0 {out.manifest.version} to r: {blobs}", shown)


def test_publish_signed_says_so(out, tmp_path):
    key, _ = key_pair(tmp_path, "key")
    assert f", signed with {key}\n" in answer("publish", "out", "--to", "r", "--sign", key).stdout


def test_publish_again_does_not_claim_a_signature_that_was_not_added(out, tmp_path):
    key, _ = key_pair(tmp_path, "key")
    answer("publish", "out", "--to", "r")
    shown = answer("publish", "out", "--to", "r", "--sign", key).stdout
    assert "published already in r, sent 0 blobs, 0 B; the signature was not added" in shown
    assert answer("ls", "r").stdout.endswith("  no\n")


def test_publish_dry_run_says_would(out, tmp_path):
    assert "would send" in answer("publish", "out", "--to", "r", "--dry-run").stdout
    assert not (tmp_path / "r").exists()


def test_publish_of_a_failed_artifact_does_not_advise_to_validate_it(tmp_path, monkeypatch):
    """`tandem validate` fails again."""
    monkeypatch.chdir(tmp_path)
    small.make_validated(tmp_path / "out", tmp_path / "work", passed=False)
    result = invoke("publish", "out", "--to", "r")
    assert result.exit_code == 1
    assert "tandem report out" in result.stderr
    assert "tandem validate" not in result.stderr


def test_publish_shows_a_failed_place_with_its_error(out):
    """`see the error below` was on stdout, the error on stderr."""
    result = invoke("publish", "out", "--to", "gs://x", "--to", "r")
    assert result.exit_code == 3
    assert result.stdout.startswith("published small@")
    assert result.stderr.splitlines()[:2] == [
        "not published to gs://x:",
        "environment: gs://x: unsupported kind of registry: gs://",
    ]


def test_sign_names_the_artifact_the_key_and_the_file(out, tmp_path):
    key, _ = key_pair(tmp_path, "key")
    assert (
        answer("sign", "out", "--key", key).stdout == f"signed small {out.manifest.version} with {key}: out/signature\n"
    )
