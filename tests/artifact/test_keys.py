"""Key files that options name: a wrong name is an error of the input, with the nearest file."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.artifact.signing import is_key, require
from pipeline.errors import InputError
from support.commands import invoke
from support.signing_keys import key_pair


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("release.pubb", True),
        ("keys/release", True),
        ("release.pub", True),
        ("ci@example.com", False),
        ("https://github.com/org/repo/.github/workflows/release.yml@refs/heads/main", False),
    ],
)
def test_is_key_of_names_and_identities(value, expected):
    assert is_key(value) == expected


def test_require_a_misspelt_file_names_the_nearest(tmp_path):
    """`release.pubb` was a keyless identity: `keyless signatures cannot be checked; check the network`, code 3."""
    _, public = key_pair(tmp_path, "release")
    with pytest.raises(InputError) as caught:
        require(str(tmp_path / "release.pubb"))
    assert (caught.value.where, caught.value.what) == (
        "--require-signature", f"no such file: `{tmp_path / 'release.pubb'}`",
    )  # fmt: skip
    assert caught.value.fix == f"the nearest name is `{public}`; a keyless identity contains `@` or `://`"


@pytest.mark.parametrize("command", [("pull", "reg/small@prod"), ("verify", "out"), ("serve", "reg/small", "--json")])
def test_commands_with_a_misspelt_key_end_before_other_work(tmp_path: Path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").write_text("{}")
    refused = invoke(*command, "--require-signature", "release.pubb")
    assert refused.exit_code == 2, refused.output
    assert "--require-signature: no such file: `release.pubb`" in refused.stderr
