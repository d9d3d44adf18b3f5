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


@pytest.mark.parametrize(
    ("command", "says", "fix"),
    [
        (("ls", "nowhere"), "nowhere: no such folder", "check the address"),
        (("ls", "nowhere/small"), "nowhere/small: no such folder", "check the address"),
        (("ls", "r/nothing"), "r: no release named 'nothing'", "names: small"),
        (("ls", "r/smal@"), "r: no release named 'smal'", "did you mean 'small'?"),
        (("ls", "work"), "work: not a registry: it has no releases", "check the address"),
        (("pull", "nowhere/small@prod", "p"), "nowhere: no such folder", "check the address"),
        (("pull", "r/smal@prod", "p"), "r: no release named 'smal'", "did you mean 'small'?"),
        (("diff", "nowhere/small@prod", "out"), "nowhere: no such folder", "check the address"),
        (("alias", "list", "./r"), "./r: a registry, not a name in it", "add one of: small"),
        (("alias", "history", "nowhere/small@prod"), "nowhere: no such folder", "check the address"),
        (("alias", "set", "nowhere/small@1.0", "prod"), "nowhere: no such folder", "check the address"),
        (("gc", "nowhere"), "nowhere: no such folder", "check the address"),
    ],
)
def test_a_misspelt_registry_is_an_error(registry, tmp_path, command, says, fix):
    """`ls` said `no releases in`, with exit code 0; `pull` said `versions and aliases: nothing`."""
    result = invoke(*command)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert f"wrong input: {says}\n  fix: {fix}" in result.stderr
    assert not (tmp_path / "nowhere").exists()


def test_ls_shows_a_damaged_release_and_the_others(registry, tmp_path):
    """One damaged manifest was the error of the whole list."""
    (tmp_path / "r/releases/small/1.0/manifest.json").write_text("{")
    result = answer("ls", "r")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["small@1.0", "damaged"] in rows
    assert any(row[0] == "small@1.1" and row[1] == registry for row in rows)
    assert "warning: damaged release in r: r/small@1.0: damaged manifest: not JSON; to replace it" in result.stderr
    shown = invoke("pull", "r/small@1.0", "p").stderr
    assert "fix: the registry has it so: ask the publisher to publish the artifact again" in shown


def test_ls_json_keeps_its_keys(registry):
    entry = json.loads(answer("ls", "r", "--json").stdout)[0]
    assert {"name", "version", "created", "size_bytes", "aliases", "variants"} <= entry.keys()


def test_alias_set_names_the_release_that_an_alias_means(registry):
    """Three commands had three forms; `set` of `latest` printed `prod -> small@latest`."""
    assert answer("alias", "set", "r/small@latest", "next").stdout == "next -> small@1.1\n"


@pytest.mark.parametrize(
    ("command", "where"),
    [(("alias", "set", "r/small@1.0", "my alias"), "ALIAS_NAME"),
     (("publish", "out", "--to", "r", "--alias", "my alias"), "--alias")],
)  # fmt: skip
def test_a_malformed_alias_names_its_argument(registry, command, where):
    """It said `registry: malformed name`."""
    result = invoke(*command)
    assert result.exit_code == 2
    assert f"wrong input: {where}: malformed alias: 'my alias'\n" in result.stderr


def test_alias_list_is_a_table(registry):
    assert answer("alias", "list", "r/small").stdout.splitlines()[0].split() == ["alias", "release"]


def test_alias_list_of_a_name_without_aliases(registry, tmp_path):
    answer("publish", "out", "--to", "bare")
    result = answer("alias", "list", "bare/small")
    assert (result.stdout, result.stderr) == ("", "small has releases but no aliases\n")


def test_rollback_at_the_first_release_does_not_deny_later_ones(registry):
    """It said `has pointed at 1.0 only`, though its history shows 1.1."""
    assert answer("alias", "rollback", "r/small@prod").stdout == "prod -> small@1.0 (before: 1.1)\n"
    shown = invoke("alias", "rollback", "r/small@prod").stderr
    assert "points at its first release 1.0; it was moved back from 1.1" in shown
    assert "only" not in shown


def test_gc_counts_what_it_kept(registry):
    assert answer("gc", "r").stdout.startswith("removed 0 unused blobs, 0 B; ")
