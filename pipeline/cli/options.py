"""What the commands share: -v, -q, --json, how artifacts are named, and who must have signed them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.console import Console
from pipeline.errors import InputError

if TYPE_CHECKING:
    from pipeline.artifact.signing import Policy

RECIPES = Path("recipes")
VERBOSE = "Show tracebacks."
QUIET = "Show results and errors only."

as_json = click.option("--json", "json_", is_flag=True, help="Print JSON for machines.")
identity_option = click.option(
    "--require-signature", "identity", help="Refuse what this public key's file, or identity, did not sign."
)
issuer_option = click.option("--issuer", help="Issuer of that identity (default: GitHub Actions).")
policy_option = click.option(
    "--policy", "policy_file", type=click.Path(path_type=Path), envvar="TANDEM_POLICY",
    help="File that says who must have signed.",
)  # fmt: skip


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


class ChipType(click.ParamType):
    """A chip that recipes can name."""

    name = "chip"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the chip's name."""
        from pipeline.recipe.chips import CHIPS  # keeps pydantic, which the room imports, out of `tandem --help`

        return click.Choice(list(CHIPS)).convert(value, param, ctx)


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


def policy_of(path: Path | None, identity: str | None = None, issuer: str | None = None) -> Policy | None:
    """Who must have signed, as the options say.

    Raises:
        InputError: a policy and an identity, of which one would be left out.

    """
    from pipeline.artifact import signing

    if path is None:
        return None if identity is None else signing.require(identity, issuer or signing.GITHUB)
    if identity is not None:
        fix = "leave one out (a policy may come from TANDEM_POLICY)"
        raise InputError("there is a policy, too", where="--require-signature", fix=fix)
    return signing.read_policy(path)
