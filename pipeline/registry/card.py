"""A release's page for people: pair, chip, shapes, toolchain, gates, and how to pull it. Written from manifests alone.

Its front matter is for a Hugging Face Hub: licence, `base_model` (which links the models), tags.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.artifact.manifest import CacheManifest, Manifest, PairManifest
from pipeline.files.limits import parse_json
from pipeline.recipe.document import to_text
from pipeline.registry.release import Document

INTRODUCTION = """A target LLM and its draft, compiled ahead of time for speculative decoding by Tandem. Servers load it
and never compile; every file is pinned by its sha256 in `manifest.json`."""
TAGS = ("tandem", "speculative-decoding", "ahead-of-time")


def card(document: Document, manifests: Mapping[str, Manifest], lock: bytes) -> str:
    """Return the README.md of a release; the text of a recipe's lock, if there is one, names the models."""
    front = to_text(_front(lock)).strip()
    command = f"```sh\ntandem pull REGISTRY/{document.name}@{document.version} DIRECTORY\n```"
    return f"---\n{front}\n---\n\n{body(document, manifests)}\n\n## Use\n\n{command}\n"


def body(document: Document, manifests: Mapping[str, Manifest]) -> str:
    """Return the page without its front matter: also a CI job's summary, and a pull request's comment."""
    parts = [f"# {document.name} {document.version}\n\n{INTRODUCTION}"]
    for variant, manifest in manifests.items():
        parts.append(f"\n## {variant or 'The artifact'}\n\n{_table(facts(manifest))}")
        if isinstance(manifest, PairManifest) and manifest.validation:
            parts.append(f"\n### Gates and speed\n\n{_table(_gates(manifest.validation))}")
    return "\n".join(parts)


def _front(lock: bytes) -> dict[str, Any]:
    """Return the front matter; the licence is that of the models, which a Hub shows through `base_model`."""
    front = {"library_name": "tandem", "license": "other", "license_name": "that-of-the-base-models"}
    models = list(_hub_models(lock))
    return front | {"tags": list(TAGS)} | ({"base_model": models} if models else {})


def _hub_models(lock: bytes) -> Iterator[str]:
    try:
        data = parse_json(lock)
    except ValueError:
        return
    for role in ("target", "draft"):
        part = data.get(role) if isinstance(data, dict) else None
        source = str(part.get("source", "")) if isinstance(part, dict) else ""
        if source.startswith("hf://"):
            yield source.removeprefix("hf://").partition("@")[0]


def facts(manifest: Manifest) -> dict[str, Any]:
    """Return the contents and requirements of an artifact, by the row labels of the page."""
    if isinstance(manifest, CacheManifest):
        return _cache_facts(manifest)
    built = _pair_facts(manifest) if isinstance(manifest, PairManifest) else {}
    return {
        "runs on": ", ".join(f"{key} {value}" for key, value in manifest.requires.items()),
        "ranks": manifest.ranks,
        **built,
        "size": f"{manifest.size_bytes / (1 << 20):,.1f} MiB",
        "toolchain": ", ".join(f"{key} {value}" for key, value in manifest.toolchain.items()),
    }


def _pair_facts(manifest: PairManifest) -> dict[str, Any]:
    shapes = manifest.shapes
    return {
        "dtype": manifest.dtype + (f", weights {manifest.weights}" if manifest.weights else ""),
        "draft tokens K": ", ".join(map(str, manifest.draft_tokens)),
        "prompt lookup": f"by {manifest.lookup} tokens" if manifest.lookup else "no",
        "sampling": ", ".join(manifest.sampling),
        "batch": ", ".join(map(str, shapes.batch)),
        "prefill buckets": ", ".join(map(str, shapes.prefill)),
        "cache buckets": ", ".join(map(str, shapes.kv)),
        "graphs": len(manifest.graphs),
        "recipe": f"sha256 {manifest.recipe_digest}",
    }


def _cache_facts(manifest: CacheManifest) -> dict[str, Any]:
    told = manifest.backend
    return {
        "kind": "compile cache of vLLM's Neuron plugin; complete, but not run by Tandem",
        "runs on": ", ".join(f"{key} {value}" for key, value in manifest.requires.items()),
        "filled by": " ".join(["vllm", "serve", *told.serve]),
        "graphs": f"{told.keys}, of the {told.route} route",
        "compiler flags": "; ".join(told.flags),
        "size": f"{manifest.size_bytes / (1 << 20):,.1f} MiB",
        "versions": ", ".join(f"{key} {value}" for key, value in manifest.toolchain.items()),
    }


def _gates(validation: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return numbers and verdicts of the validation summary as flat rows; lists are omitted."""
    rows: dict[str, Any] = {}
    for key, value in validation.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            rows |= _gates(value, f"{name}: ")
        elif isinstance(value, bool):
            rows[name] = "yes" if value else "no"
        elif isinstance(value, float):
            rows[name] = f"{value:.4g}"
        elif not isinstance(value, list):
            rows[name] = value
    return rows


def _table(rows: Mapping[str, Any]) -> str:
    def cell(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")

    return "| | |\n| --- | --- |\n" + "".join(f"| {cell(key)} | {cell(value)} |\n" for key, value in rows.items())
