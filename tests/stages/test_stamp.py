"""What makes a build stale, told without torch: local files, and revisions of sources that may move."""

from __future__ import annotations

import json

import pytest

from pipeline.artifact.manifest import MANIFEST
from pipeline.errors import PreflightError, Problem
from pipeline.recipe import load
from pipeline.sources import kinds
from pipeline.stages import checks, stamp
from pipeline.stages.settings import BuildSettings
from pipeline.stages.stamp import Stamp, fingerprint
from support import small_artifacts as small

RECIPE = """
name: moving
target: {source: "hf://org/model@main"}
draft: {derive: {from: target, layers: [0]}}
speculation: {draft_tokens: [2]}
shapes: {batch: [1], prefill: [16], kv: [48]}
"""


@pytest.fixture
def settings(tmp_path) -> BuildSettings:
    (tmp_path / "moving.yaml").write_text(RECIPE)
    recipe = load(tmp_path / "moving.yaml")
    return BuildSettings(recipe, tmp_path, small.make(tmp_path / "out", tmp_path / "work").root, tmp_path / "cache")


def points_at(monkeypatch, revision: str | None) -> None:
    """What the Hub says of the branch; `sources.kinds` asks it, tested against a real one in tests/sources."""
    monkeypatch.setattr(stamp, "current_revision", lambda source: revision)


def test_a_branch_that_moved_is_stale(settings, monkeypatch):
    """The revision of `hf://...@branch` was no input of a build: a branch that moved read as nothing changed."""
    record = Stamp(settings.cache, settings.out)
    points_at(monkeypatch, "a" * 40)
    record.record(fingerprint(settings))
    assert record.is_current(fingerprint(settings))
    points_at(monkeypatch, "b" * 40)
    assert not record.is_current(fingerprint(settings))


def test_a_branch_without_a_network_is_current(settings, monkeypatch):
    lines: list[str] = []
    record, quiet = Stamp(settings.cache, settings.out), settings
    points_at(monkeypatch, "a" * 40)
    record.record(fingerprint(quiet))
    points_at(monkeypatch, None)
    offline = BuildSettings(settings.recipe, settings.base, settings.out, settings.cache, log=lines.append)
    assert record.is_current(fingerprint(offline))
    assert lines == ["hf://org/model@main: current revision unknown; assumed unchanged since the last build"]


def test_a_commit_needs_no_hub(settings, tmp_path, monkeypatch):
    (tmp_path / "moving.yaml").write_text(RECIPE.replace("@main", f"@{'c' * 40}"))
    pinned = BuildSettings(load(tmp_path / "moving.yaml"), tmp_path, settings.out, settings.cache)
    monkeypatch.setattr(stamp, "current_revision", lambda source: pytest.fail("the Hub was asked"))
    assert fingerprint(pinned)["revisions"] == {}


def test_an_artifact_that_was_replaced_is_not_current(settings, monkeypatch):
    record = Stamp(settings.cache, settings.out)
    points_at(monkeypatch, "a" * 40)
    record.record(fingerprint(settings))
    path = settings.out / MANIFEST
    manifest = json.loads(path.read_bytes())
    path.unlink()
    path.write_text(json.dumps(manifest | {"version": "other"}))
    assert not record.is_current(fingerprint(settings))


def test_every_preflight_problem_is_shown_with_its_fix(settings, monkeypatch):
    """Of several problems only the first one's place and fix were shown."""
    problems = [Problem("packages", "no compiler", "install one"), Problem("device", "no chip", "rent one")]

    class Lacking:
        def preflight(self) -> list[Problem]:
            return problems

    monkeypatch.setattr(checks, "make_backend", lambda backend: Lacking())
    with pytest.raises(PreflightError) as caught:
        checks.usable_backend(settings.recipe)
    assert caught.value.problems == tuple(problems)
    assert caught.value.exit_code == 3


def test_moving_knows_what_may_move():
    assert kinds.moving("hf://org/model@main")
    assert not kinds.moving(f"hf://org/model@{'c' * 40}")
    assert not kinds.moving("pico://qwen3")
