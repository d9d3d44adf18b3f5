"""Messages of a command on stderr: stages, progress and errors. `results.py` prints results on stdout.

Progress is a live bar on a terminal, which vanishes when the work ends; without a terminal there is none.
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
import traceback
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import click

from pipeline.errors import TandemError
from pipeline.progress import ByteProgress, RateProgress, duration

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

MIB = 1 << 20
LINE_S = 60.0
"""Seconds between lines of progress where no bar is shown."""
STARTS = {"warning:": "yellow"}
ENDS = {"passed": "green", "FAILED": "red"}
"""Words that a line may start or end with, and their colours."""


@dataclass
class Console:
    """The messages of one command. `log` is a `Log`, `progress` a `Progress`; with `quiet`, both are no-ops.

    `json`: the command prints JSON on stdout, its error too.
    """

    quiet: bool = False
    verbose: bool = False
    json: bool = False
    _bars: Progress | None = None
    _tasks: dict[str, TaskID] = field(default_factory=dict)

    def log(self, line: str) -> None:
        """Show one line above the bars."""
        if self.quiet:
            return
        if self._bars is not None:
            from rich.text import Text  # loaded already, for the bars

            self._bars.console.print(Text.from_ansi(coloured(line)), soft_wrap=True)
        else:
            click.echo(stamped(coloured(line)), err=True)

    def progress(self, what: str, done: float, total: float, detail: str = "") -> None:
        """Show the progress of a task; `detail` replaces the percentage."""
        if self.quiet or not is_terminal(sys.stderr):
            return
        if done < total:
            self._draw(what, done, total, detail)
        elif what in self._tasks:
            self._erase(what)

    def transfer(self, what: str) -> ByteProgress:
        """Return a callback that shows bytes and, from the average rate, the time left."""
        started = time.monotonic()

        def show(done: int, total: int) -> None:
            elapsed_s = time.monotonic() - started
            left = f", {elapsed_s * (total - done) / done:.0f} s left" if 0 < done < total else ""
            self.progress(what, done, total, f"{done / MIB:,.1f} of {total / MIB:,.1f} MiB{left}")

        return show

    def rate(self, what: str, unit: str) -> RateProgress:
        """Return a callback that shows a count, its rate and the time left; without a terminal, a line each minute."""
        logged = time.monotonic()

        def show(done: int, total: int, per_s: float) -> None:
            nonlocal logged
            left = f", {per_s:,.0f} per second, about {duration((total - done) / per_s)} left" if per_s > 0 else ""
            words = f"{done:,} of {total:,} {unit}{left}"
            self.progress(what, done, total, words)
            if left and done < total and not is_terminal(sys.stderr) and (now := time.monotonic()) - logged >= LINE_S:
                self.log(f"{what}: {words}")
                logged = now

        return show

    def _draw(self, what: str, done: float, total: float, detail: str) -> None:
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=None, share="")
        share = detail or (f"{100 * done / total:.0f}%" if done else "")
        self._bars.update(self._tasks[what], completed=done, total=total if done else None, share=share)

    def _erase(self, what: str) -> None:
        assert self._bars is not None
        self._bars.remove_task(self._tasks.pop(what))
        if not self._tasks:
            self.close()

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

    terminal = Terminal(stderr=True, color_system="auto" if colours_allowed() else None)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[share]}"))
    return Progress(*columns, TimeElapsedColumn(), console=terminal, transient=True)


def colours_allowed() -> bool:
    """Return whether output may have colours and bold text: NO_COLOR is absent or empty, and TERM is not dumb."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def is_terminal(stream: IO[str]) -> bool:
    """Return whether a stream is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def stamped(line: str) -> str:
    """Return a line of a log with its time (UTC); unchanged on a terminal, or with TANDEM_TIMESTAMPS=0."""
    if is_terminal(sys.stderr) or os.environ.get("TANDEM_TIMESTAMPS") == "0":
        return line
    return f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}"


def end_bars() -> None:
    """Remove the bars of the running command before other text is written."""
    context = click.get_current_context(silent=True)
    console = context.find_object(Console) if context else None
    if console is not None:
        console.close()


def coloured(line: str) -> str:
    """Return a line with the word in colour that it starts or ends with, if that is `warning:` or a verdict."""
    first, last = line.partition(" ")[0], line.rpartition(" ")[2]
    if first in STARTS:
        return click.style(first, fg=STARTS[first]) + line.removeprefix(first)
    if last in ENDS:
        return line.removesuffix(last) + click.style(last, fg=ENDS[last])
    return line


def _wrapped(text: str) -> str:
    """Return text for stderr, on a terminal broken between words instead of inside them."""
    if not is_terminal(sys.stderr):
        return text
    try:
        width = os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        return text
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": "    "}
    lines = text.splitlines()
    return "\n".join(textwrap.fill(line, width, **options) if len(line) > width > 0 else line for line in lines)


def print_error(error: TandemError, *, with_traceback: bool) -> None:
    """Print every problem of an error on stderr: where, what, fix."""
    end_bars()
    if with_traceback:
        traceback.print_exception(error)
    for problem in error.problems:
        what = f"{problem.where}: {problem.what}" if problem.where else problem.what
        whole = _wrapped(f"{error.title}: {what}")
        shown = click.style(f"{error.title}:", fg="red") + whole.removeprefix(f"{error.title}:")
        click.echo(stamped(shown), err=True)
        if problem.fix:  # not wrapped: a command that is copied stays one line
            click.echo(f"  fix: {problem.fix}", err=True)
