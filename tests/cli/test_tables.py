"""Tables: plain text is stable and whole, a terminal's is wrapped to its width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console as Terminal

from pipeline.cli.tables import Table, Verdict, of_fields, plain, wrapped

LONG = "cpu " * 40
TABLE = Table(("name", "size", "note"), [("a", "1.0 MiB", LONG.strip()), ("long-name", "12 B", "")], right=("size",))


def test_plain_aligns_and_cuts_nothing():
    lines = list(plain(TABLE))
    assert lines[0] == "name          size  note"
    assert lines[1] == "a          1.0 MiB  " + LONG.strip()
    assert lines[2] == "long-name     12 B"


def test_plain_keeps_a_value_with_a_line_break_on_one_line():
    assert list(plain(of_fields({"finding": "a\nb"}))) == ["finding  a b"]


def test_plain_of_no_rows_has_headings_alone():
    assert list(plain(Table(("name", "size"), []))) == ["name  size"]


@pytest.mark.parametrize("width", [80, 140])
def test_wrapped_fits_the_terminal_and_loses_no_word(width):
    out = io.StringIO()
    Terminal(file=out, width=width, force_terminal=True, color_system=None).print(wrapped(TABLE, width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert out.getvalue().count("cpu") == 40


def test_wrapped_takes_brackets_as_text():
    out = io.StringIO()
    Terminal(file=out, width=80).print(wrapped(of_fields({"gate": Verdict("[red]FAILED[/red]", good=False)}), 80))
    assert "[red]FAILED[/red]" in out.getvalue()


def test_verdict_has_its_colour_and_its_words():
    out = io.StringIO()
    Terminal(file=out, width=80, force_terminal=True, color_system="standard").print(
        wrapped(of_fields({"gates": Verdict("FAILED", good=False)}), 80)
    )
    assert "\x1b[31mFAILED" in out.getvalue()


LISTING = Table(
    ("release", "digest", "built (UTC)", "size", "signed", "aliases", "variants"),
    [("acme-spec@1.0.1", "953d0b5bc218", "2026-11-29 13:00", "3.1 MiB", "yes", "prod, latest", "cpu-avx2-tp1"),
     ("acme-spec@1.0", "5bc218953d0b", "2026-11-29 12:00", "3.1 MiB", "no", "", "cpu-avx2-tp1, cpu-avx512-tp1")],
    right=("size",), whole=("release", "digest"),
)  # fmt: skip


@pytest.mark.parametrize("width", range(30, 130))
def test_wrapped_breaks_no_name(width):
    """`cpu-avx2-tp`, which looks like a variant, was shown at 80, 82 and 85 columns, and one without its end at 100."""
    out = io.StringIO()
    Terminal(file=out, width=width).print(wrapped(LISTING, width))
    words = out.getvalue().split()
    assert max(map(len, out.getvalue().splitlines())) <= width
    for row in LISTING.rows:
        assert set(" ".join(row).split()) <= set(words)


@pytest.mark.parametrize("width", [40, 60, 80])
def test_wrapped_cuts_no_cell_where_whole_columns_do_not_fit(width):
    """rich cuts the last column if the least widths exceed the terminal: `cpu-avx2-tp1` became `cpu-avx2-t`."""
    cells = ("small@1.0-of-a-long-name", "60c3abbdb3b4", "58.6 KiB", "prod", "cpu-avx2-tp1")
    headings = ("release", "digest", "size", "aliases", "variants")
    table = Table(headings, [cells], right=("size",), whole=("release", "digest"))
    out = io.StringIO()
    Terminal(file=out, width=width).print(wrapped(table, width))
    shown = "".join(out.getvalue().split())
    assert all(sum(shown.count(letter) for letter in set(cell)) for cell in cells)
    assert sum(map(len, "".join(cells).split())) + len("releasedigestsizealiasesvariants") == len(shown)
