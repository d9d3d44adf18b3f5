"""How long threads wait for each other: set for libgomp, unless the user has set it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pipeline.threads import POLICIES, SPIN_COUNT, SPINS, bound_spinning


def test_torchs_library_reads_the_limit() -> None:
    """The first import of `pipeline` sets it, in time for libgomp."""
    clean = {name: value for name, value in os.environ.items() if name not in POLICIES}
    ended = subprocess.run(
        [sys.executable, "-c", "import pipeline, torch"],
        capture_output=True, encoding="utf-8", check=True, env=clean | {"OMP_DISPLAY_ENV": "VERBOSE"},
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in ended.stderr


@pytest.mark.parametrize("name", POLICIES)
def test_what_the_user_has_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in POLICIES:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "active")
    bound_spinning()
    assert [os.environ.get(each) for each in POLICIES] == ["active" if each == name else None for each in POLICIES]
    monkeypatch.delenv(name)
    bound_spinning()
    assert os.environ[SPINS] == str(SPIN_COUNT)
    monkeypatch.delenv(SPINS)
