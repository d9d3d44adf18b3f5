"""Options that several commands share, and `collected`, which hands a command its options as one object."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from pipeline.cli.console import Console

Options = TypeVar("Options")

as_json = click.option("--json", "json_", is_flag=True, help="Print JSON.")
always_json = click.option(
    "--json", is_flag=True, expose_value=False, help="Print JSON, the only format of this command."
)
recipe_option = click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Recipe of the artifact; its folder is the base of relative sources and prompts (default: recipes/).",
)


def collected(kind: Callable[..., Options]) -> Callable[[Callable[[Console, Options], None]], Callable[..., None]]:
    """Decorate a command that takes its options as one `kind`: a frozen dataclass with a field for each parameter."""

    def decorate(command: Callable[[Console, Options], None]) -> Callable[..., None]:
        @wraps(command)
        @click.pass_obj
        def collect(console: Console, /, **values: Any) -> None:  # click passes every parameter by name
            command(console, kind(**values))

        return collect

    return decorate
