"""Aliases and versions: names that move one at a time, and names that never move."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from pipeline.errors import ArtifactError, HostError, InputError
from pipeline.registry.aliases import roll_back, set_alias
from pipeline.registry.publish import PublishSettings, publish
from pipeline.registry.releases import list_releases
from pipeline.stores.base import Interrupted, Move, open_store
from pipeline.stores.folder import FolderBucket
from support import small_artifacts as small

FORK = multiprocessing.get_context("fork")


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


def three_releases(tmp_path: Path, url: str) -> list[str]:
    """Publish three releases as `prod`; return their versions."""
    made = [small.make_validated(tmp_path / str(i), tmp_path / "work", graph=b"%d" % i).root for i in range(3)]
    return [publish(root, url, ["prod"]).version for root in made]


def lose_answers(monkeypatch: pytest.MonkeyPatch, *, also_reads: bool = False) -> None:
    """Break off the answers to moves of aliases, which are done, and reads of them after that."""
    swap, get = FolderBucket.swap, FolderBucket.get
    lost: list[str] = []

    def swapped(self, key, data, token):
        found = swap(self, key, data, token)
        if key.startswith("aliases/"):
            lost.append(key)
            raise Interrupted("the server cannot be reached, or breaks off", where="registry")
        return found

    def read(self, key, *limit):
        if also_reads and key in lost:
            raise Interrupted("the server cannot be reached", where="registry")
        return get(self, key, *limit)

    monkeypatch.setattr(FolderBucket, "swap", swapped)
    monkeypatch.setattr(FolderBucket, "get", read)


def test_a_rollback_recognises_its_own_move(tmp_path, url, monkeypatch):
    """The answer to the swap was lost, and a second call went two releases back."""
    first, second, third = three_releases(tmp_path, url)
    with monkeypatch.context() as patch:
        lose_answers(patch)
        assert roll_back(url, "small", "prod") == (third, second)
    assert open_store(url).aliases("small") == {"prod": second}
    assert first != second


def test_a_rollback_whose_repeated_request_is_refused_recognises_its_own_move(tmp_path, url, monkeypatch):
    """A client library repeats a request whose answer is lost; the store refuses the second one."""
    _, second, third = three_releases(tmp_path, url)
    swap = FolderBucket.swap

    def twice(self, key, data, token):
        swap(self, key, data, token)
        return swap(self, key, data, token)

    with monkeypatch.context() as patch:
        patch.setattr(FolderBucket, "swap", twice)
        assert roll_back(url, "small", "prod") == (third, second)


@pytest.mark.parametrize("how", ["set", "rollback"])
def test_a_refused_repetition_undoes_no_later_move(tmp_path, url, monkeypatch, how):
    """A command moved the alias a second time, and undid what another process had set in between (seed 441)."""
    first, second, third = three_releases(tmp_path, url)
    swap, calls = FolderBucket.swap, []

    def carried_out_and_refused(self, key, data, token):
        calls.append(key)
        if len(calls) > 1:
            return swap(self, key, data, token)
        assert swap(self, key, data, token)
        set_alias(url, f"small@{first}", "prod")
        return False

    with monkeypatch.context() as patch:
        patch.setattr(FolderBucket, "swap", carried_out_and_refused)
        if how == "set":
            assert set_alias(url, f"small@{second}", "prod") == second
        else:
            assert roll_back(url, "small", "prod") == (third, second)
    assert open_store(url).aliases("small") == {"prod": first}


def test_a_rollback_with_an_unknown_outcome_says_how_to_repeat_it(tmp_path, url, monkeypatch):
    _, second, third = three_releases(tmp_path, url)
    with monkeypatch.context() as patch:
        lose_answers(patch, also_reads=True)
        with pytest.raises(HostError, match="whether alias 'prod' was moved is unknown") as caught:
            roll_back(url, "small", "prod")
    assert caught.value.fix == f"tandem alias rollback {url}/small@prod --from {third}"
    for _ in range(2):
        assert roll_back(url, "small", "prod", third) == (third, second)
    assert open_store(url).aliases("small") == {"prod": second}


def test_a_rollback_from_another_version_changes_nothing(tmp_path, url):
    first, second, third = three_releases(tmp_path, url)
    for version in (first, second, "none"):
        with pytest.raises(InputError, match=f"points at {third}, not at {version}"):
            roll_back(url, "small", "prod", version)
    assert open_store(url).aliases("small") == {"prod": third}


def test_publish_that_cannot_remove_its_lease_has_succeeded(made, url, monkeypatch):
    delete = FolderBucket.delete

    def gone(self, key):
        if key.startswith("leases/") and (Path(url) / "aliases/small/prod").exists():
            raise Interrupted("the server cannot be reached", where="registry")
        delete(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(FolderBucket, "delete", gone)
        version = publish(made, url, ["prod"]).version
    assert open_store(url).aliases("small") == {"prod": version}
