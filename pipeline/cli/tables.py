"""Tables as lines: aligned plain text, or, on a terminal of a given width, wrapped and in colour. Prints nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table as RichTable

GAP = 2
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
    return of_fields_in_rows(list(fields.items()))


def of_fields_in_rows(rows: Sequence[tuple[Cell, Cell]]) -> Table:
    """Return a table of names and values, of which names may repeat."""
    return Table(("", " "), rows, show_headings=False)


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
    """Return a table for rich, which wraps cells between words; where words do not fit, each row is a block of lines.

    A name that is cut, or folded inside, can look like another name.
    """
    from rich.table import Table as RichTable  # rich takes a third of the time of `tandem --help` to import
    from rich.text import Text

    widths = _widths(table, width)
    if widths is None and table.show_headings:
        return wrapped(_blocks(table), width)
    made = RichTable(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
    made.show_header, made.header_style = table.show_headings, "bold"
    for heading, fixed in zip_longest(table.headings, widths or ()):
        justify: Literal["left", "right"] = "right" if heading in table.right else "left"
        made.add_column(Text(heading), justify=justify, overflow="fold", width=fixed)
    for row in table.rows:
        styles = [COLOURS[cell.good] if isinstance(cell, Verdict) else "" for cell in row]
        made.add_row(*(Text(str(cell), style) for cell, style in zip(row, styles, strict=True)))
    return made


def _blocks(table: Table) -> Table:
    """Return a table of two columns: for each row its headings and values, with an empty line between rows."""
    rows: list[tuple[Cell, Cell]] = []
    for number, row in enumerate(table.rows):
        rows += [("", "")] if number else []
        rows += [(heading, cell) for heading, cell in zip(table.headings, row, strict=True) if str(cell)]
    return of_fields_in_rows(rows)


def _widths(table: Table, width: int) -> list[int] | None:
    """Return widths of columns that fit a terminal without breaking words; None if there are none.

    Columns whose cells may wrap give up their room first, the widest of them first.
    """
    rows = [*([table.headings] if table.show_headings else []), *table.rows]
    columns = [[str(row[column]) for row in rows] for column in range(len(table.headings))]
    widths = [max(map(len, cells), default=0) for cells in columns]
    least = [max((len(word) for cell in cells for word in cell.split()), default=0) for cells in columns]
    excess = sum(widths) + GAP * (len(widths) - 1) - width
    keep = [heading in (*table.whole, *table.right) for heading in table.headings]
    for kept in (False, True):
        while excess > 0:
            narrower = [i for i, size in enumerate(widths) if size > least[i] and keep[i] is kept]
            if not narrower:
                break
            widths[max(narrower, key=widths.__getitem__)] -= 1
            excess -= 1
    return None if excess > 0 else widths
