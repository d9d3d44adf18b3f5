"""Open an artifact: verified whole, fitting this host, signed as a policy demands. Never compiles or downloads."""

from __future__ import annotations

from pathlib import Path

from pipeline.artifact.manifest import PairArtifact, pair_of, read_pair
from pipeline.artifact.signing import Policy, check_artifact
from pipeline.artifact.verify import check_host, verify
from pipeline.backends.base import make_backend
from pipeline.runtime.batch import Batch
from pipeline.runtime.engine import Engine
from pipeline.runtime.text import Text


def load(artifact_dir: str | Path, policy: Policy | None = None) -> Engine:
    """Verify an artifact, and who signed it where a policy is given, check that it fits this host, and open it.

    Raises:
        InputError: an artifact of a kind that Tandem does not run.
        ArtifactError: as `verified`; nothing of it was opened for execution then.

    """
    artifact = verified(Path(artifact_dir), policy)
    ranks = make_backend(artifact.manifest.backend).open(artifact.root, artifact.manifest)
    return Engine(artifact.manifest, ranks, Text(artifact.root / "tokenizer"))


def verified(root: Path, policy: Policy | None = None) -> PairArtifact:
    """An artifact whose every file was read and compared, signed as the policy demands, that fits this host.

    Raises:
        InputError: an artifact of a kind that Tandem does not run.
        ArtifactError: a file that does not match its digest, an artifact made for another host, or one that is not
            signed as the policy demands.

    """
    if policy is not None:
        check_artifact(root, policy)
    artifact = pair_of(verify(root))
    backend = make_backend(artifact.manifest.backend)
    check_host(artifact.manifest, backend.host(), toolchain=backend.toolchain().as_dict())
    return artifact


def open_batch(root: Path) -> Batch:
    """The slots of an artifact that was verified before, perhaps by another process."""
    manifest = read_pair(root).manifest
    return Batch(manifest, make_backend(manifest.backend).open(root, manifest))
