"""The contents of a release: one artifact, or several variants of one recipe (chips, ranks). Pure; no torch.

The document of a release (`manifest.json` in the registry) is an artifact's manifest, or an index that names the
manifest of each variant by its digest. Variants are published together, so an index never changes either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.artifact.manifest import (
    MANIFEST,
    Artifact,
    FileEntry,
    Manifest,
    Version,
    content_digest,
    dump,
    parse,
)
from pipeline.artifact.verify import ISA_ORDER, satisfies
from pipeline.errors import ArtifactError, CorruptError, InputError
from pipeline.files.limits import AGAIN, first_error, json_object
from pipeline.recipe.schema import Name
from pipeline.records import Record

VERSION_LENGTH = 12
INDEX_LIMIT = 100
INDEX_KIND: Literal["variants"] = "variants"

Variant = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)]


class VariantEntry(Record):
    """One variant: its manifest, and the facts by which a variant is chosen."""

    manifest: FileEntry
    content: str = Field(pattern="^[0-9a-f]{64}$")
    requires: dict[str, str]
    tensor: int


class Index(Record):
    """A release of several variants."""

    schema_version: Literal[1] = 1
    kind: Literal["variants"] = INDEX_KIND
    name: Name
    version: Version
    created: str
    variants: dict[Variant, VariantEntry] = Field(min_length=1, max_length=INDEX_LIMIT)


Document = Manifest | Index
Fetch = Callable[[str, FileEntry], bytes]
"""Returns a small file of a release, after its digest was checked."""


@dataclass(frozen=True)
class Bundle:
    """Artifacts on disk as one release: its document, and every file by its path in the release."""

    document: Document
    data: bytes
    artifacts: Mapping[str, Artifact]

    @property
    def files(self) -> dict[str, FileEntry]:
        """Every file but the document."""
        if isinstance(self.document, Manifest):
            return dict(self.document.files)
        files = {f"{v}/{MANIFEST}": entry.manifest for v, entry in self.document.variants.items()}
        inner = {variant: artifact.manifest.files for variant, artifact in self.artifacts.items()}
        return files | {f"{v}/{name}": entry for v, entries in inner.items() for name, entry in entries.items()}

    @property
    def sources(self) -> dict[str, Path]:
        """Return the path of each file."""
        single = isinstance(self.document, Manifest)
        prefixed = {"" if single else f"{variant}/": artifact for variant, artifact in self.artifacts.items()}
        inside = {f"{prefix}{n}": each.root / n for prefix, each in prefixed.items() for n in each.manifest.files}
        return inside | {f"{prefix}{MANIFEST}": each.root / MANIFEST for prefix, each in prefixed.items() if prefix}


def make_bundle(artifacts: Sequence[Artifact], version: str | None = None) -> Bundle:
    """Return one release of these artifacts; a single artifact without a chosen version becomes the release unchanged.

    Raises:
        InputError: the names differ, two are for the same chip and ranks, or the version is malformed.

    """
    if version is not None:
        _check_version(version)
    first = artifacts[0].manifest
    if len(artifacts) == 1 and version in (None, first.version):
        data = artifacts[0].data  # as it is: a signature is over these bytes
        return Bundle(parse(data, str(artifacts[0].root)), data, {"": artifacts[0]})
    named: dict[str, Artifact] = {}
    for artifact in artifacts:
        key = variant_name(artifact.manifest)
        if artifact.manifest.name != first.name or key in named:
            what = f"not one release: {artifact.manifest.name} for {key}, {first.name} for {', '.join(named)}"
            fix = "publish variants of one recipe, one for each chip and ranks"
            raise InputError(what, where=str(artifact.root), fix=fix)
        named[key] = artifact
    entries = {key: _variant_entry(artifact) for key, artifact in sorted(named.items())}
    created = max(artifact.manifest.created for artifact in artifacts)
    index = Index(name=first.name, version=version or "unversioned", created=created, variants=entries)
    if version is None:
        index = index.model_copy(update={"version": digest_of(index)[:VERSION_LENGTH]})
    return Bundle(index, dump(index), named)


def _check_version(version: str) -> None:
    try:
        TypeAdapter(Version).validate_python(version)
    except ValidationError as error:
        fix = "up to 100 letters, digits and . _ + -, for example 1.0"
        raise InputError(f"malformed version: {version!r}", where="--version", fix=fix) from error


def _variant_entry(artifact: Artifact) -> VariantEntry:
    data = artifact.data
    entry = FileEntry(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    manifest = artifact.manifest
    content = content_digest(manifest)
    return VariantEntry(manifest=entry, content=content, requires=manifest.requires, tensor=manifest.ranks)


def variant_name(manifest: Manifest) -> str:
    """Return the name of an artifact among the variants of its recipe: `cpu-avx2-tp1`, `trn2-lnc2-tp8`."""
    requires = manifest.requires
    chip = requires.get("chip") or requires.get("device", "any")
    fine = [requires[key] for key in ("isa", "compute_capability") if key in requires]
    lnc = [f"lnc{requires['lnc']}"] if "lnc" in requires else []
    return "-".join([chip, *fine, *lnc, f"tp{manifest.ranks}"]).lower()


def digest_of(document: Document) -> str:
    """Return the sha256 of a release's contents, independent of the time of its build."""
    if isinstance(document, Manifest):
        return content_digest(document)
    contents = {name: entry.content for name, entry in document.variants.items()}
    return hashlib.sha256(json.dumps([document.name, contents], sort_keys=True).encode()).hexdigest()


def parse_document(data: bytes, where: str) -> Document:
    """Parse the document of a release.

    Raises:
        ArtifactError: another schema version. CorruptError: damaged, or with unsafe paths.

    """
    try:
        return _parsed(data, where)
    except ArtifactError as error:
        if error.fix != AGAIN:
            raise
        fix = "the registry has it so: ask the publisher to publish the artifact again, under another version"
        raise CorruptError(error.what, where=error.where, fix=fix) from error


def _parsed(data: bytes, where: str) -> Document:
    if json_object(data, where).get("kind") != INDEX_KIND:
        return parse(data, where)
    try:
        return Index.model_validate_json(data)
    except ValidationError as error:
        first = first_error(error)
        key = ".".join(map(str, first["loc"]))
        raise CorruptError(f"{key}: {first['msg']}", where=where, fix=AGAIN) from error


def all_files(document: Document, fetch: Fetch, where: str) -> dict[str, FileEntry]:
    """Return every file that a published release refers to, by its path in the release."""
    if isinstance(document, Manifest):
        return dict(document.files)
    files = {}
    for name, entry in document.variants.items():
        path = f"{name}/{MANIFEST}"
        files[path] = entry.manifest
        inner = parse(fetch(path, entry.manifest), f"{where}/{name}")
        files |= {f"{name}/{path}": inner_entry for path, inner_entry in inner.files.items()}
    return files


def choose(index: Index, host: Mapping[str, str], wanted: str | None, where: str) -> str:
    """Return the variant for a host, or the requested variant.

    Of several that run on the host, accelerators come before CPUs, and larger instruction sets before smaller ones.
    The number of ranks is not chosen automatically.

    Raises:
        InputError: no variant runs on the host, or several do; lists the variants.

    """
    listed = ", ".join(index.variants)
    if wanted is not None:
        if wanted not in index.variants:
            raise InputError(f"unknown variant {wanted!r}", where=where, fix=f"accepted: {listed}")
        return wanted
    fits = [name for name, entry in index.variants.items() if _runs_on(host, entry)]
    if not fits:
        facts = ", ".join(f"{key}={value}" for key, value in host.items())
        fix = f"choose a variant with --variant: {listed}"
        raise InputError(f"no variant for this host ({facts})", where=where, fix=fix)
    best = max(_rank(index.variants[name]) for name in fits)
    fits = [name for name in fits if _rank(index.variants[name]) == best]
    if len(fits) > 1:
        fix = f"choose a variant with --variant: {', '.join(fits)}"
        raise InputError(f"{len(fits)} variants run on this host", where=where, fix=fix)
    return fits[0]


def _runs_on(host: Mapping[str, str], entry: VariantEntry) -> bool:
    return all(satisfies(key, value, host.get(key)) for key, value in entry.requires.items())


def _rank(entry: VariantEntry) -> tuple[int, int, str]:
    isa = entry.requires.get("isa", "")
    known = ISA_ORDER.index(isa) if isa in ISA_ORDER else -1
    return (entry.requires.get("device") != "cpu", known, "")
