"""Checks before any work: a locked build passes on another machine of the same class, and says what differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.build import build
from pipeline.errors import InputError, PreflightError, RecipeError
from pipeline.plan import lock as locks
from pipeline.recipe import load
from pipeline.stages.checks import resolved, usable_backend
from pipeline.stages.settings import BuildSettings, check_together

RECIPE = """\
name: tiny
target: {source: "pico://llama?layers=1"}
draft: {derive: {from: target, layers: [0]}}
speculation: {draft_tokens: [1]}
shapes: {batch: [1], prefill: [16], kv: [32]}
"""


def test_a_locked_build_without_a_lock_ends_before_it_waits(tmp_path):
    """It printed `waiting for another build ...`, and minutes later `no lock file`."""
    settings = replace(settings_of(tmp_path, RECIPE, []), locked=True)
    with pytest.raises(InputError, match="no lock file"):
        check_together([settings])


def test_build_takes_the_name_of_a_recipe(tmp_path, monkeypatch):
    """`build("x.yaml")` was an AttributeError: a Recipe was expected."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no recipe 'nothing'"):
        build("nothing")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    with pytest.raises(InputError, match=r"tiny\.lock: no lock file"):
        build("tiny.yaml", locked=True)


@pytest.fixture
def locked(tmp_path) -> tuple[BuildSettings, list[str]]:
    """Settings of a locked build whose lock was made here, and the lines that it logs."""
    lines: list[str] = []
    settings = settings_of(tmp_path, RECIPE, lines)
    backend = usable_backend(settings.recipe)
    locks.write(settings.lock_file, resolved(replace(settings, locked=False), backend).lock)
    return settings, lines


def settings_of(folder: Path, recipe: str, lines: list[str]) -> BuildSettings:
    (folder / "tiny.yaml").write_text(recipe)
    return BuildSettings(
        load(folder / "tiny.yaml"), folder, folder / "out", cache=folder / "cache", locked=True,
        lock=folder / "tiny.lock", log=lines.append,
    )  # fmt: skip


def test_locked_build_on_the_machine_of_the_lock_says_nothing(locked):
    settings, lines = locked
    resolved(settings, usable_backend(settings.recipe))
    assert lines == []


def test_locked_build_on_another_machine_says_what_differs(locked):
    settings, lines = locked
    lock = locks.read(settings.lock_file)
    locks.write(settings.lock_file, replace(lock, made_with=lock.made_with | {"cxx": "99.1.0"}))
    resolved(settings, usable_backend(settings.recipe))
    (line,) = lines
    assert line.startswith("lock: made on another machine; not pinned and different here: cxx ")
    assert line.endswith("(lock: 99.1.0)")


def test_locked_build_with_other_flags_is_rejected(locked):
    settings, _ = locked
    lock = locks.read(settings.lock_file)
    locks.write(settings.lock_file, replace(lock, flags=lock.flags | {"cpp.march": "x86-64-v2"}))
    with pytest.raises(RecipeError) as caught:
        resolved(settings, usable_backend(settings.recipe))
    assert [problem.where.rpartition(": ")[2] for problem in caught.value.problems] == ["flags.cpp.march"]


def test_compiler_that_the_recipe_names_is_required(tmp_path):
    """A recipe that needs one compiler asks for it; the lock pins the recipe."""
    found = usable_backend(settings_of(tmp_path, RECIPE, []).recipe).toolchain().versions["cxx"]
    for accepted in (found, found.partition(".")[0]):
        usable_backend(settings_of(tmp_path, f"{RECIPE}backend: {{name: inductor, cxx: '{accepted}'}}\n", []).recipe)
    other = settings_of(tmp_path, f"{RECIPE}backend: {{name: inductor, cxx: '{found[:-1]}9.1'}}\n", [])
    with pytest.raises(PreflightError, match=f"is version {found}") as caught:
        usable_backend(other.recipe)
    assert caught.value.where == "backend.cxx"
