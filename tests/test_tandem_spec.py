"""The public package: its names are those of `pipeline`, and importing it loads nothing that a pull does not need."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module

import pytest

import tandem_spec
from support.paths import PYTHONPATH, ROOT

SOURCE = ast.parse((ROOT / "tandem_spec/__init__.py").read_text())


@pytest.mark.parametrize("name", tandem_spec.__all__)
def test_public_name_is_there(name):
    assert getattr(tandem_spec, name) is not None
    assert name in dir(tandem_spec)


def test_names_for_type_checkers_are_those_at_run_time():
    """Type checkers read the imports below TYPE_CHECKING, programs the table: neither may lack a name."""
    (block,) = [node for node in SOURCE.body if isinstance(node, ast.If)]
    imported = {
        alias.asname or alias.name: getattr(import_module(node.module), alias.name)
        for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }  # fmt: skip
    assert imported.keys() | {"__version__"} == set(tandem_spec.__all__)
    assert {name: getattr(tandem_spec, name) for name in imported} == imported


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'gone'"):
        _ = tandem_spec.gone


@pytest.mark.parametrize("use", ["load", "build", "BuildSettings", "pull", "publish", "verify", "TandemError"])
def test_importing_a_name_imports_no_torch(use):
    code = f"import sys; from tandem_spec import {use}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": PYTHONPATH}
    )
    assert done.stdout == "False\n"


def test_every_error_class_is_public():
    errors = import_module("pipeline.errors")
    classes = {name for name, value in vars(errors).items() if getattr(value, "__module__", "") == errors.__name__}
    assert {name for name in classes if name[0].isupper()} <= set(tandem_spec.__all__)
