"""Commands on a recipe: build, plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import click

from pipeline.artifact.manifest import Manifest
from pipeline.artifact.manifest import read as read_manifest
from pipeline.build import BuildReport, BuildSettings, run_all
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
from pipeline.errors import InputError
from pipeline.plan.lock import lock_path, pair_configs, read
from pipeline.plan.plan import Plan, make_plan
from pipeline.progress import duration
from pipeline.recipe import load


@dataclass(frozen=True)
class BuildOptions:
    """The options of `tandem build`."""

    recipes: tuple[str, ...]
    out: Path | None
    executor: str
    workers: int | None
    locked: bool
    remote_cache: str | None
    push_cache: bool
    no_validate: bool
    json_: bool

    def remote(self) -> Remote | None:
        """Return the shared cache, if one is given."""
        return Remote(self.remote_cache, "write" if self.push_cache else "read") if self.remote_cache else None

    def builds(self, console: Console) -> list[BuildSettings]:
        """Return the build of each recipe.

        Raises:
            InputError: one output for several recipes.

        """
        if self.out is not None and len(self.recipes) > 1:
            fix = "omit --out: each recipe has its own directory in artifacts/"
            raise InputError(f"one directory for {len(self.recipes)} recipes", where="--out", fix=fix)
        return [self._build(recipe_path(name), console) for name in self.recipes]

    def _build(self, path: Path, console: Console) -> BuildSettings:
        recipe = load(path)
        return BuildSettings(
            recipe=recipe, base=path.parent, out=self.out or ARTIFACTS / recipe.name, workers=self.workers,
            validate=not self.no_validate, locked=self.locked, remote=self.remote(), lock=lock_path(path),
            executor=self.executor, log=console.log, progress=console.progress,
        )  # fmt: skip


@click.command(cls=Command)
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the artifact (default: artifacts/NAME).")
@click.option(
    "--executor", metavar="local|ray[://HOST:PORT]", default="local", show_default=True,
    help="Where graphs are compiled: workers of this machine, or the nodes of a Ray cluster.",
)  # fmt: skip
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
    """Build RECIPE into a validated artifact. RECIPE is a name in recipes/, or a file.

    The graphs of several recipes are compiled through one queue; `--json` then prints a list.
    """
    reports = run_all(options.builds(console))
    if options.json_:
        shown = [asdict(report) for report in reports]
        print_json(shown if len(shown) > 1 else shown[0])
        return
    for report in reports:
        manifest = read_manifest(report.artifact).manifest
        print_line(Verdict(_built(report, manifest), good=manifest.passed))


def _built(report: BuildReport, manifest: Manifest) -> str:
    """Return the artifact, its directory and its gates' verdict, in one line."""
    graphs = f"{counted(len(report.compiled), 'graph')} compiled, {len(report.reused)} from the cache"
    what = "nothing changed" if report.fresh else graphs
    done = "is up to date" if report.fresh else "built"
    name = f"{manifest.name} {manifest.version}"
    start = f"{name} {done}" if report.fresh else f"{done} {name}"
    return f"{start} in {report.artifact}: {what}; {GATES[manifest.passed]} ({duration(report.seconds)})"


@click.command(cls=Command)
@click.argument("recipe")
@as_json
def plan(recipe: str, json_: bool) -> None:
    """Show the graphs, memory and estimated compile times of RECIPE. With a lock, no weights are read."""
    path = recipe_path(recipe)
    parsed = load(path)
    if lock_path(path).is_file():
        configs = pair_configs(parsed, read(lock_path(path)), str(lock_path(path)))
    else:
        from pipeline.sources.pair import resolve_pair  # keeps torch out of plans of locked recipes

        cache = default_root() / "sources"
        target, draft = resolve_pair(parsed, base=path.parent, cache=cache, read_tokenizer=False)
        configs = target.config, draft.config
    planned = make_plan(parsed, *configs)
    memory = asdict(planned.memory) | {"total": planned.memory.total}
    if json_:
        print_json({"graphs": [spec.name for spec in planned.graphs], "memory_bytes_per_rank": memory})
        return
    print_line(
        f"{parsed.name}: {counted(len(planned.graphs), 'graph')} for {counted(planned.pair.models.tp, 'rank')}\n"
    )
    print_table(_graphs(planned))
    print_line("")
    memory_rows = [(name.replace("_", " "), size(size_bytes)) for name, size_bytes in memory.items()]
    print_table(Table(("memory of a rank", "size"), memory_rows, right=("size",)))
    core_s = sum(planned.compile_seconds(spec) for spec in planned.graphs)
    files = f"about {size(planned.artifact_bytes)} of files"
    print_line(f"\nto compile: about {duration(core_s)} of one core if no graph is cached; {files} (estimates)")


def _graphs(planned: Plan) -> Table:
    headings = ("graph", "time to compile", "memory to compile")
    rows = [
        (spec.name, f"about {duration(planned.compile_seconds(spec))}", f"about {size(planned.compile_memory(spec))}")
        for spec in planned.graphs
    ]
    return Table(headings, rows, right=headings[1:])
