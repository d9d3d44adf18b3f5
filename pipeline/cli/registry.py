"""The command line of registries: publish, pull, ls, diff, alias, gc, sign, verify, cache. A part of `cli.py`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.console import Console, print_error, print_json
from pipeline.cli.options import (
    Command,
    Group,
    artifact_dir,
    as_json,
    identity_option,
    issuer_option,
    policy_of,
    policy_option,
)

if TYPE_CHECKING:
    from pipeline.cache.local import Cache
    from pipeline.cache.remote import RemoteCache
    from pipeline.registry.publish import Outcome

MIB = 1 << 20
REGISTRY = "artifacts/registry"


def add_to(main: click.Group) -> None:
    """Add the commands."""
    for command in (publish, pull, ls, diff, gc, sign, verify, alias, cache):
        main.add_command(command)


def _shown(json_: bool, data: Any, line: str) -> None:
    if json_:
        print_json(data)
    else:
        click.echo(line)


@click.command(cls=Command)
@click.argument("artifacts", nargs=-1, required=True)
@click.option("--to", "urls", multiple=True, metavar="REGISTRY",
              help="A folder, s3://bucket/prefix, or hf://org; may be repeated (default: what the recipe's `publish` "
                   f"lists, or else {REGISTRY}).")  # fmt: skip
@click.option("--alias", "aliases", multiple=True, help="Point this alias at the release, beside the recipe's.")
@click.option("--version", "version", help="Name of the release (default: from its content).")
@click.option("--sign", "key", type=click.Path(path_type=Path), help="Sign with this private key before.")
@click.option("--keyless", is_flag=True, help="Sign with the identity of this CI job before.")
@click.option(
    "--unvalidated", is_flag=True, help="Let pass what has no gates: packages of NxD Inference, compile caches."
)
@click.option("--dry-run", is_flag=True, help="Show what would be sent.")
@as_json
@click.pass_obj
def publish(
    console: Console, artifacts: tuple[str, ...], urls: tuple[str, ...], aliases: tuple[str, ...],
    version: str | None, key: Path | None, keyless: bool, unvalidated: bool, dry_run: bool, json_: bool,
) -> None:  # fmt: skip
    """Publish ARTIFACTS as an immutable release; several of one recipe (chips, ranks) become its variants."""
    from pipeline.registry.publish import Place, PublishOptions, listed_places, publish_all

    roots = [artifact_dir(name) for name in artifacts]
    listed = [Place(url) for url in urls] or listed_places(roots) or [Place(REGISTRY)]
    places = [Place(one.url, tuple(dict.fromkeys((*one.aliases, *aliases)))) for one in listed]
    if (key or keyless) and not dry_run:
        for root in roots:
            _sign(root, key)
    sign = _signer(key) if key or keyless else None
    options = PublishOptions(version=version, sign=sign, unvalidated=unvalidated, dry_run=dry_run)
    outcomes = publish_all(roots, places, options, console.transfer("publish"))
    if json_:
        print_json([_outcome_json(one) for one in outcomes])
    failed = [one.error for one in outcomes if one.error is not None]
    for one in outcomes if not json_ else ():
        click.echo(_outcome_line(one, "would send" if dry_run else "sent"))
    for error in failed[:-1]:
        print_error(error, with_traceback=console.verbose)
    if failed:
        raise failed[-1]


def _outcome_line(one: Outcome, verb: str) -> str:
    if one.release is None:
        return f"not published to {one.url}: see below"
    found = one.release
    aliases = f"; {', '.join(found.aliases)} -> {found.version}" if found.aliases else ""
    size = found.sent_bytes / MIB
    return f"{found.name}@{found.version}: {verb} {found.sent} blobs, {size:.1f} MiB to {one.url}{aliases}"


def _outcome_json(one: Outcome) -> dict[str, Any]:
    if one.release is not None:
        return asdict(one.release)
    error = one.error
    return {"url": one.url, "error": {"where": error.where, "what": error.what, "fix": error.fix} if error else None}


@click.command(cls=Command)
@click.argument("reference")
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@click.option("--only", multiple=True, help="A part: graphs, weights, tokenizer, reports, or a pattern of paths.")
@click.option("--variant", help="Which of a release's variants (default: the one for this host).")
@click.option("--offline", is_flag=True, help="Ask nobody: it must have been pulled before.")
@identity_option
@issuer_option
@policy_option
@as_json
@click.pass_obj
def pull(
    console: Console, reference: str, directory: Path | None, only: tuple[str, ...], variant: str | None,
    offline: bool, identity: str | None, issuer: str | None, policy_file: Path | None, json_: bool,
) -> None:  # fmt: skip
    """Pull a release, REGISTRY/NAME@VERSION-or-ALIAS, into DIRECTORY, verified."""
    from pipeline.registry.pull import Selection
    from pipeline.registry.pull import pull as fetch

    out = fetch(
        reference, directory, select=Selection(_patterns(only), variant),
        policy=policy_of(policy_file, identity, issuer), offline=offline, progress=console.transfer("pull"),
    )  # fmt: skip
    _shown(json_, {"artifact": out}, str(out))


def _patterns(parts: tuple[str, ...]) -> list[str] | None:
    return [part if any(c in part for c in "*?[/.") else f"{part}/*" for part in parts] or None


@click.command(cls=Command)
@click.argument("url")
@as_json
@click.pass_obj
def ls(console: Console, url: str, json_: bool) -> None:
    """List the releases of a registry, or, with URL/NAME@, of one name."""
    from pipeline.registry.releases import list_releases

    place, _, last = url.rpartition("/")
    found = list_releases(place, last.rstrip("@")) if last.endswith("@") else list_releases(url)
    if not found:
        console.log(f"nothing is published in {url}")
    if json_:
        print_json([asdict(one) for one in found])
        return
    for one in found:
        aliases = f"  <- {', '.join(one.aliases)}" if one.aliases else ""
        variants = f"  [{', '.join(one.variants)}]" if one.variants else ""
        click.echo(f"{one.name}@{one.version}  {one.created}  {one.size_bytes / MIB:,.1f} MiB{variants}{aliases}")


@click.command(cls=Command)
@click.argument("first")
@click.argument("second")
@click.option("--variant", help="Which variant of releases that have several.")
@as_json
def diff(first: str, second: str, variant: str | None, json_: bool) -> None:
    """Show what differs between two artifacts or releases: graphs, shapes, toolchain, gates, files."""
    from pipeline.registry.releases import compare, manifest_of

    one, two = (manifest_of(name if "@" in name else str(artifact_dir(name)), variant) for name in (first, second))
    found = compare(one, two)
    if json_:
        print_json(found)
        return
    for how, names in found["graphs"].items():
        click.echo("".join(f"graph {how}: {name}\n" for name in names), nl=False)
    for field, values in found["fields"].items():
        click.echo(f"{field}: {values['from']} -> {values['to']}")
    for top, changes in found["files"].items():
        click.echo(f"{top}: " + ", ".join(f"{len(names)} {how}" for how, names in changes.items()))


@click.command(cls=Command)
@click.argument("url")
@click.option("--dry-run", is_flag=True, help="Show what would be removed.")
@as_json
def gc(url: str, dry_run: bool, json_: bool) -> None:
    """Remove blobs that no release of a registry reaches. Never removes releases or aliases."""
    from pipeline.registry.releases import collect

    found = collect(url, dry_run=dry_run)
    verb = "would remove" if dry_run else "removed"
    line = f"{verb} {found.blobs} blobs, {found.size_bytes / MIB:,.1f} MiB; {found.kept} are in use"
    _shown(json_, asdict(found), line)


@click.command(cls=Command)
@click.argument("artifact")
@click.option("--key", type=click.Path(path_type=Path), help="Private key, PEM (default: keyless, this CI job).")
@as_json
def sign(artifact: str, key: Path | None, json_: bool) -> None:
    """Sign ARTIFACT's manifest; publish sends the signature along."""
    made = _sign(artifact_dir(artifact), key)
    _shown(json_, {"signature": made}, str(made))


def _sign(root: Path, key: Path | None) -> Path:
    from pipeline.artifact import signing

    return signing.sign(root, key, **_secrets())


def _signer(key: Path | None) -> Callable[[bytes], bytes]:
    from pipeline.artifact import signing

    return lambda index: signing.signature_over(index, "release", key, **_secrets())


def _secrets() -> dict[str, str | None]:
    return {"password": os.environ.get("TANDEM_KEY_PASSWORD"), "token": os.environ.get("SIGSTORE_ID_TOKEN")}


@click.command(cls=Command)
@click.argument("artifact")
@click.option("--only", multiple=True, help="The part that was pulled with the same option.")
@identity_option
@issuer_option
@policy_option
@as_json
@click.pass_obj
def verify(
    console: Console, artifact: str, only: tuple[str, ...], identity: str | None, issuer: str | None,
    policy_file: Path | None, json_: bool,
) -> None:  # fmt: skip
    """Check every file of ARTIFACT against its manifest, and who signed that."""
    from pipeline.artifact.manifest import part, read, select
    from pipeline.artifact.verify import verify as check

    root = artifact_dir(artifact)
    policy = policy_of(policy_file, identity, issuer)
    if policy is not None:
        from pipeline.artifact.signing import check_artifact

        check_artifact(root, policy)
    patterns = part(read(root).manifest, _patterns(only), str(root))
    found = check(root, lambda done, total: console.progress("verify", done, total), only=patterns).manifest
    count = len(select(found, patterns))
    data = {"name": found.name, "version": found.version, "files": count, "signed": policy is not None}
    _shown(json_, data, f"{found.name} {found.version}: {count} files match")


@click.group(cls=Group)
def alias() -> None:
    """Move and follow aliases of releases."""


@alias.command("set")
@click.argument("reference")
@click.argument("alias_name")
@as_json
def alias_set(reference: str, alias_name: str, json_: bool) -> None:
    """Point ALIAS_NAME at a release, REGISTRY/NAME@VERSION-or-ALIAS."""
    from pipeline.registry.aliases import set_alias
    from pipeline.registry.releases import parse_reference

    ref = parse_reference(reference)
    set_alias(ref.url, f"{ref.name}@{ref.wanted}", alias_name)
    release = f"{ref.name}@{ref.wanted}"
    _shown(json_, {"alias": alias_name, "release": release}, f"{alias_name} -> {release}")


@alias.command("list")
@click.argument("reference")
@as_json
def alias_list(reference: str, json_: bool) -> None:
    """List the aliases of REGISTRY/NAME and where they point."""
    from pipeline.registry.releases import parse_reference
    from pipeline.stores.base import open_store

    ref = parse_reference(reference)
    found = open_store(ref.url).aliases(ref.name)
    lines = (f"{name} -> {version or 'damaged; set it again'}" for name, version in found.items())
    _shown(json_, found, "\n".join(lines))


@alias.command("history")
@click.argument("reference")
@as_json
def alias_history(reference: str, json_: bool) -> None:
    """Show where REGISTRY/NAME@ALIAS has pointed, the newest first."""
    from pipeline.registry.aliases import history
    from pipeline.registry.releases import parse_reference

    ref = parse_reference(reference)
    moves = history(ref.url, ref.name, ref.wanted).moves
    lines = (f"{move.version}  {move.when}  {move.who}".rstrip() for move in moves)
    _shown(json_, [asdict(move) for move in moves], "\n".join(lines))


@alias.command("rollback")
@click.argument("reference")
@as_json
def alias_rollback(reference: str, json_: bool) -> None:
    """Point REGISTRY/NAME@ALIAS back at the release before."""
    from pipeline.registry.aliases import roll_back
    from pipeline.registry.releases import parse_reference

    ref = parse_reference(reference)
    before, now = roll_back(ref.url, ref.name, ref.wanted)
    _shown(json_, {"alias": ref.wanted, "from": before, "to": now}, f"{ref.wanted}: {before} -> {now}")


@click.group(cls=Group)
def cache() -> None:
    """Look after the cache of compiled graphs, here and shared."""


shared = click.argument("url", envvar="TANDEM_REMOTE_CACHE")


@cache.command("push")
@shared
@as_json
@click.pass_obj
def cache_push(console: Console, url: str, json_: bool) -> None:
    """Push compiled graphs to the shared cache at URL."""
    from pipeline.cache.local import Cache, default_root
    from pipeline.cache.remote import Remote, push_all

    count = push_all(Cache(default_root(), "graphs"), Remote(url, "write").open(console.log))
    _shown(json_, {"pushed": count}, f"pushed {count} graphs to {url}")


@cache.command("pull")
@shared
@as_json
@click.pass_obj
def cache_pull(console: Console, url: str, json_: bool) -> None:
    """Pull the graphs that this machine's toolchain can use from the shared cache at URL."""
    from pipeline.backends.base import make_backend
    from pipeline.cache.local import Cache, default_root
    from pipeline.cache.remote import Remote, pull_all
    from pipeline.recipe.schema import InductorSettings

    toolchain = make_backend(InductorSettings()).toolchain().as_dict()
    count = pull_all(Cache(default_root(), "graphs"), Remote(url).open(console.log), toolchain)
    _shown(json_, {"pulled": count}, f"pulled {count} graphs from {url}")


@cache.command()
@click.option("--remote", "url", help="Of this shared cache, not of the local one.")
@as_json
def stats(url: str | None, json_: bool) -> None:
    """Count compiled graphs and bytes; of the local cache, the bytes of every folder, too."""
    from pipeline.cache.collect import folder_sizes
    from pipeline.cache.local import default_root

    found, place = _cache(url).stats(), url or default_root()
    folders = {} if url else folder_sizes(default_root())
    lines = [f"{found.entries} graphs, {found.size_bytes / MIB:,.1f} MiB in {place}"]
    lines += [f"  {name:<10}{size / MIB:>12,.1f} MiB" for name, size in folders.items()]
    _shown(json_, asdict(found) | {"root": place, "folders": folders}, "\n".join(lines))


AMOUNT = click.FloatRange(0, 1e6)


def _amount(_ctx: click.Context, _param: click.Parameter, value: float | None) -> float | None:
    if value is not None and math.isnan(value):  # a range lets it pass
        raise click.BadParameter("nan is no amount")
    return value


@cache.command("gc")
@click.option("--max-gib", type=AMOUNT, callback=_amount, required=True, help="Keep at most this much, the newest.")
@click.option("--max-days", type=AMOUNT, callback=_amount, help="Remove what is older (local: not used for longer).")
@click.option("--remote", "url", help="Of this shared cache, not of the local one.")
@as_json
def cache_gc(max_gib: float, max_days: float | None, url: str | None, json_: bool) -> None:
    """Remove the oldest graphs.

    With --max-days also, of the local cache, pulled blobs and weight shards that no artifact here is linked to. Written
    text (distill) and sources are never removed.
    """
    from pipeline.cache.collect import DAY_S, collect, remove_unused
    from pipeline.cache.local import Stats, default_root
    from pipeline.cache.remote import Remote

    age_s = None if max_days is None else max_days * DAY_S
    max_bytes = int(max_gib * (1 << 30))
    if url:
        removed = Remote(url, "write").open().gc(max_bytes, age_s)
    else:
        removed = sum(collect(default_root(), max_bytes, age_s).values(), Stats(0, 0))
    unused = Stats(0, 0) if url or age_s is None else remove_unused(default_root(), age_s)
    parts = (f"{removed.entries} graphs, {removed.size_bytes / MIB:,.1f} MiB",
             f"{unused.entries} blobs and shards, {unused.size_bytes / MIB:,.1f} MiB")  # fmt: skip
    _shown(json_, asdict(removed) | {"unused": asdict(unused)}, f"removed {'; '.join(parts)}")


def _cache(url: str | None) -> Cache | RemoteCache:
    from pipeline.cache.local import Cache, default_root
    from pipeline.cache.remote import Remote

    return Remote(url, "write").open() if url else Cache(default_root(), "graphs")
