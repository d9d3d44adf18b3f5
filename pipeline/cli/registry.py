"""Commands that read and clean a registry: pull, ls, yank, gc."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from pipeline.cli import metrics
from pipeline.cli.console import Console
from pipeline.cli.facts import copied_words, signature_state, signature_words
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json, collected
from pipeline.cli.paths import file_patterns
from pipeline.cli.results import print_json, print_result, print_table
from pipeline.cli.tables import Table
from pipeline.cli.trust import identity_option, issuer_option, policy_of, policy_option
from pipeline.cli.words import counted, moment, size, value
from pipeline.errors import HostError, TandemError
from pipeline.progress import duration
from pipeline.registry.aliases import list_aliases
from pipeline.registry.pull import Pulled, Selection, pull_release
from pipeline.registry.releases import Listed, collect, has_names, list_releases, no_releases, parse_reference
from pipeline.registry.yanks import Retention, retire, yank

FIRST_PAUSE_S, LAST_PAUSE_S = 2.0, 60.0
"""Pauses of `pull --retry`, which double."""


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
    allow_yanked: bool
    retry: float
    metrics: Path | None
    json_: bool


@click.command(cls=Command)
@click.argument("reference")
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@click.option("--only", multiple=True,
              help="Part of the files: graphs, weights, tokenizer, reports or a pattern; may be repeated.")  # fmt: skip
@click.option("--variant", help="Variant of the release (default: the one for this host).")
@click.option("--offline", is_flag=True, help="Use only the local cache.")
@click.option("--allow-yanked", is_flag=True, help="Pull a release that was yanked, too.")
@click.option("--retry", type=click.FloatRange(0), default=0.0, metavar="SECONDS",
              help="Repeat failures of network, disk and machine for this long (default: 0).")  # fmt: skip
@click.option("--metrics", type=click.Path(path_type=Path),
              help="File to write version, digest, bytes, seconds and age to, in Prometheus' text format.")  # fmt: skip
@identity_option
@issuer_option
@policy_option
@as_json
@collected(PullOptions)
def pull(console: Console, options: PullOptions) -> None:
    """Pull a release and verify it. REFERENCE is REGISTRY/NAME@VERSION-or-ALIAS.

    REGISTRY is a folder, s3://bucket/prefix, hf://org or oci://host/path. REGISTRY/NAME is short for
    REGISTRY/NAME@latest. The folder of the artifact is printed on stdout.
    """
    started = time.monotonic()
    try:
        pulled = _repeated(console, options)
    except TandemError as error:
        if options.metrics:
            metrics.write_failed(options.metrics, options.reference, error.exit_code)
        raise
    if options.metrics:
        metrics.write_pulled(options.metrics, options.reference, pulled, time.monotonic() - started)
    wanted = parse_reference(options.reference).wanted
    console.log(_pulled_words(pulled, wanted))
    print_result(_pulled_data(pulled, wanted), str(pulled.path), as_json=options.json_)


def _repeated(console: Console, options: PullOptions) -> Pulled:
    """Pull; repeat failures of the environment for as long as the options say. Others would fail again."""
    policy = policy_of(options.policy_file, options.identity, options.issuer)
    select = Selection(file_patterns(options.only), options.variant, options.allow_yanked)
    until, pause_s = time.monotonic() + options.retry, FIRST_PAUSE_S
    while True:
        try:
            return pull_release(
                options.reference, options.directory, select=select, policy=policy, offline=options.offline,
                progress=console.transfer("pull"),
            )  # fmt: skip
        except HostError as error:
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise
            pause_s = min(pause_s, left_s)
            console.log(f"{error}; next attempt in {duration(pause_s)}")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)


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
    signature exists; `pull` and `verify` check the signer, with --require-signature or --policy. "copied from" names
    the last `tandem copy` or `tandem load` that brought a release here; --json has all of them.
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
    headings = ("release", "digest", "built (UTC)", "size", "signed", "aliases", "variants", "yanked", "copied from")
    empty = {"yanked": not any(each.yanked for each in releases), "copied from": not any(map(_copied, releases))}
    rows = [
        (
            f"{each.name}@{each.version}", "damaged" if each.damage else value(each.digests),
            moment(each.created), "" if each.damage else size(each.size_bytes),
            "" if each.damage else "yes" if each.has_signature else "no", ", ".join(each.aliases),
            ", ".join(each.variants), each.yanked, _copied(each),
        )
        for each in releases
    ]  # fmt: skip
    shown = [column for column, heading in enumerate(headings) if not empty.get(heading)]
    kept = [tuple(row[column] for column in shown) for row in rows]
    return Table(tuple(headings[column] for column in shown), kept, right=("size",), whole=headings[:2])


def _copied(release: Listed) -> str:
    """Return where the last copy of a release came from, who made it and when; empty if it was published here."""
    return copied_words(release.copies) or ("damaged record" if release.copies_damage else "")


@click.command(cls=Command)
@click.argument("url")
@click.option("--keep-last", type=click.IntRange(1), help="Retire releases that are not among the newest N of a name.")
@click.option("--keep-days", type=click.FloatRange(0), help="Retire releases that were built more than N days ago.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed; without files of releases to retire.")
@as_json
@click.pass_obj
def gc(
    console: Console, url: str, keep_last: int | None, keep_days: float | None, dry_run: bool, json_: bool
) -> None:  # fmt: skip
    """Remove unused blobs from a registry. Releases stay, unless a rule retires them; aliases always stay.

    With --keep-last or --keep-days, releases that neither rule keeps are retired: yanked, and their files removed. The
    releases that aliases point at, those that `tandem alias rollback` would set them to, and yanked ones are kept.
    """
    rule = Retention(keep_last, keep_days)
    retired = [] if rule == Retention() else retire(url, rule, dry_run=dry_run)
    for release in retired:
        console.log(f"{'would retire' if dry_run else 'retired'} {release}")
    removed = collect(url, dry_run=dry_run)
    verb = "would remove" if dry_run else "removed"
    blobs = f"{counted(removed.blobs, 'unused blob')}, {size(removed.size_bytes)}"
    line = f"{verb} {blobs}; {counted(removed.kept, 'blob')} kept"
    print_result(asdict(removed) | {"retired": retired}, line, as_json=json_)


@click.command("yank", cls=Command)
@click.argument("reference")
@click.option("--reason", required=True, help="Why the release must not be used, and what to use.")
@as_json
@click.pass_obj
def yank_(console: Console, reference: str, reason: str, json_: bool) -> None:
    """Mark a release as not to be used. REFERENCE is REGISTRY/NAME@VERSION.

    Pulls and aliases reject a yanked release with the reason, and `tandem ls` shows it. The release is not deleted, and
    a yank is not undone or changed: a second one shows the first. An alias that points at the release is not moved: see
    `tandem alias set`.
    """
    found = yank(reference, reason)
    ref = parse_reference(reference)
    aliases = [alias for alias, version in list_aliases(ref.url, ref.name).items() if version == ref.wanted]
    release = f"{ref.name}@{ref.wanted}"
    line = f"yanked {release}: {found.reason}"
    if found.reason != reason.strip():
        by = f" by {found.who}" if found.who else ""
        line = (
            f"{release} was yanked before, {moment(found.when)} UTC{by}: {found.reason}; this --reason was not recorded"
        )
    print_result(asdict(found) | {"aliases": aliases}, line, as_json=json_)
    for alias in aliases:
        fix = f"tandem alias set {shlex.quote(f'{ref.url}/{ref.name}@VERSION')} {alias}"
        console.log(f"warning: {alias} points at {release}; pulls of {ref.name}@{alias} fail until `{fix}`")
