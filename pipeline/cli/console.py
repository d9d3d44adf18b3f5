"""What the command line shows: log lines, progress and errors on stderr, results on stdout. Decides nothing.

On a terminal, progress is a live bar; elsewhere it is a plain line every few seconds.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import TandemError
from pipeline.progress import ByteProgress

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_EVERY_S = 10.0
MIB = 1 << 20


@dataclass
class Console:
    """The output of one command. `log` is a `Log`, `progress` a `Progress`; with `quiet`, both are no-ops."""

    quiet: bool = False
    verbose: bool = False
    _bars: Progress | None = None
    _tasks: dict[str, TaskID] = field(default_factory=dict)
    _shown_at: dict[str, float] = field(default_factory=dict)

    def log(self, line: str) -> None:
        """Show one line."""
        if self.quiet:
            return
        if self._bars is not None:
            self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(line, err=True)

    def progress(self, what: str, done: float, total: float, detail: str = "") -> None:
        """Show how much of a piece of work is done; `detail` replaces the percentage."""
        if self.quiet:
            return
        if sys.stderr.isatty():
            self._draw(what, done, total, detail)
        elif time.monotonic() - self._shown_at.setdefault(what, time.monotonic()) >= LINE_EVERY_S and done < total:
            self._shown_at[what] = time.monotonic()
            click.echo(f"  {what}: {detail or f'{100 * done / total:.0f}%'}", err=True)

    def transfer(self, what: str) -> ByteProgress:
        """Return a callback that shows bytes and, from the average rate, the time left."""
        started = time.monotonic()

        def show(done: int, total: int) -> None:
            elapsed_s = time.monotonic() - started
            left = f", {elapsed_s * (total - done) / done:.0f} s left" if 0 < done < total else ""
            self.progress(what, done, total, f"{done / MIB:,.1f} of {total / MIB:,.1f} MiB{left}")

        return show

    def _draw(self, what: str, done: float, total: float, detail: str) -> None:
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        description = f"{what}: {detail}" if detail else what
        self._bars.update(self._tasks[what], completed=done, total=total, visible=done < total, description=description)

    def close(self) -> None:
        """Remove the bars, if there are any."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks.clear()


def _bars() -> Progress:
    # rich takes a third of the time of `tandem --help` to import
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    return Progress(*columns, TimeElapsedColumn(), console=Terminal(stderr=True), transient=True)


def print_json(data: Any) -> None:
    """Print a result as JSON."""
    click.echo(json.dumps(data, indent=1, default=str))


def print_result(data: Any, text: str, *, as_json: bool) -> None:
    """Print a result as JSON or as text."""
    if as_json:
        print_json(data)
    else:
        click.echo(text)


def print_fields(fields: Mapping[str, Any], width: int) -> None:
    """Print one field per line, values in a column."""
    for name, value in fields.items():
        click.echo(f"{name:<{width}}{value}")


def print_error(error: TandemError, *, with_traceback: bool) -> None:
    """Print every problem of an error on stderr: where, what, fix."""
    if with_traceback:
        traceback.print_exception(error)
    for problem in error.problems:
        click.secho(f"{error.title}: ", fg="red", err=True, nl=False)
        click.echo(f"{problem.where}: {problem.what}" if problem.where else problem.what, err=True)
        if problem.fix:
            click.echo(f"  fix: {problem.fix}", err=True)
