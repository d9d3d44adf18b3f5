"""Yanked releases: visible, rejected, never deleted. Retention: a rule that removes the files of old releases."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pipeline.errors import CorruptError, InputError, RefusedError
from pipeline.registry.aliases import list_aliases, roll_back, set_alias
from pipeline.registry.publish import PublishSettings, publish
from pipeline.registry.pull import Selection, pull
from pipeline.registry.releases import collect, list_releases
from pipeline.registry.yanks import Retention, retire, yank
from pipeline.stores.base import open_store
from support import small_artifacts as small
from support.commands import answer, invoke


@pytest.fixture
def url(tmp_path: Path, monkeypatch) -> str:
    """A registry with the versions 1 to 4, built a second apart; `prod` went through all but the first."""
    url = str(tmp_path / "reg")
    now = int(time.time())
    for number in (1, 2, 3, 4):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(now - 10 + number))
        root = small.make_validated(tmp_path / f"o{number}", tmp_path / "work", weights=b"w%d" % number).root
        publish(root, url, ["prod"] if number > 1 else [], PublishSettings(version=str(number)))
    return url


@pytest.fixture
def options(tmp_path: Path) -> dict:
    return {"directory": tmp_path / "pulled", "cache": tmp_path / "cache"}


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_yanked_release_is_refused_and_stays(url, options):
    before = files_of(Path(url))
    record = yank(f"{url}/small@2", "wrong tokenizer; use 3")
    assert (record.reason, record.retired) == ("wrong tokenizer; use 3", False)
    with pytest.raises(RefusedError, match="small@2 was yanked: wrong tokenizer; use 3") as caught:
        pull(f"{url}/small@2", **options)
    assert caught.value.exit_code == 4
    # `serve` has no such option: the fix is a command that works for both
    assert caught.value.fix == f"use another version, or the folder of: tandem pull {url}/small@2 --allow-yanked"
    assert not options["directory"].exists()
    pull(f"{url}/small@2", select=Selection(yanked=True), **options)
    pull(f"{url}/small@3", **options)
    assert set(before) <= set(files_of(Path(url)))
    listed = {each.version: each.yanked for each in list_releases(url)}
    assert listed == {"1": "", "2": "wrong tokenizer; use 3", "3": "", "4": ""}


def test_an_alias_does_not_lead_to_a_yanked_release(url, options, tmp_path):
    yank(f"{url}/small@3", "bad")
    with pytest.raises(RefusedError, match="yanked: bad"):
        set_alias(url, "small@3", "next")
    with pytest.raises(RefusedError, match="yanked: bad"):
        roll_back(url, "small", "prod")
    assert list_aliases(url, "small") == {"prod": "4"}
    yank(f"{url}/small@4", "bad too")
    with pytest.raises(RefusedError, match="small@4 was yanked: bad too"):
        pull(f"{url}/small@prod", **options)
    with pytest.raises(RefusedError, match="yanked"):
        publish(tmp_path / "o4", url, ["other"], settings_of("4"))
    set_alias(url, "small@2", "prod")
    pull(f"{url}/small@prod", **options)


def settings_of(version: str) -> PublishSettings:
    return PublishSettings(version=version)


def test_a_second_yank_changes_nothing(url):
    first = yank(f"{url}/small@1", "one")
    assert yank(f"{url}/small@1", "two") == first


@pytest.mark.parametrize(
    ("reference", "reason", "says"),
    [("small@prod", "x", "prod is an alias"), ("small@9", "x", "no version or alias '9'"), ("small@1", "  ", "empty")],
)
def test_yank_names_a_version_and_a_reason(url, reference, reason, says):
    with pytest.raises(InputError, match=says):
        yank(f"{url}/{reference}", reason)


def test_a_damaged_record_counts_as_a_yank(url, options):
    path = Path(url, "yanks/small/1")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(CorruptError, match="damaged record of a yank"):
        pull(f"{url}/small@1", **options)
    assert "damaged record" in next(each.damage for each in list_releases(url) if each.version == "1")


def test_gc_keeps_the_files_of_a_yanked_release(url, options):
    yank(f"{url}/small@1", "bad")
    assert collect(url).blobs == 0
    pull(f"{url}/small@1", select=Selection(yanked=True), **options)


def test_retention_removes_files_and_keeps_versions(url, options, tmp_path):
    """Of 1 to 4, `prod` points at 4 and would be rolled back to 3: with the newest alone kept, 1 and 2 retire."""
    manifests = {version: Path(url, f"releases/small/{version}/manifest.json").read_bytes() for version in "1234"}
    assert retire(url, Retention(keep_last=1), dry_run=True) == ["small@1", "small@2"]
    assert collect(url, dry_run=True).blobs == 0
    assert retire(url, Retention(keep_last=1)) == ["small@1", "small@2"]
    assert collect(url).blobs > 0
    assert retire(url, Retention(keep_last=1)) == []
    for version, data in manifests.items():
        assert Path(url, f"releases/small/{version}/manifest.json").read_bytes() == data
    with pytest.raises(RefusedError, match="retired by `tandem gc --keep-last 1`"):
        pull(f"{url}/small@1", **options)
    for version in ("3", "4"):
        pull(f"{url}/small@{version}", **options)
    with pytest.raises(RefusedError, match="yanked"):
        publish(tmp_path / "o1", url, [], settings_of("1"))


def test_retention_keeps_versions_of_one_second_together(tmp_path, monkeypatch):
    """`created` has whole seconds: of 2 and 3, built in one second, either may be the newer. A fault on a fast host."""
    url = str(tmp_path / "reg")
    for number, second in ((1, 1), (2, 2), (3, 2)):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(1_700_000_000 + second))
        root = small.make_validated(tmp_path / f"o{number}", tmp_path / "work", weights=b"w%d" % number).root
        publish(root, url, [], PublishSettings(version=str(number)))
    assert retire(url, Retention(keep_last=1)) == ["small@1"]


def test_retention_by_age_keeps_the_young(url):
    assert retire(url, Retention(keep_days=1)) == []
    assert retire(url, Retention(keep_days=0)) != []


def test_retention_keeps_what_was_yanked(url):
    yank(f"{url}/small@1", "bad")
    assert retire(url, Retention(keep_last=1)) == ["small@2"]
    assert open_store(url).read_yank("small", "1").reason == "bad"


def test_a_hub_has_no_retention():
    with pytest.raises(InputError, match="a Hub keeps"):
        retire("hf://org", Retention(keep_last=1))


def test_commands(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    assert answer("yank", "reg/small@1", "--reason", "bad").stdout == "yanked small@1: bad\n"
    assert "bad" in next(line for line in answer("ls", "reg").stdout.splitlines() if line.startswith("small@1 "))
    refused = invoke("pull", "reg/small@1", "d", "--json")
    assert refused.exit_code == 4
    assert json.loads(refused.stdout)["error"]["kind"] == "refused"
    answer("pull", "reg/small@1", "d", "--allow-yanked")
    gone = json.loads(answer("gc", "reg", "--keep-last", "1", "--json").stdout)
    assert gone["retired"] == ["small@2"]
    assert gone["blobs"] > 0


def test_yank_names_the_aliases_that_point_at_the_release(url, tmp_path, monkeypatch):
    """Pulls of `prod` failed after a yank that said nothing about it."""
    monkeypatch.chdir(tmp_path)
    set_alias(url, "small@4", "latest")
    shown = answer("yank", "reg/small@4", "--reason", "bad")
    assert shown.stdout == "yanked small@4: bad\n"
    for alias in ("prod", "latest"):
        fix = f"`tandem alias set reg/small@VERSION {alias}`"
        assert f"warning: {alias} points at small@4; pulls of small@{alias} fail until {fix}\n" in shown.stderr
    assert answer("yank", "reg/small@1", "--reason", "bad").stderr == ""


def test_a_second_yank_with_another_reason_shows_the_first(url, tmp_path, monkeypatch):
    """It printed the first reason as if it had recorded the second."""
    monkeypatch.chdir(tmp_path)
    answer("yank", "reg/small@1", "--reason", "one")
    assert answer("yank", "reg/small@1", "--reason", "one").stdout == "yanked small@1: one\n"
    shown = answer("yank", "reg/small@1", "--reason", "two").stdout
    assert shown.startswith("small@1 was yanked before, 20")
    assert shown.endswith(": one; this --reason was not recorded\n")
