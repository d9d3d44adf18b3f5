"""Layers that attend over the keys and values of an earlier layer, and have none of their own (Gemma 4)."""

from __future__ import annotations

from dataclasses import replace

from pipeline.models.parallel import Attend, Pass


def over_caches(run: Pass) -> Attend:
    """Return what queries see in caches that the pass has written: of empty rows, its own keys stand there."""
    assert run.attend is not None
    if run.attend.kv or not run.state:
        return run.attend
    batch, tokens = run.positions_BT.shape
    rows_B = run.writes.index[0][:, 0, 0]
    return replace(run.attend, kv=tokens, rows_B=rows_B, last_BT=run.attend.last_BT.expand(batch, tokens))
