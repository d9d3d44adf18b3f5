"""A C++ compiler on PATH that refuses to work for tests without the marker `compile`, in all of their processes."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

FORBIDDEN = "TANDEM_TEST_FORBIDS_COMPILER"
SCRIPT = """#!/bin/sh
case "$*" in
    *-dumpfullversion*|--version) ;;
    *) [ -z "${forbidden}" ] || {{ echo 'this test runs a compiler but is not marked `compile`' >&2; exit 1; }} ;;
esac
exec {compiler} "$@"
"""


def install(folder: Path, name: str = "g++") -> None:
    """Put the guarded compiler first on PATH; does nothing where there is no compiler."""
    compiler = shutil.which(name)
    if compiler is None:
        return
    script = folder / name
    script.write_text(SCRIPT.format(forbidden=FORBIDDEN, compiler=shlex.quote(compiler)))
    script.chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def allow(allowed: bool) -> None:
    """Let this process and those that it starts compile, or forbid it."""
    if allowed:
        os.environ.pop(FORBIDDEN, None)
    else:
        os.environ[FORBIDDEN] = "1"
