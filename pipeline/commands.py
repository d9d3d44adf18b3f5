"""What the commands in `cli.py` and `cli_registry.py` share: -v, -q, --json, and how artifacts are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.console import Console
from pipeline.errors import InputError

RECIPES = Path("recipes")
VERBOSE = "Show tracebacks."
QUIET = "Show results and errors only."

as_json = click.option("--json", "json_", is_flag=True, help="Print JSON for machines.")


class Command(click.Command):
    """A command that takes -v and -q, as the group before it does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for letter, name, text in (("-v", "verbose", VERBOSE), ("-q", "quiet", QUIET)):
            self.params.append(
                click.Option([letter, f"--{name}"], is_flag=True, help=text, expose_value=False, callback=note)
            )


class Group(click.Group):
    """A group of such commands."""

    command_class = Command
    group_class = type


def note(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Remember -v or -q, wherever it was given."""
    if value and param.name:
        setattr(ctx.ensure_object(Console), param.name, True)


def artifact_dir(name: str) -> Path:
    """An artifact by path, or by the name of its recipe under `artifacts/`."""
    for path in (Path(name), Path("artifacts") / name):
        if (path / "manifest.json").is_file():
            return path
    built = sorted(path.parent.name for path in Path("artifacts").glob("*/manifest.json"))
    here = f"artifacts here: {', '.join(built) or 'none'}"
    fix = f"make build RECIPE={name}" if (RECIPES / f"{name}.yaml").is_file() else f"name an artifact's folder; {here}"
    raise InputError(f"no artifact {name!r}", where="artifacts", fix=fix)


def recipe_path(name: str) -> Path:
    """A recipe's file, by its name in `recipes/` or by path."""
    from pipeline.recipe import find

    return find(name, RECIPES)
