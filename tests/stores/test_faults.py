"""Servers that fail, and processes that are killed: nothing half-visible, nothing lost, no hang."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.artifact.manifest import read
from pipeline.errors import ArtifactError, HostError
from pipeline.files.unfinished import TEMP
from pipeline.registry import releases as registry
from pipeline.registry.copy import copy
from pipeline.registry.publish import Place, publish
from pipeline.registry.pull import pull
from pipeline.registry.release import parse_document
from pipeline.stores.base import open_bucket, open_store
from support import fault_proxy
from support import small_artifacts as small
from support.fault_proxy import Fault
from support.paths import ROOT

pytestmark = pytest.mark.server
KILLS = 50
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
RUN = "import sys; from pipeline.cli.main import main; main()"


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    return small.make_validated(folder / "out", folder / "work", size=1_500_000).root


@pytest.fixture
def options(tmp_path: Path) -> dict:
    return {"directory": tmp_path / "pulled", "cache": tmp_path / "cache"}


@pytest.fixture
def s3_proxy(s3_server, s3_url, monkeypatch: pytest.MonkeyPatch) -> Iterator[fault_proxy.Proxy]:
    with fault_proxy.before(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def hub_proxies(hub_server, hub_url, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple]:
    """Proxies before the Hub and before the place of its large files."""
    with fault_proxy.before(hub_server.endpoint) as api, fault_proxy.before(hub_server.cdn) as cdn:
        monkeypatch.setenv("HF_ENDPOINT", api.endpoint)
        monkeypatch.setattr(hub_server, "endpoint", api.endpoint)
        monkeypatch.setattr(hub_server, "cdn", cdn.endpoint)
        yield api, cdn


PASSING = [
    Fault("GET", "503", 4), Fault("GET", "500", 4), Fault("GET .*blobs", "cut", 4), Fault("GET", "reset", 4),
    Fault("GET", "slow", 8, seconds=0.5), Fault("GET .*blobs", "503", 3, skip=3),
]  # fmt: skip


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{fault.kind}-{fault.skip}")
def test_s3_pull_survives(original, s3_url, s3_proxy, options, fault):
    publish(original, s3_url, ["latest"])
    s3_proxy.faults = [replace(fault)]
    out = pull(f"{s3_url}/small@latest", **options)
    assert small.digests(out) == small.digests(original)
    assert s3_proxy.broken


@pytest.mark.parametrize("kind", ["503", "500", "reset", "lost"])
@pytest.mark.parametrize("where", ["PUT .*blobs", "PUT .*releases", "PUT .*aliases", "POST", "PUT .*leases"])
def test_s3_publish_survives(original, s3_url, s3_proxy, options, where, kind):
    """`lost` is a write that was carried out and whose answer never came: it must not be taken for another's."""
    s3_proxy.faults = [Fault(where, kind, 2)]
    publish(original, s3_url, ["latest"])
    out = pull(f"{s3_url}/small@latest", **options)
    assert small.digests(out) == small.digests(original)


def test_s3_wrong_bytes(original, s3_url, s3_proxy, options):
    publish(original, s3_url, ["latest"])
    s3_proxy.faults = [Fault("GET .*blobs", "wrong", 1)]
    with pytest.raises(ArtifactError, match="sha256 mismatch: expected"):
        pull(f"{s3_url}/small@latest", **options)
    assert not options["directory"].exists()
    out = pull(f"{s3_url}/small@latest", **options)
    assert small.digests(out) == small.digests(original)


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{fault.kind}-{fault.skip}")
def test_s3_copy_survives(original, s3_url, s3_proxy, tmp_path, fault):
    publish(original, s3_url, ["latest"])
    s3_proxy.faults = [replace(fault)]  # a fault counts down
    copy(f"{s3_url}/small@latest", Place(f"{tmp_path}/there"))
    assert s3_proxy.broken
    out = pull(f"{tmp_path}/there/small@{read(original).manifest.version}", tmp_path / "o", cache=tmp_path / "c")
    assert small.digests(out) == small.digests(original)


def test_s3_copy_of_wrong_bytes(original, s3_url, s3_proxy, tmp_path):
    """Bytes that change on their way reach no registry; the next copy sends what is left."""
    publish(original, s3_url, ["latest"])
    s3_proxy.faults = [Fault("GET .*blobs", "wrong", 1, skip=3)]
    with pytest.raises(ArtifactError, match="sha256 mismatch: expected"):
        copy(f"{s3_url}/small@latest", Place(f"{s3_url}-2", ("live",)))
    assert open_store(f"{s3_url}-2").versions("small") == []
    copied = copy(f"{s3_url}/small@latest", Place(f"{s3_url}-2", ("live",)))
    assert copied.fresh
    out = pull(f"{s3_url}-2/small@live", tmp_path / "o", cache=tmp_path / "c")
    assert small.digests(out) == small.digests(original)


def test_s3_token_expires_midway(original, s3_url, s3_proxy, options):
    """Both directions: told so, and the next run continues with what was moved."""
    s3_proxy.faults = [Fault("PUT .*blobs", "400", 1000, skip=4, body=EXPIRED)]
    with pytest.raises(HostError, match="credentials have expired"):
        publish(original, s3_url, ["latest"])
    assert open_store(s3_url).versions("small") == []
    s3_proxy.faults = []
    again = publish(original, s3_url, ["latest"])
    assert again.sent < len({entry.sha256 for entry in read(original).manifest.files.values()})
    s3_proxy.faults = [Fault("GET .*blobs", "400", 1000, skip=4, body=EXPIRED)]
    with pytest.raises(HostError, match="credentials have expired"):
        pull(f"{s3_url}/small@latest", **options)
    s3_proxy.faults = []
    assert small.digests(pull(f"{s3_url}/small@latest", **options)) == small.digests(original)


def test_s3_down(original, s3_url, s3_proxy, options, monkeypatch):
    """A server that is gone for good: an error within a minute, not a hang."""
    monkeypatch.setattr("pipeline.stores.s3.RETRY_S", 2.0)
    publish(original, s3_url, ["latest"])
    s3_proxy.faults = [Fault("GET", "503", 10_000)]
    started = time.monotonic()
    with pytest.raises(HostError, match="503"):
        pull(f"{s3_url}/small@latest", **options)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("kind", ["503", "500", "cut", "reset", "slow"])
def test_hub_pull_survives(original, hub_url, hub_proxies, options, kind):
    publish(original, hub_url, ["latest"])
    for proxy in hub_proxies:
        proxy.faults = [Fault("GET .*(objects|resolve)", kind, 3)]
    out = pull(f"{hub_url}/small@latest", **options)
    assert small.digests(out) == small.digests(original)
    assert any(proxy.broken for proxy in hub_proxies)


@pytest.mark.parametrize(
    ("where", "kind"),
    [("POST .*commit", "503"), ("POST .*commit", "lost"), ("POST .*tag", "503"), ("POST .*tag", "lost"),
     ("POST .*preupload", "503"), ("PUT", "503"), ("PUT", "reset")],
)  # fmt: skip
def test_hub_publish_survives(original, hub_url, hub_proxies, options, where, kind):
    for proxy in hub_proxies:
        proxy.faults = [Fault(where, kind, 1)]
    publish(original, hub_url, ["latest"])
    assert sum(proxy.broken for proxy in hub_proxies) == 1
    assert small.digests(pull(f"{hub_url}/small@latest", **options)) == small.digests(original)


def test_hub_wrong_bytes(original, hub_url, hub_proxies, options):
    publish(original, hub_url, ["latest"])
    hub_proxies[1].faults = [Fault("GET .*objects", "wrong", 1)]
    with pytest.raises(ArtifactError, match="sha256 mismatch: expected"):
        pull(f"{hub_url}/small@latest", **options)
    assert not options["directory"].exists()


def command(*args: str, cache: Path) -> subprocess.Popen:
    environ = os.environ | {"TANDEM_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", RUN, "-q", *args], env=environ, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE)  # fmt: skip


def timed(*args: str, cache: Path) -> float:
    started = time.monotonic()
    process = command(*args, cache=cache)
    _, shown = process.communicate(timeout=120)
    assert process.returncode == 0, shown.decode()
    return time.monotonic() - started


def killed(*args: str, cache: Path, after_s: float) -> bool:
    """Whether it was killed before it ended; a failure of its own is one of the test."""
    process = command(*args, cache=cache)
    try:
        _, shown = process.communicate(timeout=after_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    assert process.returncode == 0, shown.decode()
    return False


def check_whole(url: str, original: Path) -> bool:
    """No release, or one whose every blob is there; an alias only to a release."""
    store = open_store(url)
    manifest = read(original).manifest
    data = store.read_release("small", manifest.version)
    alias = store.read_alias("small", "latest")
    if data is None:
        assert alias is None
        return False
    parse_document(data, url)
    if url.startswith("s3"):
        bucket = open_bucket(url)
        for entry in manifest.files.values():
            assert bucket.size(f"blobs/sha256/{entry.sha256[:2]}/{entry.sha256}") == entry.size
    return True


def test_publish_killed_at_random_moments(original, url, tmp_path):
    draw, cache = random.Random(4), tmp_path / "cache"
    whole = min(timed("publish", str(original), "--to", f"{url}-{n}", "--alias", "latest", cache=cache) for n in "ab")
    stopped = visible = 0
    for _ in range(KILLS):
        place = f"{url}-{1 + visible}"
        after_s = whole * (0.3 + 0.8 * draw.random())  # the first third is Python starting
        stopped += killed("publish", str(original), "--to", place, "--alias", "latest", cache=cache, after_s=after_s)
        visible += check_whole(place, original)
    assert stopped >= KILLS // 2, (stopped, whole)
    last = f"{url}-{1 + visible}"
    timed("publish", str(original), "--to", last, "--alias", "latest", cache=cache)
    assert small.digests(pull(f"{last}/small@latest", tmp_path / "p", cache=tmp_path / "c")) == small.digests(original)


def test_pull_killed_at_random_moments(original, url, tmp_path):
    """The directory is not there, or whole; what came is kept; the pull after the last kill completes it."""
    publish(original, url, ["latest"])
    draw, out = random.Random(5), tmp_path / "out"
    whole = timed("pull", f"{url}/small@latest", str(tmp_path / "first"), cache=tmp_path / "first-cache")
    stopped, cache, kept = 0, tmp_path / "cache", 0
    for _ in range(KILLS):
        after_s = whole * (0.3 + 0.8 * draw.random())
        stopped += killed("pull", f"{url}/small@latest", str(out), cache=cache, after_s=after_s)
        if out.exists():
            assert small.digests(out) == small.digests(original)
            shutil.rmtree(out)
            shutil.rmtree(cache)
            kept = 0
        else:
            now = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and "sha256" in path.parts)
            assert now >= kept, "a killed pull threw away what was here"
            kept = now
    assert stopped >= KILLS // 4, (stopped, whole)
    timed("pull", f"{url}/small@latest", str(out), cache=cache)
    assert small.digests(out) == small.digests(original)
    assert list(cache.rglob("*.partial")) == []
    assert list(tmp_path.glob(f"{TEMP}*")) == []


def test_readers_while_publishing_and_collecting(original, s3_url, tmp_path):
    """Releases come, blobs are collected, an alias moves: a reader always gets a whole release."""
    roots = [original] + [
        small.make_validated(tmp_path / str(n), tmp_path / f"w{n}", size=50_000, graph=b"g%d" % n).root
        for n in range(4)
    ]
    publish(original, s3_url, ["latest"])
    known = {tuple(sorted(small.digests(root).items())) for root in roots}
    done, failed = threading.Event(), []

    def guarded(work) -> None:
        try:
            while not done.is_set():
                work()
        except Exception as error:  # told to the test
            failed.append(error)

    def read_one() -> None:
        out = pull(f"{s3_url}/small@latest", tmp_path / "reader", cache=tmp_path / "reader-cache")
        assert tuple(sorted(small.digests(out).items())) in known

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (read_one, lambda: registry.collect(s3_url))]
    for thread in threads:
        thread.start()
    for _ in range(2):
        for root in roots[1:]:
            publish(root, s3_url, ["latest"])
    done.set()
    for thread in threads:
        thread.join()
    assert not failed, failed
    for root in roots:
        out = pull(f"{s3_url}/small@{read(root).manifest.version}", tmp_path / "x", cache=tmp_path / "fresh")
        assert small.digests(out) == small.digests(root)


def test_hub_token_is_revoked_midway(original, hub_url, hub_proxies, options):
    """Large files were sent, the commit is refused: no release is seen, and the next publish sends none again."""
    api, cdn = hub_proxies
    api.faults = [Fault("POST .*commit", "401", 1)]
    with pytest.raises(HostError, match="token"):
        publish(original, hub_url, ["latest"])
    assert open_store(hub_url).versions("small") == []
    sent = cdn.sent_bytes
    assert sent > 1_000_000
    publish(original, hub_url, ["latest"])
    assert cdn.sent_bytes == sent
    assert small.digests(pull(f"{hub_url}/small@latest", **options)) == small.digests(original)
