"""The command that examines this machine: doctor."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from pipeline.cli.groups import Command
from pipeline.cli.options import as_json
from pipeline.cli.paths import complete_recipe, recipe_path
from pipeline.cli.results import print_json, print_line, print_table
from pipeline.cli.tables import Table, Verdict
from pipeline.cli.words import counted
from pipeline.doctor import diagnose
from pipeline.errors import HostError
from pipeline.recipe import load
from pipeline.recipe.backend_settings import InductorSettings, NeuronSettings
from pipeline.recipe.chips import CHIPS


@click.command(cls=Command)
@click.argument("recipe", shell_complete=complete_recipe, required=False)
@click.option("--backend", type=click.Choice(["inductor", "neuron"]),
              help="Backend to check without RECIPE (default: inductor).")  # fmt: skip
@click.option("--target", type=click.Choice(list(CHIPS)), default="trn2", show_default=True, help="Chip, for neuron.")
@click.option("--lnc", type=click.IntRange(1, 2), default=1, show_default=True,
              help="Physical cores per logical core, for neuron.")  # fmt: skip
@as_json
def doctor(recipe: str | None, backend: str | None, target: str, lnc: int, json_: bool) -> None:
    """Check what this machine can build and run. With RECIPE, check it against the recipe's needs.

    The exit code is 3 if there are problems. Without RECIPE and --backend, missing packages of a backend are no
    problem: a machine that only pulls needs none.
    """
    if recipe is None:
        neuron = {"name": "neuron", "target": target, "lnc": lnc}
        diagnosis = diagnose(NeuronSettings.model_validate(neuron) if backend == "neuron" else InductorSettings())
    else:
        path = recipe_path(recipe)
        parsed = load(path)
        diagnosis = diagnose(parsed.backend, parsed, path)
    if recipe is None and backend is None and "packages" not in diagnosis.facts:
        diagnosis.problems.clear()
    if json_:
        print_json(asdict(diagnosis))
    else:
        rows = [(section, name, shown) for section, facts in diagnosis.facts.items() for name, shown in facts.items()]
        print_table(Table(("", "fact", "value"), rows, show_headings=False))
        for problem in diagnosis.problems:
            print_line(f"problem   {problem.where}: {problem.what}\n  fix: {problem.fix}")
        print_line(_verdict(len(diagnosis.problems)))
    sys.exit(HostError.exit_code if diagnosis.problems else 0)


def _verdict(problems: int) -> Verdict:
    if problems:
        return Verdict(f"{counted(problems, 'problem')}: this machine cannot build or run this", good=False)
    return Verdict("no problem found", good=True)
