"""Pulling: what arrives is what was published, whole, from a registry that may lie, on disks that may be full."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from pipeline.artifact.manifest import MANIFEST, part, read
from pipeline.artifact.verify import verify
from pipeline.errors import ArtifactError, HostError, InputError
from pipeline.files.direct import BLOCK_BYTES
from pipeline.files.unfinished import TEMP, _host
from pipeline.registry.blobs import Blobs
from pipeline.registry.parts import Origin
from pipeline.registry.pull import Selection, pull
from pipeline.registry.releases import Reference, parse_reference
from support import small_artifacts as small

FORK = multiprocessing.get_context("fork")


def blob(registry: Path, original: Path, name: str) -> Path:
    sha256 = read(original).manifest.files[name].sha256
    return registry / "blobs" / "sha256" / sha256[:2] / sha256


def test_pull_alias(registry, original, options):
    seen = []
    out = pull(f"{registry}/small@latest", progress=lambda done, total: seen.append((done, total)), **options)
    assert out == options["directory"]
    assert small.digests(out) == small.digests(original)
    verify(out)
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_pull_version_and_default_alias(registry, original, options, tmp_path):
    version = read(original).manifest.version
    pull(f"file://{registry}/small@{version}", **options)
    pull(f"{registry}/small", tmp_path / "other", cache=tmp_path / "cache")
    assert small.digests(tmp_path / "pulled") == small.digests(tmp_path / "other")


def test_pull_again_links_what_is_here(registry, options, tmp_path):
    first = pull(f"{registry}/small@latest", **options)
    shutil.rmtree(registry / "blobs")
    second = pull(f"{registry}/small@latest", tmp_path / "second", cache=options["cache"])
    assert (first / small.WEIGHTS).samefile(second / small.WEIGHTS)


def test_pull_replaces_an_older_artifact(registry, original, options, tmp_path):
    small.make(options["directory"], tmp_path / "work", graph=b"older")
    pull(f"{registry}/small@latest", **options)
    assert small.digests(options["directory"]) == small.digests(original)


def test_pull_refuses_to_replace_other_things(registry, options):
    options["directory"].mkdir()
    (options["directory"] / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match="not an artifact directory; not replaced"):
        pull(f"{registry}/small@latest", **options)
    assert (options["directory"] / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("place", [0, 1_000_000, -1])
@pytest.mark.parametrize("name", [small.WEIGHTS, "graphs/decode-b1-t1-s32/graph.bin", "recipe.yaml"])
def test_pull_flipped_bit(registry, original, options, name, place):
    path = blob(registry, original, name)
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{name}: sha256 mismatch: expected {path.name}, found \w{{64}}"):
        pull(f"{registry}/small@latest", **options)
    assert not options["directory"].exists()
    assert not [one for one in options["cache"].rglob("*") if one.stem == path.name and "locks" not in one.parts]


def test_pull_reads_no_more_than_is_listed(registry, original, options):
    """A blob that grew in the registry: its first bytes are what was published, and nothing else is taken."""
    os.truncate(blob(registry, original, small.WEIGHTS), 3_000_000)
    assert small.digests(pull(f"{registry}/small@latest", **options)) == small.digests(original)


@pytest.mark.parametrize("size", [0, 10], ids=["empty", "short"])
def test_pull_wrong_size(registry, original, options, size):
    path = blob(registry, original, small.WEIGHTS)
    os.truncate(path, size)
    with pytest.raises(ArtifactError, match=small.WEIGHTS):
        pull(f"{registry}/small@latest", **options)
    assert not options["directory"].exists()


def test_pull_missing_blob(registry, original, options):
    path = blob(registry, original, small.WEIGHTS)
    path.unlink()
    with pytest.raises(ArtifactError, match=f"blob {path.name} is missing"):
        pull(f"{registry}/small@latest", **options)
    assert not options["directory"].exists()


@pytest.mark.parametrize("path", ["../evil", "/tmp/evil", "weights/../../evil", "..\\evil"])
def test_pull_path_that_leaves(registry, original, options, tmp_path, path):
    manifest = next(registry.glob("releases/small/*/manifest.json"))
    data = json.loads(manifest.read_text())
    data["files"][path] = data["files"]["recipe.yaml"]
    manifest.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="unsafe path"):
        pull(f"{registry}/small@latest", **options)
    assert not options["directory"].exists()
    assert list(tmp_path.rglob("*evil*")) == []


@pytest.mark.parametrize("field", ["name", "version"])
def test_pull_manifest_of_another_release(registry, options, field):
    manifest = next(registry.glob("releases/small/*/manifest.json"))
    data = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(data | {field: "other"}))
    with pytest.raises(ArtifactError, match=r"mismatch in the manifest: expected '.*', found '.*other'"):
        pull(f"{registry}/small@latest", **options)


@pytest.mark.parametrize(
    ("name", "fix"),
    [("small@none", "versions and aliases of"), ("other@latest", "names: small"), ("other", "names: small")],
)
def test_pull_unknown(registry, options, name, fix):
    with pytest.raises(InputError, match=r"no version or alias|no release named 'other'") as caught:
        pull(f"{registry}/{name}", **options)
    assert fix in caught.value.fix
    assert not options["cache"].exists()


@pytest.mark.parametrize(
    "reference", ["small@latest", "registry/", "registry/@latest", "registry/small@", "/small", ""]
)
def test_parse_reference_refuses(reference):
    with pytest.raises(InputError, match="expected REGISTRY/NAME@VERSION"):
        parse_reference(reference)


def test_parse_reference_takes_apart():
    assert parse_reference("s3://b@1/p/n@v1") == Reference("s3://b@1/p", "n", "v1")
    assert parse_reference("a/b") == Reference("a", "b", "latest")


def test_pull_damaged_local_blob_is_fetched_again(registry, original, options):
    out = pull(f"{registry}/small@latest", **options)
    with (out / small.WEIGHTS).open("r+b") as file:  # shares its bytes with the local store
        file.write(b"edited")
    pull(f"{registry}/small@latest", **options)
    assert small.digests(out) == small.digests(original)


class Counting:
    """A folder store that counts the bytes it hands out."""

    def __init__(self, store) -> None:
        self.store, self.bytes = store, 0

    def read_blob(self, blob, offset: int, buffer: memoryview) -> int:
        count = self.store.read_blob(blob, offset, buffer)
        self.bytes += count
        return count


def origin(store, original: Path) -> Origin:
    return Origin(store, "small", read(original).manifest.version)


@pytest.mark.parametrize("kept", [1, 1_000_000, 2_000_000], ids=["start", "middle", "all"])
def test_bring_resumes(registry, original, tmp_path, kept):
    """Whatever byte it stopped at; of the last block, what was there is read again."""
    from pipeline.stores.base import open_store

    store, blobs = Counting(open_store(str(registry))), Blobs(tmp_path / "blobs")
    entry = read(original).manifest.files[small.WEIGHTS]
    kept = min(kept, entry.size)
    partial = blobs.path(entry.sha256).with_suffix(".partial")
    partial.parent.mkdir(parents=True)
    partial.write_bytes((original / small.WEIGHTS).read_bytes()[:kept])
    seen = []
    blobs.fetch_all(origin(store, original), {small.WEIGHTS: entry}, lambda done, total: seen.append((done, total)))
    assert store.bytes == (0 if kept == entry.size else entry.size - kept + kept % BLOCK_BYTES)
    assert blobs.path(entry.sha256).read_bytes() == (original / small.WEIGHTS).read_bytes()
    assert seen[-1] == (entry.size, entry.size)
    assert not partial.exists()


@pytest.mark.parametrize("data", [b"wrong", b"wrong" * 1_000_000], ids=["short", "long"])
def test_bring_starts_over_after_a_wrong_part(registry, original, tmp_path, data):
    from pipeline.stores.base import open_store

    blobs = Blobs(tmp_path / "blobs")
    entry = read(original).manifest.files[small.WEIGHTS]
    partial = blobs.path(entry.sha256).with_suffix(".partial")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(data)
    seen = []
    blobs.fetch_all(
        origin(open_store(str(registry)), original),
        {small.WEIGHTS: entry},
        lambda done, total: seen.append((done, total)),
    )
    assert blobs.path(entry.sha256).read_bytes() == (original / small.WEIGHTS).read_bytes()
    assert seen[-1] == (entry.size, entry.size)


def _pull(reference: str, options: dict) -> None:
    pull(reference, **options)


def test_pull_killed_then_complete(registry, original, options):
    """kill -9 at any moment: the directory is not there, or whole; pulling again completes it and leaves no litter."""
    stopped = 0
    for delay_s in (0.01, 0.03, 0.05, 0.08):
        process = FORK.Process(target=_pull, args=(f"{registry}/small@latest", options))
        process.start()
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        stopped += process.exitcode != 0
        if options["directory"].exists():
            verify(options["directory"])
            shutil.rmtree(options["directory"])
    assert stopped
    _pull_in_new_process(f"{registry}/small@latest", options)
    assert small.digests(options["directory"]) == small.digests(original)
    assert list(options["cache"].rglob("*.partial")) == []
    assert list(options["directory"].parent.glob(f"{TEMP}*")) == []


def test_pull_that_finds_its_result_removes_what_a_killed_one_left(registry, options):
    """A pull that was killed while it removed the release before left it: the next had nothing to write, and swept
    nothing."""
    reference = f"{registry}/small@latest"
    _pull_in_new_process(reference, options)
    dead = FORK.Process(target=int)
    dead.start()
    dead.join()
    left = options["directory"].parent / f"{TEMP}{_host()}-{dead.pid}-01234567-pulled"
    left.mkdir()
    _pull_in_new_process(reference, options)
    assert not left.exists()


def _pull_in_new_process(reference: str, options: dict) -> None:
    process = FORK.Process(target=_pull, args=(reference, options))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_pull_many_at_once(registry, original, options, tmp_path):
    """Several pulls share one local store."""
    folders = [tmp_path / f"pulled-{number}" for number in range(4)]
    processes = [
        FORK.Process(target=_pull, args=(f"{registry}/small@latest", options | {"directory": folder}))
        for folder in folders
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    for folder in folders:
        assert small.digests(folder) == small.digests(original)


def test_pull_only_a_part(registry, options, original):
    out = pull(f"{registry}/small@latest", select=Selection(only=["weights/target/*"]), **options)
    always = {
        n for n in small.digests(original) if n.startswith(("recipe.", "tokenizer/")) or n.endswith("config.json")
    }
    expected = {small.WEIGHTS, MANIFEST} | always
    assert small.digests(out).keys() == expected
    manifest = read(out).manifest
    verify(out, only=part(manifest, ["weights/target/*"], ""))
    with pytest.raises(ArtifactError, match=r"only a part was pulled \(--only 'weights/target/\*'\)"):
        verify(out)
    fetched = [path for path in (options["cache"] / "blobs" / "sha256").rglob("*") if path.is_file()]
    assert len(fetched) == len({manifest.files[path].sha256 for path in expected - {MANIFEST}})


def test_pull_only_nothing(registry, options):
    with pytest.raises(InputError, match=r"no file matches 'nothing\*'"):
        pull(f"{registry}/small@latest", select=Selection(only=["nothing*"]), **options)


def test_pull_offline(registry, original, options):
    with pytest.raises(HostError, match="not in the local cache"):
        pull(f"{registry}/small@latest", offline=True, **options)
    pull(f"{registry}/small@latest", **options)
    shutil.rmtree(registry)
    shutil.rmtree(options["directory"])
    for wanted in ("latest", read(original).manifest.version):
        out = pull(f"{registry}/small@{wanted}", offline=True, **options)
        assert small.digests(out) == small.digests(original)


def test_pull_offline_without_its_blobs(registry, options):
    pull(f"{registry}/small@latest", select=Selection(only=["recipe.yaml"]), **options)
    with pytest.raises(HostError, match=r"files are not in the local cache, for example \w+"):
        pull(f"{registry}/small@latest", offline=True, **options)


def test_an_exact_version_that_is_here_needs_no_registry(registry, original, options):
    """A server with all files on disk did not start without its registry, and swapped its folder at each start."""
    version = read(original).manifest.version
    out = pull(f"{registry}/small@{version}", **options)
    before = (out / MANIFEST).stat().st_ino
    registry.rename(registry.with_suffix(".gone"))
    assert pull(f"{registry}/small@{version}", **options) == out
    assert (out / MANIFEST).stat().st_ino == before
    (out / "extra").write_text("x")
    pull(f"{registry}/small@{version}", **options)
    assert not (out / "extra").exists()
    with pytest.raises((HostError, InputError)):
        pull(f"{registry}/small@latest", **options)


def test_a_damaged_blob_of_a_known_version_is_fetched(registry, original, options):
    version = read(original).manifest.version
    pull(f"{registry}/small@{version}", **options)
    for path in (options["cache"] / "blobs" / "sha256").rglob("*"):
        if path.is_file():
            path.chmod(0o644)
            path.write_bytes(b"damaged" + path.read_bytes())
    verify(pull(f"{registry}/small@{version}", **options))


def test_pull_no_registry(tmp_path, options):
    with pytest.raises(InputError, match="no such folder"):
        pull(f"{tmp_path}/none/small@latest", **options)
    assert not (tmp_path / "none").exists()


def test_pull_without_space(registry, options):
    """The need is known before the first byte, and is refused then."""
    manifest = next(registry.glob("releases/small/*/manifest.json"))
    data = json.loads(manifest.read_text())
    data["files"][small.WEIGHTS]["size"] = 10**16
    manifest.write_text(json.dumps(data))
    with pytest.raises(HostError, match=r"10,000,\d+,\d+,\d+,\d+ bytes needed, [\d,]+ free"):
        pull(f"{registry}/small@latest", **options)
    assert not options["directory"].exists()
