"""Python code in a process of its own, and on a disk of its own that is nearly full."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap

import pytest

from support.paths import ROOT


def run_python(code: str, *, prefix: tuple[str, ...] = (), **options) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


def on_small_disk(options: str, code: str) -> str:
    """Output of code that runs with a disk of its own at /mnt; skips where this user may not mount one."""
    for namespace in (("unshare", "--mount"), ("unshare", "--mount", "--map-root-user")):
        mount = f'mount -t tmpfs -o size=64k tmpfs /mnt && {options} && exec "$@"'
        prefix = (*namespace, "sh", "-c", mount, "sh")
        if shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            done = run_python(code, prefix=prefix)
            assert done.returncode == 0, done.stderr
            return done.stdout
    pytest.skip("needs a disk of its own: this user may not mount a tmpfs")
