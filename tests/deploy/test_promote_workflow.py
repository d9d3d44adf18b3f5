"""The promotion workflow's own steps, from server to server; and that the page on promotion shows this workflow."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline.registry.publish import PublishSettings, publish
from pipeline.registry.releases import list_releases
from support import small_artifacts as small
from support.paths import ROOT
from support.release_workflow import Runner

WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/promote.yml").read_text())
PAGE = (ROOT / "docs/how-to/promote.md").read_text()


@pytest.mark.server
def test_workflow_promotes_what_the_policy_accepts(url, tmp_path):
    """dev -> staging -> prod; a release by another signer stops before anything is written."""
    from pipeline.artifact.signing import signature_over
    from support.signing_keys import key_pair

    root = tmp_path / "repository"
    for name in ("pipeline", "scripts", ".github"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for version, signer in (("1.0", "release"), ("2.0", "stranger")):
        private, _ = key_pair(root, signer)
        made = small.make_validated(tmp_path / version, tmp_path / "work", weights=version.encode()).root
        sign = PublishSettings(version, sign=lambda data, key=private: signature_over(data, "r", key, None, None))
        publish(made, url, [], sign)
    rules = [{"releases": f"{url}-{stage}/*", "signed_by": [{"key": "release.pub"}]} for stage in ("staging", "prod")]
    (root / "policy.yaml").write_text(yaml.safe_dump({"rules": rules}))

    def promote(release: str, source: str, stage: str) -> None:
        expressions = {
            "inputs.release": release, "vars.TANDEM_PROMOTE_FROM": source, "vars.TANDEM_PROMOTE_TO": f"{url}-{stage}",
            "vars.TANDEM_PROMOTE_ALIAS": "latest", "vars.TANDEM_PROMOTE_POLICY || 'policy.yaml'": "policy.yaml",
        }  # fmt: skip
        runner = Runner(root, expressions, {"GITHUB_ACTOR": "alice", "TANDEM_CACHE": str(tmp_path / "cache")})
        runner.job("promote", "promote")

    promote("small@1.0", url, "staging")
    promote("small@1.0", f"{url}-staging", "prod")
    (released,) = list_releases(f"{url}-prod")
    assert (released.version, released.aliases, released.has_signature) == ("1.0", ("latest",), True)
    assert [(each.who, each.destination) for each in released.copies] == [
        ("alice", f"{url}-staging"), ("alice", f"{url}-prod"),
    ]  # fmt: skip
    assert "signed by release.pub; latest -> small@1.0" in (tmp_path / "summary").read_text()
    with pytest.raises(subprocess.CalledProcessError):
        promote("small@2.0", url, "staging")
    assert [each.version for each in list_releases(f"{url}-staging")] == ["1.0"]


def test_workflow_asks_for_an_approval_of_the_stage():
    """The stage is its environment, which has the approvals and the credentials; no identity, and no signature."""
    (job,) = WORKFLOW["jobs"].values()
    assert job["environment"] == "${{ inputs.stage }}"
    assert job["permissions"] == {"contents": "read"}
    assert WORKFLOW[True]["workflow_dispatch"]["inputs"]["stage"]["options"] == ["staging", "prod"]  # `on` is True


def test_page_shows_the_steps_of_the_workflow():
    """Each YAML block of the page is valid, and the job in it is the workflow's, without what is about GitHub alone."""
    blocks = [yaml.safe_load(block) for block in re.findall(r"^```yaml[^\n]*\n(.*?)^```", PAGE, re.M | re.S)]
    (shown,) = [block["jobs"]["promote"] for block in blocks if "jobs" in block]
    (job,) = WORKFLOW["jobs"].values()
    assert shown["environment"] == job["environment"]
    assert shown["env"].items() <= job["env"].items()
    commands = [step["run"] for step in shown["steps"] if "run" in step]
    assert commands == [step["run"].partition(" | tee")[0] for step in job["steps"] if step.get("name") != "Install"
                        and "run" in step]  # fmt: skip


def test_policies_on_the_page_are_valid(tmp_path):
    from pipeline.artifact.signing import read_policy
    from support.signing_keys import key_pair

    key_pair(tmp_path, "release")
    policies = [text for text in re.findall(r"^```yaml[^\n]*\n(.*?)^```", PAGE, re.M | re.S) if "rules:" in text]
    assert policies
    for text in policies:
        (tmp_path / "policy.yaml").write_text(text)
        assert read_policy(Path(tmp_path / "policy.yaml")).rules
