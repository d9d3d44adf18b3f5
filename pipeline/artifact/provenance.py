"""The provenance of a build: a SLSA predicate in an in-toto statement. `sbom.py` lists the packages.

Both are files of the artifact, so the manifest pins them and its signature covers them. They describe one build and
are not part of the artifact's identity. Formats: slsa.dev/spec/v1.0/provenance, in-toto Statement v1.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import __version__

PROVENANCE, SBOM = "provenance.json", "sbom.cdx.json"
BUILD_TYPE = "urn:tandem:build:v1"
LOCAL_BUILDER = "urn:tandem:builder:local"


@dataclass(frozen=True)
class Build:
    """The facts of a build in its provenance. `inputs` are the lock's sources, as plain data."""

    name: str
    created: str
    recipe_sha256: str
    lock_sha256: str
    backend: Mapping[str, Any]
    flags: Mapping[str, str]
    toolchain: Mapping[str, str]
    inputs: Mapping[str, Mapping[str, Any]]


def statement(build: Build, subjects: Mapping[str, str]) -> dict[str, Any]:
    """Return the in-toto statement; `subjects` are the artifact's files and their sha256."""
    definition = {
        "buildType": BUILD_TYPE,
        "externalParameters": {
            "recipe": {"name": build.name, "sha256": build.recipe_sha256},
            "lock": {"sha256": build.lock_sha256},
        },
        "internalParameters": {
            "backend": dict(build.backend), "flags": dict(build.flags), "toolchain": dict(build.toolchain)
        },
        "resolvedDependencies": [*_sources(build.inputs), _code()],
    }  # fmt: skip
    details = {
        "builder": {"id": builder(), "version": {"tandem": __version__}},
        "metadata": {"invocationId": invocation(), "finishedOn": build.created},
    }
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in sorted(subjects.items())],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {"buildDefinition": definition, "runDetails": details},
    }


def builder() -> str:
    """Return the builder's id: the workflow in GitHub Actions, else `LOCAL_BUILDER`."""
    workflow = os.environ.get("GITHUB_WORKFLOW_REF")
    server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
    return f"{server}/{workflow}" if workflow else LOCAL_BUILDER


def builder_of(provenance: Mapping[str, Any]) -> str:
    """Return the builder that a statement names, or an empty string."""
    try:
        return str(provenance["predicate"]["runDetails"]["builder"]["id"])
    except (KeyError, TypeError):
        return ""


def _sources(inputs: Mapping[str, Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """Yield a resource descriptor for every file of the pair's checkpoints."""
    for role, source in sorted(inputs.items()):
        for name, digest in sorted(source["files"].items()):
            yield {"name": f"{role}/{name}", "uri": source["source"], "digest": {"sha256": digest["sha256"]},
                   "annotations": {"revision": source["revision"]}}  # fmt: skip


def _code() -> dict[str, Any]:
    """Return the resource descriptor of this package's commit."""
    commit = _commit()
    plain = re.fullmatch(r"[0-9a-f]{40}", commit)
    return {"name": "tandem", "annotations": {"commit": commit}, **({"digest": {"gitCommit": commit}} if plain else {})}


def invocation() -> str:
    """Return the address of this run in GitHub Actions, else an empty string."""
    run, attempt = os.environ.get("GITHUB_RUN_ID"), os.environ.get("GITHUB_RUN_ATTEMPT", "1")
    repository = os.environ.get("GITHUB_REPOSITORY", "")
    server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
    return f"{server}/{repository}/actions/runs/{run}/attempts/{attempt}" if run else ""


def _commit() -> str:
    """Return the commit of this package in a checkout, with `-dirty` if files were edited; else `unknown`."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, encoding="utf-8", errors="replace"
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
