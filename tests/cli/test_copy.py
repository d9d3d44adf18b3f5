"""copy, save, load: one line that says what moved, from where to where, and how it is signed; errors with a code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from support import small_artifacts as small
from support.commands import answer, invoke
from support.signing_keys import key_pair

SENT = r"sent \d\d blobs, \d\d\.\d KiB"


@pytest.fixture
def dev(tmp_path, monkeypatch) -> str:
    """A registry `dev` with small@1.0, signed with `key.pem`; the reference of the release."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GITHUB_ACTOR", "alice")
    small.make_validated(tmp_path / "out", tmp_path / "work")
    key_pair(tmp_path, "key")
    key_pair(tmp_path, "other")
    answer("publish", "out", "--to", "dev", "--version", "1.0", "--alias", "latest", "--sign", "key.pem")
    return "dev/small@1.0"


def test_copy_says_what_moved_from_where_to_where(dev):
    words = answer("copy", "dev/small@latest", "prod", "--alias", "live", "--require-signature", "key.pub").stdout
    assert re.fullmatch(rf"copied small@1\.0 from dev to prod: {SENT}, signed by key\.pub; live -> small@1\.0\n", words)
    again = answer("copy", dev, "prod").stdout
    unchecked = "signature not checked (--require-signature)"
    assert again == f"small@1.0: is in prod already, sent 0 blobs, 0 B, {unchecked}\n"
    assert "live" in answer("ls", "prod").stdout


def test_copy_dry_run_says_what_it_would_send(dev):
    words = answer("copy", dev, "prod", "--dry-run").stdout
    assert re.fullmatch(rf"small@1\.0: would {SENT.replace('sent', 'send')} to prod, signature not checked .*\n", words)
    assert not Path("prod").exists()
    answer("copy", dev, "prod")
    words = answer("copy", dev, "prod", "--dry-run").stdout
    assert words.startswith("small@1.0: is in prod already; would send 0 blobs, 0 B, ")


def test_copy_json_has_the_facts_of_the_line(dev):
    data = json.loads(answer("copy", dev, "prod", "--alias", "live", "--json").stdout)
    assert data["sent"] == data["blobs"] > 10
    assert data["sent_bytes"] == data["size_bytes"] > 10_000
    kept = ("name", "version", "source", "url", "fresh", "aliases", "variants", "signer", "has_signature")
    assert {name: data[name] for name in kept} == {
        "name": "small", "version": "1.0", "source": "dev/small@1.0", "url": "prod", "fresh": True,
        "aliases": ["live"], "variants": ["cpu-avx2-tp1"], "signer": None, "has_signature": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [(["dev/small@2", "prod"], 2, "no version or alias '2'"), (["dev", "prod"], 2, "expected REGISTRY/NAME@VERSION"),
     (["dev/small@1.0", "prod/small@1.0"], 2, "a release, expected a registry"),
     (["dev/small@1.0", "ftp://x"], 3, "unsupported kind of registry"),
     (["dev/small@1.0", "prod", "--alias", "a/b"], 2, "malformed alias"),
     (["dev/small@1.0", "prod", "--require-signature", "other.pub"], 4, "not signed by other.pub"),
     (["dev/small@1.0", "prod", "--policy", "none.yaml"], 2, "cannot read the policy"),
     (["none/small@1.0", "prod"], 2, "no such folder")],
)  # fmt: skip
def test_copy_errors(dev, arguments, code, says):
    result = invoke("copy", *arguments)
    assert (result.exit_code, says in result.stderr, "fix: " in result.stderr) == (code, True, True), result.stderr
    assert not Path("prod").exists()


def test_a_policy_from_the_environment_is_asked(dev, monkeypatch):
    Path("policy.yaml").write_text("rules: [{releases: 'prod/*', signed_by: [{key: key.pub}]}]")
    monkeypatch.setenv("TANDEM_POLICY", "policy.yaml")
    assert "signed by key.pub" in answer("copy", dev, "prod").stdout
    result = invoke("copy", dev, "elsewhere")
    assert (result.exit_code, "no rule of the policy matches" in result.stderr) == (4, True)


def test_ls_shows_where_a_release_was_copied_from(dev):
    answer("copy", dev, "prod")
    head, line = answer("ls", "prod").stdout.splitlines()
    assert head.endswith("copied from")
    assert re.search(r"/dev by alice, \d{4}-\d\d-\d\d \d\d:\d\d$", line)
    (copied,) = json.loads(answer("ls", "prod", "--json").stdout)[0]["copies"]
    assert (copied["who"], copied["destination"]) == ("alice", str(Path("prod").resolve()))
    assert "copied from" not in answer("ls", "dev").stdout
    next(Path("prod/promotions").rglob("*/*")).write_text("{")
    assert answer("ls", "prod").stdout.splitlines()[1].endswith("damaged record")


def test_save_and_load_say_what_they_did(dev):
    words = answer("save", dev, "r.tar", "--require-signature", "key.pub").stdout
    assert re.fullmatch(r"saved small@1\.0 to r\.tar: \d\d blobs, \d\d\.\d KiB, signed by key\.pub\n", words)
    assert answer("save", dev, "r.tar").stdout.startswith("small@1.0: saved already in r.tar: ")
    words = answer("load", "r.tar", "prod", "--alias", "live", "--require-signature", "key.pub").stdout
    assert re.fullmatch(rf"loaded small@1\.0 from r\.tar to prod: {SENT}, signed by key\.pub; live -> .*\n", words)
    assert answer("load", "r.tar", "prod", "--dry-run").stdout.startswith("small@1.0: is in prod already; would send 0")


def test_save_that_continues_says_what_it_kept(dev):
    answer("save", dev, "r.tar")
    Path("r.tar.partial").write_bytes(Path("r.tar").read_bytes()[:20_000])
    Path("r.tar").unlink()
    assert re.search(r"\d blobs, .* \(\d+ kept from an interrupted save\), ", answer("save", dev, "r.tar").stdout)


@pytest.mark.parametrize(("cut", "says"), [(9000, "truncated"), (0, "truncated"), (None, "no such file")])
def test_load_errors(dev, cut, says):
    answer("save", dev, "r.tar")
    data = Path("r.tar").read_bytes()
    Path("r.tar").unlink()
    if cut is not None:
        Path("r.tar").write_bytes(data[:cut])
    result = invoke("load", "r.tar", "prod", "--json")
    assert result.exit_code == (2 if cut is None else 5)
    (problem,) = json.loads(result.stdout)["error"]["problems"]
    assert says in problem["what"]
    assert problem["where"].startswith("r.tar")
    assert problem["fix"]
    assert not Path("prod").exists()


def test_quiet_prints_the_line_alone(dev):
    result = answer("-q", "copy", dev, "prod")
    assert (result.stdout.count("\n"), result.stderr) == (1, "")
