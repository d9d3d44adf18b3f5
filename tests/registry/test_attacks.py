"""The attacks on software updates that The Update Framework lists, each with a budget of time and memory.

What Tandem promises of each is in docs/explanation/trust.md. An attacker here writes to the registry, or is the server,
and has no key.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.artifact.manifest import MANIFEST, SIGNATURE
from pipeline.artifact.signing import Policy, check_artifact, read_policy, require, signature_over
from pipeline.errors import ArtifactError, CorruptError, HostError, RefusedError
from pipeline.files.limits import MAX_BYTES, SIGNATURE_BYTES, SIGNATURES
from pipeline.registry.aliases import set_alias
from pipeline.registry.publish import PublishSettings, publish
from pipeline.registry.pull import pull
from pipeline.stores.base import Interrupted
from support import small_artifacts as small
from support.signing_keys import key_pair

pytest.importorskip("model_signing")
MIB = 1 << 20


@contextmanager
def budget(seconds: float, mib: float) -> Iterator[None]:
    """Fail if the block takes longer, or allocates more memory at a time."""
    tracemalloc.start()
    started = time.monotonic()
    try:
        yield
    finally:
        took, peak = time.monotonic() - started, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert took < seconds, f"{took:.1f} s"
    assert peak < mib * MIB, f"{peak / MIB:.0f} MiB"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with the signed releases 1.0 and 2.0, of two artifacts; `prod` is 2.0."""
    folder = tmp_path_factory.mktemp("attacked")
    private, _ = key_pair(folder, "release")
    signed = {"sign": lambda data: signature_over(data, "release", private, None, None)}
    for version in ("1.0", "2.0"):
        root = small.make_validated(folder / version, folder / "work", weights=version.encode()).root
        publish(root, str(folder / "registry"), ["prod"], PublishSettings(version=version, **signed))
    return folder


@pytest.fixture
def registry(tmp_path: Path, published: Path) -> Path:
    return Path(shutil.copytree(published / "registry", tmp_path / "registry"))


@pytest.fixture
def policy(published: Path) -> Policy:
    return require(str(published / "release.pub"))


@pytest.fixture
def options(tmp_path: Path, policy: Policy) -> dict:
    return {"directory": tmp_path / "pulled", "cache": tmp_path / "cache", "policy": policy}


def refused(registry: Path, options: dict, wanted: str, says: str, kind: type[Exception] = ArtifactError) -> None:
    """A pull is refused within its budget, and nothing of the release is there."""
    with budget(20, 120), pytest.raises(kind, match=says):
        pull(f"{registry}/small@{wanted}", **options)
    assert not options["directory"].exists()


def test_rollback_under_a_version(registry, options):
    """An old release in the place of a newer version: the signed index names its version."""
    shutil.copy(registry / "releases/small/1.0" / MANIFEST, registry / "releases/small/2.0" / MANIFEST)
    refused(registry, options, "2.0", "version mismatch", CorruptError)


def test_rollback_of_an_alias_is_not_promised(registry, options):
    """An alias is not signed: a writer of the registry can move it, to signed releases only. A version cannot move."""
    set_alias(str(registry), "small@1.0", "prod")
    out = pull(f"{registry}/small@prod", **options)
    first = (out / MANIFEST).read_bytes()
    pull(f"{registry}/small@2.0", **options)
    assert (out / MANIFEST).read_bytes() != first


def test_freeze_of_a_version(registry, options):
    """A version never changes, so there is nothing to freeze: with its registry gone, it starts from the cache."""
    pull(f"{registry}/small@2.0", **options)
    shutil.rmtree(registry)
    with budget(20, 120):
        pull(f"{registry}/small@2.0", **options)


def blob(registry: Path, sha256: str) -> Path:
    return registry / "blobs/sha256" / sha256[:2] / sha256


def manifest_of(registry: Path, version: str) -> Path:
    """The manifest of a release's only variant."""
    index = json.loads((registry / "releases/small" / version / MANIFEST).read_text())
    (variant,) = index["variants"].values()
    return blob(registry, variant["manifest"]["sha256"])


def weights_of(registry: Path, version: str) -> Path:
    manifest = json.loads(manifest_of(registry, version).read_text())
    return blob(registry, manifest["files"][small.WEIGHTS]["sha256"])


def signatures_of(registry: Path, version: str) -> Path:
    document = (registry / "releases/small" / version / MANIFEST).read_bytes()
    return registry / "signatures" / hashlib.sha256(document).hexdigest()


def swap_variant(registry: Path) -> None:
    """The manifest of 1.0's variant under 2.0's index."""
    manifest_of(registry, "2.0").write_bytes(manifest_of(registry, "1.0").read_bytes())


def swap_blob(registry: Path) -> None:
    """Weights of one release under the digest of another's."""
    weights_of(registry, "2.0").write_bytes(weights_of(registry, "1.0").read_bytes())


def swap_signature(registry: Path) -> None:
    """The signature over 1.0's index beside 2.0's."""
    (theirs,), (ours,) = signatures_of(registry, "1.0").iterdir(), signatures_of(registry, "2.0").iterdir()
    ours.write_bytes(theirs.read_bytes())


MIXED: dict[str, tuple[Callable[[Path], None], str]] = {
    "variant": (swap_variant, "sha256 mismatch"),
    "blob": (swap_blob, "sha256 mismatch"),
    "signature": (swap_signature, "over another manifest"),
}


@pytest.mark.parametrize("name", MIXED)
def test_mix_and_match(registry, options, name):
    change, says = MIXED[name]
    change(registry)
    refused(registry, options, "2.0", says)


def test_endless_index(registry, options):
    os.truncate(registry / "releases/small/2.0" / MANIFEST, 1 << 40)  # a hole: it takes no disk
    refused(registry, options, "2.0", "object too large", CorruptError)


def test_endless_alias(registry, options):
    os.truncate(registry / "aliases/small/prod", 1 << 40)
    refused(registry, options, "prod", "object too large", CorruptError)


def test_endless_signatures(registry, options):
    """A signature of any size, in any number: those beyond the limits are not read, and the right one still counts."""
    folder = signatures_of(registry, "2.0")
    (folder / "0").touch()
    os.truncate(folder / "0", 1 << 40)
    for number in range(SIGNATURES // 4):
        (folder / f"0{number:04}").write_bytes(b"x" * SIGNATURE_BYTES)
    with budget(60, 120):
        pull(f"{registry}/small@2.0", **options)


def test_signatures_beyond_the_limit(registry, options):
    folder = signatures_of(registry, "2.0")
    for number in range(2000):
        (folder / f"!{number:04}").write_bytes(b"{}")
    refused(registry, options, "2.0", "not signed by", RefusedError)


def test_endless_blob(registry, options):
    """More bytes than the manifest lists: no more are read than it lists."""
    weights = weights_of(registry, "2.0")
    with weights.open("r+b") as file:
        file.write(b"x")
    os.truncate(weights, 1 << 40)
    refused(registry, options, "2.0", "sha256 mismatch", CorruptError)
    assert sum(path.stat().st_blocks * 512 for path in options["cache"].rglob("*") if path.is_file()) < 50 * MIB


def test_wrong_key(registry, options, tmp_path):
    _, other = key_pair(tmp_path, "other")
    refused(registry, options | {"policy": require(str(other))}, "2.0", "signed by another key", RefusedError)
    assert not (options["cache"] / "blobs/sha256").exists()


def test_a_key_that_was_removed_from_the_policy(registry, options, published, tmp_path):
    """Keys have no date of expiry: a policy without the key refuses its signatures, of what is on disk too."""
    shutil.copy(published / "release.pub", tmp_path)
    key_pair(tmp_path, "next")
    for key in ("release", "next"):
        (tmp_path / f"{key}.yaml").write_text(f"rules: [{{signed_by: [{{key: {key}.pub}}]}}]\n")
    old, new = (read_policy(tmp_path / f"{key}.yaml") for key in ("release", "next"))
    out = pull(f"{registry}/small@2.0", **(options | {"policy": old}))
    check_artifact(out, old)
    for act in (
        lambda: check_artifact(out, new),
        lambda: pull(f"{registry}/small@2.0", **(options | {"policy": new})),
        lambda: pull(f"{registry}/small@2.0", offline=True, **(options | {"policy": new})),
    ):
        with budget(20, 120), pytest.raises(RefusedError, match="signed by another key"):
            act()


def test_a_signature_of_another_release_on_disk(registry, options):
    out = pull(f"{registry}/small@2.0", **options)
    older = pull(f"{registry}/small@1.0", options["directory"].with_name("older"), cache=options["cache"])
    shutil.copy(older / SIGNATURE, out / SIGNATURE)
    with budget(20, 120), pytest.raises(RefusedError, match="over another manifest"):
        check_artifact(out, options["policy"])


class Endless(ThreadingHTTPServer):
    """A Hub that never ends its answers: `pause_s` between pieces of `piece`."""

    daemon_threads = True
    piece, pause_s = b"", 0.0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endless

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(self.server.piece), self.server.piece))
                time.sleep(self.server.pause_s)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Keep the test's output clean."""


@pytest.fixture
def endless() -> Iterator[Endless]:
    with Endless(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_endless_answer_of_a_hub(endless):
    """The whole answer was read before its size was looked at."""
    hub_api = pytest.importorskip("pipeline.stores.hub_api")
    endless.piece = b" " * 100_000
    hub = hub_api.Hub(endpoint=f"http://127.0.0.1:{endless.server_port}", token="t")
    with budget(30, 4 * MAX_BYTES / MIB):
        data = hub.read_small("org/name", "main", MANIFEST)
    assert len(data) == MAX_BYTES


def test_slow_answer_of_a_hub(endless, monkeypatch):
    """Each byte renewed the limit of a read."""
    hub_api = pytest.importorskip("pipeline.stores.hub_api")
    from pipeline.stores import ranges

    monkeypatch.setattr(ranges, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(hub_api, "TRIES", 2)
    endless.piece, endless.pause_s = b"x", 0.1
    hub = hub_api.Hub(endpoint=f"http://127.0.0.1:{endless.server_port}", token="t")
    with budget(10, 50), pytest.raises((Interrupted, HostError)):
        hub.read_small("org/name", "main", MANIFEST)
