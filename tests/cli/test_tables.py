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
    Terminal(file=out, width=width, force_terminal=True, color_system=None).print(wrapped(TABLE))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert out.getvalue().count("cpu") == 40


def test_wrapped_takes_brackets_as_text():
    out = io.StringIO()
    Terminal(file=out, width=80).print(wrapped(of_fields({"gate": Verdict("[red]FAILED[/red]", good=False)})))
    assert "[red]FAILED[/red]" in out.getvalue()


def test_verdict_has_its_colour_and_its_words():
    out = io.StringIO()
    Terminal(file=out, width=80, force_terminal=True, color_system="standard").print(
        wrapped(of_fields({"gates": Verdict("FAILED", good=False)}))
    )
    assert "\x1b[31mFAILED" in out.getvalue()
