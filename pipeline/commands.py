"""What every command of the command line shares: -v, -q, --json. Used by `cli.py` and `cli_registry.py`."""

from __future__ import annotations

from typing import Any

import click

from pipeline.console import Console

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
