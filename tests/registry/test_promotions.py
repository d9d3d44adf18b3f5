"""The record of how a release came into a registry: who copied it, from where, step by step; damage is no silence."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.artifact import manifest
from pipeline.artifact.manifest import PULLED
from pipeline.artifact.pulled import MAX_RECORD_BYTES, Promoted, PullRecord
from pipeline.errors import CorruptError
from pipeline.registry.copy import copy
from pipeline.registry.publish import Place, publish
from pipeline.registry.pull import pull
from pipeline.registry.releases import collect, list_releases
from pipeline.stores import promotions
from pipeline.stores.promotions import MAX_PROMOTIONS, Promotion, promotion_text, promotions_of
from support.commands import answer

STEP = Promotion("s3://dev/small@1.0", "s3://prod", "2026-11-30T10:00:00Z", "alice", "urn:tandem:builder:local")


@pytest.fixture
def chain(tmp_path: Path, made: Path, monkeypatch) -> Path:
    """Registries dev -> staging -> prod, by two people, the second in a workflow."""
    for name, value in {"GITHUB_RUN_ID": "", "GITHUB_WORKFLOW_REF": ""}.items():
        monkeypatch.setenv(name, value)
    publish(made, str(tmp_path / "dev"), ["latest"])
    monkeypatch.setenv("GITHUB_ACTOR", "alice")
    copy(f"{tmp_path}/dev/small@latest", Place(f"{tmp_path}/staging", ("latest",)))
    monkeypatch.setenv("GITHUB_ACTOR", "bob")
    monkeypatch.setenv("GITHUB_WORKFLOW_REF", "org/repo/.github/workflows/promote.yml@refs/heads/main")
    monkeypatch.setenv("GITHUB_RUN_ID", "7")
    monkeypatch.setenv("GITHUB_REPOSITORY", "org/repo")
    copy(f"{tmp_path}/staging/small@latest", Place(f"{tmp_path}/prod"))
    return tmp_path


def test_each_copy_adds_who_and_from_where(chain):
    assert list_releases(str(chain / "dev"))[0].copies == ()
    (release,) = list_releases(str(chain / "prod"))
    first, second = release.copies
    assert (first.who, first.source) == ("alice", f"{chain}/dev/small@{release.version}")
    assert (first.destination, first.builder, first.run) == (f"{chain}/staging", "urn:tandem:builder:local", "")
    assert (second.who, second.source) == ("bob", f"{chain}/staging/small@{release.version}")
    assert second.builder == "https://github.com/org/repo/.github/workflows/promote.yml@refs/heads/main"
    assert second.run == "https://github.com/org/repo/actions/runs/7/attempts/1"
    assert list_releases(str(chain / "staging"))[0].copies == (first,)


def test_a_copy_of_a_release_that_is_there_adds_no_record(chain):
    before = list_releases(str(chain / "prod"))[0].copies
    copy(f"{chain}/dev/small@latest", Place(f"{chain}/prod"))
    assert list_releases(str(chain / "prod"))[0].copies == before


def test_a_copy_that_was_killed_before_its_release_leaves_one_record(chain, monkeypatch):
    """The record is written before the release; a repeated copy by the same person adds no second one."""
    shutil.rmtree(chain / "prod/releases")
    copy(f"{chain}/staging/small@latest", Place(f"{chain}/prod"))
    (release,) = list_releases(str(chain / "prod"))
    assert [each.who for each in release.copies] == ["alice", "bob"]
    shutil.rmtree(chain / "prod/releases")
    monkeypatch.setenv("GITHUB_ACTOR", "carol")
    copy(f"{chain}/staging/small@latest", Place(f"{chain}/prod"))
    (release,) = list_releases(str(chain / "prod"))
    assert sorted(each.who for each in release.copies) == ["alice", "bob", "carol"]


def test_the_record_is_an_in_toto_statement_about_the_document(chain):
    (path,) = (chain / "prod/promotions").rglob("*/*")
    statement = json.loads(path.read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "urn:tandem:promotion:v1"
    (release,) = list_releases(str(chain / "prod"))
    assert statement["subject"] == [{"name": f"small@{release.version}", "digest": {"sha256": path.parent.name}}]


def test_gc_keeps_records(chain):
    collect(str(chain / "prod"))
    assert len(list_releases(str(chain / "prod"))[0].copies) == 2


def test_inspect_of_a_pulled_artifact_shows_each_promotion(chain):
    """It showed neither where the artifact came from, nor who had copied its release there."""
    version = list_releases(str(chain / "prod"))[0].version
    out = pull(f"{chain}/prod/small@{version}", chain / "out", cache=chain / "cache")
    shown = " ".join(answer("inspect", str(out)).stdout.split())
    assert f"pulled from {chain}/prod/small@{version} promoted 1 from" in shown
    assert f"from {chain}/dev/small@{version} to {chain}/staging by alice, 20" in shown
    assert f"from {chain}/staging/small@{version} to {chain}/prod by bob, 20" in shown
    assert "UTC, https://github.com/org/repo/actions/runs/7/attempts/1" in shown
    data = json.loads(answer("inspect", str(out), "--json").stdout)["pulled"]
    assert [each["who"] for each in data["promotions"]] == ["alice", "bob"]
    again = pull(f"{chain}/prod/small@{version}", chain / "again", cache=chain / "cache", offline=True)
    assert (again / PULLED).read_bytes() == (out / PULLED).read_bytes()


def test_inspect_of_an_alias_names_its_release_and_without_a_copy_no_promotion(chain):
    shown = answer("inspect", str(pull(f"{chain}/dev/small@latest", chain / "out", cache=chain / "cache"))).stdout
    version = list_releases(str(chain / "dev"))[0].version
    assert f"small@latest (release {version})" in " ".join(shown.split())
    assert "promoted" not in shown


def test_inspect_of_a_damaged_record_of_the_pull(chain):
    out = pull(f"{chain}/dev/small@latest", chain / "out", cache=chain / "cache")
    (out / PULLED).write_text("{}")
    assert "damaged record of the pull" in answer("inspect", str(out)).stdout


def test_a_pull_without_a_readable_record_has_no_promotions(chain):
    (path,) = (chain / "prod/promotions").rglob("*/*")
    path.write_bytes(b"{")
    version = list_releases(str(chain / "prod"))[0].version
    out = pull(f"{chain}/prod/small@{version}", chain / "out", cache=chain / "cache")
    assert json.loads((out / PULLED).read_text())["promotions"] == []


def test_a_record_of_a_pull_keeps_the_newest_promotions():
    """A record beyond its limit could not be read."""
    steps = [Promoted(**asdict(STEP) | {"when": f"{n:04}", "source": "s" * 4000}) for n in range(60)]
    record = PullRecord(reference="r", version="1", manifest_sha256="a", signer=None, promotions=tuple(steps))
    kept = PullRecord.model_validate_json(record.dump()).promotions
    assert len(record.dump()) <= MAX_RECORD_BYTES
    assert 0 < len(kept) < len(steps)
    assert kept[-1] == steps[-1]


def test_alias_history_shows_who_copied_each_release(chain):
    """It showed who had moved the alias, and not where the release came from."""
    shown = answer("alias", "history", f"{chain}/staging/small@latest").stdout
    assert f"{chain}/dev by alice, 20" in " ".join(shown.split())
    (move,) = json.loads(answer("alias", "history", f"{chain}/staging/small@latest", "--json").stdout)
    assert [each["source"] for each in move["copies"]] == [f"{chain}/dev/small@{move['version']}"]
    assert "copied" not in answer("alias", "history", f"{chain}/dev/small@latest").stdout


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"\xff", b"other"])
def test_a_damaged_record_is_shown_and_stops_a_copy(chain, damage):
    (path,) = (chain / "prod/promotions").rglob("*/*")
    path.write_bytes(damage)
    (release,) = list_releases(str(chain / "prod"))
    assert (release.damage, release.copies) == ("", ())
    assert "damaged record" in release.copies_damage
    with pytest.raises(CorruptError, match=r"damaged record of a promotion \(promoted\.json\)"):
        copy(f"{chain}/prod/small@{release.version}", Place(f"{chain}/next"))


def test_a_record_of_another_manifest_is_rejected():
    data = promotion_text("small@1.0", "a" * 64, [STEP])
    assert promotions_of(data, "a" * 64, "here") == (STEP,)
    with pytest.raises(CorruptError, match="of another manifest"):
        promotions_of(data, "b" * 64, "here")


@pytest.mark.parametrize("who", ["\x1b[31mroot", "a\nb", "x" * 5000])
def test_a_record_cannot_write_to_a_terminal(who):
    data = json.loads(promotion_text("small@1.0", "a" * 64, [STEP]))
    data["predicate"]["promotions"][0]["who"] = who
    with pytest.raises(CorruptError, match="damaged record"):
        promotions_of(json.dumps(data).encode(), "a" * 64, "here")


def test_a_record_is_bounded():
    """The newest promotions are kept."""
    steps = [Promotion("s" * 4000, str(number), "", "w", "b") for number in range(MAX_PROMOTIONS + 50)]
    data = promotion_text("small@1.0", "a" * 64, steps)
    assert len(data) <= 256 << 10
    assert promotions_of(data, "a" * 64, "here")[-1] == steps[-1]


def test_names_of_the_record_agree():
    """`artifact` and `stores` do not import each other; a manifest must not list a file of this name."""
    assert manifest.PROMOTED == promotions.PROMOTED
    assert promotions.PROMOTED in manifest.BESIDE
