"""Benchmarks import what is there: they run by hand, so a name that moved would be noticed months later."""

import ast
import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
OURS = ("pipeline", "support", "tandem_spec")


def imports_of(path: Path) -> list[tuple[str, str]]:
    """Modules of ours and the names that a program imports from them, wherever it does."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            found += [(node.module, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("name", sorted(path.name for path in BENCHMARKS.glob("*.py")))
def test_names_that_a_benchmark_imports_exist(name):
    for module, attribute in imports_of(BENCHMARKS / name):
        found = importlib.import_module(module)
        assert hasattr(found, attribute) or importlib.util.find_spec(f"{module}.{attribute}"), f"{module}: {attribute}"


def test_a_program_that_imports_ours_is_seen():
    assert ("pipeline.backends.inductor.session", "LoadedGraph") in imports_of(BENCHMARKS / "block_linear.py")
