"""Recipes that a change of files affects."""

import pytest

from pipeline.errors import InputError
from pipeline.recipe.changed import changed_recipes
from support.release_workflow import TINY


def test_changed_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, more in (("one", ""), ("two", "base: bases/b.yaml\n"), ("bad", "nonsense: [")):
        path = tmp_path / "recipes" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(more + TINY.replace("name: tiny", f"name: {name}").replace("prompts.jsonl", f"{name}.jsonl"))
    (tmp_path / "recipes/bases").mkdir()
    (tmp_path / "recipes/bases/b.yaml").write_text("parallel: {tensor: 1}\n")
    cases = {
        "recipes/one.yaml": ["bad", "one"], "recipes/one.lock": ["bad", "one"], "recipes/bases/b.yaml": ["bad", "two"],
        "recipes/two.jsonl": ["bad", "two"], "README.md": [], "recipes/bad.yaml": ["bad"], "pipeline/recipe.py": [],
    }  # fmt: skip
    assert {path: changed_recipes([path]) for path in cases} == cases


@pytest.mark.parametrize("line", ["base : bases/b.yaml", "'base': \"bases/b.yaml\"  # rest", "base:\n  bases/b.yaml"])
def test_changed_recipes_base_in_any_spelling(tmp_path, monkeypatch, line):
    """Lines that begin with `base:` were searched for; any other spelling of the key was no base."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes/bases").mkdir(parents=True)
    (tmp_path / "recipes/tiny.yaml").write_text(f"{line}\n{TINY}")
    (tmp_path / "recipes/bases/b.yaml").write_text("parallel: {tensor: 1}\n")
    assert changed_recipes(["recipes/bases/b.yaml"]) == ["tiny"]


def test_changed_recipes_of_one_text_is_refused(tmp_path):
    """A text was taken for a list of paths of one letter each: nothing had changed."""
    with pytest.raises(InputError, match=r"expected a list of paths"):
        changed_recipes("recipes/tiny.yaml", tmp_path)
