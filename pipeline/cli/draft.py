"""Commands on drafts: draft doctor, recipe, convert. They import torch when they are called, not for `--help`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pipeline.cache.local import default_root
from pipeline.cli.console import Console
from pipeline.cli.groups import Group
from pipeline.cli.options import as_json
from pipeline.cli.paths import complete_recipe, recipe_path
from pipeline.cli.results import print_json, print_line, print_result, print_table
from pipeline.cli.tables import Table, Verdict
from pipeline.cli.words import counted
from pipeline.errors import GateError
from pipeline.recipe import load
from pipeline.recipe.document import to_text
from pipeline.sources.convert import convert as convert_pickled
from pipeline.sources.heads import starter_recipe
from pipeline.sources.pair import resolve
from pipeline.validate.draft.report import DraftReport, Measured


@click.group(cls=Group)
def draft() -> None:
    """Examine drafts, start a recipe from one, convert pickled ones."""


@draft.command()
@click.argument("recipe", shell_complete=complete_recipe)
@click.option("--prompts", type=click.IntRange(1), default=24, show_default=True, help="Prompts of the recipe to use.")
@click.option("--max-new-tokens", type=click.IntRange(2), default=48, show_default=True, help="Tokens of each answer.")
@as_json
@click.pass_obj
def doctor(console: Console, recipe: str, prompts: int, max_new_tokens: int, json_: bool) -> None:
    """Measure how the draft of RECIPE agrees with its target, without compiling, and try other readings of its file.

    Both models run eagerly on prompts of the recipe; the target has to fit half of the memory. The exit code is 1 if
    the draft's file is read wrongly, or the draft agrees with the target by chance or far less than the recipe states.
    """
    from pipeline.measure.draft import diagnose  # imports torch

    path = recipe_path(recipe)
    parsed = load(path)
    report = diagnose(parsed, path.parent, (prompts, max_new_tokens), console.log, console.progress)
    if json_:
        print_json(report.model_dump(mode="json") | {"line": report.line, "fix": report.fix})
    else:
        _show(report)
    sys.exit(0 if report.verdict == "agrees" else GateError.exit_code)


def _show(report: DraftReport) -> None:
    print_line(report.read)
    for text in (*report.doubts, *report.notes):
        print_line(f"unclear: {text}" if text in report.doubts else f"note: {text}")
    vocabulary = report.vocabulary
    size = f"{vocabulary.tokens:,} of {vocabulary.of:,} tokens"
    print_line(f"vocabulary: {size}, {vocabulary.answers:.1%} of the answers' tokens")
    print_line(f"measured: {counted(report.chains, 'answer position')} of {counted(report.prompts, 'prompt')}")
    places = [f"place {number + 1}" for number in range(len(report.current.by_place))]
    columns = (*places, "tokens per step")
    rows = [_row(measured) for measured in (report.current, *report.others)]
    print_table(Table(("reading", *columns), rows, right=columns))
    for each in report.expected:
        if each.speed_up is not None:
            print_line(f"K={each.draft_tokens}: {each.speed_up:.2f}x plain decode at a step cost of {each.step_cost:g}")
    print_line(Verdict(report.line, good=report.verdict == "agrees"))
    if report.fix:
        print_line(f"fix: {report.fix}")


def _row(measured: Measured) -> tuple[str, ...]:
    name = f"draft.{measured.reading}" if ":" in measured.reading else measured.reading
    rates = (f"{rate:.0%}" for rate in measured.by_place)
    return (f"{name} (better)" if measured.better else name, *rates, f"{measured.tokens_per_step:.2f}")


@draft.command("recipe")
@click.argument("source")
@as_json
@click.pass_obj
def starter(console: Console, source: str, json_: bool) -> None:
    """Print a recipe for the head SOURCE and the target that its file names, as a start.

    Heads of speculators name their target. SOURCE is written as `draft.source` is in a recipe; relative folders start
    here.
    """
    cache = default_root() / "sources"
    head = resolve(source, base=Path(), cache=cache, progress=console.progress, role="draft")
    data = starter_recipe(source, head)
    print_result(data, to_text(data).rstrip(), as_json=json_)


@draft.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path))
@as_json
@click.pass_obj
def convert(console: Console, source: Path, out: Path, json_: bool) -> None:
    """Convert the pickled weights of the folder SOURCE to safetensors in the new folder OUT.

    The file is read by a process of its own, without network and without this process's environment variables, that
    loads tensors only.
    """
    names = convert_pickled(source, out, console.log)
    print_result({"out": str(out), "files": names}, f"converted {', '.join(names)} to {out}", as_json=json_)
