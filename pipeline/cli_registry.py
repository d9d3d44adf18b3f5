"""The command line of registries: publish, pull, ls, diff, alias, gc, sign, verify, cache. Prints, like `cli.py`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pipeline.artifact import Progress
    from pipeline.cache import Cache
    from pipeline.remote_cache import RemoteCache
    from pipeline.signing import Policy

MIB = 1 << 20
as_json = click.option("--json", "json_", is_flag=True, help="Print JSON for machines.")
registry = click.option("--to", "url", default="artifacts/registry", show_default=True,
                        help="Registry: a folder, s3://bucket/prefix, or hf://org.")  # fmt: skip
_artifact_dir: Callable[[str], Path]


def add_to(main: click.Group, artifact_dir: Callable[[str], Path]) -> None:
    """Add the commands; `artifact_dir` finds an artifact by path or name."""
    global _artifact_dir
    _artifact_dir = artifact_dir
    for command in (publish, pull, ls, diff, gc, sign, verify, alias, cache):
        main.add_command(command)


def _json(data: Any) -> None:
    click.echo(json.dumps(data, indent=1, default=str))


@contextmanager
def _bar(title: str, quiet: bool) -> Iterator[Progress]:
    """A bar with bytes and time left on a terminal, a line at every tenth otherwise, on stderr."""
    if quiet:
        yield lambda _done, _total: None
        return
    if not sys.stderr.isatty():
        yield _lines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = ("{task.description}", BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _lines(title: str) -> Progress:
    import time

    started, shown = time.monotonic(), 0

    def show(done: int, total: int) -> None:
        nonlocal shown
        tenth = 10 * done // max(total, 1)
        if tenth > shown:
            shown, took = tenth, time.monotonic() - started
            left = took * (total - done) / max(done, 1)
            click.echo(f"{title}: {done / MIB:,.1f} of {total / MIB:,.1f} MiB, {left:.0f} s left", err=True)

    return show


@click.command()
@click.argument("artifacts", nargs=-1, required=True)
@registry
@click.option("--alias", "aliases", multiple=True, help="Point this alias at the release.")
@click.option("--version", "version", help="Name of the release (default: from its content).")
@click.option("--sign", "key", type=click.Path(path_type=Path), help="Sign with this private key before.")
@click.option("--keyless", is_flag=True, help="Sign with the identity of this CI job before.")
@click.option("--dry-run", is_flag=True, help="Show what would be sent.")
@as_json
@click.pass_obj
def publish(
    obj: dict[str, Any], artifacts: tuple[str, ...], url: str, aliases: tuple[str, ...], version: str | None,
    key: Path | None, keyless: bool, dry_run: bool, json_: bool,
) -> None:  # fmt: skip
    """Publish ARTIFACTS as an immutable release; several of one recipe (chips, ranks) become its variants."""
    from pipeline.publish import publish as send

    roots = [_artifact_dir(name) for name in artifacts]
    if (key or keyless) and not dry_run:
        for root in roots:
            _sign(root, key)
    with _bar("publish", obj["quiet"] or dry_run) as progress:
        release = send(roots, url, aliases, version=version, dry_run=dry_run, progress=progress)
    if json_:
        _json(asdict(release))
        return
    verb = "would send" if dry_run else "sent"
    size = release.sent_bytes / MIB
    click.echo(f"{release.name}@{release.version}: {verb} {release.sent} blobs, {size:.1f} MiB to {url}")


@click.command()
@click.argument("reference")
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@click.option("--only", multiple=True, help="A part: graphs, weights, tokenizer, reports, or a pattern of paths.")
@click.option("--variant", help="Which of a release's variants (default: the one for this host).")
@click.option("--offline", is_flag=True, help="Ask nobody: it must have been pulled before.")
@click.option("--require-signature", "identity", help="Refuse what this public key's file, or identity, did not sign.")
@click.option("--issuer", help="Issuer of that identity (default: GitHub Actions).")
@click.option("--policy", "policy_file", type=click.Path(path_type=Path), envvar="TANDEM_POLICY", help="Policy file.")
@as_json
@click.pass_obj
def pull(
    obj: dict[str, Any], reference: str, directory: Path | None, only: tuple[str, ...], variant: str | None,
    offline: bool, identity: str | None, issuer: str | None, policy_file: Path | None, json_: bool,
) -> None:  # fmt: skip
    """Pull a release, REGISTRY/NAME@VERSION-or-ALIAS, into DIRECTORY, verified."""
    from pipeline.pull import pull as fetch

    parts = [part if any(c in part for c in "*?[/.") else f"{part}/*" for part in only]
    with _bar(f"pull {reference.rpartition('/')[2]}", obj["quiet"]) as progress:
        out = fetch(
            reference, directory, only=[*parts, *("recipe.*", "tokenizer/*")] if parts else None, variant=variant,
            policy=_policy(identity, issuer, policy_file), offline=offline, progress=progress,
        )  # fmt: skip
    _json({"artifact": str(out)}) if json_ else click.echo(str(out))


def _policy(identity: str | None, issuer: str | None, path: Path | None) -> Policy | None:
    from pipeline import signing

    if identity is not None:
        return signing.require(identity, issuer or signing.GITHUB)
    return signing.read_policy(path) if path is not None else None


@click.command()
@click.argument("url")
@as_json
def ls(url: str, json_: bool) -> None:
    """List the releases of a registry, or of URL/NAME@."""
    from pipeline.registry import list_releases

    place, _, last = url.rpartition("/")
    found = list_releases(place, last.rstrip("@")) if last.endswith("@") else list_releases(url)
    if json_:
        _json([asdict(one) for one in found])
        return
    for one in found:
        aliases = f"  <- {', '.join(one.aliases)}" if one.aliases else ""
        variants = f"  [{', '.join(one.variants)}]" if one.variants else ""
        click.echo(f"{one.name}@{one.version}  {one.created}  {one.size_bytes / MIB:,.1f} MiB{variants}{aliases}")


@click.command()
@click.argument("first")
@click.argument("second")
@click.option("--variant", help="Which variant of releases that have several.")
@as_json
def diff(first: str, second: str, variant: str | None, json_: bool) -> None:
    """Show what differs between two artifacts or releases: graphs, shapes, toolchain, gates, files."""
    from pipeline.registry import compare, manifest_of

    def place(name: str) -> str:
        return str(_artifact_dir(name)) if "@" not in name else name

    found = compare(manifest_of(place(first), variant), manifest_of(place(second), variant))
    if json_:
        _json(found)
        return
    for how, names in found["graphs"].items():
        click.echo("".join(f"graph {how}: {name}\n" for name in names), nl=False)
    for field, values in found["fields"].items():
        click.echo(f"{field}: {values['from']} -> {values['to']}")
    for top, changes in found["files"].items():
        click.echo(f"{top}: " + ", ".join(f"{len(names)} {how}" for how, names in changes.items()))


@click.command()
@click.argument("url")
@click.option("--dry-run", is_flag=True, help="Show what would be removed.")
@as_json
def gc(url: str, dry_run: bool, json_: bool) -> None:
    """Remove blobs that no release of a registry reaches. Never removes releases or aliases."""
    from pipeline.registry import collect

    found = collect(url, dry_run=dry_run)
    if json_:
        _json(asdict(found))
        return
    verb = "would remove" if dry_run else "removed"
    click.echo(f"{verb} {found.blobs} blobs, {found.size_bytes / MIB:,.1f} MiB; {found.kept} are in use")


@click.command()
@click.argument("artifact")
@click.option("--key", type=click.Path(path_type=Path), help="Private key, PEM (default: keyless, this CI job).")
def sign(artifact: str, key: Path | None) -> None:
    """Sign ARTIFACT's manifest; publish sends the signature along."""
    click.echo(str(_sign(_artifact_dir(artifact), key)))


def _sign(root: Path, key: Path | None) -> Path:
    from pipeline import signing

    secrets = {"password": os.environ.get("TANDEM_KEY_PASSWORD"), "token": os.environ.get("SIGSTORE_ID_TOKEN")}
    return signing.sign(root, key, **secrets)


@click.command()
@click.argument("artifact")
@click.option("--require-signature", "identity", help="Refuse what this public key's file, or identity, did not sign.")
@click.option("--issuer", help="Issuer of that identity (default: GitHub Actions).")
@click.option("--policy", "policy_file", type=click.Path(path_type=Path), envvar="TANDEM_POLICY", help="Policy file.")
def verify(artifact: str, identity: str | None, issuer: str | None, policy_file: Path | None) -> None:
    """Check every file of ARTIFACT against its manifest, and who signed that."""
    from pipeline.artifact import verify as check

    root = _artifact_dir(artifact)
    policy = _policy(identity, issuer, policy_file)
    if policy is not None:
        from pipeline.signing import check_artifact

        check_artifact(root, policy)
    found = check(root)
    click.echo(f"{found.manifest.name} {found.manifest.version}: {len(found.manifest.files)} files match")


@click.group()
def alias() -> None:
    """Move and follow aliases of releases."""


@alias.command("set")
@click.argument("reference")
@click.argument("alias_name")
def alias_set(reference: str, alias_name: str) -> None:
    """Point ALIAS_NAME at a release, REGISTRY/NAME@VERSION-or-ALIAS."""
    from pipeline.registry import parse_reference, set_alias

    ref = parse_reference(reference)
    set_alias(ref.url, f"{ref.name}@{ref.wanted}", alias_name)
    click.echo(f"{alias_name} -> {ref.name}@{ref.wanted}")


@alias.command("list")
@click.argument("reference")
@as_json
def alias_list(reference: str, json_: bool) -> None:
    """List the aliases of REGISTRY/NAME and where they point."""
    from pipeline.registry import parse_reference
    from pipeline.stores.base import open_store

    ref = parse_reference(reference)
    found = open_store(ref.url).aliases(ref.name)
    if json_:
        _json(found)
        return
    for name, version in found.items():
        click.echo(f"{name} -> {version}")


@alias.command("history")
@click.argument("reference")
@as_json
def alias_history(reference: str, json_: bool) -> None:
    """Show where REGISTRY/NAME@ALIAS has pointed, the newest first."""
    from pipeline.registry import history, parse_reference

    ref = parse_reference(reference)
    found = history(ref.url, ref.name, ref.wanted)
    if json_:
        _json([asdict(move) for move in found.moves])
        return
    for move in found.moves:
        click.echo(f"{move.version}  {move.when}  {move.who}".rstrip())


@alias.command("rollback")
@click.argument("reference")
def alias_rollback(reference: str) -> None:
    """Point REGISTRY/NAME@ALIAS back at the release before."""
    from pipeline.registry import parse_reference, roll_back

    ref = parse_reference(reference)
    before, now = roll_back(ref.url, ref.name, ref.wanted)
    click.echo(f"{ref.wanted}: {before} -> {now}")


@click.group()
def cache() -> None:
    """Look after the cache of compiled graphs, here and shared."""


shared = click.argument("url", envvar="TANDEM_REMOTE_CACHE")


@cache.command("push")
@shared
def cache_push(url: str) -> None:
    """Push compiled graphs to the shared cache at URL."""
    from pipeline.cache import Cache, default_root
    from pipeline.remote_cache import Remote, push_all

    count = push_all(Cache(default_root()), Remote(url, "write").open(_note))
    click.echo(f"pushed {count} graphs to {url}")


@cache.command("pull")
@shared
def cache_pull(url: str) -> None:
    """Pull the graphs that this machine's toolchain can use from the shared cache at URL."""
    from pipeline.backends.base import make_backend
    from pipeline.cache import Cache, default_root
    from pipeline.remote_cache import Remote, pull_all

    toolchain = make_backend({"name": "inductor"}).toolchain().as_dict()
    count = pull_all(Cache(default_root()), Remote(url).open(_note), toolchain)
    click.echo(f"pulled {count} graphs from {url}")


@cache.command()
@click.option("--remote", "url", help="Of this shared cache, not of the local one.")
@as_json
def stats(url: str | None, json_: bool) -> None:
    """Count entries and bytes."""
    found = _cache(url).stats()
    if json_:
        _json(asdict(found))
        return
    click.echo(f"{found.entries} entries, {found.size_bytes / MIB:.1f} MiB in {url or 'the local cache'}")


@cache.command("gc")
@click.option("--max-gib", type=float, required=True, help="Keep at most this much, the newest.")
@click.option("--max-days", type=float, help="Remove what is older (local: not used for longer).")
@click.option("--remote", "url", help="Of this shared cache, not of the local one.")
def cache_gc(max_gib: float, max_days: float | None, url: str | None) -> None:
    """Remove the oldest entries."""
    removed = _cache(url).gc(int(max_gib * (1 << 30)), None if max_days is None else max_days * 24 * 3600)
    click.echo(f"removed {removed.entries} entries, {removed.size_bytes / MIB:.1f} MiB")


def _cache(url: str | None) -> Cache | RemoteCache:
    from pipeline.cache import Cache, default_root
    from pipeline.remote_cache import Remote

    return Remote(url, "write").open(_note) if url else Cache(default_root())


def _note(line: str) -> None:
    click.echo(line, err=True)
