"""`manifest.json`: the facts of an artifact, by kind, and each of its files with a digest. Opens no other file.

Every path in a manifest is checked. Files are compared in `verify`, signatures in `signing`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.errors import ArtifactError, CorruptError, InputError, no_string
from pipeline.files.atomic import safe_relative
from pipeline.files.limits import AGAIN, DO_NOT_USE, MAX_BYTES, check_counts, check_size, first_error, json_object
from pipeline.graphs.spec import GraphSpec, PairSpec, Role, Sampling
from pipeline.models.draft_kind import DraftKind
from pipeline.recipe.backend_settings import BackendSettings
from pipeline.recipe.schema import Name, Shapes
from pipeline.recipe.step_costs import StepCosts
from pipeline.records import Record

MANIFEST = "manifest.json"
SIGNATURE = "signature"
"""A signature over the manifest's bytes: in the same folder, and not listed in the manifest."""
PULLED = "pulled.json"
"""The record of a pull, see `pulled.py`: in the same folder, and not listed in the manifest."""
PROMOTED = "promoted.json"  # the record of a release's promotions, which a Hub keeps in the same folder
BESIDE = (MANIFEST, SIGNATURE, PULLED, PROMOTED)
SCHEMA_VERSION: Literal[3] = 3
MAX_FILES = 50_000
ABOUT_THE_BUILD = ("provenance.json", "sbom.cdx.json", "reports/*")
"""Files that describe one build; the content digest leaves them out."""

ALWAYS = ("recipe.*", "*config.json", "tokenizer/*")
"""Files that are pulled with every part of an artifact."""

HOW_TO_NAME = "use an artifact's directory: `tandem build` and `tandem pull` print it"
CACHE_KIND: Literal["vllm-compile-cache"] = "vllm-compile-cache"
SAMPLINGS: tuple[Sampling, ...] = ("greedy", "stochastic", "shaped")

Version = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=100)]


class FileEntry(Record):
    """Digest and size of a file."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the file, in hexadecimal")
    size: int = Field(ge=0, description="size in bytes")


class GraphEntry(Record):
    """A graph, its key in the cache, and its files."""

    spec: GraphSpec = Field(description="phase, bucket and sampling")
    key: str = Field(description="key in the cache of compiled graphs")
    file: str = Field(description="path of the compiled graph")
    io: str = Field(description="path of the graph's signature: names, shapes and dtypes of its inputs and outputs")

    @property
    def name(self) -> str:
        """Name of the graph's folder."""
        return self.spec.name


class ShardEntry(Record):
    """One rank's weights of one model."""

    model: Role = Field(description="model that the weights belong to")
    rank: int = Field(description="rank, from 0")
    file: str = Field(description="path of the safetensors file")


class Manifest(Record, ABC):
    """The fields that all kinds of manifests have."""

    schema_version: Literal[3] = Field(default=SCHEMA_VERSION, description="version of this format")
    kind: str = Field(description="kind of artifact")
    name: Name = Field(description="name of the artifact and of its releases")
    version: Version = Field(description="first digits of the content digest")
    created: str = Field(description="time of the build, UTC")
    toolchain: dict[str, str] = Field(description="versions that compiled the graphs")
    requires: dict[str, str] = Field(description="host it needs: device, instruction set, compute capability or chip")
    files: dict[str, FileEntry] = Field(
        max_length=MAX_FILES, description="every file of the artifact, by path, except the manifest and its signature"
    )

    @property
    @abstractmethod
    def ranks(self) -> int:
        """Tensor-parallel ranks."""

    @property
    def passed(self) -> bool | None:
        """Verdict of the gates; None before validation, and for kinds without gates."""
        return None

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.size for entry in self.files.values())

    def used_files(self) -> list[str]:
        """Return the paths that other fields of the manifest name."""
        return []


class PairManifest(Manifest):
    """A pair that Tandem compiled: models, graphs, shards and the result of the gates."""

    kind: Literal["pair"] = "pair"
    recipe_digest: str = Field(description="SHA-256 of the recipe")
    lock_digest: str = Field(description="SHA-256 of the lock")
    backend: BackendSettings = Field(description="the recipe's backend section")
    pair: PairSpec = Field(description="models, caches and sampling of the graphs")
    graphs: tuple[GraphEntry, ...] = Field(description="compiled graphs")
    shards: tuple[ShardEntry, ...] = Field(description="weights by model and rank")
    step_costs: StepCosts | None = Field(
        default=None, description="the recipe's speculation.step_costs: costs that the runtime chooses K by"
    )
    lookup: int | None = Field(
        default=None, ge=1, description="the recipe's speculation.lookup: number of tokens that prompt lookup matches"
    )
    validation: dict[str, Any] | None = Field(default=None, description="summary of the gates; null before validation")

    @property
    def ranks(self) -> int:
        """Tensor-parallel ranks."""
        return self.pair.models.tp

    @property
    def passed(self) -> bool | None:
        """Verdict of the gates; None before validation."""
        return None if self.validation is None else self.validation.get("passed") is True

    @property
    def dtype(self) -> str:
        """Dtype of the target."""
        return self.pair.models.target_dtype

    @property
    def weights(self) -> str | None:
        """How the target's matrices are stored, if narrower than its dtype."""
        return self.pair.models.target_weights

    @property
    def draft_kind(self) -> DraftKind:
        """The kind of draft."""
        return self.pair.models.draft_kind

    @property
    def vocab(self) -> int:
        """Number of ids that the target may emit."""
        return self.pair.target.vocab

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self.pair.target.eos_ids

    @property
    def draft_tokens(self) -> tuple[int, ...]:
        """Every K that was built, ascending."""
        return tuple(sorted({entry.spec.draft_tokens for entry in self.graphs if entry.spec.phase == "speculate"}))

    @property
    def sampling(self) -> tuple[Sampling, ...]:
        """Kinds of sampling that were built; greedy first."""
        built = {entry.spec.sampling for entry in self.graphs if entry.spec.phase in ("decode", "verify")}
        return tuple(sampling for sampling in SAMPLINGS if sampling in built)

    @property
    def logprobs(self) -> int:
        """Most probable tokens whose log probabilities a request may ask for."""
        return max((entry.spec.logprobs for entry in self.graphs), default=0)

    @property
    def shapes(self) -> Shapes:
        """Buckets that were built."""
        steps = [entry.spec for entry in self.graphs if entry.spec.phase == "decode"]
        prefill = {entry.spec.tokens for entry in self.graphs if entry.spec.phase == "prefill"}
        batch, kv = {spec.batch for spec in steps}, {spec.kv for spec in steps}
        return Shapes(batch=tuple(sorted(batch)), prefill=tuple(sorted(prefill)), kv=tuple(sorted(kv)))

    def used_files(self) -> list[str]:
        """Return the files of graphs and shards."""
        graphs = [path for graph in self.graphs for path in (graph.file, graph.io)]
        return graphs + [shard.file for shard in self.shards]


class NxdiBackend(Record):
    """Settings that NxD Inference compiled with."""

    target: str = Field(description="chip")
    lnc: int = Field(description="physical cores per logical core")
    flags: dict[str, str] = Field(
        description="compiler flags by submodel, and environment variables that changed the code"
    )


class NxdiManifest(Manifest):
    """A pair that NxD Inference compiled; only vLLM's NxDI-backed plugin runs it."""

    kind: Literal["nxdi"] = "nxdi"
    recipe_digest: str = Field(description="SHA-256 of the recipe")
    lock_digest: str = Field(description="SHA-256 of the lock")
    backend: NxdiBackend = Field(description="chip and compiler flags")
    pair: PairSpec = Field(description="models, caches and sampling of the graphs")
    draft_tokens: int = Field(description="K")

    @property
    def ranks(self) -> int:
        """Tensor-parallel ranks."""
        return self.pair.models.tp


class CacheBackend(Record):
    """How a compile cache was filled."""

    target: str = Field(description="chip")
    flags: tuple[str, ...] = Field(description="compiler flags")
    serve: tuple[str, ...] = Field(description="arguments of the `vllm serve` that filled the cache")
    environment: dict[str, str] = Field(description="environment variables of that server")
    keys: int = Field(description="number of compiled graphs")
    route: Literal["xla", "native"] = Field("xla", description="the plugin's compilation route that lowered the graphs")
    expects: tuple[str, ...] = Field((), description="keys of a server's graphs; empty in earlier artifacts")


class CacheManifest(Manifest):
    """A compile cache of vLLM's Neuron plugin; it has no recipe, pair or validation."""

    kind: Literal["vllm-compile-cache"] = CACHE_KIND
    backend: CacheBackend = Field(description="how the cache was filled")
    tensor: int = Field(description="tensor-parallel ranks of the server that filled the cache")

    @property
    def ranks(self) -> int:
        """Tensor-parallel ranks of the server that filled the cache."""
        return self.tensor


AnyManifest = Annotated[PairManifest | NxdiManifest | CacheManifest, Field(discriminator="kind")]
MANIFESTS: TypeAdapter[PairManifest | NxdiManifest | CacheManifest] = TypeAdapter(AnyManifest)


@dataclass(frozen=True)
class Artifact:
    """A directory, its parsed manifest, and the bytes of the manifest; not verified yet."""

    root: Path
    manifest: Manifest
    data: bytes = field(default=b"", repr=False, compare=False, kw_only=True)


@dataclass(frozen=True)
class PairArtifact(Artifact):
    """An artifact that Tandem's runtime opens."""

    manifest: PairManifest


def read(root: Path) -> Artifact:
    """Parse the manifest of an artifact of any kind; opens nothing else.

    Raises:
        ArtifactError: no manifest, or another schema version. CorruptError: damaged, or an unsafe path in it.

    """
    data = read_bytes(root)
    return Artifact(root, parse(data, str(root / MANIFEST)), data=data)


def read_bytes(root: Path) -> bytes:
    """Return the bytes of an artifact's manifest, which are verified, parsed and published.

    Raises:
        ArtifactError: no manifest. CorruptError: a link, or too large.

    """
    path = root / MANIFEST
    try:
        if path.is_symlink():
            raise CorruptError("the manifest is a symbolic link", where=str(path), fix=AGAIN)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        what = "no manifest" if isinstance(error, FileNotFoundError) else f"cannot read the manifest: {error.strerror}"
        raise ArtifactError(what, where=str(path), fix=HOW_TO_NAME) from error
    check_size(len(data), MAX_BYTES, str(path))
    return data


def read_pair(root: Path) -> PairArtifact:
    """Parse the manifest of a pair that Tandem compiled; opens nothing else.

    Raises:
        ArtifactError: as `read`. InputError: an artifact of another kind; the fix is the command that runs it.

    """
    return pair_of(read(root))


def pair_of(artifact: Artifact) -> PairArtifact:
    """Narrow an artifact to a pair that Tandem compiled; the error of another kind names the command that runs it."""
    manifest = artifact.manifest
    if isinstance(manifest, PairManifest):
        return PairArtifact(artifact.root, manifest, data=artifact.data)
    if manifest.kind == "nxdi":
        what, fix = "a package of NxD Inference, which only vLLM runs", f"tandem vllm-args {artifact.root}"
    else:
        what, fix = "a compile cache of vLLM's Neuron plugin", f"tandem vllm-cache install {artifact.root}"
    raise InputError(what, where=str(artifact.root), fix=fix)


def parse(data: bytes, where: str) -> PairManifest | NxdiManifest | CacheManifest:
    """Parse a manifest's bytes.

    Raises:
        ArtifactError: another schema version.
        CorruptError: damaged, too large, or with paths that could leave the directory.

    """
    found = json_object(data, where)
    if (version := found.get("schema_version")) != SCHEMA_VERSION:
        what = f"schema_version mismatch: this version of Tandem reads {SCHEMA_VERSION}, found {version!r}"
        raise ArtifactError(
            what, where=where, fix="build the artifact again, or use the version of Tandem that built it"
        )
    check_counts(found, MAX_FILES, where)
    del found
    try:
        manifest = MANIFESTS.validate_json(data)
    except ValidationError as error:
        first = first_error(error)
        place = ".".join(map(str, first["loc"][1:]))  # the first is the kind
        raise CorruptError(f"{place or 'kind'}: {first['msg']}", where=where, fix=AGAIN) from error
    if faults := list(islice(_path_faults(manifest, where), 10)):
        raise CorruptError("; ".join(faults), where=where, fix=DO_NOT_USE)
    return manifest


def dump(manifest: Record) -> bytes:
    """Return the manifest's bytes; equal manifests give equal bytes."""
    return json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True).encode() + b"\n"


def content_digest(manifest: Manifest) -> str:
    """Return the sha256 of an artifact's content, without its version, build time and validation.

    Two builds of the same inputs have the same content digest.
    """
    data = manifest.model_dump(mode="json", exclude={"version", "created", "validation"})
    data["files"] = {name: entry for name, entry in data["files"].items() if not _matches(name, ABOUT_THE_BUILD)}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def part(manifest: Manifest, only: Sequence[str] | None, where: str) -> tuple[str, ...] | None:
    """Return the patterns `only` and those of the files that belong to every part; None for the whole artifact.

    Raises:
        InputError: a pattern matches no file; the fix lists the folders.

    """
    no_string(only, "only", "patterns")
    for pattern in only or ():
        if not select(manifest, [pattern]):
            tops = ", ".join(sorted({name.partition("/")[0] for name in manifest.files}))
            raise InputError(f"no file matches {pattern!r}", where=where, fix=f"names in the artifact: {tops}")
    return (*only, *ALWAYS) if only else None


def select(manifest: Manifest, only: Sequence[str] | None) -> dict[str, FileEntry]:
    """Return the files that match any of the patterns (`weights/*/rank-0-*`); all files if `only` is None."""
    no_string(only, "only", "patterns")
    return {name: entry for name, entry in manifest.files.items() if only is None or _matches(name, only)}


def _path_faults(manifest: Manifest, where: str) -> Iterator[str]:
    for name in (names := manifest.files.keys()):
        try:
            parents = {parent.as_posix() for parent in safe_relative(name, where).parents}
        except ArtifactError as error:
            yield error.what
            continue
        if name in BESIDE or parents & names:
            yield f"path {name!r} is one of {', '.join(BESIDE)}, or a path below another file"
    for name in manifest.used_files():
        if name not in names:
            yield f"path {name!r} is used, but not listed in `files`"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
