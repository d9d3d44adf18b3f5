"""Targets of OCI registries and of files that `tandem save` wrote: answers, manifests, credentials, archives."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from unittest.mock import patch

from fuzz.servers import AnsweringServer, any_of
from pipeline.errors import TandemError
from pipeline.registry import archives
from pipeline.registry.publish import Place
from pipeline.stores import oci_session
from pipeline.stores.oci import OciStore
from pipeline.stores.oci_api import OciRegistry
from pipeline.stores.oci_layout import INDEX_TYPE, MANIFEST_TYPE, Document
from pipeline.stores.oci_login import login_for
from pipeline.stores.ranges import Ranges

SHA256 = "ab" * 32


class OneManifest(OciRegistry):
    """A registry that has one manifest under every tag and digest, and the same bytes in every blob."""

    data = b""

    def manifest(self, repo: str, reference: str) -> Document | None:
        return Document(INDEX_TYPE if b'"manifests"' in self.data else MANIFEST_TYPE, self.data)

    def referrers(self, repo: str, digest: str) -> bytes | None:
        return self.data if b'"manifests"' in self.data else None

    def tags(self, repo: str) -> list[str]:
        return ["1.0", "prod"]

    def read_small(self, repo: str, digest: str, size: int) -> bytes:
        return self.data[:size]


def oci_manifest_target(folder: Path) -> Callable[[bytes], object]:
    """What a registry stores under a tag: a manifest, an index, a record, a signature."""
    registry = OneManifest("127.0.0.1:9")
    store = OciStore(registry, "org")

    def read(data: bytes) -> None:
        registry.data = data
        versions = store.versions("name")
        any_of(
            lambda: store.read_release("name", "1.0"),
            lambda: store.signatures("name", "1.0", "model.sig", SHA256),
            lambda: store.read_alias("name", "prod"),
            lambda: store.read_yank("name", "1.0"),
        )
        if not versions:
            raise TandemError("not a release")

    return read


def oci_target(folder: Path) -> Callable[[bytes], object]:
    """What a registry answers, to every request."""
    server = AnsweringServer()
    registry = OciRegistry(server.url.removeprefix("http://"))
    store = OciStore(registry, "org")

    def read(data: bytes) -> None:
        server.answer = data
        registry.ranges, registry._located, registry._direct = Ranges(), {}, set()
        registry.session._tokens.clear()
        with patch.object(oci_session, "TRIES", 1), _without_logins(folder):
            any_of(
                lambda: store.versions("name"),
                lambda: store.read_release("name", "1.0"),
                lambda: registry.has_blob("org/name", f"sha256:{SHA256}"),
                lambda: registry.read_blob("org/name", f"sha256:{SHA256}", 0, memoryview(bytearray(10))),
                lambda: registry.put_blob("org/name", f"sha256:{SHA256}", 1, lambda: iter((b"x",))),
                lambda: registry.referrers("org/name", f"sha256:{SHA256}"),
                registry.repositories,
            )

    return read


def login_target(folder: Path) -> Callable[[bytes], object]:
    """The file in which `docker login` keeps credentials."""

    def read(data: bytes) -> None:
        (folder / "config.json").write_bytes(data)
        with _without_logins(folder):
            for host in ("ghcr.io", "docker.io"):
                with suppress(TandemError):
                    login_for(host, "org/name")
            login_for("ghcr.io", "org/name")

    return read


def archive_target(folder: Path) -> Callable[[bytes], object]:
    """A file that `tandem load` gets, and where it is loaded to."""
    file, number = folder / "release.tar", iter(range(1 << 60))

    def read(data: bytes) -> None:
        file.write_bytes(data)
        archives.load(file, Place(str(folder / f"registry-{next(number)}")))

    return read


def _without_logins(folder: Path) -> AbstractContextManager[object]:
    """No credentials but those in a folder; helpers are not on PATH."""
    names = {"DOCKER_CONFIG": str(folder), "PATH": str(folder), "REGISTRY_AUTH_FILE": "", "XDG_RUNTIME_DIR": ""}
    return patch.dict(os.environ, names)
