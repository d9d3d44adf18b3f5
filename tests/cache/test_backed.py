"""A local cache behind a shared one, and files that machines exchange by their digest."""

from __future__ import annotations

import pytest

from pipeline.cache.backed import BackedCache, received_file, send_files
from pipeline.cache.local import Cache, Stats
from pipeline.cache.remote import Remote
from pipeline.errors import ArtifactError, HostError
from pipeline.files.atomic import FileDigest, digest_file
from pipeline.progress import no_log

VERSIONS = {"torch": "1"}


@pytest.fixture
def remote(tmp_path):
    return Remote(str(tmp_path / "shared"), "write")


def backed(remote, folder, versions=VERSIONS):
    return BackedCache(Cache(folder, "goldens"), remote.open("goldens"), versions)


def test_entry_of_one_machine_is_found_on_another(remote, tmp_path):
    backed(remote, tmp_path / "a").put("abc", b"golden")
    assert backed(remote, tmp_path / "b").get("abc").read_bytes() == b"golden"
    assert Cache(tmp_path / "b", "goldens").get("abc") is not None
    assert backed(remote, tmp_path / "c", {"torch": "2"}).get("abc") is None


def sent(remote, path, data: bytes) -> FileDigest:
    path.write_bytes(data)
    send_files(remote, {digest_file(path): path}, no_log)
    return digest_file(path)


def test_file_is_sent_and_received_by_its_digest(remote, tmp_path):
    digest = sent(remote, tmp_path / "weights", b"weights")
    assert received_file(remote, tmp_path / "node", digest).read_bytes() == b"weights"
    assert remote.open("files").stats() == Stats(1, 7)


def test_file_that_is_stored_is_not_sent_again(remote, tmp_path):
    digest = sent(remote, tmp_path / "weights", b"weights")
    (stored,) = (tmp_path / "shared/files").rglob(digest.sha256 + "/" + digest.sha256)
    before = stored.stat().st_ino
    sent(remote, tmp_path / "weights", b"weights")
    assert stored.stat().st_ino == before
    stored.unlink()
    sent(remote, tmp_path / "weights", b"weights")
    assert stored.read_bytes() == b"weights"


def test_file_that_is_not_stored_is_an_error(remote, tmp_path):
    with pytest.raises(HostError, match="the shared cache lacks the file abc") as raised:
        received_file(remote, tmp_path / "node", FileDigest("abc", 3))
    assert raised.value.where == remote.url


def test_entry_with_another_digest_than_its_key_is_an_error(remote, tmp_path):
    """A writer of the shared cache cannot give a node other weights."""
    digest, other = sent(remote, tmp_path / "weights", b"weights"), sent(remote, tmp_path / "other", b"altered")
    place = tmp_path / "shared/files" / digest.sha256[:2] / digest.sha256
    entry = (place / "entry.json").read_text()
    (place / "entry.json").write_text(entry.replace(f'"sha256": "{digest.sha256}"', f'"sha256": "{other.sha256}"'))
    (place / other.sha256).write_bytes(b"altered")
    with pytest.raises(HostError, match=r"lacks the file .*malformed entry"):
        received_file(remote, tmp_path / "node", digest)


def test_file_that_changed_since_its_digest_is_not_stored(remote, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    digest = digest_file(path)
    path.write_bytes(b"altered")
    with pytest.raises(ArtifactError, match="sha256 mismatch"):
        send_files(remote, {digest: path}, no_log)
    assert remote.open("files").stats() == Stats(0, 0)
