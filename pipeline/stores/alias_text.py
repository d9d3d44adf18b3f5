"""The text of an alias: a line a move, the newest first, each `version TAB time TAB who`."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.stores.base import Move

HISTORY = 1000
"""Moves that are kept of an alias."""


def alias_text(move: Move, before: Sequence[Move]) -> bytes:
    """Return the text of an alias after a move."""
    moves = (move, *before)[:HISTORY]
    lines = ("\t".join((each.version, each.when, each.who)).rstrip("\t") + "\n" for each in moves)
    return "".join(lines).encode()


def moves_of(data: bytes) -> tuple[Move, ...]:
    """Return the moves of an alias's text."""
    lines = [line.split("\t") for line in data.decode(errors="replace").splitlines() if line.strip()]
    return tuple(Move(*[*line, "", ""][:3]) for line in lines)
