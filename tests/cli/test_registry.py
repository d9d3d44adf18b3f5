"""pull, ls, alias, gc: what is here, under which name, and nothing that is false."""

from __future__ import annotations

import json
import re

import pytest

from pipeline.artifact.manifest import read
from support import small_artifacts as small
from support.commands import answer, invoke
from support.signing_keys import key_pair


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry `r` with small@1.0 (alias first) and small@1.1 (aliases latest and prod), both of one artifact."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    made = small.make_validated(tmp_path / "out", tmp_path / "work")
    answer("publish", "out", "--to", "r", "--version", "1.0", "--alias", "prod")
    answer("publish", "out", "--to", "r", "--version", "1.1", "--alias", "prod", "--alias", "latest")
    return made.manifest.version


def test_pull_says_name_version_alias_digest_size_and_signature(registry):
    """It printed the name of a folder."""
    result = answer("pull", "r/small@prod", "p")
    assert result.stdout == "p\n"
    words = rf"pulled small@1\.1 \(prod\) {registry}: 26 files, \d\d\.\d KiB, not signed\n"
    assert re.fullmatch(words, result.stderr)


def test_pull_without_a_version_is_latest_and_says_so(registry):
    assert f"pulled small@1.1 (latest) {registry}" in answer("pull", "r/small", "p").stderr
    assert "REGISTRY/NAME is short for REGISTRY/NAME@latest" in " ".join(invoke("pull", "--help").stdout.split())


def test_pull_names_the_signer_after_a_check_alone(registry, tmp_path):
    key, public = key_pair(tmp_path, "key")
    answer("publish", "out", "--to", "r", "--version", "2.0", "--sign", key)
    assert answer("pull", "r/small@2.0", "p").stderr.endswith("signature not checked (--require-signature)\n")
    shown = answer("pull", "r/small@2.0", "p", "--require-signature", public).stderr
    assert shown.endswith(f"signed by {public}\n")


def test_pull_json_has_the_facts_of_the_line(registry, tmp_path):
    """It had the folder alone."""
    data = json.loads(answer("pull", "r/small@prod", "p", "--json").stdout)
    digest = data.pop("digest")
    assert digest.startswith(registry)
    assert len(digest) == 64
    assert data.pop("size_bytes") > 10_000
    assert data == {"artifact": "p", "name": "small", "version": "1.1", "alias": "prod", "files": 26,
                    "signature": "none", "signer": None}  # fmt: skip
    assert json.loads(answer("ls", "r", "--json").stdout)[0]["digests"] == [digest]


def test_pull_offline_names_the_version_that_the_alias_had(registry):
    answer("pull", "r/small@prod", "p")
    assert f"pulled small@1.1 (prod) {registry}" in answer("pull", "r/small@prod", "q", "--offline").stderr


def test_pull_quiet_prints_the_folder_alone(registry):
    result = answer("-q", "pull", "r/small@prod", "p")
    assert (result.stdout, result.stderr) == ("p\n", "")


def test_ls_shows_the_digest_that_inspect_shows_and_who_is_signed(registry, tmp_path):
    """`ls` said 1.1 alone, `inspect` d987079fdd41, and nothing joined the two."""
    key, _ = key_pair(tmp_path, "key")
    answer("publish", "out", "--to", "r", "--version", "2.0", "--sign", key)
    head, *lines = answer("ls", "r").stdout.splitlines()
    assert head.split() == ["release", "digest", "built", "(UTC)", "size", "signed", "aliases", "variants"]
    rows = {line.split()[0]: line for line in lines}
    assert all(registry in row for row in rows.values())
    assert " yes " in rows["small@2.0"]
    assert " no " in rows["small@1.0"]
    assert "prod, latest" in rows["small@1.1"] or "latest, prod" in rows["small@1.1"]
    assert registry == read(tmp_path / "out").manifest.version


@pytest.mark.parametrize("url", ["r/small", "r/small@", "r/small/"])
def test_ls_of_a_name_lists_its_releases(registry, url):
    """Without `@`, it said that nothing is published."""
    assert answer("ls", url).stdout.count("small@") == 2


def test_ls_of_a_name_that_is_not_there(registry):
    result = answer("ls", "r/nothing")
    assert (result.stdout, result.stderr) == ("", "no releases in r/nothing\n")


def test_ls_of_nothing_says_so(registry, tmp_path):
    result = answer("ls", "nowhere")
    assert result.stdout == ""
    assert "no releases in nowhere" in result.stderr
    assert not (tmp_path / "nowhere").exists()


def test_ls_json_keeps_its_keys(registry):
    entry = json.loads(answer("ls", "r", "--json").stdout)[0]
    assert {"name", "version", "created", "size_bytes", "aliases", "variants"} <= entry.keys()


def test_alias_list_is_a_table(registry):
    assert answer("alias", "list", "r/small").stdout.splitlines()[0].split() == ["alias", "release"]


def test_alias_list_of_a_registry_says_that_a_name_is_missing(registry):
    """It printed an empty line."""
    result = invoke("alias", "list", "./r")
    assert result.exit_code == 2
    assert "no releases of 'r'" in result.stderr
    assert result.stdout == ""


def test_alias_list_of_a_name_without_aliases(registry, tmp_path):
    answer("publish", "out", "--to", "bare")
    result = answer("alias", "list", "bare/small")
    assert (result.stdout, result.stderr) == ("", "small has releases but no aliases\n")


def test_rollback_at_the_first_release_does_not_deny_later_ones(registry):
    """It said `has pointed at 1.0 only`, though its history shows 1.1."""
    assert answer("alias", "rollback", "r/small@prod").stdout == "prod: 1.1 -> 1.0\n"
    shown = invoke("alias", "rollback", "r/small@prod").stderr
    assert "points at its first release 1.0; it was moved back from 1.1" in shown
    assert "only" not in shown


def test_gc_counts_what_it_kept(registry):
    assert answer("gc", "r").stdout.startswith("removed 0 unused blobs, 0 B; ")
