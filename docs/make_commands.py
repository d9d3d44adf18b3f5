"""The page of the commands, from click: commands.md."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator

import click

from pipeline.cli.groups import QUIET, VERBOSE
from pipeline.cli.main import main

INTRO = """\
# Commands

<!-- Written by docs/make_reference.py from the help texts in pipeline/cli/: change them there. -->

Results go to stdout; log lines, progress and errors go to stderr. Exit codes: [errors](errors.md). An option with an
environment variable takes its value from the variable when the option is absent; all variables:
[environment](environment.md).

Every command takes these options:

| option | meaning |
|---|---|"""
AS_JSON = "Print JSON."
"""Help of the option that all commands have."""
WORDS = """RECIPE is the name of a recipe in `recipes/`, or a YAML file.
ARTIFACT is a folder, or a name under `artifacts/`.
REFERENCE names a release: `REGISTRY/NAME@VERSION` or `REGISTRY/NAME@ALIAS`, where REGISTRY is a folder,
`s3://bucket/prefix`, `hf://org` or `oci://host/path`."""


def commands_page() -> str:
    """Return commands.md: options of every command, an index, and a section for each command."""
    commands = list(_commands(main, click.Context(main, info_name="tandem")))
    lines = [INTRO, "| `--json` | Print JSON. |", *(_common(option) for option in (QUIET, VERBOSE))]
    lines.append("| `-h`, `--help` | Show the help and exit. |")
    lines += ["", WORDS, "", "| command | purpose |", "|---|---|"]
    lines += [f"| [`{path}`](#{path.replace(' ', '-')}) | {_summary(command)} |" for path, command, _ in commands]
    for path, command, context in commands:
        lines += ["", *_section(path, command, context)]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _commands(group: click.Group, context: click.Context) -> Iterator[tuple[str, click.Command, click.Context]]:
    """Yield every command that runs, groups by their commands, in alphabetical order."""
    for name in sorted(group.list_commands(context)):
        command = group.get_command(context, name)
        assert command is not None, name
        inner = click.Context(command, parent=context, info_name=name)
        if isinstance(command, click.Group):
            yield from _commands(command, inner)
        else:
            yield inner.command_path, command, inner


def _section(path: str, command: click.Command, context: click.Context) -> Iterator[str]:
    # -v and -q belong to all commands: they are added when click asks for the parameters, and are not in `params`.
    arguments = [param for param in command.params if isinstance(param, click.Argument)]
    options = [param for param in command.params if isinstance(param, click.Option) and param.help != AS_JSON]
    words = ["[OPTIONS]", *(argument.make_metavar(context) for argument in arguments)]
    yield f"## {path}\n\n{_help(command)}\n\n```console\n$ {path} {' '.join(words)}\n```\n"
    for argument in arguments:
        if argument.envvar:
            name = f"`{(argument.name or '').upper()}`"
            yield f"{name} is optional when the environment variable `{argument.envvar}` is set.\n"
    if options:
        yield from _options(options, context)


def _common(option: click.Option) -> str:
    return f"| {', '.join(f'`{name}`' for name in option.opts)} | {option.help} |"


def _options(options: Iterable[click.Option], context: click.Context) -> Iterator[str]:
    yield "| option | meaning | default | environment variable |\n|---|---|---|---|"
    for option in options:
        variable = f"`{option.envvar}`" if option.envvar else ""
        meaning, _, default = (option.help or "").replace("|", "\\|").partition(" (default: ")
        default = default.removesuffix(".").removesuffix(")") or _default(option)
        meaning = meaning.removesuffix(".") + "."
        yield f"| {_names(option, context)} | {meaning} | {default} | {variable} |"


def _names(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    return names if option.is_flag else f"{names} {_value(option, context)}"


def _value(option: click.Option, context: click.Context) -> str:
    if isinstance(option.type, click.Choice):
        return " or ".join(f"`{choice}`" for choice in option.type.choices)
    if isinstance(option.type, click.IntRange | click.FloatRange):
        kind, low, high = option.type.name.split()[0].upper(), option.type.min, option.type.max
        return f"`{kind}` from {low}" if high is None else f"`{kind}`, {low:g} to {high:g}"
    return f"`{option.make_metavar(context)}`"


def _default(option: click.Option) -> str:
    if option.required:
        return "**required**"
    if option.secondary_opts:
        return f"`{option.opts[0] if option.default else option.secondary_opts[0]}`"
    return f"`{option.default}`" if option.show_default else ""


def _help(command: click.Command) -> str:
    return inspect.cleandoc(command.help or "")


def _summary(command: click.Command) -> str:
    """Return the first sentence of the help, as `tandem --help` shows it for the commands at the top."""
    paragraph = " ".join(_help(command).split("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".") + "."
