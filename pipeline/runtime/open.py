"""Open an artifact after verifying files, signature and host. Never compiles or downloads.

Imports torch only to open an artifact, so that a host without it gets an error that names the packages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifact.manifest import PairArtifact, pair_of, read_pair
from pipeline.artifact.signing import Policy, check_artifact
from pipeline.artifact.verify import check_host, verify
from pipeline.backends.base import make_backend
from pipeline.extras import require
from pipeline.models.generation import GENERATION_CONFIG, GenerationDefaults, generation_defaults

if TYPE_CHECKING:
    from pipeline.runtime.batch import Batch
    from pipeline.runtime.engine import Engine


def load(artifact_dir: str | Path, policy: Policy | None = None) -> Engine:
    """Verify an artifact's files, its signature if there is a policy, and that it fits this host; open it.

    Raises:
        InputError: an artifact of a kind that Tandem does not run.
        ArtifactError: a file that does not match its digest, an artifact for another host, or a missing signature that
            the policy requires; nothing was executed.
        HostError: the packages of the artifact's backend, or those that check signatures, are not installed.

    """
    root = Path(artifact_dir)
    backend = read_pair(root).manifest.backend.name
    require([backend, *(("sign",) if policy else ())], str(root))
    from pipeline.runtime.engine import Engine  # these two import packages of the backend's extra
    from pipeline.runtime.text import Text

    artifact = verified(root, policy)
    ranks = make_backend(artifact.manifest.backend).open(artifact.root, artifact.manifest)
    return Engine(artifact.manifest, ranks, Text(artifact.root / "tokenizer"), defaults_of(artifact.root))


def defaults_of(root: Path) -> GenerationDefaults:
    """Return the defaults of generation of an artifact.

    Raises:
        SourceError: malformed; `tandem build` refuses such a file.

    """
    path = root / GENERATION_CONFIG
    return generation_defaults(json.loads(path.read_bytes()) if path.is_file() else {}, str(path))


def verified(root: Path, policy: Policy | None = None) -> PairArtifact:
    """Return an artifact after verifying its files, its signature if there is a policy, and that it fits this host.

    Raises:
        InputError: an artifact of a kind that Tandem does not run.
        ArtifactError: a file that does not match its digest, an artifact for another host, or a missing signature that
            the policy requires.

    """
    if policy is not None:
        check_artifact(root, policy)
    artifact = pair_of(verify(root))
    backend = make_backend(artifact.manifest.backend)
    check_host(artifact.manifest, backend.host(), toolchain=backend.toolchain().as_dict())
    return artifact


def open_batch(root: Path) -> Batch:
    """Open the slots of an artifact that was verified before, possibly by another process."""
    from pipeline.runtime.batch import Batch  # imports torch

    manifest = read_pair(root).manifest
    return Batch(manifest, make_backend(manifest.backend).open(root, manifest))
