"""Open an artifact: verified whole, fitting this host, signed as a policy demands. Never compiles or downloads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.runtime.engine import Engine

if TYPE_CHECKING:
    from pipeline.artifact.manifest import Artifact
    from pipeline.artifact.signing import Policy
    from pipeline.runtime.batch import Batch


def load(artifact_dir: str | Path, policy: Policy | None = None) -> Engine:
    """Verify an artifact, and who signed it where a policy is given, check that it fits this host, and open it.

    Raises:
        ArtifactError: as `verified`: nothing of it was opened for execution then.

    """
    from pipeline.runtime.ranks import open_ranks
    from pipeline.runtime.text import Text

    found = verified(Path(artifact_dir), policy)
    return Engine(found.manifest, open_ranks(found.root, found.manifest), Text(found.root / "tokenizer"))


def verified(root: Path, policy: Policy | None = None) -> Artifact:
    """An artifact whose every file was read and compared, signed as the policy demands, that fits this host.

    Raises:
        ArtifactError: a file that does not match its digest, an artifact made for another host, or one that is not
            signed as the policy demands.

    """
    from pipeline.artifact import manifest as artifact
    from pipeline.backends.base import make_backend

    if policy is not None:
        from pipeline.artifact.signing import check_artifact

        check_artifact(root, policy)
    found = artifact.verify(root)
    backend = make_backend(found.manifest.backend)
    artifact.check_host(found.manifest, backend.host(), toolchain=backend.toolchain().as_dict())
    return found


def open_batch(root: Path) -> Batch:
    """The slots of an artifact that was verified before, perhaps by another process."""
    from pipeline.artifact import manifest as artifact
    from pipeline.runtime.batch import Batch
    from pipeline.runtime.ranks import open_ranks

    manifest = artifact.read(root).manifest
    return Batch(manifest, open_ranks(root, manifest))
