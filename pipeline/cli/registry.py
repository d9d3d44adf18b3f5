"""Commands that read and tend a registry: pull, ls, gc."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import click

from pipeline.cli.console import MIB, Console
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json, collected
from pipeline.cli.paths import file_patterns
from pipeline.cli.results import print_json, print_result
from pipeline.cli.trust import identity_option, issuer_option, policy_of, policy_option
from pipeline.registry.pull import Selection
from pipeline.registry.pull import pull as pull_release
from pipeline.registry.releases import collect, list_releases


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
    """Pull a release and verify it. REFERENCE is REGISTRY/NAME@VERSION-or-ALIAS."""
    out = pull_release(
        options.reference, options.directory, select=Selection(file_patterns(options.only), options.variant),
        policy=policy_of(options.policy_file, options.identity, options.issuer), offline=options.offline,
        progress=console.transfer("pull"),
    )  # fmt: skip
    print_result({"artifact": out}, str(out), as_json=options.json_)


@click.command(cls=Command)
@click.argument("url")
@as_json
@click.pass_obj
def ls(console: Console, url: str, json_: bool) -> None:
    """List the releases of a registry. URL/NAME@ lists the releases of one name."""
    registry, _, name = url.rpartition("/")
    releases = list_releases(registry, name.rstrip("@")) if name.endswith("@") else list_releases(url)
    if not releases:
        console.log(f"no releases in {url}")
    if json_:
        print_json([asdict(release) for release in releases])
        return
    for release in releases:
        aliases = f"  <- {', '.join(release.aliases)}" if release.aliases else ""
        variants = f"  [{', '.join(release.variants)}]" if release.variants else ""
        size = f"{release.size_bytes / MIB:,.1f} MiB"
        click.echo(f"{release.name}@{release.version}  {release.created}  {size}{variants}{aliases}")


@click.command(cls=Command)
@click.argument("url")
@click.option("--dry-run", is_flag=True, help="Show what would be removed.")
@as_json
def gc(url: str, dry_run: bool, json_: bool) -> None:
    """Remove unused blobs from a registry. Releases and aliases are never removed."""
    removed = collect(url, dry_run=dry_run)
    verb = "would remove" if dry_run else "removed"
    line = f"{verb} {removed.blobs} blobs, {removed.size_bytes / MIB:,.1f} MiB; {removed.kept} are in use"
    print_result(asdict(removed), line, as_json=json_)
