"""Commands on a recipe: build, plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from pipeline.artifact.manifest import Manifest
from pipeline.artifact.manifest import read as read_manifest
from pipeline.build import BuildReport, BuildSettings, run
from pipeline.cache.local import default_root
from pipeline.cache.remote import Remote
from pipeline.cli.console import Console
from pipeline.cli.facts import GATES
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json, collected
from pipeline.cli.paths import ARTIFACTS, recipe_path
from pipeline.cli.results import print_json, print_line, print_table
from pipeline.cli.tables import Table, Verdict
from pipeline.cli.words import counted, size
from pipeline.plan.estimates import Work
from pipeline.plan.forecast import Cluster, Forecast, GraphForecast, cluster, forecast
from pipeline.plan.history import History
from pipeline.plan.lock import lock_path, pair_configs, read
from pipeline.plan.plan import Plan, make_plan
from pipeline.progress import duration
from pipeline.recipe import Recipe, load
from pipeline.stages.workers import worker_count
from pipeline.validate.prompts import load_prompts, prompts_path


@dataclass(frozen=True)
class BuildOptions:
    """The options of `tandem build`."""

    recipe: str
    out: Path | None
    workers: int | None
    locked: bool
    remote_cache: str | None
    push_cache: bool
    no_validate: bool
    json_: bool

    def remote(self) -> Remote | None:
        """Return the shared cache, if one is given."""
        return Remote(self.remote_cache, "write" if self.push_cache else "read") if self.remote_cache else None


@click.command(cls=Command)
@click.argument("recipe")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the artifact (default: artifacts/NAME).")
@click.option("--workers", type=click.IntRange(1), help="Compile workers (default: from cores and memory).")
@click.option("--locked", is_flag=True, help="Reject sources or toolchains that differ from the recipe's lock.")
@click.option(
    "--remote-cache", envvar="TANDEM_REMOTE_CACHE", help="Shared cache of graphs: a folder or s3://bucket/prefix."
)
@click.option(
    "--push-cache", is_flag=True, envvar="TANDEM_PUSH_CACHE", help="Write compiled graphs to the shared cache."
)
@click.option("--no-validate", is_flag=True, help="Skip the gates; the artifact cannot be published.")
@as_json
@collected(BuildOptions)
def build(console: Console, options: BuildOptions) -> None:
    """Build RECIPE into a validated artifact. RECIPE is a name in recipes/, or a file."""
    path = recipe_path(options.recipe)
    recipe = load(path)
    report = run(BuildSettings(
        recipe=recipe, base=path.parent, out=options.out or ARTIFACTS / recipe.name, workers=options.workers,
        validate=not options.no_validate, locked=options.locked, remote=options.remote(), lock=lock_path(path),
        log=console.log, progress=console.progress,
    ))  # fmt: skip
    if options.json_:
        print_json(asdict(report))
        return
    manifest = read_manifest(report.artifact).manifest
    print_line(Verdict(_built(report, manifest), good=manifest.passed))


def _built(report: BuildReport, manifest: Manifest) -> str:
    """Return the artifact, its directory and its gates' verdict, in one line."""
    graphs = f"{counted(len(report.compiled), 'graph')} compiled, {len(report.reused)} from the cache"
    what = "nothing changed" if report.fresh else graphs
    done = "is up to date" if report.fresh else "built"
    name = f"{manifest.name} {manifest.version}"
    start = f"{name} {done}" if report.fresh else f"{done} {name}"
    times = f"{duration(report.seconds)}{_planned_s(report)}"
    return f"{start} in {report.artifact}: {what}; {GATES[manifest.passed]} ({times})"


def _planned_s(report: BuildReport) -> str:
    """Return the time that was planned for the stages that ran."""
    return f", planned {duration(sum(of.expected_s for of in report.stages.values()))}" if report.stages else ""


@click.command(cls=Command)
@click.argument("recipe")
@click.option("--workers", type=click.IntRange(1), help="Graphs compiled at a time (default: from cores and memory).")
@click.option("--simulate", is_flag=True, help="Show the time to compile on 1, 2, 4, ... up to --workers machines.")
@click.option("--price", type=click.FloatRange(0, 1e6), help="Price of a machine hour, for the cost of --simulate.")
@as_json
def plan(recipe: str, workers: int | None, price: float | None, *, simulate: bool, json_: bool) -> None:
    """Show the graphs of RECIPE, and the time, memory and disk that its build takes. With a lock, no weights are read.

    Times are those of builds that were recorded on this machine, else estimates. The build assumed has an empty cache.
    """
    path = recipe_path(recipe)
    parsed = load(path)
    planned = _planned(path, parsed)
    rules = parsed.validate_
    work = Work(len(load_prompts(prompts_path(rules.prompts, path.parent))), rules.max_new_tokens)
    expected = forecast(planned, work, History(default_root()).builds())
    largest = max(graph.memory_bytes for graph in expected.graphs.values())
    at_once = workers or worker_count(largest, len(planned.graphs))
    fleet = cluster(expected, at_once, price) if simulate else ()
    if json_:
        print_json(
            _data(planned, expected, at_once) | ({"simulated": [asdict(of) for of in fleet]} if simulate else {})
        )
        return
    print_line(
        f"{parsed.name}: {counted(len(planned.graphs), 'graph')} for {counted(planned.pair.models.tp, 'rank')}\n"
    )
    print_table(_graphs(planned, expected))
    print_line("")
    memory_rows = [(name.replace("_", " "), size(size_bytes)) for name, size_bytes in _rank_memory(planned).items()]
    print_table(Table(("memory of a rank", "size"), memory_rows, right=("size",)))
    print_line("")
    print_table(_build(planned, expected, at_once))
    if simulate:
        print_line("")
        print_table(_fleet(fleet))
    print_line(f"\n{expected.basis}")


def _planned(path: Path, recipe: Recipe) -> Plan:
    if lock_path(path).is_file():
        return make_plan(recipe, *pair_configs(recipe, read(lock_path(path)), str(lock_path(path))))
    from pipeline.sources.pair import resolve_pair  # keeps torch out of plans of locked recipes

    cache = default_root() / "sources"
    target, draft = resolve_pair(recipe, base=path.parent, cache=cache, read_tokenizer=False)
    return make_plan(recipe, target.config, draft.config)


def _rank_memory(planned: Plan) -> dict[str, int]:
    return asdict(planned.memory) | {"total": planned.memory.total}


def _data(planned: Plan, expected: Forecast, workers: int) -> dict[str, Any]:
    """Return a plan and its forecast as JSON: seconds and bytes."""
    return {
        "graphs": [spec.name for spec in planned.graphs],
        "memory_bytes_per_rank": _rank_memory(planned),
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


def _build(planned: Plan, expected: Forecast, workers: int) -> Table:
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
