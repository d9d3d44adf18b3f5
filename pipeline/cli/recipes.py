"""Commands on recipe files: recipe schema, check, changed, lock."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import click

from pipeline.backends.base import make_backend
from pipeline.cache.local import default_root
from pipeline.cli.console import Console
from pipeline.cli.groups import Group
from pipeline.cli.options import always_json, as_json
from pipeline.cli.paths import RECIPES, complete_recipe, recipe_path
from pipeline.cli.results import print_json, print_line, print_result
from pipeline.cli.tables import Verdict
from pipeline.cli.words import counted
from pipeline.errors import InputError, RecipeError, together
from pipeline.plan.lock import Lock, lock_path, make_lock, other_files, pair_configs, read, stale, write
from pipeline.plan.plan import Plan, make_plan
from pipeline.recipe import Recipe, load
from pipeline.recipe.changed import changed_recipes
from pipeline.recipe.read import schema as recipe_schema
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.local import check_local
from pipeline.sources.tokenizer import fast_tokenizer_files
from pipeline.stores.base import scheme_of
from pipeline.validate.prompts import Prompt, recipe_prompts

Result = TypeVar("Result")


@click.group(cls=Group)
def recipe() -> None:
    """Check and lock recipes."""


@recipe.command()
@always_json
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    print_json(recipe_schema())


@recipe.command()
@click.argument("names", shell_complete=complete_recipe, nargs=-1, required=True)
@as_json
@click.pass_obj
def check(console: Console, names: tuple[str, ...], json_: bool) -> None:
    """Check recipes with their prompts, registries, locks and local sources, and plan them.

    For a source in a folder, the config, the shards, the tensor shapes and the tokenizer are checked, without reading
    weights; tiny models (`pico://`) are generated. Other sources are not downloaded; the result lists them. A lock is
    compared with the recipe, the installed versions, and the configs and sizes of weights in folders; `tandem build
    --locked` also compares the weights. A recipe whose sources are not on this host is planned if it has a lock.
    """
    checks = {name: _check(recipe_path(name)) for name in names}
    for each in checks.values():
        if each.warning:
            console.log(each.warning)
    if json_:
        unchecked = {name: each.unchecked for name, each in checks.items()}
        locks = {name: "up to date" if each.locked else "none" for name, each in checks.items()}
        print_json({"checked": list(names), "sources_not_checked": unchecked, "locks": locks})
        return
    for each in checks.values():
        print_line(Verdict(_words(each), good=None if each.unchecked else True))


@dataclass(frozen=True)
class _Checked:
    """The result of a recipe's check: its plan, if its models are known, and the unchecked sources."""

    path: Path
    plan: Plan | None
    locked: bool
    unchecked: tuple[str, ...]
    warning: str | None = None


def _check(path: Path) -> _Checked:
    parsed = load(path)
    for target in parsed.publish:
        scheme_of(target.to)
    errors: list[InputError] = []
    prompts = _attempt(errors, lambda: recipe_prompts(parsed, path.parent))
    sources = _attempt(errors, lambda: check_local(parsed, path.parent, default_root() / "sources"))
    lock = _attempt(errors, lambda: _lock_of(parsed, path))
    if errors or prompts is None or sources is None:
        raise together(errors)
    plan = make_plan(parsed, *(each.config for each in sources.pair)) if sources.pair else None
    if plan is None and lock is not None:
        plan = make_plan(parsed, *pair_configs(parsed, lock, str(lock_path(path))))
    if sources.pair and lock is not None and (problems := other_files(lock, sources.pair, str(lock_path(path)))):
        raise RecipeError(problems)
    warning = _cut_prompts(parsed, prompts, sources.pair[0]) if sources.pair else None
    return _Checked(path, plan, lock is not None, sources.unchecked, warning)


def _attempt(errors: list[InputError], check: Callable[[], Result]) -> Result | None:
    """Return the result of a check; None after an error, which is added to `errors`."""
    try:
        return check()
    except InputError as error:
        errors.append(error)
        return None


def _lock_of(parsed: Recipe, path: Path) -> Lock | None:
    """Return the lock of a recipe, if it has one.

    Raises:
        RecipeError: the lock is of another recipe, or of other versions than those that are installed.

    """
    if not lock_path(path).is_file():
        return None
    lock = read(lock_path(path))
    if problems := stale(parsed, lock, str(lock_path(path))):
        raise RecipeError(problems)
    return lock


def _cut_prompts(parsed: Recipe, prompts: Sequence[Prompt], target: Checkpoint) -> str | None:
    """Return the build's warning about prompts that are too long; None without the packages that read tokenizers."""
    if find_spec("tokenizers") is None:
        return None
    from pipeline.validate.lengths import cut_warning, token_counts  # of an extra

    files = fast_tokenizer_files(target)
    new_tokens = parsed.validate_.max_new_tokens
    return cut_warning(token_counts(prompts, files), parsed.shapes, new_tokens) if files else None


def _words(checked: _Checked) -> str:
    """Return the checked and the unchecked parts, in one line."""
    parts = ["recipe", "prompts"] if checked.unchecked else ["recipe", "prompts", "sources"]
    if checked.plan is not None:
        planned = f"plan of {counted(len(checked.plan.graphs), 'graph')}"
        parts.append(planned + (" (from the lock)" if checked.unchecked else ""))
    if checked.locked:
        compared = "recipe and versions" if checked.unchecked else "recipe, versions, configs and sizes of weights"
        parts.append(f"lock up to date ({compared})")
    unchecked = f"; sources not checked: {', '.join(checked.unchecked)}" if checked.unchecked else ""
    return f"{checked.path}: ok: {', '.join(parts)}{unchecked}"


@recipe.command()
@click.argument("paths", nargs=-1, required=True)
@always_json
def changed(paths: tuple[str, ...]) -> None:
    """Print a JSON list of the recipes that changes to the files PATHS affect. With -, PATHS are read from stdin."""
    files = _lines_of_stdin() if paths == ("-",) else list(paths)
    click.echo(json.dumps(changed_recipes(files, RECIPES)))


def _lines_of_stdin() -> list[str]:
    """Return the paths in stdin: bytes, as the file system has them, that end at line feeds only."""
    lines = sys.stdin.buffer.read().split(b"\n")
    return [os.fsdecode(line.removesuffix(b"\r")) for line in lines if line.strip()]


@recipe.command()
@click.argument("name", shell_complete=complete_recipe)
@as_json
def lock(name: str, json_: bool) -> None:
    """Pin the sources, versions and flags of recipe NAME in a lock file beside it."""
    from pipeline.sources.pair import resolve_pair  # keeps torch out of the other commands

    path = recipe_path(name)
    parsed = load(path)
    pair = resolve_pair(parsed, base=path.parent, cache=default_root() / "sources")
    backend = make_backend(parsed.backend)
    write(lock_path(path), make_lock(parsed, *pair, backend.toolchain().as_dict(), backend.flags()))
    print_result({"lock": lock_path(path)}, f"wrote {lock_path(path)}", as_json=json_)
