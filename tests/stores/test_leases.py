"""Publishing while unused blobs are collected: whoever comes second waits; dead holders hold nobody."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from pipeline.errors import ArtifactError, HostError
from pipeline.registry import releases as registry
from pipeline.registry.publish import publish
from pipeline.registry.pull import pull
from pipeline.stores import leases
from pipeline.stores.folder import FolderBucket, open_folder
from support import small_artifacts as small


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("leases")
    return small.make_validated(folder / "out", folder / "work").root


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "registry")


def leave_blobs(made: Path, url: str) -> None:
    """As a publish that was killed before its manifest."""
    publish(made, url)
    for path in Path(url).glob("releases/*/*/manifest.json"):
        path.unlink()


def test_collect_removes_what_is_unused(made, url):
    leave_blobs(made, url)
    before = len(list(Path(url).glob("blobs/sha256/*/*")))
    assert registry.collect(url, dry_run=True).blobs == before
    assert len(list(Path(url).glob("blobs/sha256/*/*"))) == before
    removed = registry.collect(url)
    assert (removed.blobs, removed.kept) == (before, 0)
    assert not list(Path(url).glob("blobs/sha256/*/*"))
    assert not list(Path(url).glob("collections/*"))


def test_collect_keeps_what_releases_reach(made, url, tmp_path):
    publish(made, url)
    assert registry.collect(url).blobs == 0
    version = registry.list_releases(url)[0].version
    assert small.digests(pull(f"{url}/small@{version}", tmp_path / "p", cache=tmp_path / "c")) == small.digests(made)


def test_collect_stops_at_a_manifest_with_a_changed_digest(made, url):
    """One changed digit of a digest, at rest or on the way, and the blob that it named was removed as unused."""
    publish(made, url)
    before = sorted(Path(url).glob("blobs/sha256/*/*"))
    (path,) = Path(url).glob("releases/*/*/manifest.json")
    whole, digest = path.read_text(), before[0].name
    path.write_text(whole.replace(digest, digest[:-1] + ("0" if digest[-1] != "0" else "1")))
    with pytest.raises(ArtifactError, match="which is not in the registry; nothing is removed"):
        registry.collect(url)
    assert sorted(Path(url).glob("blobs/sha256/*/*")) == before
    path.write_text(whole)
    assert registry.collect(url).blobs == 0


@pytest.mark.parametrize("name", ["releases/small/1.0/manifesu.json", "releases/small/1.0", "releases/x/y/z/w"])
def test_collect_stops_at_an_object_that_is_no_release(made, url, name):
    """A listed name with one changed letter was no release, and its blobs were removed as unused."""
    leave_blobs(made, url)
    before = sorted(Path(url).glob("blobs/sha256/*/*"))
    path = Path(url) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    with pytest.raises(ArtifactError, match="nothing is removed"):
        registry.collect(url)
    assert sorted(Path(url).glob("blobs/sha256/*/*")) == before


def test_collect_stops_at_a_manifest_it_cannot_read(made, url):
    """What a damaged manifest reaches is not known, so nothing is removed."""
    leave_blobs(made, url)
    before = len(list(Path(url).glob("blobs/sha256/*/*")))
    bad = Path(url) / "releases/small/1/manifest.json"
    bad.parent.mkdir(parents=True)
    bad.write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        registry.collect(url)
    assert len(list(Path(url).glob("blobs/sha256/*/*"))) == before


def test_publish_waits_for_a_collection(made, url, tmp_path, monkeypatch):
    """The old way to lose blobs: the publisher finds them, the collection removes them, the release is created."""
    leave_blobs(made, url)
    at_work, go_on = threading.Event(), threading.Event()
    delete = FolderBucket.delete

    def slowly(self: FolderBucket, key: str) -> None:
        if key.startswith("blobs"):
            at_work.set()
            go_on.wait(30)
        delete(self, key)

    monkeypatch.setattr(FolderBucket, "delete", slowly)
    collector = threading.Thread(target=registry.collect, args=(url,))
    collector.start()
    at_work.wait(30)
    publisher = threading.Thread(target=publish, args=(made, url, ["latest"]))
    publisher.start()
    time.sleep(0.5)
    assert open_folder(url).versions("small") == []  # it waits
    go_on.set()
    publisher.join(30)
    collector.join(30)
    assert small.digests(pull(f"{url}/small@latest", tmp_path / "p", cache=tmp_path / "c")) == small.digests(made)


def test_collection_waits_for_publishers(made, url, monkeypatch):
    monkeypatch.setattr(leases, "PATIENCE_S", 0.5)
    leave_blobs(made, url)
    with leases.leased(FolderBucket(Path(url))), pytest.raises(HostError, match="a publish is in progress"):
        registry.collect(url)
    assert registry.collect(url).blobs


def test_publish_gives_up_on_a_collection_that_goes_on(made, url, monkeypatch):
    monkeypatch.setattr(leases, "PATIENCE_S", 0.5)
    with leases.collecting(FolderBucket(Path(url))), pytest.raises(HostError, match="collection of unused blobs"):
        publish(made, url)
    assert publish(made, url).fresh


def test_two_collections(url):
    with leases.collecting(FolderBucket(Path(url))), pytest.raises(HostError, match="another collection"):
        registry.collect(url)


@pytest.mark.parametrize(("age_s", "alive"), [(60, True), (2 * leases.DEAD_LEASE_S, False)])
def test_lease_of_a_dead_publisher(made, url, monkeypatch, age_s, alive):
    monkeypatch.setattr(leases, "PATIENCE_S", 0.5)
    leave_blobs(made, url)
    lease = Path(url) / "leases" / "dead-1"
    lease.write_text("publish\n")
    os.utime(lease, (time.time() - age_s,) * 2)
    if alive:
        with pytest.raises(HostError, match="a publish is in progress"):
            registry.collect(url)
    else:
        assert registry.collect(url).blobs
        assert not lease.exists()


def test_mark_of_a_dead_collection(made, url):
    mark = Path(url) / "collections" / "mark"
    mark.parent.mkdir(parents=True)
    mark.write_text("gc\n")
    os.utime(mark, (time.time() - 2 * leases.DEAD_MARK_S,) * 2)
    assert publish(made, url).fresh
    registry.collect(url)
    assert not mark.exists()


def test_clock_skew_changes_nothing(made, url, monkeypatch):
    """A host whose clock is a year off: ages are the store's, so its lease is no older for it."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 365 * 24 * 3600)
    monkeypatch.setattr(leases, "PATIENCE_S", 0.5)
    with leases.leased(FolderBucket(Path(url))), pytest.raises(HostError, match="a publish is in progress"):
        registry.collect(url)


def test_lease_that_was_not_renewed_creates_no_release(made, url, monkeypatch):
    monkeypatch.setattr(leases, "VALID_S", -1.0)
    with pytest.raises(HostError, match="the registry was unreachable"):
        publish(made, url)
    assert open_folder(url).versions("small") == []


def test_publish_and_collect_many_times(made, url, tmp_path):
    """Races of the real thing: whatever wins, a release that is there is whole."""
    for round_ in range(10):
        leave_blobs(made, url)
        threads = [threading.Thread(target=registry.collect, args=(url,)),
                   threading.Thread(target=publish, args=(made, url, ["latest"]))]  # fmt: skip
        for thread in threads[:: 1 if round_ % 2 else -1]:
            thread.start()
        for thread in threads:
            thread.join()
        out = pull(f"{url}/small@latest", tmp_path / "p", cache=tmp_path / f"c{round_}")
        assert small.digests(out) == small.digests(made)
