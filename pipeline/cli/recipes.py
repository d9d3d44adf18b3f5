"""Commands about recipes as files: their schema, checks, what a change concerns, locks. Imports no torch itself."""

from __future__ import annotations

import json
import sys

import click

from pipeline.cli.console import print_json
from pipeline.cli.options import RECIPES, Group, as_json, recipe_path


@click.group(cls=Group)
def recipe() -> None:
    """Check and lock recipes."""


@recipe.command()
@as_json
def schema(json_: bool) -> None:  # noqa: ARG001 - it is JSON either way
    """Print the JSON Schema of a recipe, for editors."""
    from pipeline.recipe.read import schema as make

    print_json(make())


@recipe.command()
@click.argument("names", nargs=-1, required=True)
@as_json
def check(names: tuple[str, ...], json_: bool) -> None:
    """Check recipes, their prompts and registries, and plan those that have a lock."""
    from pipeline.plan.lock import lock_path, pair_configs, read
    from pipeline.plan.plan import make_plan
    from pipeline.recipe import load
    from pipeline.stores.base import scheme_of
    from pipeline.validate.prompts import load_prompts, prompts_path

    for name in names:
        path = recipe_path(name)
        parsed = load(path)
        load_prompts(prompts_path(parsed.validate_.prompts, path.parent))
        for one in parsed.publish:
            scheme_of(one.to)
        if lock_path(path).is_file():
            make_plan(parsed, *pair_configs(parsed, read(lock_path(path)), str(lock_path(path))))
        if not json_:
            click.echo(f"{path}: ok")
    if json_:
        print_json({"checked": list(names)})


@recipe.command()
@click.argument("paths", nargs=-1, required=True)
@as_json
def changed(paths: tuple[str, ...], json_: bool) -> None:  # noqa: ARG001 - it is JSON either way
    """Print the names of the recipes that changed PATHS concern, as a JSON list; - reads paths from stdin."""
    from pipeline.recipe.changed import changed_recipes

    given = sys.stdin.read().splitlines() if paths == ("-",) else list(paths)
    click.echo(json.dumps(changed_recipes(given, RECIPES)))


@recipe.command()
@click.argument("name")
@as_json
def lock(name: str, json_: bool) -> None:
    """Pin what RECIPE's sources and toolchain are now, beside it."""
    from pipeline.backends.base import make_backend
    from pipeline.cache.local import default_root
    from pipeline.plan.lock import lock_path, make_lock, write
    from pipeline.recipe import load
    from pipeline.sources.pair import resolve_pair

    path = recipe_path(name)
    parsed = load(path)
    pair = resolve_pair(parsed, base=path.parent, cache=default_root() / "sources")
    toolchain = make_backend(parsed.backend).toolchain().as_dict()
    write(lock_path(path), make_lock(parsed, *pair, toolchain))
    if json_:
        print_json({"lock": lock_path(path)})
        return
    click.echo(f"wrote {lock_path(path)}")


def add_to(main: click.Group) -> None:
    """Add the group to the command line."""
    main.add_command(recipe)
