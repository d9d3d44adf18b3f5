"""The artifact, recipe or part of an artifact that an argument names."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from pipeline.cache.local import default_root
from pipeline.errors import InputError, no_string
from pipeline.recipe import find
from pipeline.registry.releases import has_names
from pipeline.stages.stamp import is_building
from pipeline.stores.base import open_store

ARTIFACTS = Path("artifacts")
RECIPES = Path("recipes")


def artifact_dir(name: str) -> Path:
    """Return an artifact's directory, by path or by the name of its recipe.

    Raises:
        InputError: neither is an artifact.

    """
    for path in (Path(name), ARTIFACTS / name):
        if (path / "manifest.json").is_file():
            return path
    if Path(name).is_dir():
        what = "not an artifact: expected a folder with manifest.json, which `tandem build` or `tandem pull` writes"
        raise InputError(what, where=name, fix=f"name an artifact's folder; {_known()}")
    if is_release(name):
        fix = f"tandem pull {shlex.quote(name)}, then name the folder that it prints"
        raise InputError("a release in a registry, not a folder", where=name, fix=fix)
    places = [name, f"{ARTIFACTS / name}"] if Path(name).name == name else [name]
    what = f"no artifact {name!r}: no folder {' or '.join(f'`{place}`' for place in places)}"
    has_recipe = (RECIPES / f"{name}.yaml").is_file()
    fix = f"tandem build {name}" if has_recipe else f"name an artifact's folder; {_known()}"
    raise InputError(what, where="ARTIFACT", fix=fix)


def is_release(name: str) -> bool:
    """Return whether an argument names a release: with a version or alias, or as REGISTRY/NAME of a registry."""
    if "://" in name or "@" in name:
        return True
    registry, _, last = name.rstrip("/").rpartition("/")
    return bool(registry and last) and has_names(registry) and last in open_store(registry).names()


def check_not_building(root: Path) -> None:
    """Reject an artifact that a build is replacing: it has no results of gates yet.

    Raises:
        InputError: a build of it is running.

    """
    if is_building(default_root(), root):
        raise InputError("a build of it is running", where=str(root), fix="wait until the build ends")


def complete_recipe(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the names of recipes, and files, for shell completion."""
    return _completed([path.stem for path in RECIPES.glob("*.yaml")], incomplete)


def complete_artifact(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the names of artifacts, and files, for shell completion."""
    return _completed(_named(), incomplete)


def _completed(names: Sequence[str], incomplete: str) -> list[CompletionItem]:
    found = [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]
    return [*found, CompletionItem(incomplete, type="file")]


def _known() -> str:
    """Return the artifacts in the folder of artifacts, for a fix."""
    return f"in {ARTIFACTS}/: {', '.join(_named()) or 'none'}"


def _named() -> list[str]:
    """Return the names of the built artifacts, then of the pulled ones: `pulled/NAME`."""
    found = (sorted(ARTIFACTS.glob(pattern)) for pattern in ("*/manifest.json", "*/*/manifest.json"))
    return [path.parent.relative_to(ARTIFACTS).as_posix() for paths in found for path in paths]


def recipe_path(name: str) -> Path:
    """Return a recipe's file, by path or by its name.

    Raises:
        InputError: no such recipe.

    """
    return find(name, RECIPES)


def file_patterns(parts: Sequence[str]) -> list[str] | None:
    """Return patterns of paths for parts like `weights`; None for the whole artifact."""
    no_string(parts, "parts", "parts")
    return [part if any(c in part for c in "*?[/.") else f"{part}/*" for part in parts] or None
