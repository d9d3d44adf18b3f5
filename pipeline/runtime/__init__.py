"""Run an artifact: `load(folder)` gives an `Engine`. Never compiles, never downloads."""

from __future__ import annotations

from pathlib import Path

from pipeline.runtime.engine import Engine, Generation

__all__ = ["Engine", "Generation", "load"]


def load(artifact_dir: str | Path) -> Engine:
    """Verify an artifact, check that it fits this host, and open it.

    Raises:
        ArtifactError: a file that does not match its digest, or an artifact made for another host.

    """
    from pipeline import artifact
    from pipeline.backends.base import make_backend
    from pipeline.runtime.ranks import open_ranks
    from pipeline.runtime.text import Text

    found = artifact.verify(Path(artifact_dir))
    backend = make_backend(found.manifest.backend)
    artifact.check_host(found.manifest, backend.host(), toolchain=backend.toolchain().as_dict())
    return Engine(found.manifest, open_ranks(found.root, found.manifest), Text(found.root / "tokenizer"))
