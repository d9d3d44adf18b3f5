"""Commands on built artifacts: inspect, verify, diff. They open no weights and run no graphs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pipeline.artifact.manifest import MANIFEST, Manifest, PairManifest, part, read, select
from pipeline.artifact.pulled import PullRecord, pull_record
from pipeline.artifact.signing import has_signature, read_trusted
from pipeline.artifact.verify import verify_files
from pipeline.cli.console import Console
from pipeline.cli.facts import changes_of, fields_of, pulled_fields, signature_state, signature_words
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json
from pipeline.cli.paths import ARTIFACTS, artifact_dir, complete_artifact, file_patterns, is_release
from pipeline.cli.results import print_fields, print_json, print_line, print_table
from pipeline.cli.tables import Verdict
from pipeline.cli.trust import identity_option, issuer_option, policy_of, policy_option
from pipeline.cli.words import counted, size
from pipeline.errors import CorruptError
from pipeline.models.generation import GenerationDefaults
from pipeline.registry.card import body
from pipeline.registry.releases import compare, manifest_of
from pipeline.runtime.open import defaults_of


@click.command(cls=Command)
@click.argument("artifact", shell_complete=complete_artifact)
@click.option("--markdown", is_flag=True, help="Print Markdown tables, for a CI summary or a comment.")
@as_json
def inspect(artifact: str, markdown: bool, json_: bool) -> None:
    """Show what ARTIFACT holds and needs. Of a pulled one also the registry and the promotions of its release.

    Only its manifest, generation_config.json and the record of the pull are read.
    """
    root = artifact_dir(artifact)
    manifest = read(root).manifest
    defaults = defaults_of(root)
    if markdown:
        print_line(body(manifest, {"": manifest}))
    elif json_:
        derived = _derived(manifest, defaults) if isinstance(manifest, PairManifest) else {}
        record = _pull_record(root)
        pulled = {"pulled": record.model_dump(mode="json")} if isinstance(record, PullRecord) else {}
        print_json(manifest.model_dump(mode="json") | derived | pulled)
    else:
        pulled_from = pulled_fields(_pull_record(root))
        print_fields(fields_of(manifest, root, defaults, pulled_from, has_signature=has_signature(root)))


def _pull_record(root: Path) -> PullRecord | str | None:
    """Return the record of the pull; None for an artifact that was not pulled; why it cannot be read."""
    try:
        return pull_record(root, (root / MANIFEST).read_bytes())
    except CorruptError as error:
        return error.what


def _derived(manifest: PairManifest, defaults: GenerationDefaults) -> dict[str, Any]:
    """Return fields for scripts that follow from the manifest's pair and graphs, and the defaults of generation."""
    return {
        "tensor": manifest.ranks, "dtype": manifest.dtype, "weights": manifest.weights,
        "method": manifest.draft_kind.method, "draft_tokens": manifest.draft_tokens, "sampling": manifest.sampling,
        "candidates": manifest.pair.candidates, "shapes": manifest.shapes.model_dump(mode="json"),
        "vocab": manifest.vocab, "eos_ids": manifest.eos_ids,
        "generation": {name: setting for name, setting in asdict(defaults).items() if name != "unsupported"},
        "not_applied": defaults.not_applied(manifest.sampling),
    }  # fmt: skip


@click.command(cls=Command)
@click.argument("artifact", shell_complete=complete_artifact)
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
    """Check the files of ARTIFACT against its manifest. Required signatures are checked as well."""
    root = artifact_dir(artifact)
    policy = policy_of(policy_file, identity, issuer)
    trusted = read_trusted(root, policy)
    signer, manifest = trusted.signer, trusted.artifact.manifest
    patterns = part(manifest, file_patterns(only), str(root))
    verify_files(trusted.artifact, lambda done, total: console.progress("verify", done, total), only=patterns)
    chosen = select(manifest, patterns)
    signature = signature_words(signer, present=has_signature(root))
    if json_:
        facts = {"name": manifest.name, "version": manifest.version, "files": len(chosen)}
        state = signature_state(signer, present=has_signature(root))
        print_json(facts | {"signature": state, "signer": signer and str(signer)})
        return
    files = f"{len(chosen)} of {counted(len(manifest.files), 'file')}" if patterns else counted(len(chosen), "file")
    match = f"{files} match the manifest, {size(sum(entry.size for entry in chosen.values()))}"
    print_line(Verdict(f"{manifest.name} {manifest.version}: {match}; {signature}", good=True))


def _label(name: str, manifest: Manifest) -> str:
    """Return the name of a release with its version or alias, or of an artifact; and the artifact's digest."""
    release = name.rpartition("/")[2] if "@" in name else manifest.name
    return f"{release} {manifest.version}"


def _manifest(name: str, variant: str | None) -> Manifest:
    """Return the manifest of an artifact, or of a release; one without version or alias is `latest`."""
    is_folder = any((place / "manifest.json").is_file() for place in (Path(name), ARTIFACTS / name))
    return manifest_of(name if not is_folder and is_release(name) else str(artifact_dir(name)), variant)


@click.command(cls=Command)
@click.argument("first", shell_complete=complete_artifact)
@click.argument("second", shell_complete=complete_artifact)
@click.option("--variant", help="Variant to compare, if a release has several.")
@as_json
def diff(first: str, second: str, variant: str | None, json_: bool) -> None:
    """Compare two artifacts or releases. The result lists graphs, shapes, toolchain, gates and files that differ."""
    before, after = (_manifest(name, variant) for name in (first, second))
    differences = compare(before, after)
    if json_:
        print_json(differences)
        return
    labels = _label(first, before), _label(second, after)
    shown = changes_of(differences, *labels)
    if not any(any(part.values()) for part in differences.values()):
        equal = f"the manifests of {' and '.join(labels)} are equal"
        print_line(f"no difference: {equal} (files not read: tandem verify)")
    elif shown.rows:
        print_table(shown)
    else:
        print_line(f"{' and '.join(labels)} differ in measured values only; --json has them")
