"""What the command line shows: lines and bars on stderr, results on stdout. Used by `cli.py` alone; decides nothing.

On a terminal, work under way is a live bar; elsewhere it is a plain line now and then.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import TandemError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_EVERY_S = 10.0
MIB = 1 << 20


@dataclass
class Console:
    """Output of one command. Quiet shows results and errors alone."""

    quiet: bool = False
    verbose: bool = False
    _bars: Progress | None = None
    _tasks: dict[str, TaskID] = field(default_factory=dict)
    _told: dict[str, float] = field(default_factory=dict)

    def log(self, line: str) -> None:
        """One line of what is going on."""
        if self.quiet:
            return
        if self._bars is not None:
            self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(line, err=True)

    def progress(self, what: str, done: float, total: float, detail: str = "") -> None:
        """How far one piece of work has come; complete at `done` = `total`. `detail` says it in other words."""
        if self.quiet:
            return
        if sys.stderr.isatty():
            self._draw(what, done, total, detail)
        elif time.monotonic() - self._told.setdefault(what, time.monotonic()) >= LINE_EVERY_S and done < total:
            self._told[what] = time.monotonic()
            click.echo(f"  {what}: {detail or f'{100 * done / total:.0f}%'}", err=True)

    def transfer(self, what: str) -> Callable[[int, int], None]:
        """How far bytes have come, told with what is left of the time, as far as the rate until now tells."""
        started = time.monotonic()

        def moved(done: int, total: int) -> None:
            took = time.monotonic() - started
            left = f", {took * (total - done) / done:.0f} s left" if 0 < done < total else ""
            self.progress(what, done, total, f"{done / MIB:,.1f} of {total / MIB:,.1f} MiB{left}")

        return moved

    def _draw(self, what: str, done: float, total: float, detail: str) -> None:
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        shown = f"{what}: {detail}" if detail else what
        self._bars.update(self._tasks[what], completed=done, total=total, visible=done < total, description=shown)

    def close(self) -> None:
        """End the bars, if there are any."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks.clear()


class Stream:
    """The text of tokens as they come; what may be a part of a character waits for the rest of it."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._shown = ""

    def push(self, tokens: list[int]) -> str:
        """What can be shown now."""
        self._tokens.extend(tokens)
        text = self._decode(self._tokens).rstrip("\ufffd")
        new = text[len(self._shown) :]
        self._shown += new
        return new

    def rest(self) -> str:
        """What is left at the end."""
        return self._decode(self._tokens)[len(self._shown) :]


def _bars() -> Progress:
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    return Progress(*columns, TimeElapsedColumn(), console=Terminal(stderr=True), transient=True)


def print_json(data: Any) -> None:
    """A result for machines."""
    click.echo(json.dumps(data, indent=1, default=str))


def print_error(error: TandemError, *, with_traceback: bool) -> None:
    """An error on stderr: where, what, fix; all problems of a recipe."""
    if with_traceback:
        traceback.print_exception(error)
    for problem in error.problems:
        click.secho(f"{error.title}: ", fg="red", err=True, nl=False)
        click.echo(f"{problem.where}: {problem.what}" if problem.where else problem.what, err=True)
        if problem.fix:
            click.echo(f"  fix: {problem.fix}", err=True)
