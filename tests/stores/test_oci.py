"""Registries of OCI artifacts: what other tools read, failing servers, races, and tags that others move."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import ArtifactError, CorruptError, HostError, TandemError
from pipeline.registry import aliases, releases
from pipeline.registry.publish import PublishSettings, publish
from pipeline.registry.pull import pull
from pipeline.stores import oci_tags
from pipeline.stores.base import open_store
from pipeline.stores.oci_layout import MANIFEST_TYPE, Document, descriptor, digest_of
from support import fault_proxy
from support import small_artifacts as small
from support.fault_proxy import Fault

pytestmark = pytest.mark.server
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(params=["distribution", "crane", "referrers"])
def each_url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found


@pytest.fixture
def proxy(distribution, distribution_url) -> Iterator[fault_proxy.Proxy]:
    with fault_proxy.before(f"http://{distribution.host}") as found:
        yield found


def behind(proxy: fault_proxy.Proxy) -> str:
    return f"oci://{proxy.endpoint.removeprefix('http://')}/org-{time.monotonic_ns()}"


def reference(url: str, version: str) -> str:
    return f"{url.removeprefix('oci://')}/small:{version}"


def ran(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not on PATH: apt-get install {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_card(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in small.digests(folder).items() if name != "README.md"}


def test_modelpack_and_oras_read_a_release(made, each_url, tmp_path):
    """The public clients write the same files as `pull`, and the card."""
    import oras.client
    from modelpack_client import ModelPackClient

    release = publish(made, each_url)
    ModelPackClient(insecure=True).pull(reference(each_url, release.version), tmp_path / "modelpack")
    assert without_card(tmp_path / "modelpack") == small.digests(made)
    oras.client.OrasClient(insecure=True).pull(
        target=reference(each_url, release.version), outdir=str(tmp_path / "oras")
    )
    assert without_card(tmp_path / "oras") == small.digests(made)


def test_skopeo_mirrors_a_release(made, each_url, options):
    """A mirror that another tool made is a registry: same version, same files."""
    release = publish(made, each_url, ["latest"])
    source, target = reference(each_url, release.version), reference(f"{each_url}-mirror", release.version)
    raw = ran("skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{source}")
    assert json.loads(raw)["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    ran(
        "skopeo",
        "copy",
        "-q",
        "--src-tls-verify=false",
        "--dest-tls-verify=false",
        f"docker://{source}",
        f"docker://{target}",
    )
    assert small.digests(pull(f"{each_url}-mirror/small@{release.version}", **options)) == small.digests(made)


def test_image_is_unpacked_by_a_runtimes_tools(made, distribution_url, tmp_path):
    release = publish(made, distribution_url, ["latest"], PublishSettings(image=True))
    assert release.images == (reference(distribution_url, f"{release.version}-image"),)
    about = json.loads(ran("skopeo", "inspect", "--tls-verify=false", f"docker://{release.images[0]}"))
    assert (about["Os"], about["Architecture"]) == ("linux", "amd64")
    ran("skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{release.images[0]}", f"oci:{tmp_path}/oci:x")
    ran("umoci", "unpack", "--rootless", "--image", f"{tmp_path}/oci:x", f"{tmp_path}/bundle")
    assert small.digests(tmp_path / "bundle/rootfs") == small.digests(made)
    listed = open_store(distribution_url)
    assert (listed.versions("small"), listed.aliases("small")) == ([release.version], {"latest": release.version})


def test_image_with_variants_has_one_for_each(made, crane_url, tmp_path):
    second = Path(shutil.copytree(made, tmp_path / "trn2"))
    data = json.loads((second / "manifest.json").read_text())
    data |= {"requires": {"device": "neuron", "chip": "trn2", "lnc": "2"}}
    (second / "manifest.json").write_text(json.dumps(data))
    release = publish([made, second], crane_url, ["latest"], PublishSettings(version="1.0", image=True))
    assert [image.rpartition(":")[2] for image in release.images] == [
        "1.0-cpu-avx2-tp1-image",
        "1.0-trn2-lnc2-tp1-image",
    ]
    again = publish([made, second], crane_url, ["latest"], PublishSettings(version="1.0", image=True))
    assert (again.images, again.fresh) == (release.images, False)


PASSING = [
    Fault("GET", "503", 4), Fault("GET", "500", 4), Fault("GET .*blobs", "cut", 4), Fault("GET", "reset", 4),
    Fault("GET", "slow", 8, seconds=0.5), Fault("GET .*blobs", "503", 3, skip=3), Fault("GET", "429", 3),
]  # fmt: skip


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{fault.kind}-{fault.skip}")
def test_pull_survives(made, proxy, options, fault):
    url = behind(proxy)
    publish(made, url, ["latest"])
    proxy.faults = [fault]
    assert small.digests(pull(f"{url}/small@latest", **options)) == small.digests(made)
    assert proxy.broken


@pytest.mark.parametrize("kind", ["503", "500", "reset", "lost"])
@pytest.mark.parametrize("where", ["PUT .*uploads", "POST .*uploads", "PUT .*manifests", "HEAD .*blobs"])
def test_publish_survives(made, proxy, options, where, kind):
    """`lost` is a write that was carried out and whose answer never came."""
    url = behind(proxy)
    proxy.faults = [Fault(where, kind, 2)]
    publish(made, url, ["latest"])
    assert proxy.broken == 2
    assert small.digests(pull(f"{url}/small@latest", **options)) == small.digests(made)


def test_wrong_bytes_are_refused(made, proxy, options):
    url = behind(proxy)
    publish(made, url, ["latest"])
    proxy.faults = [Fault("GET .*blobs", "wrong", 1, skip=1)]
    with pytest.raises(ArtifactError, match="sha256 mismatch: expected"):
        pull(f"{url}/small@latest", **options)
    assert not options["directory"].exists()
    assert small.digests(pull(f"{url}/small@latest", **options)) == small.digests(made)


def test_registry_that_is_gone(made, proxy, options, monkeypatch):
    monkeypatch.setattr("pipeline.stores.oci_session.FIRST_PAUSE_S", 0.01)
    url = behind(proxy)
    publish(made, url, ["latest"])
    proxy.faults = [Fault("GET", "503", 10_000)]
    with pytest.raises(HostError, match="HTTP status 503"):
        pull(f"{url}/small@latest", **options)


def test_registry_without_ranges_sends_whole_blobs(made, proxy, options, monkeypatch):
    """Parts are read from whole answers then: slower, and right."""
    url = behind(proxy)
    publish(made, url, ["latest"])
    monkeypatch.setattr("pipeline.registry.blobs.PART_BYTES", 64 << 10)
    proxy.dropped_headers = ("range",)
    assert small.digests(pull(f"{url}/small@latest", **options)) == small.digests(made)


def test_upload_that_breaks_midway_is_sent_again(distribution_url):
    """Twenty megabytes, with a reset after ten."""
    data = bytes(range(256)) * 80_000
    store, starts = open_store(distribution_url), []

    def pieces() -> Iterator[bytes]:
        starts.append(0)
        for at in range(0, len(data), 1 << 20):
            if len(starts) == 1 and at >= 10 << 20:
                raise ConnectionResetError
            yield data[at : at + (1 << 20)]

    store.registry.put_blob(store.repository("small"), digest_of(data), len(data), pieces)
    assert store.registry.has_blob(store.repository("small"), digest_of(data)) == len(data)
    assert len(starts) == 2


def _claim(url: str, number: int, answers) -> None:
    store = open_store(url)
    repo = store.repository("small")
    with oci_tags.locked(store.registry, repo):
        answers.put((number, "in", time.monotonic()))
        time.sleep(0.05)
        answers.put((number, "out", time.monotonic()))


def test_lock_admits_one_process_at_a_time(each_url):
    answers = SPAWN.Queue()
    processes = [SPAWN.Process(target=_claim, args=(each_url, number, answers)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    seen = sorted((answers.get(timeout=5) for _ in range(8)), key=lambda each: each[2])
    assert [what for _, what, _ in seen] == ["in", "out"] * 4
    assert all(seen[at][0] == seen[at + 1][0] for at in range(0, 8, 2))


def test_lock_of_a_dead_process_ends(made, crane_url, monkeypatch):
    monkeypatch.setattr(oci_tags, "LEASE_S", 1.0)
    store = open_store(crane_url)
    oci_tags.put_bytes(store.registry, store.repository("small"), b"{}")
    oci_tags._write(store.registry, store.repository("small"), "gone")
    publish(made, crane_url, ["latest"])
    assert store.aliases("small")["latest"]


def test_tag_that_another_tool_moved_is_an_alias(made, crane_url, tmp_path):
    first = publish(made, crane_url, ["prod"]).version
    second = publish(small.make_beside(tmp_path, graph=b"new"), crane_url).version
    ran("crane", "tag", "--insecure", reference(crane_url, second), "prod")
    moves = aliases.history(crane_url, "small", "prod").moves
    assert [move.version for move in moves] == [second, first]
    assert aliases.roll_back(crane_url, "small", "prod") == (second, first)


def test_version_that_another_tool_moved_is_refused(made, crane_url, tmp_path, options):
    """The manifest names another version than its tag, so the tag is no release."""
    first = publish(made, crane_url).version
    second = publish(small.make_beside(tmp_path, graph=b"new"), crane_url).version
    ran("crane", "tag", "--insecure", reference(crane_url, second), first)
    assert open_store(crane_url).read_release("small", first) is None
    assert open_store(crane_url).versions("small") == [second]


def test_manifest_of_a_stranger_is_refused(made, crane_url, options):
    store = open_store(crane_url)
    repo = store.repository("small")
    oci_tags.put_bytes(store.registry, repo, b"{}")
    body = {
        "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": descriptor("application/json", b"{}"), "layers": [],
        "annotations": {"org.opencontainers.image.version": "1.0"},
    }  # fmt: skip
    store.registry.put_manifest(repo, "1.0", Document(MANIFEST_TYPE, json.dumps(body).encode()))
    with pytest.raises(CorruptError, match=r"no layer manifest\.json"):
        pull(f"{crane_url}/small@1.0", **options)


@pytest.mark.parametrize("status", ["401", "403", "404", "405"])
def test_registry_that_lists_no_names(made, proxy, status, options):
    """As most public registries: what needs no list works, and a wrong name is not taken for an empty registry."""
    url = behind(proxy)
    publish(made, url, ["latest"])
    proxy.faults = [Fault("GET .*_catalog", status, 1000)]
    assert small.digests(pull(f"{url}/small@latest", **options)) == small.digests(made)
    assert [entry.name for entry in releases.list_releases(url, "small")] == ["small"]
    with pytest.raises(TandemError, match="no release named 'smal'"):
        pull(f"{url}/smal@latest", **options)
    with pytest.raises(HostError, match="does not list its names"):
        releases.list_releases(url)


@pytest.mark.parametrize("status", ["400", "409", "412"])
def test_immutable_tags(made, proxy, status, tmp_path):
    """A registry that refuses to change tags: releases are published, an alias is refused by name."""
    url = behind(proxy)
    body = b'{"errors":[{"code":"TAG_INVALID","message":"the repository is immutable"}]}'
    store = open_store(url)
    oci_tags.put_bytes(store.registry, store.repository("small"), b"{}")
    oci_tags._write(store.registry, store.repository("small"), "")
    proxy.faults = [Fault("PUT .*manifests/_tandem.lock", status, 100, body=body)]
    version = publish(made, url).version
    assert store.versions("small") == [version]
    proxy.faults += [Fault("PUT .*manifests/prod", status, 100, body=body)]
    with pytest.raises(HostError, match="tag prod cannot change"):
        aliases.set_alias(url, f"small@{version}", "prod")


def test_many_publishers_of_one_version(each_url, tmp_path):
    """Of several contents under one version exactly one becomes the release, ten times."""
    roots = []
    for number in range(3):
        root = small.make_beside(tmp_path, f"made{number}", weights=b"%d" % number)
        roots.append(root)
    for attempt in range(10):
        won: list[int] = []

        def attempt_one(number: int, version: str, won: list[int] = won) -> None:
            try:
                publish(roots[number], each_url, options=PublishSettings(version=version))
                won.append(number)
            except ArtifactError:
                pass

        threads = [threading.Thread(target=attempt_one, args=(n, f"1.{attempt}")) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        out = pull(f"{each_url}/small@1.{attempt}", tmp_path / f"out{attempt}", cache=tmp_path / "cache")
        assert (
            small.digests(out)["weights/target/rank-0-of-1.safetensors"]
            == small.digests(roots[won[0]])["weights/target/rank-0-of-1.safetensors"]
        )


def test_copy_goes_through_registries_of_all_kinds(made, each_url, tmp_path):
    """Folder -> OCI -> folder: manifest, files, signature and promotions are there; copying again sends nothing."""
    from pipeline.artifact import signing
    from pipeline.registry.copy import copy
    from pipeline.registry.publish import Place
    from support.signing_keys import key_pair

    private, public = key_pair(tmp_path, "release")
    signing.sign(made, private)
    version = publish(made, str(tmp_path / "dev")).version
    copied = copy(f"{tmp_path}/dev/small@{version}", Place(each_url, ("staging",)))
    assert (copied.fresh, copied.has_signature, copied.aliases) == (True, True, ("staging",))
    back = copy(f"{each_url}/small@staging", Place(str(tmp_path / "prod"), ("prod",)))
    assert (back.version, copy(f"{tmp_path}/dev/small@{version}", Place(each_url)).sent) == (version, 0)
    policy = signing.require(str(public))
    for url in (each_url, str(tmp_path / "prod")):
        out = pull(f"{url}/small@{version}", tmp_path / "out", cache=tmp_path / "cache", policy=policy)
        assert small.digests(out) == small.digests(made)
    promotions = releases.list_releases(str(tmp_path / "prod"))[0].copies
    assert [each.destination for each in promotions] == [each_url, str(tmp_path / "prod")]
