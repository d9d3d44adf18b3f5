"""The command that builds a recipe: build."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import click

from pipeline.artifact.manifest import Manifest
from pipeline.artifact.manifest import read as read_manifest
from pipeline.build import BuildReport, BuildSettings, run_all
from pipeline.cache.remote import Remote
from pipeline.cli.console import Console
from pipeline.cli.facts import GATES
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json, collected
from pipeline.cli.paths import ARTIFACTS, complete_recipe, recipe_path
from pipeline.cli.results import print_json, print_line
from pipeline.cli.tables import Verdict
from pipeline.cli.words import counted
from pipeline.errors import InputError
from pipeline.plan.lock import lock_path
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
    send_weights: bool
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
            executor=self.executor, send_weights=self.send_weights, log=console.log, progress=console.progress,
        )  # fmt: skip


@click.command(cls=Command)
@click.argument("recipes", shell_complete=complete_recipe, nargs=-1, required=True, metavar="RECIPE...")
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
@click.option(
    "--send-weights", is_flag=True,
    help="Send weights to the recipe's registries while graphs compile and gates run; publish then sends the rest.",
)  # fmt: skip
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
    times = f"{duration(report.seconds)}{_planned_s(report)}"
    return f"{start} in {report.artifact}: {what}; {GATES[manifest.passed]} ({times})"


def _planned_s(report: BuildReport) -> str:
    """Return the time that was planned for the stages that ran."""
    return f", planned {duration(sum(of.expected_s for of in report.stages.values()))}" if report.stages else ""
