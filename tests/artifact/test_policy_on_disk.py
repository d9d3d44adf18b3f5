"""A policy on disk is that of the pull: the recorded reference selects the rule, one reading of the manifest counts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from pipeline.artifact.manifest import MANIFEST, PULLED
from pipeline.artifact.reports import add_reports
from pipeline.artifact.signing import (
    check_artifact,
    policy_of,
    read_policy,
    read_trusted,
    require,
    sign,
    signature_over,
)
from pipeline.artifact.verify import verify
from pipeline.cli import serve
from pipeline.errors import CorruptError, InputError, RefusedError
from pipeline.files.limits import SIGNATURE_BYTES
from pipeline.registry.publish import PublishSettings, publish
from pipeline.registry.pull import pull
from support import small_artifacts as small
from support.commands import answer, invoke
from support.signing_keys import key_pair

pytest.importorskip("model_signing")


def policy_file(folder: Path, **rules: str) -> Path:
    """Write a policy: the pattern of each key's releases."""
    lines = [f"  - releases: '{pattern}'\n    signed_by: [{{key: {key}.pub}}]\n" for key, pattern in rules.items()]
    (folder / "policy.yaml").write_text("rules:\n" + "".join(lines))
    return folder / "policy.yaml"


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    return {name: key_pair(tmp_path, name)[0] for name in ("dev", "prod")}


def test_an_artifact_signed_for_dev_is_none_of_prod_on_disk(made, keys, tmp_path):
    """Only the pattern's text after its last slash counted, so the first rule, dev's, decided for every artifact."""
    sign(made, keys["dev"])
    publish(made, f"{tmp_path}/prodreg", ["prod"])
    policy = read_policy(policy_file(tmp_path, dev=f"{tmp_path}/devreg/*", prod=f"{tmp_path}/prodreg/*"))
    options = {"cache": tmp_path / "cache"}
    with pytest.raises(RefusedError, match=r"not signed by prod\.pub"):
        pull(f"{tmp_path}/prodreg/small@prod", tmp_path / "d", policy=policy, **options)
    pulled = pull(f"{tmp_path}/prodreg/small@prod", tmp_path / "d", **options)
    with pytest.raises(RefusedError, match=r"not signed by prod\.pub"):
        check_artifact(pulled, policy)


@pytest.mark.parametrize("wanted", ["prod", "1.0"])
def test_a_rule_of_an_alias_or_version_holds_on_disk(made, keys, tmp_path, wanted):
    """`tandem serve REG/small@prod --policy` pulled it, and the server then refused `small@<digest>`."""
    sign(made, keys["prod"])
    settings = PublishSettings(version="1.0", sign=lambda data: signature_over(data, "r", keys["prod"], None, None))
    publish(made, f"{tmp_path}/reg", ["prod"], settings)
    policy = read_policy(policy_file(tmp_path, prod=f"{tmp_path}/reg/small@{wanted}"))
    out = pull(f"{tmp_path}/reg/small@{wanted}", tmp_path / "d", cache=tmp_path / "cache", policy=policy)
    assert str(check_artifact(out, policy)) == "prod.pub"
    record = json.loads((out / PULLED).read_text())
    assert (record["reference"], record["version"]) == (f"{tmp_path}/reg/small@{wanted}", "1.0")
    assert record["signer"] == "prod.pub"
    verify(out)


def test_a_relative_registry_is_recorded_as_an_absolute_one(made, keys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sign(made, keys["prod"])
    publish(made, "reg", ["prod"])
    policy = read_policy(policy_file(tmp_path, prod=f"{tmp_path}/reg/*"))
    out = pull("reg/small@prod", tmp_path / "d", cache=tmp_path / "cache", policy=policy)
    monkeypatch.chdir("/")
    check_artifact(out, policy)


def test_an_artifact_that_was_built_here_matches_no_rule_of_a_registry(made, keys, tmp_path):
    sign(made, keys["prod"])
    of_registry = read_policy(policy_file(tmp_path, prod="s3://models/releases/*"))
    with pytest.raises(RefusedError, match="no record of a pull"):
        check_artifact(made, of_registry)
    check_artifact(made, read_policy(policy_file(tmp_path, prod="small@*")))
    check_artifact(made, read_policy(policy_file(tmp_path, prod="*")))


def test_the_record_of_one_artifact_is_none_of_another(made, keys, tmp_path):
    sign(made, keys["dev"])
    publish(made, f"{tmp_path}/devreg", ["a"])
    other = small.make_validated(tmp_path / "other", tmp_path / "work", weights=b"others").root
    sign(other, keys["dev"])
    publish(other, f"{tmp_path}/prodreg", ["a"])
    options = {"cache": tmp_path / "cache"}
    dev = pull(f"{tmp_path}/devreg/small@a", tmp_path / "d", **options)
    prod = pull(f"{tmp_path}/prodreg/small@a", tmp_path / "p", **options)
    shutil.copy(dev / PULLED, prod / PULLED)
    with pytest.raises(CorruptError, match="the record is of another manifest"):
        check_artifact(prod, read_policy(policy_file(tmp_path, dev=f"{tmp_path}/devreg/*")))
    (prod / PULLED).write_text("{")
    with pytest.raises(CorruptError, match="damaged record"):
        check_artifact(prod, require(str(tmp_path / "dev.pub")))


def test_new_reports_end_the_record(made, tmp_path):
    """The manifest is another one then: the artifact is no longer what was pulled."""
    publish(made, f"{tmp_path}/reg", ["a"])
    out = pull(f"{tmp_path}/reg/small@a", tmp_path / "d", cache=tmp_path / "cache")
    add_reports(out, {"parity.json": b"{ }"}, {"passed": True})
    assert not (out / PULLED).exists()
    verify(out)


def test_the_bytes_that_were_verified_are_those_that_are_parsed(made, keys, tmp_path, monkeypatch):
    """The manifest was read three times: once for its name, once for the signature, once for the files."""
    sign(made, keys["prod"])
    opened: list[Path] = []
    real = Path.open

    def counted(path: Path, *args, **options):
        opened.append(path)
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", counted)
    trusted = read_trusted(made, require(str(tmp_path / "prod.pub")))
    assert opened.count(made / MANIFEST) == 1
    assert trusted.artifact.data == real(made / MANIFEST, "rb").read()


def test_nothing_is_parsed_before_the_signature(made, keys, tmp_path):
    """A manifest that no parser accepts is refused for its signature, not for its contents."""
    sign(made, keys["prod"])
    (made / MANIFEST).write_text('{"schema_version": 3, "kind": "pair", "files": 1}')
    with pytest.raises(RefusedError, match="over another manifest"):
        check_artifact(made, require(str(tmp_path / "prod.pub")))


def test_a_signature_beyond_its_limit_is_not_read(made, keys, tmp_path):
    (made / "signature").touch()
    os.truncate(made / "signature", 1 << 40)
    with pytest.raises(CorruptError, match=f"more than {SIGNATURE_BYTES:,} bytes"):
        check_artifact(made, require(str(tmp_path / "prod.pub")))


def test_serve_tells_the_server_whose_signature_is_required(made, keys, tmp_path, monkeypatch):
    """`serve --require-signature` checked once, and the server's own check required nothing."""
    monkeypatch.chdir(tmp_path)
    sign(made, keys["prod"])
    shown = json.loads(answer("serve", "out", "--json", "--require-signature", "prod.pub").stdout)["environment"]
    assert shown == {"TANDEM_ARTIFACT": str(made), "TANDEM_REQUIRE_SIGNATURE": str(tmp_path / "prod.pub")}
    file = policy_file(tmp_path, prod="*")
    shown = json.loads(answer("serve", "out", "--json", "--policy", file).stdout)["environment"]
    assert shown == {"TANDEM_ARTIFACT": str(made), "TANDEM_POLICY": str(file)}
    named = serve._signers("https://github.com/o/r/.github/workflows/release.yml@refs/heads/main", "https://i", None)
    assert named["TANDEM_REQUIRE_SIGNATURE"].startswith("https://github.com/")
    assert named["TANDEM_ISSUER"] == "https://i"
    refused = invoke("serve", "out", "--json", "--require-signature", "dev.pub")
    assert refused.exit_code == 4


def test_the_server_requires_that_signature(made, keys, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from pipeline.serve import settings

    monkeypatch.setenv("TANDEM_REQUIRE_SIGNATURE", str(tmp_path / "prod.pub"))
    monkeypatch.delenv("TANDEM_POLICY", raising=False)
    settings.checked.cache_clear()
    with pytest.raises(RefusedError, match=r"not signed$"):
        settings.checked(made)
    monkeypatch.setenv("TANDEM_POLICY", str(policy_file(tmp_path, prod="*")))
    with pytest.raises(InputError, match="cannot be combined"):
        settings.checked(made)
    settings.checked.cache_clear()


def test_the_server_opens_what_was_verified(made, monkeypatch):
    """Another pod's pull may replace the folder between the check and the opening by another process."""
    pytest.importorskip("torch")
    from pipeline.runtime.open import open_batch

    with pytest.raises(CorruptError, match="replaced after it was verified"):
        open_batch(made, "0" * 64)


def test_policy_of_excludes_both(tmp_path, keys):
    with pytest.raises(InputError, match="cannot be combined"):
        policy_of(policy_file(tmp_path, prod="*"), "x")
    assert policy_of(None) is None
