"""Releases: whole or not there, never changed, never without gates; aliases move one at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from pipeline.artifact.manifest import MANIFEST, dump, read
from pipeline.artifact.reports import add_reports
from pipeline.cli.main import main
from pipeline.errors import ArtifactError, GateError, HostError
from pipeline.files.unfinished import TEMP
from pipeline.registry.card import body
from pipeline.registry.publish import PublishSettings, publish
from pipeline.registry.releases import compare, list_releases
from pipeline.stores.base import open_store
from support import small_artifacts as small

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "registry")


def test_publish_layout(made, url):
    release = publish(made, url, ["latest"])
    manifest = read(made).manifest
    root = Path(url)
    assert release.fresh
    assert (root / "releases" / "small" / manifest.version / MANIFEST).read_bytes() == dump(manifest)
    assert (root / "aliases" / "small" / "latest").read_text().split()[0] == manifest.version
    blobs = {path.name: path.parent.name for path in (root / "blobs" / "sha256").rglob("*") if path.is_file()}
    assert blobs == {entry.sha256: entry.sha256[:2] for entry in manifest.files.values()}
    assert release.sent == len(blobs)
    assert list(root.rglob(f"{TEMP}*")) == []


def test_publish_file_url(made, url):
    publish(made, f"file://{url}")
    assert [listed.version for listed in list_releases(url)] == [read(made).manifest.version]


def test_publish_again_sends_nothing(made, url):
    first = publish(made, url)
    before = small.digests(Path(url))
    again = publish(made, url)
    assert (again.sent, again.fresh, again.version) == (0, False, first.version)
    assert small.digests(Path(url)) == before


def test_publish_same_content_validated_again(made, url):
    """Another time and other reports do not make another release, and do not change the one there is."""
    publish(made, url)
    before = small.digests(Path(url))
    add_reports(made, {"parity.json": b"[later]"}, {"passed": True, "run": 2})
    assert not publish(made, url, []).fresh
    assert small.digests(Path(url)) == before


def test_publish_same_version_other_content(made, url):
    publish(made, url)
    before = small.digests(Path(url))
    (made / "recipe.yaml").write_text("name: other\n")
    data = json.loads((made / MANIFEST).read_text())
    entry = {"sha256": small.digests(made)["recipe.yaml"], "size": 12}
    data["files"]["recipe.yaml"], data["pair"]["models"]["tp"] = entry, 2
    (made / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(
        ArtifactError, match=r"other content: published \w{64}, yours \w{64}; different: pair.models.tp, recipe.yaml"
    ) as error:
        publish(made, url, ["latest"])
    assert "never changes" in error.value.fix
    assert small.digests(Path(url)) == before


@pytest.mark.parametrize(("summary", "message"), [(None, "was not validated"), (False, "failed its gates")])
def test_publish_without_passed_gates(tmp_path, url, summary, message):
    made = small.make(tmp_path / "out", tmp_path / "work").root
    if summary is not None:
        add_reports(made, {"parity.json": b""}, {"passed": summary})
    with pytest.raises(GateError, match=message) as caught:
        publish(made, url, ["latest"])
    assert caught.value.exit_code == 1
    assert not Path(url).exists()


@pytest.mark.parametrize("verdict", ["yes", 1, None, [True]])
def test_publish_gates_must_say_true(made, url, verdict):
    data = json.loads((made / MANIFEST).read_text())
    data["validation"] = {"passed": verdict}
    (made / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(GateError):
        publish(made, url)


def test_publish_damaged_artifact(made, url):
    with (made / "recipe.yaml").open("a") as file:
        file.write("#")
    with pytest.raises(ArtifactError, match=r"recipe\.yaml: \d+ bytes"):
        publish(made, url)
    assert not Path(url).exists()


def test_publish_dry_run(made, url):
    release = publish(made, url, ["latest"], PublishSettings(dry_run=True))
    assert release.sent == len({entry.sha256 for entry in read(made).manifest.files.values()})
    assert release.sent_bytes > 0
    assert not Path(url).exists()


def test_publish_shares_blobs(tmp_path, url):
    """New graphs over the same weights send no weights."""
    publish(small.make_validated(tmp_path / "1", tmp_path / "work", size=100_000).root, url)
    second = small.make_validated(tmp_path / "2", tmp_path / "work", graph=b"new", size=100_000)
    release = publish(second.root, url)
    weights = sum(second.manifest.files[shard.file].size for shard in second.manifest.shards)
    assert release.sent > 0
    assert release.sent_bytes <= second.manifest.size_bytes - weights
    assert len(list_releases(url)) == 2


def test_publish_copies(made, url):
    """An artifact that is edited later must not reach the registry."""
    publish(made, url)
    before = small.digests(Path(url))
    for path in made.rglob("*"):
        if path.is_file():
            path.write_bytes(b"edited")
    assert small.digests(Path(url)) == before


def test_publish_again_restores_lost_blobs(made, url):
    publish(made, url)
    before = small.digests(Path(url))
    lost, cut = sorted((Path(url) / "blobs").rglob("*/????*"), key=lambda path: path.stat().st_size)[-2:]
    lost.unlink()
    os.truncate(cut, 3)
    assert publish(made, url).sent == 2
    assert small.digests(Path(url)) == before


def test_publish_unknown_kind(made):
    with pytest.raises(HostError, match="unsupported kind of registry: ftp://") as caught:
        publish(made, "ftp://bucket/prefix")
    assert caught.value.fix == "accepted: a folder, file://..., hf://..., oci://..., s3://..."


def test_publish_registry_is_a_file(made, tmp_path):
    (tmp_path / "registry").write_text("")
    with pytest.raises(HostError, match="cannot write"):
        publish(made, str(tmp_path / "registry"))


def _publish(made: Path, url: str, alias: str) -> None:
    publish(made, url, [alias])


def test_publish_killed_then_complete(tmp_path, url):
    """kill -9 at any moment: readers see no release or the whole one, and publishing again completes it."""
    made = small.make_validated(tmp_path / "out", tmp_path / "work", size=3_000_000).root
    version = read(made).manifest.version
    whole = {entry.sha256 for entry in read(made).manifest.files.values()}
    stopped = 0
    for delay_s in (0.02, 0.05, 0.08, 0.12, 0.2):
        process = FORK.Process(target=_publish, args=(made, url, "latest"))
        process.start()
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        stopped += process.exitcode != 0
        store = open_store(url)
        if store.read_release("small", version) is not None:
            assert whole <= {path.name for path in (Path(url) / "blobs").rglob("*")}
        else:
            assert store.read_alias("small", "latest") is None
    assert stopped
    publish(made, url, ["latest"])
    assert open_store(url).read_alias("small", "latest").version == version
    names = {path.name for path in (Path(url) / "blobs").rglob("*") if path.is_file()}
    assert whole <= names


def test_publish_two_at_once(tmp_path, url):
    """Equal artifacts: both succeed. Of two contents under one version, one wins and the other is told."""
    one = small.make_validated(tmp_path / "1", tmp_path / "work").root
    two = small.make_validated(tmp_path / "2", tmp_path / "work").root
    processes = [FORK.Process(target=_publish, args=(made, url, "latest")) for made in (one, two, one, two)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert [listed.aliases for listed in list_releases(url)] == [("latest",)]


def _conflicting(made: Path, url: str) -> None:
    try:
        publish(made, url)
    except ArtifactError:
        os._exit(7)
    os._exit(0)


def test_publish_two_contents_one_version(tmp_path, url):
    mades = []
    for number in range(2):
        root = small.make_validated(tmp_path / str(number), tmp_path / "work", weights=b"%d" % number).root
        data = json.loads((root / MANIFEST).read_text())
        (root / MANIFEST).write_text(json.dumps(data | {"version": "1.0"}))
        mades.append(root)
    processes = [FORK.Process(target=_conflicting, args=(made, url)) for made in mades * 2]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(process.exitcode for process in processes) == [0, 0, 7, 7]


def listed(root: Path, *places: dict) -> None:
    """Give the recipe in an artifact a `publish:` list, as a build from such a recipe would."""
    path = root / "recipe.yaml"
    data = yaml.safe_load(path.read_text()) | {"publish": list(places)}
    path.write_text(yaml.safe_dump(data))
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["files"]["recipe.yaml"] = {"sha256": small.digests(root)["recipe.yaml"], "size": path.stat().st_size}
    (root / MANIFEST).write_text(json.dumps(manifest))


def tandem(*args: str) -> tuple[int, str]:
    found = CliRunner().invoke(main, list(args))
    return found.exit_code, found.output


def test_publish_goes_where_the_recipe_says(tmp_path):
    made = small.make_validated(tmp_path / "out", tmp_path / "work").root
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    listed(made, {"to": one, "aliases": ["latest"]}, {"to": two}, {"to": one, "aliases": ["nightly"]})
    code, shown = tandem("publish", str(made), "--alias", "prod")
    assert (code, len(shown.splitlines())) == (0, 2)
    assert {url: list_releases(url)[0].aliases for url in (one, two)} == {
        one: ("latest", "nightly", "prod"), two: ("prod",),
    }  # fmt: skip


def test_publish_to_leaves_the_list_alone(tmp_path):
    made = small.make_validated(tmp_path / "out", tmp_path / "work").root
    listed(made, {"to": str(tmp_path / "one"), "aliases": ["latest"]})
    code, _ = tandem("publish", str(made), "--to", str(tmp_path / "two"), "--to", str(tmp_path / "three"))
    assert code == 0
    assert not (tmp_path / "one").exists()
    assert [one.aliases for name in ("two", "three") for one in list_releases(str(tmp_path / name))] == [(), ()]


def test_publish_one_failing_place_hides_no_other(tmp_path):
    """Each place has its line, each failure its fix; the exit code is a failure's."""
    made = small.make_validated(tmp_path / "out", tmp_path / "work").root
    (tmp_path / "file").write_text("in the way")
    good, bad = str(tmp_path / "good"), str(tmp_path / "file/registry")
    listed(made, {"to": bad, "aliases": ["latest"]}, {"to": good, "aliases": ["latest"]}, {"to": "gs://bucket"})
    code, shown = tandem("publish", str(made))
    assert code == 3
    assert f"not published to {bad}" in shown
    assert re.search(rf"to {re.escape(good)}: sent \d+ blobs, [\d.]+ KiB, not signed; latest ->", shown)
    assert shown.count("fix: ") == 2
    assert list_releases(good)[0].aliases == ("latest",)
    found = json.loads(CliRunner().invoke(main, ["publish", str(made), "--json"]).stdout)
    assert [one["url"] for one in found] == [bad, good, "gs://bucket"]
    assert [sorted(one) == ["error", "url"] for one in found] == [True, False, True]


def test_publish_failed_gates_go_nowhere(tmp_path):
    made = small.make_validated(tmp_path / "out", tmp_path / "work", passed=False).root
    listed(made, {"to": str(tmp_path / "one")}, {"to": str(tmp_path / "two")})
    code, shown = tandem("publish", str(made))
    assert (code, shown.count("failed its gates")) == (1, 1)
    assert not (tmp_path / "one").exists()


def test_card_and_diff_show_parity_and_speed(tmp_path):
    roots = []
    for rate in (49.2, 51.3):
        made = small.make(tmp_path / str(rate), tmp_path / "work").root
        figures = {"error_over_noise": {"target": rate}, "speed": {"plain": {"tokens_per_s": rate}}}
        roots.append(add_reports(made, {"parity.json": b"{}"}, {"passed": True} | figures).root)
    first, second = (read(root).manifest for root in roots)
    page = body(first, {"": first})
    assert "| speed: plain: tokens per s | 49.2 |" in page
    assert "| error over noise: target | 49.2 |" in page
    found = compare(first, second)["fields"]
    assert found["validation.speed.plain.tokens_per_s"] == {"from": 49.2, "to": 51.3}
    assert found["validation.error_over_noise.target"] == {"from": 49.2, "to": 51.3}
