"""Markers hold what they promise: only a test marked `compile` can run the compiler, in any of its processes."""

from __future__ import annotations

import shutil
import subprocess

import pytest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def run_compiler(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["g++", *arguments], input="int x;", capture_output=True, text=True, check=False)


def test_compiler_is_refused_to_a_test_without_the_marker():
    done = run_compiler("-fsyntax-only", "-xc++", "-")
    assert done.returncode == 1
    assert "not marked `compile`" in done.stderr


def test_compiler_says_its_version_to_every_test():
    """A cache key holds the version, so planning a build asks for it."""
    assert run_compiler("-dumpfullversion", "-dumpversion").stdout.strip()


@pytest.mark.compile
def test_compiler_runs_for_a_test_with_the_marker():
    assert run_compiler("-fsyntax-only", "-xc++", "-").returncode == 0


def test_time_limit_of_a_test_is_that_of_its_markers(request):
    assert request.node.get_closest_marker("timeout") is None, "the default of pyproject.toml holds"


@pytest.mark.compile
def test_time_limit_of_a_compiling_test_is_longer(request):
    assert request.node.get_closest_marker("timeout").args[0] > float(request.config.getini("timeout"))
