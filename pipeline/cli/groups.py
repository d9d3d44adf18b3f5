"""The classes of commands: -v and -q on every command, and a group that imports a command when it is called."""

from __future__ import annotations

from importlib import import_module

import click
from click.shell_completion import CompletionItem

from pipeline.cli.console import Console


def _set_output(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Store -v or -q in the console, whether it is given before or behind the command's name."""
    console = ctx.ensure_object(Console)
    if value and param.name == "verbose":
        console.verbose = True
    elif value:
        console.quiet = True


VERBOSE = click.Option(
    ["-v", "--verbose"], is_flag=True, help="Show tracebacks.", expose_value=False, callback=_set_output
)
QUIET = click.Option(
    ["-q", "--quiet"], is_flag=True, help="Show results and errors only.", expose_value=False, callback=_set_output
)


class Command(click.Command):
    """A command with -v and -q, like its group."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's own parameters, then those that every command has."""
        return [*super().get_params(ctx), VERBOSE, QUIET]


class Group(click.Group):
    """A group of such commands, which lists the whole first sentence of each."""

    command_class = Command
    group_class = type

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the names and summaries of the commands; click cuts them at the width of the terminal."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary(self.commands[name])) for name in self.list_commands(ctx)])


class Lazy(click.Command):
    """A command that is not imported yet: `module:attribute`, and its summary in the list of commands."""

    def __init__(self, name: str, place: str, summary: str) -> None:
        super().__init__(name, short_help=summary)
        self.place = place

    def load(self) -> click.Command:
        """Import the command."""
        module, _, attribute = self.place.partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command), self.place
        return command


def _summary(command: click.Command) -> str:
    """Return the short help of a command, or the first sentence of its help."""
    text = " ".join((command.help or "").split())
    return command.short_help or f"{text.partition('. ')[0].rstrip('.')}."


class LazyGroup(Group):
    """A group of `Lazy` commands: `--help` and completion list them without importing any (click's LazyGroup)."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command, imported."""
        command = super().get_command(ctx, cmd_name)
        return command.load() if isinstance(command, Lazy) else command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the commands that start with `incomplete`, and options."""
        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        commands = [CompletionItem(name, help=self.commands[name].short_help) for name in names]
        return [*commands, *click.Command.shell_complete(self, ctx, incomplete)]
