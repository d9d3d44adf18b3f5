"""A release in one file: the same bytes on the other side, and kills that cost little."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.artifact.manifest import MANIFEST, read
from pipeline.artifact.signing import require
from pipeline.errors import CorruptError, HostError, InputError, RefusedError
from pipeline.files.unfinished import TEMP
from pipeline.registry.aliases import list_aliases
from pipeline.registry.archives import load, save
from pipeline.registry.copy import CopySettings
from pipeline.registry.publish import Place, PublishSettings, publish
from pipeline.registry.pull import pull
from pipeline.registry.releases import list_releases
from pipeline.registry.yanks import yank
from pipeline.stores.archive import BLOCK, header, read_archive, write_archive
from pipeline.stores.base import open_store
from support import small_artifacts as small
from support.signing_keys import key_pair

FORK = multiprocessing.get_context("fork")


def test_save_and_load_keep_every_byte(saved, file, air):
    loaded = load(file, Place(air.url, ("live",)))
    assert (loaded.fresh, loaded.sent, loaded.has_signature) == (True, loaded.blobs, True)
    assert small.kept(Path(air.url)) == small.kept(saved / "dev")
    assert list_aliases(air.url, "small") == {"live": "1.0"}
    assert load(file, air).sent == 0


def test_load_asks_the_policy_of_the_destination(saved, file, air, tmp_path):
    _, stranger = key_pair(tmp_path, "stranger")
    with pytest.raises(RefusedError, match="not signed by"):
        load(file, air, CopySettings(require(str(stranger))))
    assert not Path(air.url).exists()
    assert load(file, air, CopySettings(require(str(saved / "release.pub")))).signer == str(saved / "release.pub")
    with pytest.raises(RefusedError, match="not signed by"):
        save(f"{saved}/dev/small@1.0", tmp_path / "x.tar", CopySettings(require(str(stranger))))
    assert not list(tmp_path.glob("x.tar*"))


def test_load_records_each_step(saved, file, air):
    load(file, air)
    first, second = list_releases(air.url)[0].copies
    assert (first.source, first.destination) == (f"{saved}/dev/small@1.0", "release.tar")
    assert (second.source, second.destination) == ("release.tar/small@1.0", air.url)


def test_standard_tools_read_the_file(saved, file, tmp_path):
    """tar makes a registry of it, and sha256sum checks it."""
    (tmp_path / "x").mkdir()
    subprocess.run(["tar", "-xf", file, "-C", tmp_path / "x"], check=True)
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "x", check=True)
    assert done.returncode == 0
    assert small.kept(tmp_path / "x") == small.kept(saved / "dev")
    out = pull(f"{tmp_path}/x/small@1.0", tmp_path / "pulled", cache=tmp_path / "cache")
    assert small.digests(out).items() >= small.digests(saved / "out").items()


def test_save_takes_a_yank_along(saved, tmp_path, air):
    shutil.copytree(saved / "dev", tmp_path / "dev")
    yank(f"{tmp_path}/dev/small@1.0", "bad")
    with pytest.raises(RefusedError, match="yanked: bad"):
        save(f"{tmp_path}/dev/small@1.0", tmp_path / "y.tar")
    save(f"{tmp_path}/dev/small@1.0", tmp_path / "y.tar", CopySettings(yanked=True))
    with pytest.raises(RefusedError, match="yanked: bad"):
        load(tmp_path / "y.tar", air)
    load(tmp_path / "y.tar", air, CopySettings(yanked=True))
    assert list_releases(air.url)[0].yanked == "bad"


def test_save_again_is_done_already_and_replaces_nothing_else(saved, file, tmp_path):
    before = file.read_bytes()
    assert not save(f"{saved}/dev/small@1.0", file).fresh
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match="not overwritten") as caught:
        save(f"{saved}/dev/small@1.0", tmp_path / "thesis.tex")
    assert caught.value.fix == "remove the file, or name another"
    publish(saved / "out", f"{tmp_path}/other", [], PublishSettings(version="2"))
    with pytest.raises(InputError, match="archive of another release; not overwritten"):
        save(f"{tmp_path}/other/small@2", file)
    assert (tmp_path / "thesis.tex").read_text() == "years"
    assert file.read_bytes() == before


def test_load_dry_run_writes_nothing(file, air):
    assert load(file, air, CopySettings(dry_run=True)).sent > 10
    assert not Path(air.url).exists()


def _save(reference: str, file: Path) -> None:
    save(reference, file)


def _load(file: Path, air: Place) -> None:
    load(file, air)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a registry whose release has files of megabytes."""
    folder = tmp_path_factory.mktemp("large")
    publish(small.make_validated(folder / "out", folder / "work", size=3_000_000).root, str(folder / "dev"), ["latest"])
    return folder


def killed(work: Callable[..., None], *args: object, after_s: float) -> bool:
    process = FORK.Process(target=work, args=args)
    process.start()
    time.sleep(after_s)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode != 0


def test_save_killed_then_continued(large, tmp_path, air):
    """The file is absent or whole; what was written whole is not fetched again."""
    file, partial = tmp_path / "r.tar", tmp_path / "r.tar.partial"
    stopped = 0
    for after_s in (0.03, 0.05, 0.08, 0.12, 0.16):
        stopped += killed(_save, f"{large}/dev/small@latest", file, after_s=after_s)
        if file.exists():
            break
    assert stopped
    if not file.exists():
        assert partial.exists()
    save(f"{large}/dev/small@latest", file)
    assert not partial.exists()
    load(file, air)
    assert small.kept(Path(air.url)) == small.kept(large / "dev")


def test_save_keeps_whole_blobs_and_no_others(large, tmp_path, air):
    """A partial file that ends inside a member, one with a flipped bit, and one of another release."""
    reference, file, partial = f"{large}/dev/small@latest", tmp_path / "r.tar", tmp_path / "r.tar.partial"
    total = save(reference, file).sent
    whole = file.read_bytes()
    with read_archive(file) as archive:
        members = list(archive.bucket.members.values())
    for count, cut in ((3, 700), (total - 1, 1), (total, 0), (total + 2, 600)):
        file.unlink(missing_ok=True)
        partial.write_bytes(whole[: members[count - 1].end + cut])
        assert save(reference, file).sent == total - min(count, total)
        assert partial.exists() is False
    file.unlink()
    data = bytearray(whole[: members[9].end])
    data[members[4].offset + 1] ^= 1
    partial.write_bytes(data)
    assert save(reference, file).sent == total - 4
    file.unlink()
    other = hashlib.sha256(b"other").hexdigest()
    partial.write_bytes(header(f"blobs/sha256/{other[:2]}/{other}", 5, "") + b"other".ljust(BLOCK, b"\0") + whole)
    assert save(reference, file).sent == total
    load(file, air)
    assert small.kept(Path(air.url)) == small.kept(large / "dev")


def test_save_after_a_failure_of_the_source_continues(large, tmp_path):
    """A blob of the source that is damaged: an error that names it, and the file continues once it is whole."""
    dev, file = Path(shutil.copytree(large / "dev", tmp_path / "dev")), tmp_path / "r.tar"
    entry = read(large / "out").manifest.files[small.WEIGHTS]
    path = dev / "blobs/sha256" / entry.sha256[:2] / entry.sha256
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"?")
    with pytest.raises(CorruptError, match="sha256 mismatch"):
        save(f"{dev}/small@latest", file)
    assert not file.exists()
    path.write_bytes(good)
    done = save(f"{dev}/small@latest", file)
    assert done.sent <= done.blobs
    with read_archive(file) as archive:
        assert archive.names() == ["small"]


def test_load_killed_then_complete(large, tmp_path, air):
    file, stopped = tmp_path / "r.tar", 0
    save(f"{large}/dev/small@latest", file)
    version = read(large / "out").manifest.version
    whole = {entry.sha256 for entry in read(large / "out").manifest.files.values()}
    for after_s in (0.03, 0.05, 0.08, 0.12):
        stopped += killed(_load, file, air, after_s=after_s)
        if open_store(air.url).read_release("small", version) is not None:
            assert whole <= {path.name for path in (Path(air.url) / "blobs").rglob("*")}
    assert stopped
    load(file, air)
    assert small.kept(Path(air.url)) == small.kept(large / "dev")
    assert not [path for path in Path(air.url).rglob(f"{TEMP}*") if "blobs" not in path.parts]


def test_two_saves_of_one_file_at_once(saved, tmp_path):
    file = tmp_path / "r.tar"
    with write_archive(file, {}), pytest.raises(HostError, match="another process writes this archive"):
        save(f"{saved}/dev/small@1.0", file)
    file.unlink()
    save(f"{saved}/dev/small@1.0", file)


def test_save_into_a_folder_that_is_not_there_yet(saved, tmp_path):
    assert save(f"{saved}/dev/small@1.0", tmp_path / "new/folder/r.tar").fresh
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["r.tar"]
    assert (saved / "dev/releases/small/1.0" / MANIFEST).is_file()
