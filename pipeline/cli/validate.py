"""Commands of validation: validate, report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from pipeline.artifact.manifest import read, read_pair
from pipeline.artifact.signing import check_artifact
from pipeline.cli.console import Console
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json, recipe_option
from pipeline.cli.paths import RECIPES, artifact_dir, check_not_building, complete_artifact
from pipeline.cli.results import print_fields, print_json, print_line, print_table
from pipeline.cli.tables import Table, Verdict
from pipeline.cli.trust import policy_of, policy_option
from pipeline.cli.words import counted
from pipeline.errors import InputError
from pipeline.files.atomic import write_atomic
from pipeline.recipe import load
from pipeline.validate.report import compare, summaries
from pipeline.validate.report import schema as reports
from pipeline.validate.report.schema import Gate, Report

RECIPE = "recipe.yaml"
"""File of the recipe in an artifact."""


@click.command(cls=Command)
@click.argument("artifact", shell_complete=complete_artifact)
@recipe_option
@click.option("--on-device", is_flag=True, help="Fail unless run on the target accelerator.")
@policy_option
@as_json
@click.pass_obj
def validate(
    console: Console, artifact: str, recipe_file: Path | None, on_device: bool, policy_file: Path | None, json_: bool
) -> None:  # fmt: skip
    """Run the validation gates on ARTIFACT again. The reports in it are replaced."""
    from pipeline.validate.run import validate_artifact  # keeps torch out of `tandem report`

    root = artifact_dir(artifact)
    device = read(root).manifest.requires.get("device", "cpu")
    if on_device and device == "cpu":
        raise InputError("the artifact runs on a CPU", where=str(root), fix="omit --on-device")
    if (policy := policy_of(policy_file)) is not None:
        check_artifact(root, policy)
    validate_artifact(root, recipe_file.parent if recipe_file else RECIPES, console.log, console.progress)
    manifest = read_pair(root).manifest
    if json_:
        print_json(manifest.validation)
        return
    gates = ", ".join((manifest.validation or {}).get("gates", {}))
    print_line(
        Verdict(f"{manifest.name} {manifest.version}: passed {gates}; reports are in {root / 'reports'}", good=True)
    )


@click.command(cls=Command)
@click.argument("artifacts", shell_complete=complete_artifact, nargs=-1)
@click.option("--schema", "schema_", is_flag=True, help="Print the JSON Schema of reports/parity.json.")
@click.option("--out", type=click.Path(path_type=Path), help="File of the comparison page (default: compare.html).")
@click.option("--markdown", is_flag=True, help="Print Markdown tables, for a CI summary or a comment.")
@as_json
def report(artifacts: tuple[str, ...], schema_: bool, out: Path | None, markdown: bool, json_: bool) -> None:
    """Show one parity report, or compare two. A comparison shows which changes exceed the noise."""
    if schema_:
        print_json(reports.schema())
        return
    if len(artifacts) not in (1, 2):
        raise InputError(f"{len(artifacts)} artifacts", where="report", fix="name one artifact, or two to compare")
    roots = [artifact_dir(name) for name in artifacts]
    for root in roots:
        if not (root / "reports" / "parity.json").is_file():
            check_not_building(root)
    first, *others = map(reports.load, roots)
    if others:
        _compare(first, others[0], out or Path("compare.html"), json_)
    elif json_:
        print_json(summaries.summary(first))
    elif markdown:
        click.echo(summaries.markdown(first), nl=False)
    else:
        _show(first, roots[0])


def _show(whole: Report, root: Path) -> None:
    verdict = "passed" if whole.passed else "FAILED"
    print_line(Verdict(f"{whole.name} {whole.version}: validation {verdict}\n", good=whole.passed))
    rows = [_gate_row(gate) for gate in whole.gates]
    columns = 3 if any(gate.findings for gate in whole.gates) else 2
    print_table(Table(("gate", "verdict", "findings")[:columns], [row[:columns] for row in rows]))
    print_line("")
    floor = load(root / RECIPE).floor if (root / RECIPE).is_file() else None
    print_fields({label: _limited(label, shown, floor) for label, shown in summaries.headlines(whole)})


def _limited(label: str, shown: str, floor: float | None) -> str:
    """Return a measurement, tokens per step with the limit that the recipe sets."""
    return f"{shown} (limit: at least {floor:g})" if floor and label.startswith("tokens per step") else shown


def _gate_row(gate: Gate) -> tuple[str, Verdict, str]:
    more = f" (and {len(gate.findings) - 1} more)" if len(gate.findings) > 1 else ""
    return gate.name, Verdict("passed" if gate.passed else "FAILED", gate.passed), "".join(gate.findings[:1]) + more


def _compare(before: Report, after: Report, page: Path, json_: bool) -> None:
    changes = compare.compare(before, after)
    write_atomic(page, compare.render(before, after).encode())
    if json_:
        print_json([asdict(change) for change in changes])
        return
    judged = {"worse": False, "better": True}
    rows = [
        (change.what, summaries.show(change.before), summaries.show(change.after),
         Verdict(change.judgement, judged.get(change.judgement)))
        for change in changes
    ]  # fmt: skip
    headings = ("measurement", before.version, f"{after.version} ", "judgement")
    print_table(Table(headings, rows, right=headings[1:3]))
    worse = sum(change.worse for change in changes)
    line = f"{counted(worse, 'measurement')} worse beyond noise" if worse else "nothing is worse beyond noise"
    print_line(Verdict(f"\n{line}; page: {page}", good=not worse))
