"""Commands on recipe files: recipe schema, check, changed, lock."""

from __future__ import annotations

import json
import sys

import click

from pipeline.backends.base import make_backend
from pipeline.cache.local import default_root
from pipeline.cli.groups import Group
from pipeline.cli.options import always_json, as_json
from pipeline.cli.paths import RECIPES, recipe_path
from pipeline.cli.results import print_json, print_result
from pipeline.plan.lock import lock_path, make_lock, pair_configs, read, write
from pipeline.plan.plan import make_plan
from pipeline.recipe import load
from pipeline.recipe.changed import changed_recipes
from pipeline.recipe.read import schema as recipe_schema
from pipeline.stores.base import scheme_of
from pipeline.validate.prompts import load_prompts, prompts_path


@click.group(cls=Group)
def recipe() -> None:
    """Check and lock recipes."""


@recipe.command()
@always_json
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    print_json(recipe_schema())


@recipe.command()
@click.argument("names", nargs=-1, required=True)
@as_json
def check(names: tuple[str, ...], json_: bool) -> None:
    """Check recipes with their prompts and registries, and plan those that have a lock.

    Sources are not read: a build checks them.
    """
    for name in names:
        path = recipe_path(name)
        parsed = load(path)
        load_prompts(prompts_path(parsed.validate_.prompts, path.parent))
        for target in parsed.publish:
            scheme_of(target.to)
        if lock_path(path).is_file():
            make_plan(parsed, *pair_configs(parsed, read(lock_path(path)), str(lock_path(path))))
        if not json_:
            click.echo(f"{path}: ok")
    if json_:
        print_json({"checked": list(names)})


@recipe.command()
@click.argument("paths", nargs=-1, required=True)
@always_json
def changed(paths: tuple[str, ...]) -> None:
    """Print a JSON list of the recipes that changes to the files PATHS affect. With -, PATHS are read from stdin."""
    files = sys.stdin.read().splitlines() if paths == ("-",) else list(paths)
    click.echo(json.dumps(changed_recipes(files, RECIPES)))


@recipe.command()
@click.argument("name")
@as_json
def lock(name: str, json_: bool) -> None:
    """Pin the sources and the toolchain of recipe NAME in a lock file beside it."""
    from pipeline.sources.pair import resolve_pair  # keeps torch out of the other commands

    path = recipe_path(name)
    parsed = load(path)
    pair = resolve_pair(parsed, base=path.parent, cache=default_root() / "sources")
    toolchain = make_backend(parsed.backend).toolchain().as_dict()
    write(lock_path(path), make_lock(parsed, *pair, toolchain))
    print_result({"lock": lock_path(path)}, f"wrote {lock_path(path)}", as_json=json_)
