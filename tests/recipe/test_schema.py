"""Recipes: what loads, what is refused and in which words. Each bad recipe is a file named for its fault.

A line `#! <line> <key> | <part of what> | <part of fix>` in such a file is one expected problem; there are no others.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.errors import InputError, Problem, RecipeError
from pipeline.recipe import Recipe, find, load
from pipeline.recipe.backend_settings import InductorSettings, NeuronSettings
from pipeline.recipe.read import schema
from pipeline.validate.prompts import prompts_path
from support.paths import ROOT, TESTS

BAD = sorted((TESTS / "recipes" / "bad").glob("*.yaml"))
GOOD_FILES = sorted((TESTS / "recipes" / "good").glob("*.yaml"))
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
GOOD = """\
name: pair
target: {source: ./target}
draft: {source: ./draft}
speculation: {draft_tokens: [2, 4]}
shapes: {batch: [1], prefill: [32], kv: [64]}
"""


def write(folder: Path, text: str, name: str = "pair.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems_of(path: Path) -> tuple[Problem, ...]:
    with pytest.raises(RecipeError) as caught:
        load(path)
    return caught.value.problems


def expected(path: Path) -> list[tuple[str, str, str]]:
    found = []
    for line in path.read_text().splitlines():
        if line.startswith("#! "):
            place, what, fix = line[3:].split(" | ")
            number, _, key = place.strip().partition(" ")
            found.append((f"{path}:{number}" + (f": {key}" if key else ""), what, fix))
    return found


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_load_bad_recipe_names_place_and_remedy(path: Path) -> None:
    problems = problems_of(path)
    wanted = expected(path)
    assert [p.where for p in problems] == [where for where, _, _ in wanted]
    for problem, (_, what, fix) in zip(problems, wanted, strict=True):
        assert what in problem.what
        assert fix in problem.fix


def test_load_takes_text_as_a_path_or_a_name(tmp_path, monkeypatch) -> None:
    """It was an AttributeError: `str` has no `parent`."""
    (tmp_path / "recipes").mkdir()
    path = write(tmp_path / "recipes", GOOD)
    monkeypatch.chdir(tmp_path)
    assert load("pair").digest() == load("recipes/pair.yaml").digest() == load(path).digest()
    with pytest.raises(InputError, match="no recipe 'pear'"):
        load("pear")


def test_load_of_a_name_without_recipes_says_so(tmp_path, monkeypatch) -> None:
    """It said `use a path, or one of: none`."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load("pair")
    assert caught.value.fix == "no recipes in recipes/ here; use a path"


def test_bad_recipes_all_say_what_they_expect() -> None:
    assert len(BAD) > 40
    assert all(expected(path) for path in BAD)


SPELLED = {
    "leading-zero": ("shapes.kv", [100]), "leading-zero-no-octal": ("shapes.kv", [90]),
    "hexadecimal": ("shapes.kv", [64]), "name-is-a-date": ("name", "2026-11-28"),
    "merge-key": ("draft.dtype", "float32"), "home-folder": ("target.source", "~/target"),
}  # fmt: skip
"""Recipe in `tests/recipes/good` -> a key and its value; of the others, `shapes.kv` is [64]."""


@pytest.mark.parametrize("path", GOOD_FILES, ids=lambda path: path.stem)
def test_load_reads_yaml_1_2(path: Path) -> None:
    """YAML 1.1 reads `0100` as 64; `<<: *anchor` was an unknown key."""
    key, expected_value = SPELLED.get(path.stem, ("shapes.kv", [64]))
    value = load(path).model_dump(mode="json", by_alias=True)
    for part in key.split("."):
        value = value[part]
    assert value == expected_value


def test_load_sorts_problems_of_a_path_with_colons(tmp_path: Path) -> None:
    """The first colon of a path was taken for that of the line, so the problems came in no order."""
    folder = tmp_path / "a:1: b"
    folder.mkdir()
    text = "name: pair\nshapes: {batch: [x], prefill: [16], kv: [y]}\nspeculation: {draft_tokens: [0]}\n" + "# -\n" * 9
    lines = [p.where.removeprefix(str(folder / "pair.yaml")) for p in problems_of(write(folder, f"{text}oops: 1\n"))]
    assert lines[-1].startswith(":13: oops")
    numbers = [int(line.split(":")[1]) for line in lines]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("keys", ["1: [1.0, 2.0], 01: [3.0, 4.0]", "1_0: [1.0, 2.0]", "'1.0': [1.0, 2.0]"])
def test_load_batch_of_costs_is_written_in_one_way(tmp_path: Path, keys: str) -> None:
    """`1` and `01` were one batch, and the last one won."""
    text = GOOD.replace("draft_tokens: [2, 4]", f"draft_tokens: [2, 4], method: eagle3, step_costs: {{{keys}}}")
    assert any("step_costs" in problem.where for problem in problems_of(write(tmp_path, text)))


COSTS_BY_TOKENS = [
    ("{1: {32: [1.0, 2.0], 64: [1.5, 2.5]}}", None),
    ("{1: {32: [1.0, 2.0], 63: [1.5, 2.5]}}", "found costs for caches of up to 63 tokens; the largest kv bucket is 64"),
    ("{1: {32: [1.0, 2.0], 64: [1.5]}}", "found 1 step_costs for 2 draft_tokens"),
    ("{1: {x: [1.0, 2.0], 64: [1.5, 2.5]}}", "found 'x'; accepted: an integer from 1"),
    ("{1: {}}", "at least 1 item"),
    ("{}", "at least 1 item"),
]


@pytest.mark.parametrize(("costs", "fault"), COSTS_BY_TOKENS)
def test_load_costs_by_cached_tokens(tmp_path: Path, costs: str, fault: str | None) -> None:
    text = GOOD.replace("draft_tokens: [2, 4]", f"draft_tokens: [2, 4], method: eagle3, step_costs: {costs}")
    if fault is None:
        speculation = load(write(tmp_path, text)).speculation
        assert speculation.step_costs == {1: {32: (1.0, 2.0), 64: (1.5, 2.5)}}
        return
    problems = problems_of(write(tmp_path, text))
    assert [fault in problem.what for problem in problems] == [True]
    assert problems[0].where.partition(": ")[2].startswith("speculation")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_load_shipped_recipe_is_named_as_its_file(path: Path) -> None:
    recipe = load(path)
    assert recipe.name == path.stem
    assert prompts_path(recipe.validate_.prompts, path.parent).is_file()


def test_load_fills_defaults(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, GOOD))
    assert recipe.target.dtype == "float32"
    assert recipe.speculation.sampling == ("greedy",)
    assert recipe.backend == InductorSettings(device="cpu")
    assert recipe.parallel.tensor == 1


def test_load_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        load(tmp_path / "none.yaml")


def test_load_binary_file_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "pair.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(InputError, match="not UTF-8"):
        load(tmp_path / "pair.yaml")


def test_load_anchor_that_contains_itself_ends(tmp_path: Path) -> None:
    problems = problems_of(write(tmp_path, GOOD + "publish: &all [*all]\n"))
    assert "contains itself" in problems[0].what


def test_load_number_with_exponent_is_a_number(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as text, for want of a dot."""
    recipe = load(write(tmp_path, GOOD + "validate: {gates: {near_tie_rate: 1e-3}}\n"))
    assert recipe.validate_.gates.near_tie_rate == 0.001


def test_load_base_is_merged_beneath(tmp_path: Path) -> None:
    write(tmp_path, "target: {dtype: bfloat16}\nshapes: {kv: [128, 256], prefill: [16]}\n", "base.yaml")
    recipe = load(write(tmp_path, "base: base.yaml\n" + GOOD))
    assert recipe.target.dtype == "bfloat16"
    assert recipe.shapes.kv == (64,), "lists replace, they do not join"


def test_load_base_with_another_backend_is_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path, "backend: {name: neuron, target: trn2, lnc: 2}\n", "base.yaml")
    recipe = load(write(tmp_path, "base: base.yaml\n" + GOOD + "backend: {name: inductor}\n"))
    assert recipe.backend == InductorSettings()


def test_load_problem_in_base_names_the_base(tmp_path: Path) -> None:
    base = write(tmp_path, "parallel:\n  tenser: 2\n", "base.yaml")
    (problem,) = problems_of(write(tmp_path, "base: base.yaml\n" + GOOD))
    assert problem.where == f"{base}:2: parallel.tenser"


def test_load_base_of_a_base_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path, "base: other.yaml\nparallel: {tensor: 2}\n", "base.yaml")
    (problem,) = problems_of(write(tmp_path, "base: base.yaml\n" + GOOD))
    assert problem.where == f"{base}:1: base"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_to_yaml_reads_back_equal_and_alone(path: Path, tmp_path: Path) -> None:
    recipe = load(path)
    again = load(write(tmp_path, recipe.to_yaml()))
    assert again.model_dump() == recipe.model_dump()
    assert again.digest() == recipe.digest()


def test_digest_ignores_layout_and_sees_values(tmp_path: Path) -> None:
    first = load(write(tmp_path, GOOD))
    spaced = load(write(tmp_path, "# a comment\n" + GOOD.replace("{batch: [1]", "{ batch:  [1]")))
    other = load(write(tmp_path, GOOD.replace("kv: [64]", "kv: [65]")))
    assert first.digest() == spaced.digest() != other.digest()


def test_argument_is_the_file_of_a_recipe_outside_of_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in messages named the recipe's `name`, which is not its file."""
    text = GOOD.replace("name: ", "name: another-")
    (tmp_path / "recipes").mkdir()
    for path in (tmp_path / "my pair.yaml", tmp_path / "recipes/mine.yaml"):
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    assert load(tmp_path / "my pair.yaml").argument() == f"'{tmp_path}/my pair.yaml'"
    assert load(Path("recipes/mine.yaml")).argument() == "mine"


def test_place_names_the_line_of_the_nearest_key(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    recipe = load(path)
    assert recipe.place("shapes.kv[0]") == f"{path}:5: shapes.kv[0]"
    assert recipe.place("draft.dtype") == f"{path}:3: draft.dtype"
    assert recipe.place("parallel.tensor") == f"{path}:1: parallel.tensor"


def test_find_name_path_and_near_miss(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert find("pair", tmp_path) == path
    assert find(str(path), tmp_path / "elsewhere") == path
    with pytest.raises(InputError) as caught:
        find("piar", tmp_path)
    assert caught.value.fix == "did you mean 'pair'?"


def test_recipe_is_immutable(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, GOOD))
    with pytest.raises(ValidationError):
        recipe.shapes.kv = (1,)  # type: ignore[misc]


def test_neuron_lnc_two_needs_trn2() -> None:
    assert NeuronSettings(name="neuron", target="trn2", lnc=2).lnc == 2
    with pytest.raises(ValidationError, match="accepted on inf2: 1"):
        NeuronSettings(name="neuron", target="inf2", lnc=2)


def test_schema_describes_every_key() -> None:
    found = schema()
    json.dumps(found)
    sections = [found, *found["$defs"].values()]
    bare = [
        f"{section['title']}.{key}"
        for section in sections
        for key, value in section["properties"].items()
        if "description" not in value and "const" not in value
    ]
    assert bare == []
    assert all(section["additionalProperties"] is False for section in sections)
    assert "base" in found["properties"]


def test_schema_knows_the_keys_of_files() -> None:
    assert set(schema()["properties"]) >= {field.alias or name for name, field in Recipe.model_fields.items()}
    assert "from" in schema()["$defs"]["Derive"]["properties"]


def test_recipe_modules_import_no_torch() -> None:
    code = "import sys, pipeline.plan.plan, pipeline.plan.lock, pipeline.recipe.check; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(("name", "least"), [("default", 60), ("pico", 10)])
def test_prompts_are_varied_and_short(name: str, least: int) -> None:
    lines = prompts_path(f"prompts/{name}.jsonl", ROOT / "recipes").read_text().splitlines()
    prompts = [json.loads(line) for line in lines]
    assert len(prompts) >= least
    assert len({p["id"] for p in prompts}) == len({p["prompt"] for p in prompts}) == len(prompts)
    assert all(set(p) == {"id", "class", "prompt"} and len(p["prompt"]) <= 450 for p in prompts)
    if name == "default":
        classes = Counter(p["class"] for p in prompts)
        assert set(classes) == {"code", "json", "chat", "summary", "open_ended"}
        assert min(classes.values()) >= 12


def test_prompts_path_default_ships_with_the_package(tmp_path: Path) -> None:
    """A recipe anywhere has prompts; a file of its own wins, and any other name must be there."""
    shipped = prompts_path("prompts/default.jsonl", tmp_path)
    assert shipped.is_file()
    assert tmp_path not in shipped.parents
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "default.jsonl").write_text("")
    assert prompts_path("prompts/default.jsonl", tmp_path) == tmp_path / "prompts" / "default.jsonl"
    assert prompts_path("mine.jsonl", tmp_path) == tmp_path / "mine.jsonl"
