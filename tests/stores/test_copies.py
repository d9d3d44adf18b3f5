"""Copies between a folder and real servers, both ways, and through a file: the same bytes everywhere."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.artifact.manifest import MANIFEST, SIGNATURE
from pipeline.errors import ArtifactError, RefusedError
from pipeline.files.atomic import sha256_file
from pipeline.registry.aliases import history
from pipeline.registry.archives import load, save
from pipeline.registry.copy import CopySettings, copy
from pipeline.registry.publish import Place, PublishSettings, publish
from pipeline.registry.pull import Selection, pull
from pipeline.registry.releases import list_releases
from pipeline.registry.yanks import yank
from pipeline.stores.base import open_store
from support import small_artifacts as small
from support.paths import ROOT

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, original: Path) -> Path:
    """A registry in a folder: 1.0 of two variants that share weights; stand-ins of signatures over three documents."""
    folder = tmp_path_factory.mktemp("copies")
    one = Path(shutil.copytree(original, folder / "one"))
    two = Path(shutil.copytree(original, folder / "two"))
    data = json.loads((two / MANIFEST).read_text()) | {"requires": {"device": "neuron", "chip": "trn2"}}
    (two / MANIFEST).write_text(json.dumps(data))
    sign = PublishSettings(version="1.0", sign=lambda document: b"over " + hashlib.sha256(document).digest())
    publish([one, two], str(folder / "dev"), ["latest"], sign)
    return folder


@pytest.fixture
def dev(tmp_path: Path, source: Path) -> Path:
    return Path(shutil.copytree(source / "dev", tmp_path / "dev"))


def test_copy_there_and_back(dev, url, tmp_path):
    """Folder -> server -> folder: documents, signatures and blobs are those of the first folder."""
    there = copy(f"{dev}/small@latest", Place(url, ("live",)))
    assert (there.version, there.fresh, len(there.variants), there.has_signature) == ("1.0", True, 2, True)
    assert [(each.version, each.aliases, each.has_signature) for each in list_releases(url)] == [
        ("1.0", ("live",), True)
    ]
    assert [move.version for move in history(url, "small", "live").moves] == ["1.0"]
    back = copy(f"{url}/small@live", Place(f"{tmp_path}/back"))
    assert back.sent == back.blobs == there.blobs
    assert small.kept(tmp_path / "back") == small.kept(dev)
    assert [each.source for each in list_releases(f"{tmp_path}/back")[0].copies] == [
        f"{dev}/small@1.0",
        f"{url}/small@1.0",
    ]


def test_copy_again_sends_nothing(dev, url, tmp_path):
    """Also after a newer release, which on a Hub has replaced the files of main."""
    copy(f"{dev}/small@1.0", Place(url))
    copies = list_releases(url)[0].copies
    publish(small.make_beside(tmp_path, weights=b"newer"), url, ["latest"])
    again = copy(f"{dev}/small@1.0", Place(url, ("live",)))
    assert (again.sent, again.fresh) == (0, False)
    assert copy(f"{dev}/small@1.0", Place(url), CopySettings(dry_run=True)).sent == 0
    assert next(each.copies for each in list_releases(url) if each.version == "1.0") == copies
    assert open_store(url).aliases("small")["live"] == "1.0"


def test_copy_from_server_to_server(dev, url, tmp_path):
    copy(f"{dev}/small@1.0", Place(url))
    copied = copy(f"{url}/small@1.0", Place(f"{url}-2", ("live",)))
    assert copied.sent in (0, copied.blobs)  # some OCI registries share blobs among all repositories
    options = {"cache": tmp_path / "cache", "select": Selection(variant="trn2-tp1")}
    out = pull(f"{url}-2/small@live", tmp_path / "out", **options)
    assert small.digests(out).items() >= small.digests(pull(f"{dev}/small@1.0", tmp_path / "out2", **options)).items()
    copy(f"{url}-2/small@1.0", Place(f"{tmp_path}/back"))
    assert small.kept(tmp_path / "back") == small.kept(dev)


def test_copy_keeps_several_signatures_over_one_document(dev, url, tmp_path):
    """A folder finds them by digest; a Hub has `signature`, `signature-2`."""
    document = (dev / "releases/small/1.0" / MANIFEST).read_bytes()
    place = dev / "signatures" / hashlib.sha256(document).hexdigest()
    for text in (b"by another signer", b"by a third"):
        (place / hashlib.sha256(text).hexdigest()).write_bytes(text)
    copy(f"{dev}/small@1.0", Place(url))
    found = open_store(url).signatures("small", "1.0", SIGNATURE, place.name)
    assert sorted(found) == sorted(path.read_bytes() for path in place.iterdir())
    copy(f"{url}/small@1.0", Place(f"{tmp_path}/back"))
    assert small.kept(tmp_path / "back") == small.kept(dev)


def test_copy_refuses_other_content_and_takes_yanks_along(dev, url, tmp_path):
    publish(small.make_beside(tmp_path, weights=b"other"), url, [], PublishSettings(version="1.0"))
    with pytest.raises(ArtifactError, match="version already published with other content"):
        copy(f"{dev}/small@1.0", Place(url))
    yank(f"{dev}/small@1.0", "bad")
    with pytest.raises(RefusedError, match="yanked: bad"):
        copy(f"{dev}/small@1.0", Place(f"{url}-2"))
    assert open_store(f"{url}-2").versions("small") == []
    copy(f"{dev}/small@1.0", Place(f"{url}-2"), CopySettings(yanked=True))
    assert list_releases(f"{url}-2")[0].yanked == "bad"
    assert not copy(f"{dev}/small@1.0", Place(f"{url}-2"), CopySettings(yanked=True)).fresh


def test_copy_through_a_file(dev, url, tmp_path):
    """`save` from a server, `load` into another one."""
    copy(f"{dev}/small@1.0", Place(url))
    file = tmp_path / "release.tar"
    save(f"{url}/small@1.0", file)
    loaded = load(file, Place(f"{url}-2", ("live",)))
    assert loaded.fresh
    copy(f"{url}-2/small@live", Place(f"{tmp_path}/back"))
    assert small.kept(tmp_path / "back") == small.kept(dev)
    assert [each.destination for each in list_releases(f"{tmp_path}/back")[0].copies] == [
        url, "release.tar", f"{url}-2", f"{tmp_path}/back",
    ]  # fmt: skip


def test_copy_of_a_large_file_needs_neither_memory_nor_disk_of_its_size(url, tmp_path):
    """300 MB from server to server; on disk at most one file at a time, for a Hub alone."""
    made = small.make_validated(tmp_path / "made", tmp_path / "work").root
    data = json.loads((made / MANIFEST).read_text())
    path = made / small.WEIGHTS
    os.truncate(path, 300_000_000)
    data["files"][small.WEIGHTS] = {"sha256": sha256_file(path), "size": 300_000_000}
    (made / MANIFEST).write_text(json.dumps(data))
    publish(made, url, ["latest"])
    (tmp_path / "tmp").mkdir()
    code = (
        "from pipeline.cli.main import main\n"
        "try: main()\n"
        "finally: print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    environ = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(tmp_path / "tmp"),
        "TANDEM_CACHE": str(tmp_path / "c"),
    }
    words = [sys.executable, "-c", code, "-q", "copy", f"{url}/small@latest", f"{url}-2"]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) / 1024 < 280
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / "c").exists()
    out = pull(f"{url}-2/small@{list_releases(f'{url}-2')[0].version}", tmp_path / "out", cache=tmp_path / "cache")
    assert sha256_file(out / small.WEIGHTS) == data["files"][small.WEIGHTS]["sha256"]


def test_copy_killed_at_random_moments(dev, url, tmp_path):
    """No release, or a whole one with its record; the copy after the last kill completes it."""
    code = "import sys; from pipeline.cli.main import main; main()"
    words = [sys.executable, "-c", code, "-q", "copy", f"{dev}/small@1.0"]
    (tmp_path / "tmp").mkdir()
    environ = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")}
    started = time.monotonic()
    subprocess.run([*words, f"{url}-0"], env=environ, check=True, stdout=subprocess.DEVNULL)
    whole_s, draw, stopped = time.monotonic() - started, random.Random(6), 0
    for _ in range(12):
        process = subprocess.Popen([*words, url, "--alias", "live"], env=environ, stdout=subprocess.DEVNULL)
        try:
            process.wait(whole_s * (0.3 + 0.8 * draw.random()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            stopped += 1
        store = open_store(url)
        if store.read_release("small", "1.0") is None:
            assert store.read_alias("small", "live") is None
    assert stopped >= 3
    subprocess.run([*words, url, "--alias", "live"], env=environ, check=True, stdout=subprocess.DEVNULL)
    assert list((tmp_path / "tmp").iterdir()) == []  # what killed copies to a Hub left there, too
    copy(f"{url}/small@live", Place(f"{tmp_path}/back"))
    assert small.kept(tmp_path / "back") == small.kept(dev)
    assert len(list_releases(url)[0].copies) == 1
