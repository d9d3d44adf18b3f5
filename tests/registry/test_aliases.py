"""Aliases and versions: names that move one at a time, and names that never move."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import pytest

from pipeline.errors import ArtifactError, InputError
from pipeline.registry.aliases import set_alias
from pipeline.registry.publish import PublishSettings, publish
from pipeline.registry.releases import list_releases
from pipeline.stores.base import Move, open_store
from support import small_artifacts as small

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    return small.make_validated(folder / "out", folder / "work").root


@pytest.fixture
def made(tmp_path: Path, original: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "out"))


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "registry")


def test_set_alias_moves(tmp_path, url):
    first = publish(small.make_validated(tmp_path / "1", tmp_path / "work").root, url, ["latest", "prod"])
    second = publish(small.make_validated(tmp_path / "2", tmp_path / "work", graph=b"new").root, url, ["latest"])
    assert {listed.version: listed.aliases for listed in list_releases(url, "small")} == {
        first.version: ("prod",),
        second.version: ("latest",),
    }
    set_alias(url, "small@latest", "prod")
    assert open_store(url).aliases("small") == {"latest": second.version, "prod": second.version}
    set_alias(url, f"small@{first.version}", "prod")
    assert open_store(url).aliases("small")["prod"] == first.version


@pytest.mark.parametrize("release", ["small@none", "small@", "small", "other@latest"])
def test_set_alias_unknown(made, url, release):
    publish(made, url, ["latest"])
    with pytest.raises(InputError, match=r"no version or alias|no release named 'other'"):
        set_alias(url, release, "prod")


def test_set_alias_named_like_a_version(made, url):
    """It could never be reached, or would shadow a version."""
    version = publish(made, url).version
    with pytest.raises(InputError, match="is a version of small"):
        set_alias(url, f"small@{version}", version)
    with pytest.raises(InputError, match="is a version of small"):
        publish(made, url, [version])


@pytest.mark.parametrize("alias", ["../x", "", ".hidden", "a/b", "a\0"])
def test_publish_alias_must_be_plain(made, url, alias):
    with pytest.raises(InputError, match="malformed name"):
        publish(made, url, [alias])
    assert not Path(url).exists()


def test_swap_alias_with_an_old_token(url):
    store = open_store(url)
    assert store.swap_alias("small", "prod", Move("1"), None)
    first = store.read_alias("small", "prod")
    assert not store.swap_alias("small", "prod", Move("2"), None)
    assert store.swap_alias("small", "prod", Move("2"), first)
    assert not store.swap_alias("small", "prod", Move("3"), first)
    assert store.aliases("small") == {"prod": "2"}
    assert store.read_alias("small", "prod").moves == (Move("2"), Move("1"))


def _count_up(url: str) -> None:
    store = open_store(url)
    for _ in range(10):
        while True:
            now = store.read_alias("small", "n")
            value = int(now.version) if now else 0
            if store.swap_alias("small", "n", Move(str(value + 1)), now):
                break


def test_swap_alias_loses_no_update(url):
    processes = [FORK.Process(target=_count_up, args=(url,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = open_store(url).read_alias("small", "n")
    assert [move.version for move in found.moves] == [str(n) for n in range(40, 0, -1)]


def test_list_releases_of_nothing(url):
    """A folder that does not exist was a registry without releases."""
    with pytest.raises(InputError, match="no such folder"):
        list_releases(url)


def test_a_version_never_takes_the_place_of_an_alias(made, url, tmp_path):
    """A version never yields to an alias: whoever names one `latest` would decide for good what is pulled."""
    first = publish(made, url, ["latest"])
    other = small.make_validated(tmp_path / "b", tmp_path / "w", weights=b"others").root
    with pytest.raises(InputError, match="version 'latest' is an alias of small"):
        publish(other, url, options=PublishSettings(version="latest"))
    assert open_store(url).aliases("small") == {"latest": first.version}
    assert open_store(url).versions("small") == [first.version]


@pytest.mark.parametrize("version", ["", "a b", "../../x", "-x", "v" * 101])
def test_a_version_is_a_plain_name(made, url, version):
    with pytest.raises(InputError, match="malformed version"):
        publish(made, url, options=PublishSettings(version=version))
    assert not Path(url).exists()


def test_a_damaged_alias_hides_no_other_and_can_be_set_again(made, url):
    release = publish(made, url, ["latest", "prod"])
    (Path(url) / "aliases" / "small" / "prod").write_text("")
    assert [one.aliases for one in list_releases(url)] == [("latest",)]
    assert open_store(url).aliases("small") == {"latest": release.version, "prod": ""}
    with pytest.raises(ArtifactError, match="alias 'prod' is damaged") as caught:
        set_alias(url, "small@prod", "other")
    assert "tandem alias set" in caught.value.fix
    set_alias(url, "small@latest", "prod")
    assert open_store(url).aliases("small") == {"latest": release.version, "prod": release.version}
