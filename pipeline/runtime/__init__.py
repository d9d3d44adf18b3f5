"""Run an artifact: `load(folder)` gives an `Engine`. Never compiles, never downloads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.runtime.engine import Engine, Generation

if TYPE_CHECKING:
    from pipeline.signing import Policy

__all__ = ["Engine", "Generation", "load"]


def load(artifact_dir: str | Path, policy: Policy | None = None) -> Engine:
    """Verify an artifact, and who signed it where a policy is given, check that it fits this host, and open it.

    Raises:
        ArtifactError: a file that does not match its digest, an artifact made for another host, or one that is not
            signed as the policy demands: nothing of it was opened for execution then.

    """
    from pipeline import artifact
    from pipeline.backends.base import make_backend
    from pipeline.runtime.ranks import open_ranks
    from pipeline.runtime.text import Text

    if policy is not None:
        from pipeline.signing import check_artifact

        check_artifact(Path(artifact_dir), policy)
    found = artifact.verify(Path(artifact_dir))
    backend = make_backend(found.manifest.backend)
    artifact.check_host(found.manifest, backend.host(), toolchain=backend.toolchain().as_dict())
    return Engine(found.manifest, open_ranks(found.root, found.manifest), Text(found.root / "tokenizer"))
