"""The public interface: build, publish, pull, verify and run artifacts for speculative decoding.

Everything else in `pipeline` may change in any version. A name is imported on first use, so importing this package
imports no torch; only `build`, `load` and `Engine` do.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline import __version__

if TYPE_CHECKING:
    from pipeline.artifact.manifest import Artifact
    from pipeline.artifact.manifest import read as read_artifact
    from pipeline.artifact.signing import Policy, read_policy, sign
    from pipeline.artifact.signing import require as require_signature
    from pipeline.artifact.verify import verify
    from pipeline.build import BuildReport, BuildSettings, build
    from pipeline.build import run as run_build
    from pipeline.errors import (
        ArtifactError,
        CorruptError,
        GateError,
        HostError,
        InputError,
        PreflightError,
        Problem,
        RecipeError,
        RefusedError,
        SourceError,
        TandemError,
    )
    from pipeline.recipe import Recipe
    from pipeline.recipe import load as load_recipe
    from pipeline.registry.publish import PublishSettings, Release, publish
    from pipeline.registry.pull import Selection, pull
    from pipeline.runtime import Engine, Generation, Rules, TokenLogProbs, load
    from pipeline.runtime.text import Chat

_PLACES = {
    "Artifact": "pipeline.artifact.manifest",
    "ArtifactError": "pipeline.errors",
    "BuildReport": "pipeline.build",
    "BuildSettings": "pipeline.build",
    "Chat": "pipeline.runtime.text",
    "CorruptError": "pipeline.errors",
    "Engine": "pipeline.runtime",
    "GateError": "pipeline.errors",
    "Generation": "pipeline.runtime",
    "HostError": "pipeline.errors",
    "InputError": "pipeline.errors",
    "Policy": "pipeline.artifact.signing",
    "PreflightError": "pipeline.errors",
    "Problem": "pipeline.errors",
    "PublishSettings": "pipeline.registry.publish",
    "Recipe": "pipeline.recipe",
    "RecipeError": "pipeline.errors",
    "RefusedError": "pipeline.errors",
    "Release": "pipeline.registry.publish",
    "Rules": "pipeline.runtime",
    "Selection": "pipeline.registry.pull",
    "SourceError": "pipeline.errors",
    "TandemError": "pipeline.errors",
    "TokenLogProbs": "pipeline.runtime",
    "build": "pipeline.build",
    "load": "pipeline.runtime",
    "load_recipe": "pipeline.recipe:load",
    "publish": "pipeline.registry.publish",
    "pull": "pipeline.registry.pull",
    "read_artifact": "pipeline.artifact.manifest:read",
    "read_policy": "pipeline.artifact.signing",
    "require_signature": "pipeline.artifact.signing:require",
    "run_build": "pipeline.build:run",
    "sign": "pipeline.artifact.signing",
    "verify": "pipeline.artifact.verify",
}
"""Public name -> its module, with the name there if that differs."""

__all__ = [
    "Artifact",
    "ArtifactError",
    "BuildReport",
    "BuildSettings",
    "Chat",
    "CorruptError",
    "Engine",
    "GateError",
    "Generation",
    "HostError",
    "InputError",
    "Policy",
    "PreflightError",
    "Problem",
    "PublishSettings",
    "Recipe",
    "RecipeError",
    "RefusedError",
    "Release",
    "Rules",
    "Selection",
    "SourceError",
    "TandemError",
    "TokenLogProbs",
    "__version__",
    "build",
    "load",
    "load_recipe",
    "publish",
    "pull",
    "read_artifact",
    "read_policy",
    "require_signature",
    "run_build",
    "sign",
    "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, own = _PLACES[name].partition(":")
    return getattr(import_module(module), own or name)


def __dir__() -> list[str]:
    return sorted(__all__)
