"""Targets that come from a registry or a shared cache: manifests, indexes, aliases, yanks, provenance, signatures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipeline.artifact import manifest as manifests
from pipeline.artifact.manifest import MANIFEST, PULLED
from pipeline.artifact.pulled import pull_record
from pipeline.artifact.signer import Signer, fault_of
from pipeline.artifact.signing import Policy, Rule
from pipeline.cache.local import Cache
from pipeline.cache.remote import RemoteCache
from pipeline.errors import CorruptError, TandemError
from pipeline.registry import aliases
from pipeline.registry.release import Index, all_files, choose, digest_of, parse_document, variant_name
from pipeline.registry.releases import target_of
from pipeline.stores.folder import FolderBucket
from pipeline.stores.objects import ObjectStore
from pipeline.stores.promotions import promotions_of
from pipeline.stores.yanks import yank_of
from pipeline.validate.report import schema
from support.paths import ROOT

HOST = {"device": "cpu", "machine": "x86_64", "isa": "avx2"}
SIGNED = b'{"a signed": "manifest"}'
KEY = "ab" * 32


def manifest_target(folder: Path) -> Callable[[bytes], object]:
    """A manifest, and what is computed from it before a file is fetched."""

    def read(data: bytes) -> None:
        found = manifests.parse(data, "manifest.json")
        manifests.dump(found)
        manifests.content_digest(found)
        variant_name(found)
        with suppress(TandemError):
            manifests.part(found, ["weights/*"], "manifest.json")

    return read


def release_target(folder: Path) -> Callable[[bytes], object]:
    """The document of a release: its files, and the variant for a host."""
    manifest = (ROOT / "tests/fuzz/corpus/release/valid-pair.json").read_bytes()

    def read(data: bytes) -> None:
        found = parse_document(data, "release")
        digest_of(found)
        if isinstance(found, Index):
            with suppress(TandemError):
                choose(found, HOST, None, "release")
        all_files(found, lambda path, entry: manifest, "release")

    return read


def alias_target(folder: Path) -> Callable[[bytes], object]:
    """The text of an alias in a registry, its history, and the version before."""
    store = ObjectStore(FolderBucket(folder))
    path = folder / "aliases/small/prod"
    path.parent.mkdir(parents=True)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = store.read_alias("small", "prod")
        assert found is not None
        aliases.previous_version(found)
        target_of(found, "prod", str(folder))

    return read


def yank_target(folder: Path) -> Callable[[bytes], object]:
    """The record of a yank."""
    return lambda data: yank_of(data, "yank")


def provenance_target(folder: Path) -> Callable[[bytes], object]:
    """A provenance statement, whose builder a policy compares."""
    signer = Signer(identity="x")
    policy = Policy(rules=(Rule(releases="*", builder="urn:*", signed_by=(signer,)),))
    return lambda data: policy.check_builder(lambda: data, "/srv/registry/small@1")


def signature_target(folder: Path) -> Callable[[bytes], object]:
    """A signature over a manifest; one that is not accepted is an error here, so that valid seeds are told apart."""
    signer = Signer(key=str(ROOT / "tests/fuzz/corpus/release.pub"))

    def read(data: bytes) -> None:
        if (fault := fault_of(SIGNED, data, signer, folder)) is not None:
            raise CorruptError(fault)

    return read


def pulled_target(folder: Path) -> Callable[[bytes], object]:
    """The record of a pull beside a manifest."""
    (folder / MANIFEST).write_bytes(SIGNED)

    def read(data: bytes) -> None:
        (folder / PULLED).write_bytes(data)
        pull_record(folder, SIGNED)

    return read


def promotion_target(folder: Path) -> Callable[[bytes], object]:
    """The record of a release's promotions."""
    return lambda data: promotions_of(data, KEY, "/srv/registry/small@1")


def report_target(folder: Path) -> Callable[[bytes], object]:
    """The report of the gates."""
    return lambda data: schema.read(data, "parity.json")


def shared_target(folder: Path) -> Callable[[bytes], object]:
    """An entry of the shared cache that a build fetches."""
    remote = RemoteCache(FolderBucket(folder / "remote"), "graphs")
    place = folder / "remote/graphs" / KEY[:2] / KEY
    place.mkdir(parents=True)
    (place / hashlib.sha256(b"graph").hexdigest()).write_bytes(b"graph")
    local = Cache(folder / "local", "graphs")

    def read(data: bytes) -> None:
        (place / "entry.json").write_bytes(data)
        list(remote.entries())
        if not remote.fetch(KEY, {"torch": "1"}, local):
            raise CorruptError("not used")

    return read
