"""Artifacts: a flipped bit, a file too many or too few, a path or link that leads out, another host: all refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from pipeline.artifact.manifest import MANIFEST, MAX_BYTES, content_digest, dump, parse, read
from pipeline.artifact.reports import add_reports
from pipeline.artifact.verify import verify
from pipeline.errors import ArtifactError, InputError
from pipeline.files.unfinished import TEMP, sweep
from pipeline.plan import lock as locks
from pipeline.recipe import load
from support import small_artifacts as small
from support.paths import ROOT, TESTS

FILES = [
    "graphs/decode-b1-t1-s32/graph.bin",
    "graphs/decode-b1-t1-s32/io.json",
    "graphs/speculate-b1-t3-s32-k2/flags.json",
    "weights/target/rank-0-of-1.safetensors",
    "weights/draft/rank-0-of-1.safetensors",
    "tokenizer/tokenizer.json",
    "recipe.yaml",
    "recipe.lock",
    "provenance.json",
    "sbom.cdx.json",
    "reports/parity.json",
]


def edit_manifest(root: Path, change) -> None:
    data = json.loads((root / MANIFEST).read_text())
    change(data)
    (root / MANIFEST).write_text(json.dumps(data))


def test_verify_whole(made):
    seen = []
    found = verify(made, lambda done, total: seen.append((done, total)))
    assert set(found.manifest.files) > set(FILES)
    assert seen[-1] == (found.manifest.size_bytes,) * 2


@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("name", FILES)
def test_verify_flipped_bit(made, name, place):
    data = bytearray((made / name).read_bytes())
    data[place] ^= 1
    expected = read(made).manifest.files[name].sha256
    (made / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{name}: sha256 [0-9a-f]{{64}}, expected {expected}"):
        verify(made)


@pytest.mark.parametrize("byte", range(0, 3000, 97))
def test_read_flipped_manifest(made, byte):
    """No flipped bit of a manifest is a crash, and none that changes files or graphs goes unseen."""
    data = bytearray((made / MANIFEST).read_bytes())
    data[byte % len(data)] ^= 2
    before = read(made).manifest
    (made / MANIFEST).write_bytes(data)
    try:
        after = verify(made).manifest
    except ArtifactError:
        return
    assert after.files == before.files


def test_verify_truncated(made):
    os.truncate(made / FILES[0], 3)
    with pytest.raises(ArtifactError, match=rf"{FILES[0]}: 3 bytes, expected \d+"):
        verify(made)


def test_verify_reports_everything_at_once(made):
    (made / FILES[0]).unlink()
    (made / "graphs" / "extra").write_text("")
    (made / FILES[3]).write_bytes(b"other")
    os.mkfifo(made / "pipe")
    with pytest.raises(ArtifactError) as caught:
        verify(made)
    what = caught.value.what
    assert f"{FILES[0]}: missing" in what
    assert "graphs/extra: not in the manifest" in what
    assert f"{FILES[3]}: 5 bytes, expected" in what
    assert "pipe: not a plain file" in what


@pytest.mark.parametrize("kind", ["file", "folder", "outside", "dangling"])
def test_verify_link(made, tmp_path, kind):
    """A link is refused even where it leads to the right bytes."""
    name = FILES[3]
    path = made / ("weights/target" if kind == "folder" else name)
    moved = (tmp_path if kind == "outside" else made) / "moved"
    path.rename(moved)
    path.symlink_to(moved)
    if kind == "dangling":
        moved.unlink()
    with pytest.raises(ArtifactError, match="a link to"):
        verify(made)


def test_read_manifest_is_a_link(made, tmp_path):
    (made / MANIFEST).rename(tmp_path / "elsewhere")
    (made / MANIFEST).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="the manifest is a symbolic link"):
        read(made)


@pytest.mark.parametrize("path", ["../out2/file", "/etc/passwd", "a/../../b", "a\\b", "", MANIFEST, "recipe.yaml/x"])
def test_read_unsafe_path(made, path):
    edit_manifest(made, lambda data: data["files"].update({path: {"sha256": "0" * 64, "size": 0}}))
    with pytest.raises(ArtifactError) as caught:
        read(made)
    assert repr(path) in caught.value.what


@pytest.mark.parametrize("field", ["file", "io"])
def test_read_graph_that_is_not_listed(made, field):
    """A loader opens what a graph names, so it must be among the files that are verified."""
    edit_manifest(made, lambda data: data["graphs"][0].update({field: "../evil.so"}))
    with pytest.raises(ArtifactError, match=r"'\.\./evil\.so' is used, but not listed"):
        read(made)


FAULTS = {
    "schema": (
        lambda data: data.update(schema_version=1),
        "this version of Tandem reads 3, found 1",
    ),
    "kind": (lambda data: data.update(kind="other"), "kind: Input tag 'other'"),
    "inside": (lambda data: data["pair"]["models"].update(later=1), "pair.models.later: "),
    "graph": (lambda data: data["graphs"][0]["spec"].update(phase="other"), "graphs.0.spec.phase: Input should be"),
    "unknown": (lambda data: data.update(later=1), "later: Extra inputs"),
    "type": (lambda data: data["pair"].update(rows="two"), "pair.rows: Input should be a valid integer"),
    "gone": (lambda data: data.pop("files"), "files: Field required"),
    "name": (lambda data: data.update(name="../x"), "name: String should match"),
    "version": (lambda data: data.update(version="../x"), "version: String should match"),
    "digest": (lambda data: data["files"]["recipe.yaml"].update(sha256="12"), "files.recipe.yaml.sha256"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_read_damaged_manifest(made, fault):
    change, message = FAULTS[fault]
    edit_manifest(made, change)
    with pytest.raises(ArtifactError, match=message):
        read(made)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"null"])
def test_read_not_json(made, data):
    (made / MANIFEST).write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged manifest"):
        read(made)


def test_read_no_artifact(tmp_path):
    with pytest.raises(ArtifactError, match="no manifest") as caught:
        read(tmp_path / "none")
    assert caught.value.exit_code == 2


def test_verify_moved_and_alone(tmp_path):
    """An artifact needs nothing outside its directory."""
    small.make(tmp_path / "out2", tmp_path / "work").root.rename(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "work")
    verify(tmp_path / "elsewhere")


def test_verify_only_a_part(made):
    with pytest.raises(ArtifactError, match="not in the part"):
        verify(made, only=["weights/*"])
    shutil.rmtree(made / "graphs")
    with pytest.raises(ArtifactError, match="missing"):
        verify(made)
    verify(made, only=["weights/*", "tokenizer/*", "re*", "*config.json", "prov*", "sbom*"])


def test_package_is_reproducible(tmp_path, monkeypatch):
    """Another folder gives the same bytes, with the time that the build is told to claim."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    one = small.make(tmp_path / "a" / "out", tmp_path / "a" / "work")
    two = small.make(tmp_path / "b" / "deeper" / "out2", tmp_path / "b" / "work")
    assert dump(one.manifest) == dump(two.manifest)
    assert one.manifest.created == "2023-11-14T22:13:20Z"
    assert small.digests(one.root) == small.digests(two.root)


def test_package_version_names_content(tmp_path, monkeypatch):
    """Time and reports are not content; weights and graphs are."""
    work = tmp_path / "work"
    first = small.make(tmp_path / "1", work).manifest
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    later = small.make_validated(tmp_path / "2", work).manifest
    assert later.version == first.version
    assert content_digest(later) == content_digest(first)
    assert small.make(tmp_path / "3", work, weights=b"new").manifest.version != first.version
    assert small.make(tmp_path / "4", work, graph=b"new").manifest.version != first.version


def test_package_recipe_and_lock_read_back(made):
    assert load(made / "recipe.yaml").digest() == read(made).manifest.recipe_digest
    assert locks.digest(locks.read(made / "recipe.lock")) == read(made).manifest.lock_digest


def test_package_links_graphs_and_shards(tmp_path):
    made = small.make(tmp_path / "out", tmp_path / "work").root
    stored = {path.stat().st_ino for path in (tmp_path / "work").rglob("*") if path.is_file()}
    for graph in read(made).manifest.graphs:
        assert (made / graph.file).stat().st_ino in stored
    for shard in read(made).manifest.shards:
        assert (made / shard.file).stat().st_ino in stored
    assert (made / "tokenizer" / "tokenizer.json").stat().st_ino not in stored


def test_package_refuses_to_replace_other_things(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match="not an artifact directory; not replaced"):
        small.make(tmp_path / "home", tmp_path / "work")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


def test_package_damaged_graph_is_refused(tmp_path):
    work = tmp_path / "work"
    for path in (small.make(tmp_path / "out", work).root / "graphs").rglob("graph.bin"):
        with path.open("r+b") as file:
            file.write(b"X")
    small.make(tmp_path / "new", work)  # putting again repairs the entries
    verify(tmp_path / "new")


CHILD = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from support import small_artifacts as small
print("ready", flush=True)
for turn in range(1000):
    small.make_again(Path({out!r}), Path({work!r}), weights=b"new%d" % (turn % 3), size=200_000)
"""


def test_package_killed_leaves_whole_artifacts(tmp_path):
    """kill -9 at any moment: the directory holds one complete artifact, and the next build leaves no litter."""
    out, work = tmp_path / "out", tmp_path / "work"
    small.make_again(out, work)
    code = CHILD.format(tests=str(TESTS), root=str(ROOT), out=str(out), work=str(work))
    seen = set()
    for delay_s in (0.01, 0.04, 0.09, 0.15, 0.22, 0.3, 1.0, 3.0, 9.0):
        if delay_s >= 1 and len(seen) > 1:
            break  # the long ones are for a busy machine
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(delay_s)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        seen.add(verify(out).manifest.version)
    assert len(seen) > 1
    expected = small.make_again(tmp_path / "undisturbed", tmp_path / "work2", weights=b"new0", size=200_000)
    rebuilt = small.make_again(out, work, weights=b"new0", size=200_000)
    assert rebuilt.manifest.version == expected.manifest.version
    assert content_digest(verify(out).manifest) == content_digest(expected.manifest)
    sweep(tmp_path)
    assert list(tmp_path.glob(f"{TEMP}*")) == []


def _add_reports_forever(root: Path) -> None:
    for turn in range(10_000):
        add_reports(root, {"parity.json": b"%d" % turn, "junit.xml": b"x"}, {"passed": True})


def test_add_reports_killed(made):
    """Reports and manifest used to change one by one: a kill in between left an artifact that did not verify."""
    for delay_s in (0.02, 0.05, 0.1):
        process = multiprocessing.get_context("fork").Process(target=_add_reports_forever, args=(made,))
        process.start()
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        verify(made)


def test_add_reports_again_replaces(made):
    add_reports(made, {"parity.json": b"[1]"}, {"passed": False})
    found = verify(made)
    assert found.manifest.passed is False
    assert (made / "reports" / "parity.json").read_bytes() == b"[1]"


def test_import_brings_no_torch():
    code = (
        "import sys, pipeline.stages.package, pipeline.registry.publish, pipeline.registry.pull, pipeline.cache.local\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("path", ["a/" * 20000 + "b", "a/" * 32 + "b", "b" * 513])
def test_a_path_that_is_too_deep_or_too_long_is_refused_at_once(path, validated):
    """66 kB of manifest cost 385 MiB and seconds, before any signature was checked."""
    facts = json.loads((validated / MANIFEST).read_bytes())
    facts["files"][path] = {"sha256": "0" * 64, "size": 1}
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match=f"path of {len(path)} characters"):
            parse(json.dumps(facts).encode(), "here")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_manifest_that_is_too_large_is_not_parsed():
    with pytest.raises(ArtifactError, match=r"the manifest has 16,777,217 bytes, limit 16,777,216"):
        parse(b" " * (MAX_BYTES + 1), "here")
