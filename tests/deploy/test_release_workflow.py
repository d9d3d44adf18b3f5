"""The release workflow's own steps, on real servers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipeline.registry import releases as registry
from support.release_workflow import BIN, Runner, expressions_of, make_repository

pytestmark = pytest.mark.server


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_repository(tmp_path)


def test_workflow_steps(repository, url, s3_url, tmp_path):
    """A push: the changed recipe alone is built from its lock, gated, signed, published; the alias moves. Then the
    comment of a pull request. `gh` is a stand-in that keeps what it was given; the key replaces the job's identity."""
    from pipeline.artifact import signing
    from pipeline.registry.pull import pull
    from support.signing_keys import key_pair

    private, public = key_pair(tmp_path, "release")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gh").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$GH_LOG"; cp comment.md "$GH_LOG.body"\n')
    (tmp_path / "bin/gh").chmod(0o755)
    environ = {"SIGNING_KEY": str(private), "TANDEM_CACHE": str(tmp_path / "cache"), "GH_LOG": str(tmp_path / "gh")}
    runner = Runner(repository, expressions_of(repository, url, s3_url), environ)
    runner.job("changed")
    assert runner.output.read_text() == 'recipes=["tiny"]\n'
    runner.job("build")
    assert "| passed | yes |" in runner.summary.read_text()
    runner.job("publish")
    released = registry.list_releases(url)
    assert [(one.name, one.aliases) for one in released] == [("tiny", ("prod",))]
    out = pull(f"{url}/tiny@prod", tmp_path / "out", cache=tmp_path / "c", policy=signing.require(str(public)))
    assert (out / "graphs").is_dir()
    runner.job("check")
    runner.job("comment")
    assert (tmp_path / "gh").read_text().split() == [
        "pr", "comment", "7", "--body-file", "comment.md", "--edit-last", "--create-if-none",
    ]  # fmt: skip
    assert "| passed | yes |" in (tmp_path / "gh.body").read_text()


def test_release_stops_at_a_failed_gate(repository, s3_url, tmp_path):
    """Nothing is published, and no alias moves; the tables and the reports are there all the same."""
    path = repository / "recipes/tiny.yaml"
    path.write_text(path.read_text().replace("tokens_per_step: 1.0", "tokens_per_step: 2.9"))
    environ = {"TANDEM_CACHE": str(tmp_path / "cache"), "SIGNING_KEY": "unused"}
    runner = Runner(repository, expressions_of(repository, s3_url, ""), environ)
    command = [str(BIN / "tandem"), "recipe", "lock", "tiny"]
    subprocess.run(command, cwd=repository, env=runner.environ, check=True)
    with pytest.raises(subprocess.CalledProcessError, match=r"release\.sh build"):
        runner.job("build")
    assert "| passed | no |" in runner.summary.read_text()
    assert (repository / "artifacts/tiny/reports/parity.html").is_file()
    with pytest.raises(subprocess.CalledProcessError, match=r"release\.sh check"):
        runner.job("publish")
    assert registry.list_releases(s3_url) == []


def test_a_build_that_made_nothing_has_a_summary(repository, tmp_path):
    (repository / "recipes/tiny.lock").write_text("damaged")
    runner = Runner(repository, expressions_of(repository, "", ""), {"TANDEM_CACHE": str(tmp_path / "cache")})
    with pytest.raises(subprocess.CalledProcessError, match=r"release\.sh build"):
        runner.job("check")
    assert (repository / "summaries/tiny.md").read_text() == "## tiny\n\nNo artifact: the log says why.\n"
    assert runner.summary.read_text() == (repository / "summaries/tiny.md").read_text()
