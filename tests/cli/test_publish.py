"""publish, sign: what was published, where it lies, and what was not done."""

from __future__ import annotations

import re

import pytest

from pipeline.stages.stamp import Stamp, build_lock
from support import small_artifacts as small
from support.commands import answer, invoke
from support.signing_keys import key_pair


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return small.make_validated(tmp_path / "out", tmp_path / "work")


def test_publish_says_what_and_where(out):
    shown = answer("publish", "out", "--to", "r", "--version", "1.0", "--alias", "prod").stdout
    blobs = r"sent \d+ blobs, \d\d\.\d KiB, not signed; prod -> small@1\.0\n"
    assert re.fullmatch(rf"published small@1\.0 {out.manifest.version} to r: {blobs}", shown)


def test_publish_signed_says_so(out, tmp_path):
    key, _ = key_pair(tmp_path, "key")
    assert f", signed with {key}\n" in answer("publish", "out", "--to", "r", "--sign", key).stdout


def test_publish_of_an_unsigned_release_cannot_add_a_signature(out, tmp_path):
    """It exited with 0 and said `the signature was not added`; the folder had the signature that no pull gets."""
    key, _ = key_pair(tmp_path, "key")
    answer("publish", "out", "--to", "r")
    for words in ((), ("--dry-run",)):
        result = invoke("publish", "out", "--to", "r", "--sign", key, *words)
        assert result.exit_code == 2
        version = out.manifest.version
        assert f"artifact: r: small@{version} exists and is not signed\n" in result.stderr
        assert "fix: publish under another version: --version VERSION, with --sign" in result.stderr
    assert not (out.root / "signature").exists()
    assert answer("ls", "r").stdout.endswith("  no\n")


@pytest.mark.parametrize("version", [(), ("--version", "1.0")])
def test_publish_with_another_key_keeps_the_first_signature(out, tmp_path, version):
    """The signature in the folder was replaced by one of a key that signed no release: `verify` failed afterwards."""
    key, public = key_pair(tmp_path, "key")
    other, _ = key_pair(tmp_path, "other")
    answer("publish", "out", "--to", "r", "--sign", key, *version)
    result = invoke("publish", "out", "--to", "r", "--sign", other, *version)
    assert result.exit_code == 2
    assert "exists and is not signed by this key" in result.stderr
    answer("verify", "out", "--require-signature", public)


def test_publish_again_with_the_same_key_is_no_error(out, tmp_path):
    key, _ = key_pair(tmp_path, "key")
    answer("publish", "out", "--to", "r", "--version", "1.0", "--sign", key)
    shown = answer("publish", "out", "--to", "r", "--version", "1.0", "--sign", key, "--alias", "prod").stdout
    assert f"published already in r, sent 0 blobs, 0 B, already signed with {key}; prod -> small@1.0\n" in shown


def test_publish_signed_to_a_place_that_has_the_release_unsigned_and_a_new_one(out, tmp_path):
    key, public = key_pair(tmp_path, "key")
    answer("publish", "out", "--to", "old")
    result = invoke("publish", "out", "--to", "old", "--to", "new", "--sign", key)
    assert result.exit_code == 2
    assert f"signed with {key}" in result.stdout
    answer("pull", f"new/small@{out.manifest.version}", "p", "--require-signature", public)


def test_publish_warns_of_an_index_that_nobody_signed(out, tmp_path):
    """`tandem sign`, then a version: the line said `with the signature in its folder`, and nobody could pull it."""
    key, public = key_pair(tmp_path, "key")
    answer("sign", "out", "--key", key)
    for words in (("--dry-run",), (), ("--json",)):
        shown = answer("publish", "out", "--to", "r", "--version", "1.0", *words).stderr
        assert "warning: the index of 1.0 is not signed; pulls with --require-signature reject it" in shown
    assert invoke("pull", "r/small@1.0", "p", "--require-signature", public).exit_code == 4
    assert answer("publish", "out", "--to", "r").stderr == ""  # without a version: no index
    assert "only `tandem publish --sign` signs" in " ".join(invoke("sign", "--help").stdout.split())


def test_publish_again_says_that_a_new_signature_of_the_folder_was_not_added(out, tmp_path):
    answer("publish", "out", "--to", "r")
    answer("sign", "out", "--key", key_pair(tmp_path, "key")[0])
    assert "not signed; the signature in the folder was not added" in answer("publish", "out", "--to", "r").stdout


@pytest.mark.parametrize("command", [("publish", "out", "--to", "r", "--sign"), ("sign", "out", "--key")])
def test_a_key_that_cannot_sign_is_named_once_with_its_own_fix(out, tmp_path, command):
    """A missing file and a public key both had the fix `openssl ecparam ... -out key.pem`; the path was shown twice."""
    _, public = key_pair(tmp_path, "release")
    result = invoke(*command, "missing.pem")
    assert result.exit_code == 2
    assert "wrong input: missing.pem: cannot read the private key: No such file or directory\n" in result.stderr
    assert "fix: check the path; the private key is a PEM file; to create a key: openssl ecparam" in result.stderr
    result = invoke(*command, public)
    assert result.exit_code == 2
    assert f"wrong input: {public}: a public key, expected the private key\n" in result.stderr
    assert "fix: name the private key" in result.stderr
    assert not (tmp_path / "r").exists()


def test_publish_signs_with_an_encrypted_key(out, tmp_path, monkeypatch):
    """TANDEM_KEY_PASSWORD was handed to the library as text, which accepts bytes alone."""
    key, public = key_pair(tmp_path, "key", password=b"secret")
    monkeypatch.setenv("TANDEM_KEY_PASSWORD", "wrong")
    result = invoke("publish", "out", "--to", "r", "--sign", key)
    assert result.exit_code == 2
    assert "fix: set TANDEM_KEY_PASSWORD" in result.stderr
    monkeypatch.setenv("TANDEM_KEY_PASSWORD", "secret")
    answer("publish", "out", "--to", "r", "--version", "1.0", "--sign", key)
    answer("pull", "r/small@1.0", "p", "--require-signature", public)


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


def test_publish_and_report_during_a_build_say_so(tmp_path, monkeypatch):
    """They said `was not validated`, and to run `tandem validate`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    root = small.make(tmp_path / "out", tmp_path / "work").root
    with build_lock(Stamp(tmp_path / "cache", root).lock_file, print, "nobody"):
        for command in (("publish", "out", "--to", "r"), ("report", "out")):
            result = invoke(*command)
            assert result.exit_code == 2
            assert "wrong input: out: a build of it is running\n  fix: wait until the build ends\n" in result.stderr
    assert "was not validated" in invoke("publish", "out", "--to", "r").stderr


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
