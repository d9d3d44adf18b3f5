"""Who signed, who must have, and what provenance says: all offline, with keys. Keyless needs the real services."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.artifact import signer, signing
from pipeline.artifact.manifest import MANIFEST, SIGNATURE
from pipeline.artifact.provenance import PROVENANCE
from pipeline.artifact.signing import check_artifact, read_policy, require, sign, signature_over
from pipeline.artifact.verify import verify
from pipeline.cli.main import main
from pipeline.errors import ArtifactError, HostError, InputError
from pipeline.registry.publish import PublishSettings, publish
from pipeline.registry.pull import pull
from support.paths import ROOT
from support.signing_keys import key_pair

pytest.importorskip("model_signing")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return key_pair(tmp_path, "release")


@pytest.fixture
def options(tmp_path: Path) -> dict:
    return {"directory": tmp_path / "pulled", "cache": tmp_path / "cache"}


def test_sign_then_check(made, keys):
    private, public = keys
    assert sign(made, private) == made / SIGNATURE
    check_artifact(made, require(str(public)))
    verify(made)  # a signature is not an extra file


def test_sign_is_what_the_tool_of_model_signing_verifies(made, keys):
    """No format of our own: the reference tool accepts it."""
    sign(made, keys[0])
    command = [str(Path(sys.executable).parent / "model_signing"), "verify", "key", str(made), "--signature",
               str(made / SIGNATURE), "--ignore_unsigned_files", "--public_key", str(keys[1])]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_check_unsigned(made, keys):
    with pytest.raises(ArtifactError, match=r"not signed$"):
        check_artifact(made, require(str(keys[1])))


def test_check_another_key(made, keys, tmp_path):
    sign(made, key_pair(tmp_path, "stranger")[0])
    with pytest.raises(
        ArtifactError, match=rf"^{re.escape(str(made))}: not signed by .*release\.pub: signed by another key$"
    ):
        check_artifact(made, require(str(keys[1])))


@pytest.mark.parametrize("field", ["version", "files"])
def test_check_a_changed_manifest(made, keys, field):
    sign(made, keys[0])
    data = json.loads((made / MANIFEST).read_text())
    data["version"] = "other" if field == "version" else data["version"]
    if field == "files":
        data["files"]["recipe.yaml"] |= {"sha256": "0" * 64}
    (made / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="over another manifest"):
        check_artifact(made, require(str(keys[1])))


@pytest.mark.parametrize("data", [b"", b"{}", b"not json", b"[" * 10_000, b'{"mediaType": 1}', bytes(range(256))])
def test_check_a_damaged_signature(made, keys, data):
    (made / SIGNATURE).write_bytes(data)
    with pytest.raises(ArtifactError, match="not signed by"):
        check_artifact(made, require(str(keys[1])))


def test_check_a_signature_that_is_a_link(made, keys, tmp_path):
    sign(made, keys[0])
    (made / SIGNATURE).rename(tmp_path / "elsewhere")
    (made / SIGNATURE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"not signed$"):
        check_artifact(made, require(str(keys[1])))
    with pytest.raises(ArtifactError, match="signature: a link"):
        verify(made)


def test_require_a_key_that_is_not_there(tmp_path):
    """It was an error of the environment, with exit code 3."""
    with pytest.raises(InputError, match=r"--require-signature: no such file: `.*none\.pub`"):
        require(str(tmp_path / "none.pub"))


def test_require_the_private_key(keys):
    """The artifact was blamed: `not signed by release.pem: Valid PEM but no BEGIN PUBLIC KEY; do not use it`."""
    with pytest.raises(InputError, match=r"^--require-signature: .*release\.pem is not a public key$") as caught:
        require(str(keys[0]))
    assert caught.value.fix == f"name {keys[1]}"


def test_require_a_damaged_public_key(made, keys, tmp_path):
    sign(made, keys[0])
    (tmp_path / "bad.pub").write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    with pytest.raises(InputError, match=r"bad\.pub: unusable public key") as caught:
        check_artifact(made, require(str(tmp_path / "bad.pub")))
    assert not isinstance(caught.value, ArtifactError)


@pytest.mark.parametrize(
    ("name", "says"), [("gone.pub", "no such file: `.*gone.pub`"), ("release.pem", "is not a public key")]
)
def test_read_policy_names_the_line_of_an_unusable_key(keys, tmp_path, name, says):
    (tmp_path / "policy.yaml").write_text(f"rules:\n  - signed_by:\n      - key: release.pub\n      - key: {name}\n")
    with pytest.raises(InputError, match=says) as caught:
        read_policy(tmp_path / "policy.yaml")
    assert caught.value.where.endswith("policy.yaml:4: rules[0].signed_by[1].key")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("data", [b"", b"-----BEGIN nothing-----"])
def test_sign_with_what_is_no_key(made, tmp_path, data):
    (tmp_path / "key.pem").write_bytes(data)
    with pytest.raises(InputError, match="unusable private key") as caught:
        sign(made, tmp_path / "key.pem")
    assert "openssl" in caught.value.fix


def test_pull_refuses_before_a_byte_is_fetched(made, keys, options, tmp_path):
    publish(made, str(tmp_path / "registry"), ["latest"])
    with pytest.raises(ArtifactError, match="not signed"):
        pull(f"{tmp_path}/registry/small@latest", policy=require(str(keys[1])), **options)
    assert not options["directory"].exists()
    assert not (options["cache"] / "blobs" / "sha256").exists()


def test_pull_brings_the_signature(made, keys, options, tmp_path):
    sign(made, keys[0])
    publish(made, str(tmp_path / "registry"), ["latest"])
    out = pull(f"{tmp_path}/registry/small@latest", policy=require(str(keys[1])), **options)
    check_artifact(out, require(str(keys[1])))
    shutil.rmtree(tmp_path / "registry")
    shutil.rmtree(out)
    pull(f"{tmp_path}/registry/small@latest", policy=require(str(keys[1])), offline=True, **options)


def test_pull_one_of_several_signatures(made, keys, options, tmp_path):
    """Somebody else's signature beside the right one does no harm, and helps nobody."""
    url = str(tmp_path / "registry")
    sign(made, key_pair(tmp_path, "stranger")[0])
    publish(made, url, ["latest"])
    with pytest.raises(ArtifactError, match="not signed by"):
        pull(f"{url}/small@latest", policy=require(str(keys[1])), **options)
    stranger = (made / SIGNATURE).read_bytes()
    sign(made, keys[0])
    folder = next(Path(url).glob("signatures/*"))
    (folder / ("f" * 64)).write_bytes((made / SIGNATURE).read_bytes())
    out = pull(f"{url}/small@latest", policy=require(str(keys[1])), **options)
    assert (out / SIGNATURE).read_bytes() != stranger


POLICY = """
rules:
  - releases: "{url}/small@*"
    builder: "{builder}"
    signed_by: [{{key: release.pub}}]
"""


@pytest.mark.parametrize(
    ("builder", "message"), [("urn:tandem:*", ""), ("https://github.com/*", "builder mismatch: found urn:tandem")]
)
def test_policy_file(made, keys, options, tmp_path, builder, message):
    url = str(tmp_path / "registry")
    sign(made, keys[0])
    publish(made, url, ["latest"])
    (tmp_path / "policy.yaml").write_text(POLICY.format(url=url, builder=builder))
    policy = read_policy(tmp_path / "policy.yaml")
    if not message:
        out = pull(f"{url}/small@latest", policy=policy, **options)
        check_artifact(out, policy)
        pull(f"{url}/small@latest", policy=policy, offline=True, **options)
        (out / PROVENANCE).unlink()  # so that no edit reaches the local store
        (out / PROVENANCE).write_text("{}")
        with pytest.raises(ArtifactError, match="provenance names no builder"):
            check_artifact(out, policy)
        return
    pull(f"{url}/small@latest", **options)
    for offline in (False, True):
        with pytest.raises(ArtifactError, match=message):
            pull(f"{url}/small@latest", policy=policy, offline=offline, **options)


def test_policy_without_a_rule_for_a_release(made, keys, options, tmp_path):
    publish(made, str(tmp_path / "registry"), ["latest"])
    (tmp_path / "policy.yaml").write_text(POLICY.format(url="s3://prod", builder="*"))
    with pytest.raises(ArtifactError, match="no rule of the policy"):
        pull(f"{tmp_path}/registry/small@latest", policy=read_policy(tmp_path / "policy.yaml"), **options)


SPELLINGS = ("{0}/registry", "file://{0}/registry", "registry", "./registry", "{0}/other/../registry", "link")


@pytest.mark.parametrize("pattern", ["{0}/registry/*", "file://{0}/registry/*", "registry/small@*", "{0}/link/*"])
def test_policy_compares_folders_not_their_spelling(tmp_path, keys, monkeypatch, pattern):
    """`/srv/reg/*` allowed `/srv/reg/small@1`, but neither `file:///srv/reg/small@1` nor `reg/small@1`."""
    monkeypatch.chdir(tmp_path)
    for name in ("registry", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("registry")
    (tmp_path / "policy.yaml").write_text(
        POLICY.format(url="x", builder="*").replace("x/small@*", pattern.format(tmp_path))
    )
    policy = read_policy(tmp_path / "policy.yaml")
    for spelling in SPELLINGS:
        assert policy.rule(f"{spelling.format(tmp_path)}/small@1.0")
    for other in ("other", f"{tmp_path}/registry/../other", "s3://registry"):
        with pytest.raises(ArtifactError, match="no rule of the policy matches") as caught:
            policy.rule(f"{other}/small@1.0")
        assert pattern.format(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("rules: []", "rules"), ("rules: [{signed_by: []}]", "signed_by"), ("rules: [{signed_by: [{}]}]", "exactly one"),
     ("rule: 1", "rule: unknown key"), (": :", "policy.yaml:1: an empty key"),
     ("rules: [", "policy.yaml:1:9: not YAML"),
     ("rules: [{releases: x, releases: y}]", "policy.yaml:1: rules.0..releases: key given twice"),
     ("rules: [{signed_by: [{key: a, identity: b}]}]", "exactly one"),
     ("rules: [{signedby: [{key: a}]}]", r"policy.yaml:1: rules\[0\].signedby: unknown key")],
)  # fmt: skip
def test_read_policy_damaged(tmp_path, text, message):
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_policy(tmp_path / "policy.yaml")


def test_read_policy_with_a_misspelt_key_says_which_is_meant(tmp_path):
    """It said `Field required`."""
    (tmp_path / "policy.yaml").write_text("rules:\n  - signedby: [{key: a}]\n    release: x\n")
    with pytest.raises(InputError) as caught:
        read_policy(tmp_path / "policy.yaml")
    assert [(p.where.rpartition(": ")[2], p.what, p.fix) for p in caught.value.problems] == [
        ("rules[0].signedby", "unknown key", "did you mean signed_by?"),
        ("rules[0].release", "unknown key", "did you mean releases?"),
    ]


def test_read_policy_missing(tmp_path):
    with pytest.raises(InputError, match="cannot read the policy"):
        read_policy(tmp_path / "policy.yaml")


def test_keyless_without_its_services(made, monkeypatch):
    """What cannot be checked is refused, and said to be the network's fault, not the artifact's."""

    def unreachable(*args, **kwargs):
        raise TUFError("Failed to refresh TUF metadata")

    class TUFError(Exception):
        pass

    class Config:
        use_sigstore_verifier = use_sigstore_signer = unreachable

    for module in (signing, signer):
        monkeypatch.setattr(module, "library", lambda _: type("module", (), {"Config": Config}))
    (made / SIGNATURE).write_bytes(b"{}")
    with pytest.raises(HostError, match="cannot be checked on this host"):
        check_artifact(made, require("https://github.com/org/repo/.github/workflows/release.yml@refs/heads/main"))
    with pytest.raises(HostError, match="cannot sign"):
        sign(made)


def test_load_refuses_before_it_opens_anything(made, keys, tmp_path):
    """The graph here is no library at all: opening it would be another error."""
    pytest.importorskip("torch")
    from pipeline.runtime.open import load

    with pytest.raises(ArtifactError, match=r"not signed$"):
        load(made, require(str(keys[1])))
    sign(made, key_pair(tmp_path, "stranger")[0])
    with pytest.raises(ArtifactError, match="not signed by"):
        load(made, require(str(keys[1])))


@pytest.fixture
def index_signer(keys):
    return lambda index: signature_over(index, "release", keys[0], None, None)


def test_a_version_that_was_chosen_is_signed_too(made, keys, index_signer, options, tmp_path):
    """Who can write to a registry, and has no key, gives no old release a new version."""
    url, policy = str(tmp_path / "registry"), require(str(keys[1]))
    sign(made, keys[0])
    publish(made, url, ["latest"], PublishSettings(version="1.0", sign=index_signer))
    releases = tmp_path / "registry" / "releases" / "small"
    for offline in (False, True):
        check_artifact(pull(f"{url}/small@1.0", policy=policy, offline=offline, **options), policy)
    (releases / "2.0").mkdir()
    index = (releases / "1.0" / MANIFEST).read_text()
    (releases / "2.0" / MANIFEST).write_text(index.replace('"version": "1.0"', '"version": "2.0"'))
    pull(f"{url}/small@2.0", **options)
    for offline in (False, True):
        with pytest.raises(ArtifactError, match="the index of this release is not signed"):
            pull(f"{url}/small@2.0", policy=policy, offline=offline, **options)


def test_an_index_signed_by_a_stranger(made, keys, options, tmp_path):
    stranger = key_pair(tmp_path, "stranger")[0]
    sign(made, keys[0])
    url = str(tmp_path / "registry")
    sign_wrongly = PublishSettings(
        version="1.0", sign=lambda index: signature_over(index, "release", stranger, None, None)
    )
    publish(made, url, options=sign_wrongly)
    with pytest.raises(ArtifactError, match="signed by another key"):
        pull(f"{url}/small@1.0", policy=require(str(keys[1])), **options)


def test_commands_that_run_an_artifact_ask_for_signatures(made, keys, tmp_path, monkeypatch):
    (tmp_path / "policy.yaml").write_text(POLICY.format(url="x", builder="*").replace("x/small", "small"))
    monkeypatch.setenv("TANDEM_POLICY", str(tmp_path / "policy.yaml"))
    monkeypatch.chdir(ROOT)  # where recipes/ is
    for command in (("run", str(made), "--prompt", "hi"), ("bench", str(made)), ("validate", str(made)),
                    ("tune", "pico-spec", "--artifact", str(made)), ("verify", str(made))):  # fmt: skip
        result = CliRunner().invoke(main, command)
        assert "not signed" in result.output, command


def test_a_policy_and_an_identity_exclude_each_other(made, keys, tmp_path, monkeypatch):
    monkeypatch.setenv("TANDEM_POLICY", str(tmp_path / "policy.yaml"))
    result = CliRunner().invoke(main, ["verify", str(made), "--require-signature", str(keys[1])])
    assert result.exit_code == 2
    assert "cannot be combined with a policy" in result.output


def test_what_is_remembered_of_an_alias_is_of_one_release(made, keys, index_signer, options, tmp_path):
    """After an alias moved from a release with an index to one without, and where the memory is damaged."""
    url, policy = str(tmp_path / "registry"), require(str(keys[1]))
    sign(made, keys[0])
    publish(made, url, ["prod"], PublishSettings(version="1.0", sign=index_signer))
    pull(f"{url}/small@prod", policy=policy, **options)
    publish(made, url, ["prod"])
    pull(f"{url}/small@prod", policy=policy, **options)
    check_artifact(pull(f"{url}/small@prod", policy=policy, offline=True, **options), policy)
    for memory in (options["cache"] / "blobs" / "manifests").iterdir():
        memory.write_bytes(memory.read_bytes()[:40])
    with pytest.raises(HostError, match="not in the local cache"):
        pull(f"{url}/small@prod", policy=policy, offline=True, **options)
