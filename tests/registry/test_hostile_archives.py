"""Files that are damaged, or made to deceive: refused with where, what and fix, and a registry stays as it was."""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.artifact.manifest import read
from pipeline.errors import CorruptError, InputError, TandemError
from pipeline.registry.archives import load, save
from pipeline.registry.publish import Place, PublishSettings, publish
from pipeline.registry.releases import list_releases
from pipeline.stores.archive import BLOCK, header, read_archive
from pipeline.stores.base import open_store
from support import small_artifacts as small


def refused(file: Path, air: Place, says: str, kind: type[Exception] = CorruptError) -> TandemError:
    """A file is refused with what to do, and the registry has no release, not even a folder."""
    with pytest.raises(kind, match=says) as caught:
        load(file, air)
    assert str(file) in caught.value.where
    assert caught.value.fix
    assert not Path(air.url).exists() or not open_store(air.url).names()
    return caught.value


def test_truncated_files_are_refused(file, air):
    """At the end of each member, and inside header and bytes of some."""
    whole, ends = file.read_bytes(), [0]
    with read_archive(file) as archive:
        ends += [member.end for member in archive.bucket.members.values()]
    places = {0, *ends, *(end + more for end in ends[::4] for more in (1, BLOCK - 1, BLOCK, BLOCK + 1))}
    for place in sorted(place for place in places if place < ends[-1]):
        file.write_bytes(whole[:place])
        refused(file, air, "truncated")
    file.write_bytes(whole[: ends[-1]])
    assert "byte" in refused(file, air, "truncated: the end of the archive is missing").where
    file.write_bytes(whole)
    load(file, air)


def test_flipped_bits_are_refused_wherever_they_are(saved, file, tmp_path):
    """Except in the bytes that fill up a member's last block, which mean nothing."""
    whole, draw = file.read_bytes(), random.Random(3)
    with read_archive(file) as archive:
        members = dict(archive.bucket.members)
    places = [member.offset + draw.randrange(member.size) for member in members.values() if member.size]
    places += [member.offset - BLOCK + draw.randrange(345) for member in members.values()]  # headers end in zeros
    for number, place in enumerate(draw.sample(places, 40)):
        data = bytearray(whole)
        data[place] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        refused(file, Place(f"{tmp_path}/air{number}"), ".")


def test_a_flipped_bit_in_any_small_member_is_refused(file, tmp_path):
    """The document, signatures and records have no digest in a manifest: SHA256SUMS has theirs."""
    whole = file.read_bytes()
    with read_archive(file) as archive:
        small_ones = {key: member for key, member in archive.bucket.members.items() if not key.startswith("blobs/")}
    assert len(small_ones) == 5
    for number, (key, member) in enumerate(small_ones.items()):
        data = bytearray(whole)
        data[member.offset + member.size // 2] ^= 1
        file.write_bytes(data)
        refused(file, Place(f"{tmp_path}/air{number}"), rf"{key}: sha256 mismatch|SHA256SUMS is missing, damaged")


def test_a_damaged_blob_leaves_a_registry_as_it_was(saved, file, air, tmp_path):
    other = small.make_validated(tmp_path / "other", tmp_path / "work", weights=b"other").root
    publish(other, air.url, ["live"])
    before = small.digests(Path(air.url))
    with read_archive(file) as archive:
        weights = archive.bucket.members[f"blobs/sha256/{(entry := _weights(saved))[:2]}/{entry}"]
    data = bytearray(file.read_bytes())
    data[weights.offset] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptError, match=f"sha256 mismatch: expected {entry}") as caught:
        load(file, Place(air.url, ("live",)))
    assert caught.value.where.startswith(f"{file}/small@1.0: ")
    assert "tandem save" in caught.value.fix
    assert small.digests(Path(air.url)).items() >= before.items()
    assert [each.version for each in list_releases(air.url)] == [read(other).manifest.version]


def _weights(saved: Path) -> str:
    return read(saved / "out").manifest.files[small.WEIGHTS].sha256


def plain(name: str, data: bytes) -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    return add


def special(name: str, kind: bytes, target: str = "/etc/passwd") -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        tar.addfile(info)

    return add


BLOB = f"blobs/sha256/aa/{'a' * 64}"
HOSTILE = {
    "parent": plain("../evil", b"x"), "absolute": plain("/tmp/evil", b"x"), "inside": plain("blobs/../../evil", b"x"),
    "link": special(BLOB, tarfile.SYMTYPE), "hard-link": special(BLOB, tarfile.LNKTYPE),
    "device": special(BLOB, tarfile.CHRTYPE), "pipe": special(BLOB, tarfile.FIFOTYPE),
    "folder": special("blobs", tarfile.DIRTYPE), "sparse": special(BLOB, tarfile.GNUTYPE_SPARSE),
    "long-name": plain("a" * 300, b"x"), "other": plain("README.md", b"x"),
    "alias": plain("aliases/small/prod", b"1.0\n"), "lease": plain("leases/x", b"x"),
    "second-release": plain("releases/small/2.0/manifest.json", b"{}"), "unlisted": plain(BLOB, b"x"),
}  # fmt: skip


@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_hostile_members_are_refused(file, air, tmp_path, how, form):
    """Nothing is extracted: a member is a plain file with an expected name, or the file is refused."""
    with tarfile.open(file, "a", format=form) as tar:
        HOSTILE[how](tar)
    refused(file, air, r"unexpected member|SHA256SUMS|damaged header")
    assert not list(tmp_path.rglob("*evil*"))
    assert not Path(air.url).exists()


def test_a_member_that_is_there_twice_is_refused(file, air):
    with read_archive(file) as archive:
        key = next(iter(archive.bucket.members))
    with tarfile.open(file, "a") as tar:
        plain(key, b"x")(tar)
    refused(file, air, f"{key} is there twice")


def remade(file: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Write the archive again as an attacker would, with a list of digests that fits."""
    with tarfile.open(file) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}
    del members["SHA256SUMS"]
    change(members)
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in members.items())
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in {**members, "SHA256SUMS": sums.encode()}.items():
            plain(name, data)(tar)


def test_an_archive_that_another_tar_wrote_is_read(saved, file, air):
    remade(file, lambda members: None)
    load(file, air)
    assert small.kept(Path(air.url)) == small.kept(saved / "dev")


def _no_release(members: dict[str, bytes]) -> None:
    del members["releases/small/1.0/manifest.json"]


def _two_releases(members: dict[str, bytes]) -> None:
    members["releases/small/2.0/manifest.json"] = members["releases/small/1.0/manifest.json"]


def _other_version(members: dict[str, bytes]) -> None:
    members["releases/small/2.0/manifest.json"] = members.pop("releases/small/1.0/manifest.json")


def _no_blob(members: dict[str, bytes]) -> None:
    del members[max((name for name in members if name.startswith("blobs/")), key=lambda name: len(members[name]))]


def _grown_blob(members: dict[str, bytes]) -> None:
    name = max((name for name in members if name.startswith("blobs/")), key=lambda name: len(members[name]))
    members[name] += b"more"


def _wrong_blob(members: dict[str, bytes]) -> None:
    name = max((name for name in members if name.startswith("blobs/")), key=lambda name: len(members[name]))
    members[name] = b"x" * len(members[name])


def _other_document(members: dict[str, bytes]) -> None:
    members["releases/small/1.0/manifest.json"] = b"[" * 10_000


@pytest.mark.parametrize(
    ("change", "says"),
    [(_no_release, "holds 0 releases, expected 1"), (_two_releases, "holds 2 releases, expected 1"),
     (_other_version, "version mismatch"), (_no_blob, r"1 of \d+ blobs are missing or have another size"),
     (_grown_blob, r"1 of \d+ blobs are missing or have another size"), (_wrong_blob, "sha256 mismatch"),
     (_other_document, "damaged manifest")],
)  # fmt: skip
def test_an_archive_made_to_deceive_is_refused(file, air, change, says):
    remade(file, change)
    error = refused(file, air, says)
    if change is _wrong_blob:
        assert "tandem save" in error.fix


@pytest.mark.parametrize("data", [b"", b"x", b"x" * 5000, b"\0" * 10240, b"\x1f\x8b" + b"x" * 3000])
def test_other_files_are_refused(file, air, data):
    file.write_bytes(data)
    refused(file, air, "truncated|not an archive|SHA256SUMS is missing")


def test_a_file_that_is_not_there(tmp_path, air):
    refused(tmp_path / "none.tar", air, "no such file", InputError)
    refused(tmp_path, air, "not a file", InputError)


def test_a_claimed_size_takes_no_memory(file, air):
    """A header of an exabyte, and one of a negative size."""
    for size in (1 << 60, (1 << 88) - 1):
        file.write_bytes(header(BLOB, size, "here") + file.read_bytes())
        refused(file, air, "truncated|unexpected member|damaged header")


@pytest.mark.parametrize("size", [0, 1, 511, (1 << 33) - 1, 1 << 33, 150_000_000_000])
def test_headers_are_those_of_tar(tmp_path, size):
    """A size over 8 GiB is in base 256; the file is a hole."""
    path = tmp_path / "t.tar"
    path.write_bytes(header(BLOB, size, "here"))
    os.truncate(path, BLOCK + size + -size % BLOCK + 2 * BLOCK)
    with tarfile.open(path) as tar:
        (info,) = tar.getmembers()
    assert (info.name, info.size, info.isreg()) == (BLOB, size, True)
    shown = subprocess.run(["tar", "-tvf", path], capture_output=True, text=True, check=True).stdout
    assert shown.split()[2] == str(size)


def test_names_that_do_not_fit_are_rejected_before_the_work(saved, tmp_path):
    version = "1" * 100
    small_one = tmp_path / "small-one"
    name = "n" * 60
    with pytest.raises(InputError, match="too long for an archive"):
        header(f"releases/{name}/{version}/manifest.json", 0, "here")
    publish(saved / "out", str(small_one), [], PublishSettings(version=version))
    save(f"{small_one}/small@{version}", tmp_path / "long.tar")  # 105 characters fit
    load(tmp_path / "long.tar", Place(f"{tmp_path}/air"))
