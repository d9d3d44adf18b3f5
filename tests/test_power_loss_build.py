"""Power that goes at every write, rename and sync of a real build: the next build ends with the same artifact.

Graphs are in the cache, which another disk had before; sources, shards and the artifact are made anew.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact.verify import verify
from pipeline.errors import TandemError
from support import tiny_build as tiny
from support.power_loss import CUTS, observed

MADE_ANEW = ("shards", "sources", "stamps", "goldens", "locks")
"""Folders of the cache that the build on this disk fills."""


def cut_once(built: Any, root: Path, at: int, how: str) -> bool:
    """Build, cut at a step; check what is left, build again, and compare. Returns whether the build was cut."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(built.cache, root / "cache", ignore=shutil.ignore_patterns(*MADE_ANEW))
    out, done = root / "out", False
    with observed(root, at, how) as disk:
        try:
            tiny.again(built, out=out, cache=root / "cache", workers=1, validate=False)
            done = True
        except TandemError:
            assert how == "fails"
    assert out.exists() or not done
    if out.exists():
        verify(out)
    report = tiny.again(built, out=out, cache=root / "cache", workers=1, validate=False)
    assert report.compiled == ()
    assert tiny.same_parts(out) == tiny.same_parts(built.out)
    return disk.steps >= at


@pytest.mark.slow
@pytest.mark.parametrize("how", (*CUTS, "fails"))
def test_every_step_of_a_build(tiny_built, tmp_path, how):
    built, _ = tiny_built
    at = 1
    while cut_once(built, tmp_path / "disk", at, how):
        at += 1
    assert at > 10, "a build without steps tests nothing"
