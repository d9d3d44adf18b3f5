"""Commands that read and clean a registry: pull, ls, gc."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from pipeline.cli.console import Console
from pipeline.cli.facts import signature_state, signature_words
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json, collected
from pipeline.cli.paths import file_patterns
from pipeline.cli.results import print_json, print_result, print_table
from pipeline.cli.tables import Table
from pipeline.cli.trust import identity_option, issuer_option, policy_of, policy_option
from pipeline.cli.words import counted, moment, size, value
from pipeline.registry.pull import Pulled, Selection, pull_release
from pipeline.registry.releases import Listed, collect, has_names, list_releases, no_releases, parse_reference


@dataclass(frozen=True)
class PullOptions:
    """The options of `tandem pull`."""

    reference: str
    directory: Path | None
    only: tuple[str, ...]
    variant: str | None
    offline: bool
    identity: str | None
    issuer: str | None
    policy_file: Path | None
    json_: bool


@click.command(cls=Command)
@click.argument("reference")
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@click.option("--only", multiple=True,
              help="Part of the files: graphs, weights, tokenizer, reports or a pattern; may be repeated.")  # fmt: skip
@click.option("--variant", help="Variant of the release (default: the one for this host).")
@click.option("--offline", is_flag=True, help="Use only the local cache.")
@identity_option
@issuer_option
@policy_option
@as_json
@collected(PullOptions)
def pull(console: Console, options: PullOptions) -> None:
    """Pull a release and verify it. REFERENCE is REGISTRY/NAME@VERSION-or-ALIAS.

    REGISTRY/NAME is short for REGISTRY/NAME@latest. The folder of the artifact is printed on stdout.
    """
    pulled = pull_release(
        options.reference, options.directory, select=Selection(file_patterns(options.only), options.variant),
        policy=policy_of(options.policy_file, options.identity, options.issuer), offline=options.offline,
        progress=console.transfer("pull"),
    )  # fmt: skip
    wanted = parse_reference(options.reference).wanted
    console.log(_pulled_words(pulled, wanted))
    print_result(_pulled_data(pulled, wanted), str(pulled.path), as_json=options.json_)


def _pulled_data(pulled: Pulled, wanted: str) -> dict[str, Any]:
    return {
        "artifact": pulled.path, "name": pulled.name, "version": pulled.version, "digest": pulled.digest,
        "alias": wanted if wanted != pulled.version else None, "files": pulled.files, "size_bytes": pulled.size_bytes,
        "signature": signature_state(pulled.signer, present=pulled.has_signature), "signer": pulled.signer,
    }  # fmt: skip


def _pulled_words(pulled: Pulled, wanted: str) -> str:
    """Return the pulled artifact, in one line."""
    alias = f" ({wanted})" if wanted != pulled.version else ""
    digest = f" {value(pulled.digest)}" if value(pulled.digest) != pulled.version else ""
    files = f"{counted(pulled.files, 'file')}, {size(pulled.size_bytes)}"
    signature = signature_words(pulled.signer, present=pulled.has_signature)
    return f"pulled {pulled.name}@{pulled.version}{alias}{digest}: {files}, {signature}"


@click.command(cls=Command)
@click.argument("url")
@as_json
@click.pass_obj
def ls(console: Console, url: str, json_: bool) -> None:
    """List the releases of a registry. URL/NAME lists the releases of one name.

    A release has the digest of its artifact, which `tandem inspect` shows, or of each variant. "signed" means that a
    signature exists; `pull` and `verify` check the signer, with --require-signature or --policy.
    """
    releases = _releases(url)
    for damaged in (release for release in releases if release.damage):
        console.log(f"warning: damaged release in {url}: {damaged.damage}; to replace it, publish another version")
    if json_:
        print_json([asdict(release) for release in releases])
    else:
        print_table(_listing(releases))


def _releases(url: str) -> list[Listed]:
    """Return the releases of a registry, or of one name if the URL ends with a name that has releases.

    Raises:
        InputError: there are none.

    """
    registry, _, last = url.rstrip("/").rpartition("/")
    name = last.removesuffix("@")
    is_name = bool(registry) and not registry.endswith(":/")
    found = [] if last.endswith("@") else _listed(url)
    found = found or (_listed(registry, name) if is_name else [])
    if found:
        return found
    raise no_releases(registry, name) if is_name and has_names(registry) else no_releases(url)


def _listed(url: str, name: str | None = None) -> list[Listed]:
    """Return the releases of a registry; none where the folder does not exist."""
    return list_releases(url, name) if has_names(url) else []


def _listing(releases: Sequence[Listed]) -> Table:
    headings = ("release", "digest", "built (UTC)", "size", "signed", "aliases", "variants")
    rows = [
        (
            f"{each.name}@{each.version}", "damaged" if each.damage else value(each.digests),
            moment(each.created), "" if each.damage else size(each.size_bytes),
            "" if each.damage else "yes" if each.has_signature else "no", ", ".join(each.aliases),
            ", ".join(each.variants),
        )
        for each in releases
    ]  # fmt: skip
    return Table(headings, rows, right=("size",), whole=headings[:2])


@click.command(cls=Command)
@click.argument("url")
@click.option("--dry-run", is_flag=True, help="Show what would be removed.")
@as_json
def gc(url: str, dry_run: bool, json_: bool) -> None:
    """Remove unused blobs from a registry. Releases and aliases are never removed."""
    removed = collect(url, dry_run=dry_run)
    verb = "would remove" if dry_run else "removed"
    blobs = f"{counted(removed.blobs, 'unused blob')}, {size(removed.size_bytes)}"
    line = f"{verb} {blobs}; {counted(removed.kept, 'blob')} kept"
    print_result(asdict(removed), line, as_json=json_)
