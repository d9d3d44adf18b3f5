"""The command that examines this machine: doctor."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from pipeline.cli.groups import Command
from pipeline.cli.options import as_json
from pipeline.cli.paths import recipe_path
from pipeline.cli.results import print_json
from pipeline.doctor import diagnose
from pipeline.errors import HostError
from pipeline.recipe import load
from pipeline.recipe.chips import CHIPS
from pipeline.recipe.schema import InductorSettings, NeuronSettings


@click.command(cls=Command)
@click.argument("recipe", required=False)
@click.option("--backend", type=click.Choice(["inductor", "neuron"]), default="inductor", show_default=True,
              help="Backend to check without RECIPE.")  # fmt: skip
@click.option("--target", type=click.Choice(list(CHIPS)), default="trn2", show_default=True, help="Chip, for neuron.")
@click.option("--lnc", type=click.IntRange(1, 2), default=1, show_default=True,
              help="Physical cores per logical core, for neuron.")  # fmt: skip
@as_json
def doctor(recipe: str | None, backend: str, target: str, lnc: int, json_: bool) -> None:
    """Check what this machine can build and run. With RECIPE, check it against the recipe's needs."""
    if recipe is None:
        neuron = {"name": "neuron", "target": target, "lnc": lnc}
        diagnosis = diagnose(NeuronSettings.model_validate(neuron) if backend == "neuron" else InductorSettings())
    else:
        path = recipe_path(recipe)
        parsed = load(path)
        diagnosis = diagnose(parsed.backend, parsed, path)
    if json_:
        print_json(asdict(diagnosis))
    else:
        for section, facts in diagnosis.facts.items():
            for name, value in facts.items():
                click.echo(f"{section:<10}{name:<24}{value}")
        for problem in diagnosis.problems:
            click.echo(f"problem   {problem.where}: {problem.what}\n  fix: {problem.fix}")
    sys.exit(HostError.exit_code if diagnosis.problems else 0)
