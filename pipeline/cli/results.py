"""Results of a command on stdout, as text, tables or JSON. `console.py` prints logs and errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import click

from pipeline.cli.console import colours_allowed, end_bars, is_terminal
from pipeline.cli.tables import COLOURS, Cell, Table, Verdict, of_fields, plain, wrapped


def print_json(data: Any, *, one_line: bool = False) -> None:
    """Print a result as JSON; on one line if it is mostly a long list."""
    print_line(json.dumps(data, indent=None if one_line else 1, default=str))


def print_line(text: str | Verdict) -> None:
    """Print a line; a verdict in its colour."""
    end_bars()
    if isinstance(text, Verdict):
        text = click.style(text.text, fg=COLOURS[text.good])
    click.echo(text)


def print_result(data: Any, text: str, *, as_json: bool) -> None:
    """Print a result as JSON or as text."""
    if as_json:
        print_json(data)
    else:
        print_line(text)


def print_table(table: Table) -> None:
    """Print a table: wrapped to the width of a terminal, elsewhere as plain lines that are never cut."""
    end_bars()
    if is_terminal(sys.stdout):
        from rich.console import Console as Terminal  # rich takes a third of the time of `tandem --help` to import

        terminal = Terminal(file=sys.stdout, highlight=False, color_system="auto" if colours_allowed() else None)
        terminal.print(wrapped(table, terminal.width))
        return
    for line in plain(table):
        click.echo(line)


def print_fields(fields: Mapping[str, Cell]) -> None:
    """Print a field per line, with the values in a column."""
    print_table(of_fields(fields))
