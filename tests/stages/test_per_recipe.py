"""A build whose gates fail: it replaces the artifact of its folder, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.artifact.manifest import read
from pipeline.errors import GateError
from pipeline.recipe.schema import Recipe
from pipeline.stages.per_recipe import naming_replaced
from pipeline.stages.settings import BuildSettings
from support import small_artifacts as small


def failing(tmp_path: Path, lines: list[str], publish: list[dict]) -> None:
    """Replace the artifact in `out` as a build does whose gates fail."""
    recipe = Recipe.model_validate(small.RECIPE | {"publish": publish})
    with naming_replaced(BuildSettings(recipe, tmp_path, tmp_path / "out", log=lines.append)):
        small.make_validated(tmp_path / "out", tmp_path / "work", passed=False, weights=b"new")
        raise GateError("acceptance", where="small")


@pytest.mark.parametrize(("publish", "url"), [([], "REGISTRY"), ([{"to": "s3://bucket/r"}], "s3://bucket/r")])
def test_naming_replaced_names_both_artifacts(tmp_path, publish, url):
    """A build that failed replaced a good artifact without a word."""
    old = small.make_validated(tmp_path / "out", tmp_path / "work").manifest.version
    lines: list[str] = []
    with pytest.raises(GateError):
        failing(tmp_path, lines, publish)
    new = read(tmp_path / "out").manifest.version
    assert lines == [
        f"warning: {tmp_path / 'out'} has the new artifact {new}, which failed its gates; it replaced {old}, which "
        f"passed them; if it was published: tandem pull {url}/small@{old}"
    ]


@pytest.mark.parametrize("before", [None, False])
def test_naming_replaced_is_silent_if_nothing_good_was_replaced(tmp_path, before):
    if before is not None:
        small.make_validated(tmp_path / "out", tmp_path / "work", passed=before)
    lines: list[str] = []
    with pytest.raises(GateError):
        failing(tmp_path, lines, [])
    assert lines == []
