"""Errors of click about a command line, as errors with where, what and fix. Prints nothing."""

from __future__ import annotations

import click

from pipeline.errors import InputError

BEHIND = ("--json",)
"""Options that belong behind the name of a command."""


def usage_error(error: click.UsageError) -> InputError:
    """Return a wrong option, argument or command as an input error; the fix names the help or the right spelling."""
    path = " ".join(["tandem", *(error.ctx.command_path.split()[1:] if error.ctx else ())])
    fix = f"see: {path} --help"
    if isinstance(error, click.NoSuchOption):
        near = f"did you mean {error.possibilities[0]}? " if error.possibilities else ""
        if error.option_name in BEHIND and path == "tandem":
            return InputError("not an option of `tandem`", where=error.option_name, fix=f"tandem COMMAND {BEHIND[0]}")
        return InputError("no such option", where=error.option_name, fix=f"{near}{fix}")
    if isinstance(error, click.MissingParameter):
        return InputError("missing", where=_name(error, path), fix=f"add it; {fix}")
    if isinstance(error, click.BadParameter):
        return InputError(_plain(error.message), where=_name(error, path), fix=fix)
    return InputError(_plain(error.format_message()), where=path, fix=fix)


def _plain(message: str) -> str:
    """Return a sentence of click as the text behind a colon."""
    return message[:1].lower() + message[1:].rstrip(".")


def _name(error: click.BadParameter, path: str) -> str:
    """Return the option or argument of an error, as it is written on the command line."""
    if error.param is None:
        return error.param_hint if isinstance(error.param_hint, str) else path
    return error.param.opts[0] if isinstance(error.param, click.Option) else error.param.make_metavar(_context(error))


def _context(error: click.BadParameter) -> click.Context:
    return error.ctx or click.Context(click.Command("tandem"))
