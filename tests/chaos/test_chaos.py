"""Commands that are disturbed at a step: `make test-chaos SEED=1 RUNS=60`; ONLY=publish:kill limits what seeds draw.

No seed starts later than SECONDS after the first; the next run goes on with those that are left.

A seed draws a command, a disturbance and a step; `tests/chaos/scenario.py` says what must hold. Seeds that passed with
the same source are in `build/chaos/journal.jsonl` and are skipped, so a stopped suite continues.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from chaos.ground import Ground, note, passed
from chaos.scenario import of_seed
from support.paths import ROOT

pytestmark = pytest.mark.chaos
SEED, RUNS = int(os.environ.get("SEED") or 1), int(os.environ.get("RUNS") or 60)
SECONDS, STARTED = float(os.environ.get("SECONDS") or "inf"), time.monotonic()
ONLY, STEP = os.environ.get("ONLY", ""), int(os.environ.get("STEP") or 0)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("chaos"))


@pytest.fixture(scope="module")
def source() -> str:
    """A digest of the code: a seed that passed with another one is played again."""
    files = sorted(path for folder in ("pipeline", "tests/chaos") for path in (ROOT / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in files) + ONLY.encode()).hexdigest()[:16]


@pytest.mark.parametrize("seed", range(SEED, SEED + RUNS))
def test_seed(seed, ground, source):
    if RUNS > 1 and seed in passed(source):
        pytest.skip("passed before with this source")
    if time.monotonic() - STARTED > SECONDS:
        pytest.skip("no time left: run the same command again")
    scenario, started, step = of_seed(seed, ONLY), time.monotonic(), STEP
    try:
        step = ground.play(scenario, STEP or None)
    except BaseException as error:
        note(scenario, source, "failed", started)
        only = f" ONLY={ONLY}" if ONLY else ""
        again = f"make test-chaos SEED={seed} RUNS=1{only}" + (f" STEP={step}" if step else "")
        raise AssertionError(f"seed {seed} ({scenario}); replay: {again}\n{error}") from error
    note(scenario, source, "passed", started)
