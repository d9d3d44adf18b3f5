"""Commands on a recipe: build, plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import click

from pipeline.build import BuildSettings, run
from pipeline.cache.local import default_root
from pipeline.cache.remote import Remote
from pipeline.cli.console import MIB, Console
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json, collected
from pipeline.cli.paths import ARTIFACTS, recipe_path
from pipeline.cli.results import print_json
from pipeline.plan.lock import lock_path, pair_configs, read
from pipeline.plan.plan import make_plan
from pipeline.recipe import load


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
    elif report.fresh:
        click.echo(f"{report.artifact}: nothing changed ({report.seconds:.2f} s)")
    else:
        counts = f"{len(report.compiled)} graphs compiled, {len(report.reused)} from the cache"
        click.echo(f"{report.artifact}: {counts} ({report.seconds:.0f} s)")


@click.command(cls=Command)
@click.argument("recipe")
@as_json
def plan(recipe: str, json_: bool) -> None:
    """Show the graphs and the memory per rank of RECIPE. With a lock, no weights are read."""
    path = recipe_path(recipe)
    parsed = load(path)
    if lock_path(path).is_file():
        configs = pair_configs(parsed, read(lock_path(path)), str(lock_path(path)))
    else:
        from pipeline.sources.pair import resolve_pair  # keeps torch out of plans of locked recipes

        target, draft = resolve_pair(parsed, base=path.parent, cache=default_root() / "sources")
        configs = target.config, draft.config
    planned = make_plan(parsed, *configs)
    memory = asdict(planned.memory) | {"total": planned.memory.total}
    if json_:
        print_json({"graphs": [spec.name for spec in planned.graphs], "memory_bytes_per_rank": memory})
        return
    click.echo(f"{parsed.name}: {len(planned.graphs)} graphs, {planned.pair.models.tp} rank(s)")
    for spec in planned.graphs:
        click.echo(f"  {spec.name}")
    for name, size_bytes in memory.items():
        click.echo(f"  {name.replace('_', ' '):<16}{size_bytes / MIB:>12,.1f} MiB per rank")
