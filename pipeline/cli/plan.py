"""The command that shows what a build of a recipe does and takes, and which buckets fit its traffic: plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from pipeline.artifact.host import processor_flags
from pipeline.cache.local import default_root
from pipeline.cli.console import Console
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json, collected
from pipeline.cli.paths import complete_recipe, recipe_path
from pipeline.cli.plan_buckets import show_buckets
from pipeline.cli.plan_costs import show_costs
from pipeline.cli.results import print_json, print_line, print_table
from pipeline.cli.tables import Table
from pipeline.cli.words import counted, size
from pipeline.errors import InputError
from pipeline.models.config import ModelConfig
from pipeline.plan.estimates import Work, pace_of, saved_by_rings
from pipeline.plan.forecast import Cluster, Forecast, GraphForecast, cluster, forecast
from pipeline.plan.history import History
from pipeline.plan.lock import lock_path, pair_configs, read
from pipeline.plan.plan import Plan, make_plan
from pipeline.progress import duration
from pipeline.recipe import Recipe, load
from pipeline.stages.workers import worker_count
from pipeline.validate.prompts import recipe_prompts


@dataclass(frozen=True)
class PlanOptions:
    """The options of `tandem plan`."""

    recipe: str
    workers: int | None
    simulate: bool
    price: float | None
    traffic: Path | None
    graphs: int | None
    write: bool
    costs: bool
    json_: bool


@click.command(cls=Command)
@click.argument("recipe", shell_complete=complete_recipe)
@click.option("--workers", type=click.IntRange(1), help="Graphs compiled at a time (default: from cores and memory).")
@click.option("--simulate", is_flag=True, help="Show the time to compile on 1, 2, 4, ... up to --workers machines.")
@click.option("--price", type=click.FloatRange(0, 1e6), help="Price of a machine hour, for the cost of --simulate.")
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
@click.option(
    "--costs", is_flag=True, help="Trace Neuron graphs: show products, reads, memory, and a lower bound of time."
)
@as_json
@collected(PlanOptions)
def plan(console: Console, options: PlanOptions) -> None:
    """Show the graphs of RECIPE, and the time, memory and disk that its build takes. With a lock, no weights are read.

    Times are those of builds that were recorded on this machine, else estimates. The build assumed has an empty cache.
    """
    if options.traffic is None and (options.graphs is not None or options.write):
        where = "--write" if options.graphs is None else "--graphs"
        raise InputError("option without --traffic", where=where, fix="add --traffic FILE")
    if options.price is not None and not options.simulate:
        raise InputError("option without --simulate", where="--price", fix="add --simulate")
    path = recipe_path(options.recipe)
    recipe = load(path)
    planned = make_plan(recipe, *_configs(path, recipe))
    if options.costs:
        show_costs(planned, console, as_json=options.json_)
    elif options.traffic is not None:
        budget = options.graphs or len(planned.graphs)
        show_buckets(path, planned, options.traffic, budget, write=options.write, as_json=options.json_)
    else:
        _show_plan(planned, path.parent, options)


def _configs(path: Path, recipe: Recipe) -> tuple[ModelConfig, ModelConfig]:
    """Return the configs of target and draft, from the lock if there is one."""
    if lock_path(path).is_file():
        return pair_configs(recipe, read(lock_path(path)), str(lock_path(path)))
    from pipeline.sources.pair import resolve_pair  # keeps torch out of plans of locked recipes

    cache = default_root() / "sources"
    target, draft = resolve_pair(recipe, base=path.parent, cache=cache, read_tokenizer=False)
    return target.config, draft.config


def _show_plan(planned: Plan, base: Path, options: PlanOptions) -> None:
    rules = planned.recipe.validate_
    work = Work(len(recipe_prompts(planned.recipe, base)), rules.max_new_tokens)
    expected = forecast(planned, work, History(default_root()).builds(), pace_of(processor_flags()))
    largest = max(graph.memory_bytes for graph in expected.graphs.values())
    workers = options.workers or worker_count(largest, len(planned.graphs))
    fleet = cluster(expected, workers, options.price) if options.simulate else ()
    if options.json_:
        simulated = {"simulated": [asdict(of) for of in fleet]} if options.simulate else {}
        print_json(_data(planned, expected, workers) | simulated)
        return
    ranks = counted(planned.pair.models.tp, "rank")
    print_line(f"{planned.recipe.name}: {counted(len(planned.graphs), 'graph')} for {ranks}\n")
    print_table(_graphs(planned, expected))
    print_line("")
    memory_rows = [(name.replace("_", " "), size(size_bytes)) for name, size_bytes in _rank_memory(planned).items()]
    print_table(Table(("memory of a rank", "size"), memory_rows, right=("size",)))
    for ring in planned.pair.rings:
        print_line(f"caches of layers with a window of {ring.window}: {ring.slots} of {planned.pair.length} positions")
    if planned.pair.rings:
        print_line(f"whole caches need {size(saved_by_rings(planned.pair))} more")
    print_line("")
    print_table(_stages(planned, expected, workers))
    if options.simulate:
        print_line("")
        print_table(_fleet(fleet))
    print_line(f"\n{expected.basis}")


def _rank_memory(planned: Plan) -> dict[str, int]:
    return asdict(planned.memory) | {"total": planned.memory.total}


def _data(planned: Plan, expected: Forecast, workers: int) -> dict[str, Any]:
    """Return a plan and its forecast as JSON: seconds and bytes."""
    return {
        "graphs": [spec.name for spec in planned.graphs],
        "memory_bytes_per_rank": _rank_memory(planned),
        "rings": [asdict(ring) for ring in planned.pair.rings],
        "saved_by_rings_bytes_per_rank": saved_by_rings(planned.pair),
        "build": {
            "workers": workers,
            "recorded_builds": expected.builds,
            "total_s": expected.total_s(workers),
            "stages_s": {**expected.stages, "compile": expected.compile_s(workers)},
            "host_memory_bytes": expected.memory_bytes(workers),
            "disk_bytes": planned.disk_bytes(expected.graphs_bytes),
            "artifact_bytes": planned.shards_bytes + expected.graphs_bytes,
        },
        "compile": {name: asdict(graph) for name, graph in expected.graphs.items()},
    }


def _graphs(planned: Plan, expected: Forecast) -> Table:
    headings = ("graph", "time to compile", "memory to compile")
    rows = [
        (spec.name, f"{_about(graph)}{duration(graph.seconds)}", f"{_about(graph)}{size(graph.memory_bytes)}")
        for spec in planned.graphs
        for graph in [expected.graphs[spec.name]]
    ]
    return Table(headings, rows, right=headings[1:])


def _about(graph: GraphForecast) -> str:
    return "" if graph.recorded else "about "


def _stages(planned: Plan, expected: Forecast, workers: int) -> Table:
    """Return what a build without cached graphs takes."""
    rows = [(name, f"about {duration(seconds)}") for name, seconds in expected.stages.items()]
    rows.insert(2, (f"compile, {workers} at a time", f"about {duration(expected.compile_s(workers))}"))
    rows += [
        ("total", f"about {duration(expected.total_s(workers))}"),
        ("memory of the host", f"about {size(expected.memory_bytes(workers))}"),
        ("disk, without sources", f"about {size(planned.disk_bytes(expected.graphs_bytes))}"),
        ("artifact", f"about {size(planned.shards_bytes + expected.graphs_bytes)}"),
    ]
    return Table(("build from nothing", "estimate"), rows, right=("estimate",))


def _fleet(fleet: Sequence[Cluster]) -> Table:
    headings = ("machines", "time to compile", "of ideal", "machine hours", "cost")
    rows = [
        (str(of.machines), duration(of.seconds), f"{of.efficiency:.0%}", f"{of.machine_hours:.2f}",
         "-" if of.cost is None else f"{of.cost:.2f}")
        for of in fleet
    ]  # fmt: skip
    return Table(headings, rows, right=headings)
