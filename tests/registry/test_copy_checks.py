"""What a copy asks before it writes: the policy of the destination, and whether the release was yanked."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from pipeline.artifact.signing import read_policy, signature_over
from pipeline.errors import InputError, RefusedError
from pipeline.registry.copy import CopySettings, copy
from pipeline.registry.publish import Place, PublishSettings, publish
from pipeline.registry.pull import pull
from pipeline.registry.releases import list_releases
from pipeline.registry.yanks import yank
from pipeline.stores.base import Yank, open_store
from support import small_artifacts as small
from support.signing_keys import key_pair

pytest.importorskip("model_signing")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, validated: Path) -> Path:
    """Keys `release` and `stranger`, and a registry `dev`: 1.0 with an index and signatures, 2.0 without."""
    folder = tmp_path_factory.mktemp("checked")
    private, _ = key_pair(folder, "release")
    key_pair(folder, "stranger")
    root, url = Path(shutil.copytree(validated, folder / "out")), str(folder / "dev")
    sign = PublishSettings(version="1.0", sign=lambda data: signature_over(data, "release", private, None, None))
    publish(root, url, ["latest"], sign)
    publish(small.make_validated(folder / "two", folder / "work", weights=b"2").root, url, [], PublishSettings("2.0"))
    return folder


@pytest.fixture
def folder(tmp_path: Path, source: Path) -> Path:
    """A copy to spoil, with a place for policies."""
    return Path(shutil.copytree(source, tmp_path / "f"))


def settings(folder: Path, text: str) -> CopySettings:
    (folder / "policy.yaml").write_text(text)
    return CopySettings(read_policy(folder / "policy.yaml"))


def refused(folder: Path, rules: str, says: str, *, version: str = "1.0", aliases: tuple[str, ...] = ()) -> None:
    """A copy is refused, and nothing is written."""
    with pytest.raises(RefusedError, match=says):
        copy(f"{folder}/dev/small@{version}", Place(f"{folder}/prod", aliases), settings(folder, rules))
    assert not (folder / "prod").exists()


RELEASE = "rules: [{releases: 'prod/*', signed_by: [{key: release.pub}]}]"


def test_the_policy_of_the_destination_accepts(folder):
    copied = copy(f"{folder}/dev/small@latest", Place(f"{folder}/prod", ("live",)), settings(folder, RELEASE))
    assert copied.signer == "release.pub"
    pulled = {"cache": folder / "cache", "policy": settings(folder, RELEASE).policy}
    pull(f"{folder}/prod/small@live", folder / "pulled", **pulled)


def test_a_rule_for_the_source_is_not_asked(folder):
    rules = "rules: [{releases: 'dev/*', signed_by: [{key: release.pub}]}]"
    refused(folder, rules, "no rule of the policy matches .*/prod/small@1.0")


def test_another_signer_is_refused(folder):
    rules = "rules: [{releases: 'prod/*', signed_by: [{key: stranger.pub}]}]"
    refused(folder, rules, r"not signed by stranger\.pub")


def test_a_release_without_a_signature_is_refused(folder):
    refused(folder, RELEASE, "the index of this release is not signed", version="2.0")


def test_each_alias_has_its_rule(folder):
    """`live` has a stricter rule than the version: a copy that would set it is refused, one without it is not."""
    rules = """
rules:
  - {releases: "prod/small@live", signed_by: [{key: stranger.pub}]}
  - {releases: "prod/*", signed_by: [{key: release.pub}]}
"""
    refused(folder, rules, r"not signed by stranger\.pub", aliases=("canary", "live"))
    copy(f"{folder}/dev/small@1.0", Place(f"{folder}/prod", ("canary",)), settings(folder, rules))


def test_the_builder_of_the_provenance_is_asked(folder):
    rules = RELEASE.replace("signed_by", "builder: 'https://github.com/*', signed_by")
    refused(folder, rules, "builder mismatch: found urn:tandem:builder:local")


def test_the_manifest_of_each_variant_must_be_signed(folder):
    """The signature over the index alone is not enough: a pull of the variant would be refused."""
    for path in (folder / "dev/signatures").iterdir():
        if path.name != _sha256(folder / "dev/releases/small/1.0/manifest.json"):
            shutil.rmtree(path)
    refused(folder, RELEASE, "not signed$")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_yanked_release_is_refused_unless_asked_and_takes_its_yank_along(folder):
    yank(f"{folder}/dev/small@1.0", "wrong tokenizer")
    prod = Place(f"{folder}/prod")
    with pytest.raises(RefusedError, match="yanked: wrong tokenizer") as caught:
        copy(f"{folder}/dev/small@1.0", prod)
    assert caught.value.fix.endswith("--allow-yanked")
    allowed = CopySettings(yanked=True)
    with pytest.raises(InputError, match="no alias can point at it"):
        copy(f"{folder}/dev/small@1.0", Place(prod.url, ("live",)), allowed)
    assert not (folder / "prod").exists()
    copy(f"{folder}/dev/small@1.0", prod, allowed)
    assert [each.yanked for each in list_releases(prod.url)] == ["wrong tokenizer"]
    assert not copy(f"{folder}/dev/small@1.0", prod, allowed).fresh


def test_a_version_that_the_destination_yanked_stays_yanked(folder):
    copy(f"{folder}/dev/small@1.0", Place(f"{folder}/prod"))
    yank(f"{folder}/prod/small@1.0", "bad")
    for settings_ in (CopySettings(), CopySettings(yanked=True)):
        with pytest.raises(RefusedError, match="yanked: bad"):
            copy(f"{folder}/dev/small@1.0", Place(f"{folder}/prod"), settings_)


def test_a_retired_release_has_no_files_to_copy(folder):
    open_store(f"{folder}/dev").yank("small", "2.0", Yank("old", retired=True))
    with pytest.raises(RefusedError, match=r"2\.0 was retired: old"):
        copy(f"{folder}/dev/small@2.0", Place(f"{folder}/prod"), CopySettings(yanked=True))
    assert not (folder / "prod").exists()
