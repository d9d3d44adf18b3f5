"""Power that goes at every write, rename and sync: after the next start everything is whole or absent, and nothing
that was reported as done is gone. And disks that fail there once: the command ends with an error, and works again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.artifact.manifest import read
from pipeline.artifact.verify import verify
from pipeline.cache.local import Cache
from pipeline.errors import TandemError
from pipeline.registry.archives import load, save
from pipeline.registry.publish import Place, PublishSettings, publish
from pipeline.registry.pull import Selection, pull
from pipeline.registry.releases import list_releases
from pipeline.registry.yanks import yank
from pipeline.stores.base import open_store
from support import small_artifacts as small
from support.power_loss import CUTS, observed

KEYS = {"a1" * 8: b"one" * 100, "b2" * 8: b"two" * 50_000}


@dataclass(frozen=True)
class Case:
    """What is done in a folder; what must hold after a cut, done or not; `prepare` fills the folder before."""

    act: Callable[[Path, Path], object]
    check: Callable[[Path, Path, bool], None]
    prepare: Callable[[Path, Path], object] = lambda root, given: None


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two artifacts, and a registry with both; on another disk, whose power stays."""
    folder = tmp_path_factory.mktemp("given")
    for name in ("one", "two"):
        root = small.make_validated(folder / name, folder / "work", weights=name.encode(), size=300).root
        publish(root, str(folder / "registry"), ["prod"], PublishSettings(version=name))
    return folder


def fill_cache(root: Path, given: Path) -> None:
    for key, data in KEYS.items():
        Cache(root / "cache", "graphs").put(key, data, {"torch": "1"})


def check_cache(root: Path, given: Path, done: bool) -> None:
    for key, data in KEYS.items():
        found = Cache(root / "cache", "graphs").get(key)
        assert found.read_bytes() == data if found else not done


def package(root: Path, given: Path) -> None:
    shutil.rmtree(root / "work/shards", ignore_errors=True)  # the stand-in for the sharder syncs nothing
    small.make_again(root / "out", root / "work", weights=b"one", size=300)


def check_packaged(root: Path, given: Path, done: bool) -> None:
    assert (root / "out").exists() or not done
    if (root / "out").exists():
        verify(root / "out")
    if done:
        assert read(root / "out").manifest.passed


def publish_two(root: Path, given: Path) -> None:
    publish(given / "two", str(root / "registry"), ["prod"], PublishSettings(version="two"))


def publish_one(root: Path, given: Path) -> None:
    publish(given / "one", str(root / "registry"), ["prod"], PublishSettings(version="one"))


def check_registry(root: Path, given: Path, done: bool) -> None:
    """Every release that is listed can be pulled; the alias points at a whole one."""
    url = str(root / "registry")
    listed = {each.version: each for each in list_releases(url)}
    assert "one" in listed
    assert "two" in listed or not done
    assert not any(each.damage for each in listed.values())
    aliases = open_store(url).aliases("small")
    assert aliases["prod"] in listed
    assert aliases["prod"] == "two" or not done
    for version in listed:
        out = pull(f"{url}/small@{version}", given / "pulled", cache=given / "cache")
        assert small.digests(out) == small.digests(given / version)
        shutil.rmtree(given / "cache")


def pull_one(root: Path, given: Path) -> None:
    pull(f"{given}/registry/small@one", root / "pulled", cache=root / "cache")


def pull_two(root: Path, given: Path) -> None:
    pull(f"{given}/registry/small@two", root / "pulled", cache=root / "cache")


def check_pulled(root: Path, given: Path, done: bool) -> None:
    """The folder has the old release or the new one."""
    verify(root / "pulled")
    found = small.digests(root / "pulled")
    assert found == small.digests(given / "two") or (not done and found == small.digests(given / "one"))


def yank_one(root: Path, given: Path) -> None:
    yank(f"{root}/registry/small@one", "bad")


def check_yanked(root: Path, given: Path, done: bool) -> None:
    url = f"{root}/registry"
    (listed,) = list_releases(url)
    assert listed.yanked == "bad" if done else listed.yanked in ("", "bad")
    pull(f"{url}/small@one", given / "pulled", cache=given / "cache", select=Selection(yanked=True))
    shutil.rmtree(given / "cache")


def save_one(root: Path, given: Path) -> None:
    save(f"{given}/registry/small@one", root / "one.tar")


def check_saved(root: Path, given: Path, done: bool) -> None:
    """The file is absent or whole."""
    if done or (root / "one.tar").exists():
        assert load(root / "one.tar", Place(f"{given}/elsewhere")).fresh
        shutil.rmtree(given / "elsewhere")


CASES = {
    "cache": Case(fill_cache, check_cache),
    "build": Case(package, check_packaged),
    "publish": Case(publish_two, check_registry, publish_one),
    "pull": Case(pull_two, check_pulled, pull_one),
    "save": Case(save_one, check_saved),
    "yank": Case(yank_one, check_yanked, publish_one),
}


def run(case: Case, root: Path, given: Path, at: int, how: str) -> tuple[int, bool]:
    """Do it once, cut at a step; check what is left; do it again, and check. Returns the steps, and whether cut."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    case.prepare(root, given)
    done = False
    with observed(root, at, how) as disk:
        try:
            case.act(root, given)
            done = True
        except TandemError:
            assert how == "fails"
    case.check(root, given, done)
    case.act(root, given)
    case.check(root, given, True)
    return disk.steps, disk.steps >= at > 0


HOW = (*CUTS, "fails")
SOME = 1
"""Steps of each case that are cut in the fast lane; the slow one cuts them all."""


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", CASES)
def test_some_steps(name, how, given, tmp_path):
    """The steps are spread, and other ones for each way of cutting."""
    steps, _ = run(CASES[name], tmp_path / "disk", given, 0, how)
    stride = max(1, steps // SOME)
    for at in range(1 + HOW.index(how) % stride, steps + 1, stride):
        assert run(CASES[name], tmp_path / "disk", given, at, how)[1]


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", CASES)
def test_every_step(name, how, given, tmp_path):
    """Cut at step 1, 2, ... until nothing is cut any more."""
    at = 1
    while run(CASES[name], tmp_path / "disk", given, at, how)[1]:
        at += 1
    assert at > 3, "a model without steps tests nothing"
