"""UTF-8 whatever the locale: Python's UTF-8 mode for the command line, and the encoding of its output."""

from __future__ import annotations

import io
import os
import sys

import click


def use_utf8_mode() -> None:
    """Start this process again in Python's UTF-8 mode (PEP 540) if the locale has another encoding.

    The encoding of file names, arguments and of files that other packages read is set when Python starts.
    """
    asked = "utf8" in sys._xoptions  # noqa: SLF001 - where Python documents them
    if sys.flags.utf8_mode or asked or sys.getfilesystemencoding() == "utf-8" or not sys.executable:
        return
    command = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
    os.execve(sys.executable, command, os.environ | {"PYTHONUTF8": "1"})  # noqa: S606 - becomes the same command


def utf8_output() -> None:
    """Make stdout and stderr UTF-8; names of files that are not UTF-8 go to stdout as they are."""
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


class Utf8Text(click.ParamType):
    """Text on the command line, which is UTF-8 whatever the locale."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the argument's bytes as UTF-8 text; Python has decoded them with the encoding of the locale."""
        try:
            return os.fsencode(value).decode()
        except UnicodeEncodeError:  # a caller in Python, whose text has no bytes in this locale
            return value
        except UnicodeDecodeError as error:
            self.fail(f"not UTF-8: byte 0x{error.object[error.start]:02x} at index {error.start}", param, ctx)
