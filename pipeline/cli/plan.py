"""The command that shows what a build of a recipe would do, and which buckets fit its traffic: plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from pipeline.cache.local import default_root
from pipeline.cli.console import Console
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json, collected
from pipeline.cli.paths import recipe_path
from pipeline.cli.results import print_json, print_line, print_table
from pipeline.cli.tables import Table
from pipeline.cli.words import counted, size, value
from pipeline.errors import InputError
from pipeline.measure.traffic import read_traffic
from pipeline.measure.traffic_buckets import BucketSet, Proposal, propose, room_of
from pipeline.models.config import ModelConfig
from pipeline.plan.lock import lock_path, pair_configs, read
from pipeline.plan.plan import Plan, make_plan
from pipeline.progress import duration
from pipeline.recipe import Recipe, load
from pipeline.recipe.write import Change, change_recipe


@dataclass(frozen=True)
class PlanOptions:
    """The options of `tandem plan`."""

    recipe: str
    traffic: Path | None
    graphs: int | None
    write: bool
    json_: bool


@click.command(cls=Command)
@click.argument("recipe")
@click.option(
    "--traffic",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Log or histogram of prompt and answer lengths: show the buckets that pad these requests least.",
)
@click.option(
    "--graphs",
    type=click.IntRange(1),
    help="With --traffic: maximum number of graphs (default: the number with the recipe's buckets).",
)
@click.option("--write", is_flag=True, help="With --traffic: write the buckets to the recipe.")
@as_json
@collected(PlanOptions)
def plan(console: Console, options: PlanOptions) -> None:  # noqa: ARG001 - every command gets the console
    """Show the graphs, memory and estimated compile times of RECIPE. With a lock, no weights are read."""
    if options.traffic is None and (options.graphs is not None or options.write):
        where = "--write" if options.graphs is None else "--graphs"
        raise InputError("option without --traffic", where=where, fix="add --traffic FILE")
    path = recipe_path(options.recipe)
    recipe = load(path)
    planned = make_plan(recipe, *_configs(path, recipe))
    if options.traffic is None:
        _show_plan(planned, as_json=options.json_)
    else:
        _plan_buckets(path, planned, options.traffic, options)


def _configs(path: Path, recipe: Recipe) -> tuple[ModelConfig, ModelConfig]:
    """Return the configs of target and draft, from the lock if there is one."""
    if lock_path(path).is_file():
        return pair_configs(recipe, read(lock_path(path)), str(lock_path(path)))
    from pipeline.sources.pair import resolve_pair  # keeps torch out of plans of locked recipes

    cache = default_root() / "sources"
    target, draft = resolve_pair(recipe, base=path.parent, cache=cache, read_tokenizer=False)
    return target.config, draft.config


def _show_plan(planned: Plan, *, as_json: bool) -> None:
    memory = asdict(planned.memory) | {"total": planned.memory.total}
    if as_json:
        print_json({"graphs": [spec.name for spec in planned.graphs], "memory_bytes_per_rank": memory})
        return
    ranks = counted(planned.pair.models.tp, "rank")
    print_line(f"{planned.recipe.name}: {counted(len(planned.graphs), 'graph')} for {ranks}\n")
    print_table(_graphs(planned))
    print_line("")
    memory_rows = [(name.replace("_", " "), size(size_bytes)) for name, size_bytes in memory.items()]
    print_table(Table(("memory of a rank", "size"), memory_rows, right=("size",)))
    files = f"about {size(planned.artifact_bytes)} of files"
    compiling = f"about {duration(_compile_seconds(planned))} of one core if no graph is cached"
    print_line(f"\nto compile: {compiling}; {files} (estimates)")


def _compile_seconds(planned: Plan) -> float:
    return sum(planned.compile_seconds(spec) for spec in planned.graphs)


def _graphs(planned: Plan) -> Table:
    headings = ("graph", "time to compile", "memory to compile")
    rows = [
        (spec.name, f"about {duration(planned.compile_seconds(spec))}", f"about {size(planned.compile_memory(spec))}")
        for spec in planned.graphs
    ]
    return Table(headings, rows, right=headings[1:])


def _plan_buckets(path: Path, planned: Plan, traffic: Path, options: PlanOptions) -> None:
    """Show the buckets that pad the requests of a file least, and write them to the recipe if asked to."""
    budget = options.graphs or len(planned.graphs)
    proposal = propose(planned, read_traffic(traffic, room_of(planned)), budget)
    buckets = {kind: list(of.buckets) for kind, of in proposal.proposed.items()}
    changed = planned.recipe.model_copy(
        update={"shapes": planned.recipe.shapes.model_copy(update={k: tuple(of) for k, of in buckets.items()})}
    )
    replanned = make_plan(changed, planned.pair.target, planned.pair.draft)
    if options.write:
        edit = f"write to `shapes`: prefill: {buckets['prefill']}, kv: {buckets['kv']}"
        change_recipe(path, [Change("shapes", kind, of, behind=kind) for kind, of in buckets.items()], edit)
    if options.json_:
        print_json(_data(proposal, planned, replanned, budget))
        return
    print_table(_compared(proposal, planned, replanned))
    print_line(f"\n{counted(proposal.requests, 'request')} in {traffic}; at most {counted(budget, 'graph')}")
    if proposal.rejected:
        print_line(f"{counted(proposal.rejected, 'prompt')} longer than the largest prefill bucket of the recipe")
    now, then = (duration(_compile_seconds(each)) for each in (planned, replanned))
    print_line(f"to compile: now about {now}, proposed about {then} of one core if no graph is cached (estimates)")
    done = f"written to {path}; lock and build the recipe again"
    print_line(done if options.write else "--write writes the proposed buckets to the recipe")


def _compared(proposal: Proposal, planned: Plan, replanned: Plan) -> Table:
    rows = []
    for kind, now in proposal.now.items():
        for when, of in (("now", now), ("proposed", proposal.proposed[kind])):
            padding = "unknown" if of.padding is None else f"{of.padding:.2f}x"
            rows.append((kind, when, value(of.buckets), padding, str(of.graphs)))
    for when, each in (("now", planned), ("proposed", replanned)):
        rows.append(("all", when, "", "", str(len(each.graphs))))
    return Table(("kind", "", "buckets", "padding", "graphs"), rows, right=("padding", "graphs"))


def _data(proposal: Proposal, planned: Plan, replanned: Plan, budget: int) -> dict[str, Any]:
    """Return a proposal as plain data."""

    def sets(of: dict[str, BucketSet], plan: Plan) -> dict[str, Any]:
        kinds = {kind: asdict(each) for kind, each in of.items()}
        return {**kinds, "graphs": len(plan.graphs), "compile_core_seconds": _compile_seconds(plan)}

    return {
        "requests": proposal.requests,
        "rejected_by_recipe": proposal.rejected,
        "graph_budget": budget,
        "kv_position_cost_in_prompt_tokens": proposal.position_cost,
        "now": sets(proposal.now, planned),
        "proposed": sets(proposal.proposed, replanned),
    }
