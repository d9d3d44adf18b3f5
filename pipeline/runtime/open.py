"""Open an artifact after verifying files, signature and host. Never compiles or downloads.

Imports torch only to open an artifact, so that a host without it gets an error that names the packages.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifact.manifest import MANIFEST, PairArtifact, pair_of, read
from pipeline.artifact.signing import Policy, read_trusted
from pipeline.artifact.verify import check_host, verify_files
from pipeline.backends.base import make_backend
from pipeline.errors import CorruptError
from pipeline.extras import require
from pipeline.files.limits import json_object
from pipeline.models.generation import GENERATION_CONFIG, GenerationDefaults, generation_defaults
from pipeline.runtime.answers import check_remembered

if TYPE_CHECKING:
    from pipeline.runtime.batch import Batch
    from pipeline.runtime.engine import Engine


def load(
    artifact_dir: str | Path, policy: Policy | None = None, *, share_prefixes: bool = True, remember_tokens: int = 0
) -> Engine:
    """Verify an artifact's files, its signature if there is a policy, and that it fits this host; open it.

    `share_prefixes`: a prompt that begins as an earlier one, or as an answer, is read from there on. `remember_tokens`:
    tokens of answers that are kept, to propose what followed the same words in an earlier one; about 150 bytes each.

    Raises:
        InputError: an artifact of a kind that Tandem does not run, or `remember_tokens` for one without prompt lookup.
        RefusedError: a missing signature that the policy requires. CorruptError: a file that does not match its digest.
        ArtifactError: an artifact for another host. Nothing was executed.
        HostError: the packages of the artifact's backend, or those that check signatures, are not installed.

    """
    root = Path(artifact_dir)
    if policy is not None:
        require(["sign"], str(root))
    artifact = _trusted(root, policy)
    check_remembered(artifact.manifest, remember_tokens)
    require([artifact.manifest.backend.name], str(root))
    from pipeline.runtime.engine import Engine  # these two import packages of the backend's extra
    from pipeline.runtime.text import Text

    _verify(artifact)
    ranks = make_backend(artifact.manifest.backend).open(artifact.root, artifact.manifest)
    text, defaults = Text(artifact.root / "tokenizer"), defaults_of(artifact.root)
    engine = Engine(artifact.manifest, ranks, text, defaults, share_prefixes=share_prefixes)
    engine.batch.remember_answers(remember_tokens)
    return engine


def defaults_of(root: Path) -> GenerationDefaults:
    """Return the defaults of generation of an artifact.

    Raises:
        SourceError: malformed; `tandem build` refuses such a file.

    """
    path = root / GENERATION_CONFIG
    return generation_defaults(
        json_object(path.read_bytes(), str(path), path.name) if path.is_file() else {}, str(path)
    )


def verified(root: Path, policy: Policy | None = None) -> PairArtifact:
    """Return an artifact after verifying its files, its signature if there is a policy, and that it fits this host.

    Raises:
        InputError: an artifact of a kind that Tandem does not run.
        RefusedError: a missing signature that the policy requires. CorruptError: a file that does not match its digest.
        ArtifactError: an artifact for another host.

    """
    artifact = _trusted(root, policy)
    _verify(artifact)
    return artifact


def _trusted(root: Path, policy: Policy | None) -> PairArtifact:
    return pair_of(read_trusted(root, policy).artifact)


def _verify(artifact: PairArtifact) -> None:
    verify_files(artifact)
    backend = make_backend(artifact.manifest.backend)
    check_host(artifact.manifest, backend.host(), toolchain=backend.toolchain().as_dict())


def open_batch(root: Path, manifest_sha256: str) -> Batch:
    """Open the slots of an artifact that was verified before, by another process, which read this manifest.

    Raises:
        CorruptError: the artifact was replaced since.

    """
    from pipeline.runtime.batch import Batch  # imports torch

    artifact = read(root)
    if hashlib.sha256(artifact.data).hexdigest() != manifest_sha256:
        what = "the artifact was replaced after it was verified"
        raise CorruptError(what, where=str(root / MANIFEST), fix="start the server again")
    manifest = pair_of(artifact).manifest
    return Batch(manifest, make_backend(manifest.backend).open(root, manifest))
