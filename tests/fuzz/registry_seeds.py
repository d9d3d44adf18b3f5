"""Valid inputs of the targets in `fuzz.registries`, for `fuzz.seeds`."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

from fuzz.seeds import answer, as_json
from pipeline.registry.archives import save
from pipeline.registry.publish import PublishSettings, publish
from pipeline.stores.base import Content
from pipeline.stores.oci_layout import MANIFEST_TYPE, RELEASE_TYPE, VERSION, descriptor, index_of, layout_of, record
from support import small_artifacts as small


def of_registries(folder: Path) -> Iterator[tuple[str, bytes]]:
    made = small.make_validated(folder / "tiny", folder / "work-tiny", size=10)
    publish(made.root, str(folder / "registry"), options=PublishSettings(version="1.0"))
    save(f"{folder}/registry/small@1.0", folder / "release.tar")
    yield "archive/valid.tar", (folder / "release.tar").read_bytes()
    content = Content("name", "1.0", b"{}", {}, {})
    top = layout_of(content).top
    yield "oci_manifest/valid-release.json", top.data
    entry = descriptor(top.media_type, top.data) | {"artifactType": RELEASE_TYPE, "annotations": {"a": "b"}}
    yield "oci_manifest/valid-index.json", index_of([entry], {VERSION: "1.0"}).data
    yield "oci_manifest/record.json", record("application/x", b"{}", {}).data
    auth = base64.b64encode(b"user:secret").decode()
    yield "login/valid.json", as_json({"auths": {"ghcr.io": {"auth": auth}}})
    yield "login/helper.json", as_json({"credsStore": "absent", "credHelpers": {"ghcr.io": "x"}})
    kind = f"Content-Type: {MANIFEST_TYPE}"
    yield "oci/valid-manifest.http", answer(top.data, kind)
    yield "oci/valid-tags.http", answer(as_json({"tags": ["1.0"]}), 'Link: </v2/_catalog>; rel="next"')
    challenge = 'WWW-Authenticate: Bearer realm="http://127.0.0.1:1/token",service="x",scope="y"'
    yield "oci/challenge.http", answer(b'{"errors": [{"code": "DENIED"}]}', challenge, status="401 Unauthorized")
    yield "oci/moved.http", answer(b"", "Location: /v2/x", status="307 Temporary Redirect")
    yield "oci/upload.http", answer(b"", "Location: /v2/x", status="202 Accepted")
