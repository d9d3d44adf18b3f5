"""How an artifact came to be: SLSA provenance as an in-toto statement, and an SBOM of what built it.

Both are files of the artifact, so the manifest pins them and its signature covers them. They tell of one build and are
not part of what the artifact is. Formats: slsa.dev/spec/v1.0/provenance, in-toto Statement v1, CycloneDX 1.6.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline import __version__

PROVENANCE, SBOM = "provenance.json", "sbom.cdx.json"
BUILD_TYPE = "urn:tandem:build:v1"
LOCAL_BUILDER = "urn:tandem:builder:local"
ROOTS = ("torch", "transformers", "safetensors", "tokenizers", "gguf", "numpy", "neuronx-cc", "neuronx-distributed",
         "torch-neuronx", "pydantic", "ruamel.yaml", "click", "filelock", "rich")  # fmt: skip
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Build:
    """What provenance tells of a build. `inputs` are the lock's sources, as plain data."""

    name: str
    created: str
    recipe_sha256: str
    lock_sha256: str
    backend: Mapping[str, Any]
    flags: Mapping[str, str]
    toolchain: Mapping[str, str]
    inputs: Mapping[str, Mapping[str, Any]]


def statement(build: Build, subjects: Mapping[str, str]) -> dict[str, Any]:
    """The in-toto statement; `subjects` are the artifact's files and their sha256."""
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
        "metadata": {"invocationId": _invocation(), "finishedOn": build.created},
    }
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in sorted(subjects.items())],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {"buildDefinition": definition, "runDetails": details},
    }


def builder() -> str:
    """Who builds: the workflow that GitHub Actions runs, or a machine that nobody vouches for."""
    workflow = os.environ.get("GITHUB_WORKFLOW_REF")
    server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
    return f"{server}/{workflow}" if workflow else LOCAL_BUILDER


def builder_of(provenance: Mapping[str, Any]) -> str:
    """The builder that a statement names, or an empty string."""
    try:
        return str(provenance["predicate"]["runDetails"]["builder"]["id"])
    except (KeyError, TypeError):
        return ""


def sbom(build: Build) -> dict[str, Any]:
    """CycloneDX: the packages that are installed here among those that build artifacts, and the compilers."""
    packages = sorted(_closure(ROOTS).items(), key=lambda item: item[0].lower())
    compilers = {key: value for key, value in build.toolchain.items() if key in ("cxx", "neuronx-cc", "cuda")}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": build.created,
            "component": {"type": "application", "name": "tandem", "version": __version__, "bom-ref": "tandem"},
        },
        "components": [
            *(_component(found) for _, found in packages),
            *({"type": "application", "name": k, "version": v, "bom-ref": k} for k, v in sorted(compilers.items())),
        ],
    }


def _component(found: metadata.Distribution) -> dict[str, Any]:
    name, version = found.metadata["Name"], found.version
    purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{version}"
    return {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}


def _closure(roots: Iterable[str]) -> dict[str, metadata.Distribution]:
    """Installed packages that these need, by name; extras are left out."""
    found: dict[str, metadata.Distribution] = {}
    left = list(roots)
    while left:
        name = left.pop()
        try:
            one = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        key = re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower()
        if key not in found:
            found[key] = one
            needs = (need for need in one.requires or () if "extra ==" not in need)
            left += [match[0] for need in needs if (match := NAME.match(need))]
    return found


def _sources(inputs: Mapping[str, Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """Every file of the pair's checkpoints."""
    for role, source in sorted(inputs.items()):
        for name, digest in sorted(source["files"].items()):
            yield {"name": f"{role}/{name}", "uri": source["source"], "digest": {"sha256": digest["sha256"]},
                   "annotations": {"revision": source["revision"]}}  # fmt: skip


def _code() -> dict[str, Any]:
    """This package's own commit."""
    commit = _commit()
    plain = re.fullmatch(r"[0-9a-f]{40}", commit)
    return {"name": "tandem", "annotations": {"commit": commit}, **({"digest": {"gitCommit": commit}} if plain else {})}


def _invocation() -> str:
    run, attempt = os.environ.get("GITHUB_RUN_ID"), os.environ.get("GITHUB_RUN_ATTEMPT", "1")
    repository = os.environ.get("GITHUB_REPOSITORY", "")
    server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
    return f"{server}/{repository}/actions/runs/{run}/attempts/{attempt}" if run else ""


def _commit() -> str:
    """The commit of this package, if it runs from a checkout; `-dirty` when that was edited."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
