"""Commands on built artifacts: inspect, verify, diff. They open no weights and run no graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.artifact.manifest import PairManifest, part, read, select
from pipeline.artifact.signing import check_artifact
from pipeline.artifact.verify import verify as verify_files
from pipeline.cli.console import MIB, Console, print_fields, print_json, print_result
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json
from pipeline.cli.paths import artifact_dir, file_patterns
from pipeline.cli.trust import identity_option, issuer_option, policy_of, policy_option
from pipeline.registry.card import body, facts
from pipeline.registry.releases import compare, manifest_of

VERDICTS = {True: "passed", False: "FAILED", None: "not validated"}


@click.command(cls=Command)
@click.argument("artifact")
@click.option("--markdown", is_flag=True, help="Print Markdown tables, for a CI summary or a comment.")
@as_json
def inspect(artifact: str, markdown: bool, json_: bool) -> None:
    """Show what ARTIFACT holds and needs. Only its manifest is read."""
    root = artifact_dir(artifact)
    manifest = read(root).manifest
    if markdown:
        click.echo(body(manifest, {"": manifest}))
    elif json_:
        derived = _derived(manifest) if isinstance(manifest, PairManifest) else {}
        print_json(manifest.model_dump(mode="json") | derived)
    elif isinstance(manifest, PairManifest):
        print_fields(_fields(manifest, root), width=12)
    else:
        print_fields(facts(manifest), width=16)


def _derived(manifest: PairManifest) -> dict[str, Any]:
    """What scripts ask for that a manifest has only as facts of its pair and its graphs."""
    return {
        "tensor": manifest.ranks, "dtype": manifest.dtype, "weights": manifest.weights,
        "method": manifest.draft_kind.method, "draft_tokens": manifest.draft_tokens, "sampling": manifest.sampling,
        "candidates": manifest.pair.candidates, "shapes": manifest.shapes.model_dump(mode="json"),
        "vocab": manifest.vocab, "eos_ids": manifest.eos_ids,
    }  # fmt: skip


def _fields(manifest: PairManifest, root: Path) -> dict[str, Any]:
    return {
        "artifact": f"{manifest.name} {manifest.version}", "path": root, "created": manifest.created,
        "needs": manifest.requires, "toolchain": manifest.toolchain, "ranks": manifest.ranks,
        "dtype": manifest.dtype + (f", weights {manifest.weights}" if manifest.weights else ""),
        "K": list(manifest.draft_tokens), "sampling": list(manifest.sampling),
        "candidates": manifest.pair.candidates or "all", "graphs": len(manifest.graphs),
        "files": f"{len(manifest.files)}, {manifest.size_bytes / MIB:.1f} MiB", "gates": VERDICTS[manifest.passed],
    }  # fmt: skip


@click.command(cls=Command)
@click.argument("artifact")
@click.option(
    "--only", multiple=True, help="Check only this part, as pulled with `tandem pull --only`; may be repeated."
)
@identity_option
@issuer_option
@policy_option
@as_json
@click.pass_obj
def verify(
    console: Console, artifact: str, only: tuple[str, ...], identity: str | None, issuer: str | None,
    policy_file: Path | None, json_: bool,
) -> None:  # fmt: skip
    """Check the files of ARTIFACT against its manifest. Required signatures are checked, too."""
    root = artifact_dir(artifact)
    policy = policy_of(policy_file, identity, issuer)
    if policy is not None:
        check_artifact(root, policy)
    patterns = part(read(root).manifest, file_patterns(only), str(root))
    manifest = verify_files(root, lambda done, total: console.progress("verify", done, total), only=patterns).manifest
    count = len(select(manifest, patterns))
    data = {"name": manifest.name, "version": manifest.version, "files": count, "signed": policy is not None}
    print_result(data, f"{manifest.name} {manifest.version}: {count} files match", as_json=json_)


@click.command(cls=Command)
@click.argument("first")
@click.argument("second")
@click.option("--variant", help="Variant to compare, of releases that have several.")
@as_json
def diff(first: str, second: str, variant: str | None, json_: bool) -> None:
    """Compare two artifacts or releases. The result lists graphs, shapes, toolchain, gates and files that differ."""
    before, after = (manifest_of(name if "@" in name else str(artifact_dir(name)), variant) for name in (first, second))
    differences = compare(before, after)
    if json_:
        print_json(differences)
        return
    for how, names in differences["graphs"].items():
        click.echo("".join(f"graph {how}: {name}\n" for name in names), nl=False)
    for field, values in differences["fields"].items():
        click.echo(f"{field}: {values['from']} -> {values['to']}")
    for top, changes in differences["files"].items():
        click.echo(f"{top}: " + ", ".join(f"{len(names)} {how}" for how, names in changes.items()))
