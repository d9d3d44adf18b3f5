"""Tables as lines: aligned plain text, or, on a terminal of a given width, wrapped and in colour. Prints nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table as RichTable

GAP = 2
LEAST_WRAPPED = 10
"""Minimum width of a column with wrapped cells, in characters, before other columns are wrapped as well."""

COLOURS = {True: "green", False: "red", None: "yellow"}


@dataclass(frozen=True)
class Verdict:
    """A word that is coloured on a terminal: good, bad, or (None) undecided. The text has the same meaning."""

    text: str
    good: bool | None

    def __str__(self) -> str:
        return self.text


Cell = str | Verdict


@dataclass(frozen=True)
class Table:
    """Rows of cells below headings. Columns in `right` hold numbers; those in `whole` are not wrapped on a terminal."""

    headings: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    right: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    show_headings: bool = True


def of_fields(fields: Mapping[str, Cell]) -> Table:
    """Return a table of names and values."""
    return Table(("", " "), list(fields.items()), show_headings=False)


def plain(table: Table) -> Iterator[str]:
    """Yield the lines of a table for a pipe or a file: aligned, never cut, without control codes."""
    rows = [[str(cell).replace("\n", " ") for cell in row] for row in table.rows]
    if table.show_headings:
        rows = [list(table.headings), *rows]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(len(table.headings))]
    right = [heading in table.right for heading in table.headings]
    for row in rows:
        cells = zip(row, widths, right, strict=True)
        yield (
            (" " * GAP)
            .join(cell.rjust(width) if to_right else cell.ljust(width) for cell, width, to_right in cells)
            .rstrip()
        )


def wrapped(table: Table, width: int) -> RichTable:
    """Return a table for rich, which wraps the cells to the width of the terminal."""
    from rich.table import Table as RichTable  # rich takes a third of the time of `tandem --help` to import
    from rich.text import Text

    made = RichTable(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
    made.show_header, made.header_style = table.show_headings, "bold"
    for heading, least in zip(table.headings, _least_widths(table, width), strict=True):
        justify: Literal["left", "right"] = "right" if heading in table.right else "left"
        made.add_column(Text(heading), justify=justify, overflow="fold", min_width=least)
    for row in table.rows:
        styles = [COLOURS[cell.good] if isinstance(cell, Verdict) else "" for cell in row]
        made.add_row(*(Text(str(cell), style) for cell, style in zip(row, styles, strict=True)))
    return made


def _least_widths(table: Table, width: int) -> list[int | None]:
    """Return the widths that keep cells on one line; none on a narrow terminal, where rich would cut other cells."""
    widest = [max((len(str(row[column])) for row in table.rows), default=0) for column in range(len(table.headings))]
    keep = [heading in (*table.whole, *table.right) for heading in table.headings]
    least = [size if kept else min(size, LEAST_WRAPPED) for size, kept in zip(widest, keep, strict=True)]
    fits = sum(least) + GAP * len(least) <= width
    return [size if kept and fits else None for size, kept in zip(least, keep, strict=True)]
