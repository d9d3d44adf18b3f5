"""vLLM's settings as an artifact has them. Imports no vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.artifact.manifest import PairManifest
from pipeline.errors import ArtifactError, InputError

BLOCK = 16
"""Tokens of a block in the scheduler's books."""


CONFIG = "config.json"


class Options(BaseModel):
    """Our part of `--additional-config`, under `tandem`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    speculate_up_to: int | None = Field(default=None, ge=0)
    """Rows that speculate together at most; with more, everyone decodes plainly."""


def options(additional_config: object) -> Options:
    """Read them.

    Raises:
        InputError: an option that is unknown or of another type.

    """
    given = additional_config.get("tandem", {}) if isinstance(additional_config, Mapping) else {}
    try:
        return Options.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(("additional-config", "tandem", *map(str, first["loc"])))
        known = ", ".join(Options.model_fields)
        raise InputError(f"{first['msg']} (found {first['input']!r})", where=where, fix=f"known: {known}") from error


def most_tokens(manifest: PairManifest) -> int:
    """Longest prompt and answer together: the last token is never read, so it needs no place in the cache."""
    return manifest.shapes.kv[-1]


def blocks(manifest: PairManifest) -> int:
    """Blocks that all slots can fill, drafts at the end included, and the one that vLLM keeps for itself."""
    per_slot = -(-(most_tokens(manifest) + 2 * max(manifest.draft_tokens) + 1) // BLOCK)
    return manifest.shapes.batch[-1] * per_slot + 1


def of_vllm(root: Path, manifest: PairManifest) -> dict[str, Any]:
    """Values of vLLM's arguments, by their names in the engine's arguments."""
    return {
        "tokenizer": str(root / "tokenizer"),
        "dtype": manifest.dtype,
        "max_model_len": most_tokens(manifest),
        "max_num_seqs": manifest.shapes.batch[-1],
        "tensor_parallel_size": 1,
        "enforce_eager": True,
    }


@cache
def checked(root: Path) -> PairManifest:
    """The manifest of an artifact whose every file was verified, which passed its gates and fits this host.

    Signatures are asked for as the policy in `TANDEM_POLICY` says. Once per process: vLLM asks at several moments.

    Raises:
        ArtifactError: as `runtime.verified`, gates that failed or did not run, or no configuration for vLLM.

    """
    from pipeline.artifact.signing import read_policy
    from pipeline.runtime.open import verified

    policy = os.environ.get("TANDEM_POLICY")
    manifest = verified(root, read_policy(Path(policy)) if policy else None).manifest
    if manifest.passed is not True:
        what = "its gates failed" if manifest.passed is False else "its gates did not run"
        raise ArtifactError(what, where=str(root), fix=f"run `tandem validate {root}`")
    if CONFIG not in manifest.files:
        what = f"it has no {CONFIG}, which vLLM reads: an older Tandem packed it"
        raise ArtifactError(what, where=str(root), fix="build it again: every graph comes from the cache")
    return manifest
