"""The command that measures a pair: tune. It imports torch when it is called, not for `--help`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.console import Console
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json, collected
from pipeline.cli.paths import ARTIFACTS, artifact_dir, complete_recipe, recipe_path
from pipeline.cli.results import print_json, print_line, print_table
from pipeline.cli.tables import Table, Verdict
from pipeline.cli.trust import policy_of, policy_option
from pipeline.cli.words import value
from pipeline.files.atomic import write_atomic
from pipeline.models.draft_kind import DRAFT_KINDS
from pipeline.recipe import load
from pipeline.validate.prompts import recipe_prompts

if TYPE_CHECKING:
    from pipeline.measure.tune import Tuning


@dataclass(frozen=True)
class TuneOptions:
    """The options of `tandem tune`."""

    recipe: str
    artifact: str | None
    prompts_per_class: int
    max_new_tokens: int
    write: bool
    policy_file: Path | None
    json_: bool


@click.command(cls=Command)
@click.argument("recipe", shell_complete=complete_recipe)
@click.option("--artifact", help="Artifact to measure (default: artifacts/NAME).")
@click.option(
    "--prompts", "prompts_per_class", type=click.IntRange(1), default=4, show_default=True, help="Prompts per class."
)
@click.option(
    "--max-new-tokens", type=click.IntRange(2), default=64, show_default=True, help="Maximum number of new tokens."
)
@click.option("--write", is_flag=True, help="Write the best K, their step costs and the buckets to the recipe.")
@policy_option
@as_json
@collected(TuneOptions)
def tune(console: Console, options: TuneOptions) -> None:
    """Measure which K and buckets are best for RECIPE. Its artifact must be built and run on this machine."""
    from pipeline.measure.tune import curve, write_recipe  # these import torch
    from pipeline.measure.tune import tune as measure
    from pipeline.runtime.open import load as load_artifact

    path = recipe_path(options.recipe)
    recipe = load(path)
    prompts = recipe_prompts(recipe, path.parent)
    root, policy = artifact_dir(options.artifact or recipe.name), policy_of(options.policy_file)
    engine = load_artifact(root, policy, share_prefixes=False)
    tuning = measure(engine, prompts, options.prompts_per_class, options.max_new_tokens, console.log, console.progress)
    data = tuning.to_json()
    pages = ARTIFACTS / "tuning"
    pages.mkdir(parents=True, exist_ok=True)
    write_atomic(pages / f"{recipe.name}.html", curve(tuning, recipe.name).encode())
    write_atomic(pages / f"{recipe.name}.json", json.dumps(data, indent=2).encode())
    if options.write:
        write_recipe(path, tuning, paced=DRAFT_KINDS[recipe.speculation.method].reads_target_states)
    if options.json_:
        print_json(data)
        return
    _show(tuning, engine.manifest.draft_tokens)
    advice = "written to the recipe; build it again" if options.write else "--write writes them to the recipe"
    print_line(f"draft_tokens: {tuning.draft_tokens}\nstep_costs: {data['step_costs']}\n({advice})")


def _show(tuning: Tuning, built: Sequence[int]) -> None:
    costs = [
        (str(batch), str(tokens), f"K={k}", f"{cost:.2f}x a decode step")
        for batch, by_tokens in tuning.by_shape.items()
        for tokens, of in by_tokens.items()
        for k, cost in of.items()
    ]
    heads = ("rows", "cached tokens up to", "step", "cost")
    print_table(Table(heads, costs, right=("rows", "cached tokens up to", "cost")))
    print_line("")
    rows = [(kind, *_best(speeds, built)) for kind, speeds in tuning.expected.items()]
    print_table(Table(("prompts", "best K", "expected speed-up", ""), rows, right=("best K", "expected speed-up")))
    print_line(f"\nschedule of K for vLLM's own drafts: {json.dumps(tuning.schedule())}")
    for name, (now, then) in tuning.padding.items():
        print_line(f"\n{name} buckets {value(tuning.shapes[name])}: padding overhead {then:.2f}x (now {now:.2f}x)")
    if all(max(speeds[k] for k in speeds if k) <= 1 for speeds in tuning.expected.values()):
        print_line(Verdict("no K is faster than plain decode on this machine with this draft", good=None))


def _best(speeds: Mapping[int, float], built: Sequence[int]) -> tuple[str, str, str]:
    """Return the K that is fastest for a class of prompts, its speed-up, and a note on both."""
    best = max((k for k in speeds if k), key=lambda k: speeds[k])
    notes = [] if best in built else [f"K={best} was not built: estimated"]
    notes += ["slower than plain decode"] if speeds[best] <= 1 else []
    return str(best), f"{speeds[best]:.2f}x", "; ".join(notes)
