"""Folders of the repository that tests and the processes they start need."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
PYTHONPATH = os.pathsep.join(map(str, (ROOT, TESTS)))
"""What a process of its own needs to import `pipeline` and `support`."""
