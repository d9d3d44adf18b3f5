"""What every registry promises, on a real S3 server and on a Hub: the same tests for both."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.artifact.manifest import MANIFEST, SIGNATURE, read
from pipeline.artifact.verify import verify
from pipeline.errors import ArtifactError, InputError
from pipeline.files.atomic import sha256_file
from pipeline.registry import aliases
from pipeline.registry import releases as registry
from pipeline.registry.publish import PublishSettings, publish
from pipeline.registry.pull import Selection, pull
from pipeline.stores.base import Move, open_store
from support import small_artifacts as small
from support.paths import ROOT

pytestmark = pytest.mark.server
SPAWN = multiprocessing.get_context("spawn")  # clients of both kinds keep threads, which a fork would lose


def test_publish_and_pull(made, url, options):
    release = publish(made, url, ["latest"])
    assert release.fresh
    for wanted in ("latest", release.version):
        out = pull(f"{url}/small@{wanted}", **options)
        assert small.digests(out) == small.digests(made)
        verify(out)


def test_publish_again_sends_nothing(made, url):
    first = publish(made, url)
    again = publish(made, url)
    assert (again.sent, again.fresh, again.version) == (0, False, first.version)


def test_publish_one_changed_graph_sends_it_alone(tmp_path, made, url):
    publish(made, url)
    changed = Path(shutil.copytree(made, tmp_path / "changed"))
    path = changed / "graphs/decode-b1-t1-s32/graph.bin"
    path.write_bytes(b"changed" * 400_000)
    data = json.loads((changed / MANIFEST).read_text()) | {"version": "2"}
    data["files"]["graphs/decode-b1-t1-s32/graph.bin"] = {
        "sha256": small.digests(changed)["graphs/decode-b1-t1-s32/graph.bin"], "size": 2_800_000,
    }  # fmt: skip
    (changed / MANIFEST).write_text(json.dumps(data))
    dry = publish(changed, url, options=PublishSettings(dry_run=True))
    assert (dry.sent, dry.sent_bytes) == (1, 2_800_000)
    assert publish(changed, url).sent_bytes == 2_800_000


def test_publish_same_version_other_content(tmp_path, made, url):
    version = publish(made, url).version
    second = small.make_beside(tmp_path, graph=b"new")
    data = json.loads((second / MANIFEST).read_text())
    (second / MANIFEST).write_text(json.dumps(data | {"version": version}))
    with pytest.raises(ArtifactError, match="version already published with other content"):
        publish(second, url)
    assert small.digests(pull(f"{url}/small@{version}", tmp_path / "p", cache=tmp_path / "c")) == small.digests(made)


def _publish(root: Path, url: str, environ: dict[str, str], answers) -> None:
    os.environ.update(environ)
    try:
        answers.put(("ok", publish(root, url, ["latest"]).fresh))
    except ArtifactError as error:
        answers.put(("refused", error.what))


def test_publish_two_contents_one_version(tmp_path, url):
    """One wins whole, the other is told; the reader sees the winner's."""
    roots = []
    for number in range(2):
        root = small.make_beside(tmp_path, f"made{number}", weights=b"%d" % number)
        data = json.loads((root / MANIFEST).read_text())
        (root / MANIFEST).write_text(json.dumps(data | {"version": "1.0"}))
        roots.append(root)
    answers = SPAWN.Queue()
    running = [SPAWN.Process(target=_publish, args=(root, url, dict(os.environ), answers)) for root in roots]
    for one in running:
        one.start()
    for one in running:
        one.join(120)
    found = sorted(answers.get(timeout=5)[0] for _ in roots)
    assert found == ["ok", "refused"]
    out = pull(f"{url}/small@1.0", tmp_path / "pulled", cache=tmp_path / "cache")
    assert small.digests(out) in [small.digests(root) for root in roots]


def test_alias_moves_history_and_rollback(tmp_path, made, url):
    first = publish(made, url, ["prod"]).version
    second = publish(small.make_beside(tmp_path, graph=b"new"), url, ["prod"]).version
    third = publish(small.make_beside(tmp_path, "third", graph=b"third"), url, ["prod"]).version
    assert aliases.roll_back(url, "small", "prod") == (third, second)
    assert aliases.roll_back(url, "small", "prod") == (second, first)
    with pytest.raises(InputError, match="points at its first release"):
        aliases.roll_back(url, "small", "prod")
    moves = [move.version for move in aliases.history(url, "small", "prod").moves]
    assert moves == [first, second, third, second, first]
    aliases.set_alias(url, f"small@{third}", "prod")
    assert open_store(url).aliases("small") == {"prod": third}
    out = pull(f"{url}/small@prod", tmp_path / "pulled", cache=tmp_path / "cache")
    assert small.digests(out) == small.digests(tmp_path / "third")


def test_swap_alias_with_an_old_token(tmp_path, made, url):
    one = publish(made, url, ["prod"]).version
    two = publish(small.make_beside(tmp_path, graph=b"new"), url).version
    store = open_store(url)
    old = store.read_alias("small", "prod")
    assert not store.swap_alias("small", "prod", Move(two), None)
    assert store.swap_alias("small", "prod", Move(two), old)
    assert not store.swap_alias("small", "prod", Move(one), old)
    assert store.read_alias("small", "prod").version == two


def test_two_alias_movers_lose_nothing(tmp_path, made, url):
    """Both movers' moves are in the history: none overwrote the other unseen."""
    versions = [publish(made, url, ["prod"]).version, publish(small.make_beside(tmp_path, graph=b"new"), url).version]
    failed = []

    def move(version: str) -> None:
        try:
            store = open_store(url)
            aliases.move_alias(store, "small", "prod", version, url)
        except Exception as error:  # told to the test
            failed.append(error)

    for _ in range(3):
        threads = [threading.Thread(target=move, args=(version,)) for version in versions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    moves = [one.version for one in aliases.history(url, "small", "prod").moves]
    assert all(a != b for a, b in itertools.pairwise(moves)), moves


def test_list_releases_and_compare(tmp_path, made, url):
    first = publish(made, url, ["latest"]).version
    second = publish(small.make_beside(tmp_path, graph=b"new"), url, ["latest"]).version
    listed = {one.version: one.aliases for one in registry.list_releases(url)}
    assert listed == {first: (), second: ("latest",)}
    found = registry.compare(registry.manifest_of(f"{url}/small@{first}"), registry.manifest_of(f"{url}/small@latest"))
    assert found["graphs"]["recompiled"]
    assert found["files"]["graphs"]["changed"]


def test_pull_only_graphs(made, url, options):
    publish(made, url, ["latest"])
    out = pull(f"{url}/small@latest", select=Selection(only=["graphs/*"]), **options)
    found = {path.relative_to(out).parts[0] for path in out.rglob("*") if path.is_file()}
    assert {"graphs", "tokenizer", MANIFEST} <= found
    assert not found & {"weights", "reports"}


def test_an_index_brings_its_signature(made, url):
    signed = PublishSettings(version="1.0", sign=lambda index: b"over " + hashlib.sha256(index).digest())
    publish(made, url, options=signed)
    store = open_store(url)
    digest = hashlib.sha256(store.read_release("small", "1.0"))
    assert list(store.signatures("small", "1.0", SIGNATURE, digest.hexdigest())) == [b"over " + digest.digest()]


def test_pull_unknown(made, url, options):
    with pytest.raises(InputError, match=r"no such folder|it has no releases"):
        pull(f"{url}/small@latest", **options)
    publish(made, url, ["prod"])
    with pytest.raises(InputError, match="no version or alias 'latest'") as caught:
        pull(f"{url}/small@latest", **options)
    assert "prod" in caught.value.fix


def test_variants(tmp_path, made, url):
    """Two targets in one release: the host's own is chosen, others by name, and what there is is listed."""
    second = Path(shutil.copytree(made, tmp_path / "trn2"))
    data = json.loads((second / MANIFEST).read_text())
    data |= {"requires": {"device": "neuron", "chip": "trn2", "lnc": "2"}}
    data["pair"]["models"]["tp"] = 8
    (second / MANIFEST).write_text(json.dumps(data))
    release = publish([made, second], url, ["latest"], PublishSettings(version="1.0"))
    assert release.version == "1.0"
    assert registry.list_releases(url)[0].variants == ("cpu-avx2-tp1", "trn2-lnc2-tp8")
    out = pull(f"{url}/small@latest", tmp_path / "a", cache=tmp_path / "c", select=Selection(variant="trn2-lnc2-tp8"))
    assert small.digests(out) == small.digests(second)
    out = pull(f"{url}/small@latest", tmp_path / "b", cache=tmp_path / "c", select=Selection(variant="cpu-avx2-tp1"))
    assert small.digests(out) == small.digests(made)
    with pytest.raises(InputError, match="unknown variant 'gpu'") as caught:
        pull(f"{url}/small@1.0", tmp_path / "d", cache=tmp_path / "c", select=Selection(variant="gpu"))
    assert "trn2-lnc2-tp8" in caught.value.fix
    assert not publish([made, second], url, options=PublishSettings(version="1.0")).fresh


def test_signed(tmp_path, made, url, options):
    from pipeline.artifact import signing
    from support.signing_keys import key_pair

    private, public = key_pair(tmp_path, "release")
    _, stranger = key_pair(tmp_path, "stranger")
    publish(small.make_beside(tmp_path, graph=b"unsigned"), url, ["unsigned"])
    signing.sign(made, private)
    publish(made, url, ["latest"])
    out = pull(f"{url}/small@latest", policy=signing.require(str(public)), **options)
    signing.check_artifact(out, signing.require(str(public)))
    shutil.rmtree(options["cache"])
    for alias, key, message in (("latest", stranger, "not signed by"), ("unsigned", public, "not signed$")):
        with pytest.raises(ArtifactError, match=message):
            pull(f"{url}/small@{alias}", tmp_path / "x", cache=options["cache"], policy=signing.require(str(key)))
    assert not (options["cache"] / "blobs" / "sha256").exists()  # refused before a byte was fetched


def test_pull_start_up_is_light():
    """No torch, no client library before it is needed."""
    heavy = ("torch", "obstore", "huggingface_hub", "boto3", "model_signing", "cyclonedx")
    modules = "pipeline.registry.pull, pipeline.registry.publish"
    code = f"import sys, {modules}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_read_manifest_unchanged(made, url, options):
    publish(made, url, ["latest"])
    assert read(pull(f"{url}/small@latest", **options)).manifest == read(made).manifest


def test_memory_does_not_grow_with_the_artifact(tmp_path, url):
    """A file of 700 MB, either way, in less than 300 MB: what is on its way is bounded, whatever the size."""
    made = small.make_validated(tmp_path / "made", tmp_path / "work").root
    path, data = made / "weights/target/rank-0-of-1.safetensors", json.loads((made / "manifest.json").read_text())
    os.truncate(path, 700_000_000)
    digest = sha256_file(path)
    data["files"][str(path.relative_to(made))] = {"sha256": digest, "size": 700_000_000}
    (made / "manifest.json").write_text(json.dumps(data))
    out = tmp_path / "out"
    for args in (("publish", str(made), "--to", url, "--alias", "latest"), ("pull", f"{url}/small@latest", str(out))):
        assert peak_mib(*args, cache=tmp_path / "cache") < 300
    assert sha256_file(out / path.relative_to(made)) == digest


def peak_mib(*args: str, cache: Path) -> float:
    """Peak memory of a command; as it sees it itself, since a child's `ru_maxrss` begins at its parent's."""
    code = (
        "from pipeline.cli.main import main\n"
        "try: main()\n"
        "finally: print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    environ = os.environ | {"TANDEM_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", *args], env=environ, capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1]) / 1024


def test_yank_is_visible_refused_and_keeps_the_release(made, url, options, tmp_path):
    """On S3 an object, on a Hub a file of main, which later releases keep."""
    from pipeline.errors import RefusedError
    from pipeline.registry.yanks import yank

    publish(made, url, ["latest"], PublishSettings(version="1.0"))
    assert yank(f"{url}/small@1.0", "bad") == yank(f"{url}/small@1.0", "again")
    with pytest.raises(RefusedError, match="yanked: bad"):
        pull(f"{url}/small@latest", **options)
    other = small.make_validated(tmp_path / "other", tmp_path / "work", weights=b"other").root
    publish(other, url, ["latest"], PublishSettings(version="2.0"))
    assert {each.version: each.yanked for each in registry.list_releases(url)} == {"1.0": "bad", "2.0": ""}
    assert small.digests(pull(f"{url}/small@latest", **options)) == small.digests(other)
    out = pull(f"{url}/small@1.0", select=Selection(yanked=True), **options)
    assert small.digests(out) == small.digests(made)
    with pytest.raises(RefusedError, match="yanked: bad"):
        aliases.set_alias(url, "small@1.0", "latest")
