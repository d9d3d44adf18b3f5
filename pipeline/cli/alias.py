"""Commands on aliases of releases: alias set, list, history, rollback."""

from __future__ import annotations

from dataclasses import asdict

import click

from pipeline.cli.console import Console
from pipeline.cli.facts import copied_words
from pipeline.cli.groups import Group
from pipeline.cli.options import as_json
from pipeline.cli.results import print_json, print_result, print_table
from pipeline.cli.tables import Table
from pipeline.cli.words import moment, pointer
from pipeline.registry.aliases import check_name, history, list_aliases, roll_back, set_alias
from pipeline.registry.promotions import promotions_by_version
from pipeline.registry.releases import parse_reference


@click.group(cls=Group)
def alias() -> None:
    """Set, list and roll back aliases of releases."""


@alias.command("set")
@click.argument("reference")
@click.argument("alias_name")
@as_json
def alias_set(reference: str, alias_name: str, json_: bool) -> None:
    """Set ALIAS_NAME to a release. REFERENCE is REGISTRY/NAME@VERSION-or-ALIAS."""
    check_name(alias_name, "ALIAS_NAME")
    ref = parse_reference(reference)
    release = f"{ref.name}@{set_alias(ref.url, f'{ref.name}@{ref.wanted}', alias_name)}"
    print_result({"alias": alias_name, "release": release}, pointer(alias_name, release), as_json=json_)


@alias.command("list")
@click.argument("reference")
@as_json
@click.pass_obj
def alias_list(console: Console, reference: str, json_: bool) -> None:
    """List the aliases of a name with their releases. REFERENCE is REGISTRY/NAME."""
    ref = parse_reference(reference)
    aliases = list_aliases(ref.url, ref.name)
    if json_:
        print_json(aliases)
    elif aliases:
        rows = [(name, version or "damaged; set it again") for name, version in aliases.items()]
        print_table(Table(("alias", "release"), rows))
    else:
        console.log(f"{ref.name} has releases but no aliases")


@alias.command("history")
@click.argument("reference")
@as_json
def alias_history(reference: str, json_: bool) -> None:
    """List the releases that an alias has pointed at, newest first. REFERENCE is REGISTRY/NAME@ALIAS.

    "copied from" names the last `tandem copy` or `tandem load` that brought a release here; --json has all of them.
    """
    ref = parse_reference(reference)
    moves = history(ref.url, ref.name, ref.wanted).moves
    copies = promotions_by_version(ref.url, ref.name, (move.version for move in moves))
    if json_:
        print_json([asdict(move) | {"copies": [asdict(each) for each in copies[move.version]]} for move in moves])
        return
    rows = [
        (move.version, moment(move.when) or "unknown", move.who or "unknown", copied_words(copies[move.version]))
        for move in moves
    ]
    shown = 4 if any(copies.values()) else 3
    print_table(Table(("release", "set (UTC)", "by", "copied from")[:shown], [row[:shown] for row in rows]))


@alias.command("rollback")
@click.argument("reference")
@click.option("--from", "leave", metavar="VERSION", help="Version to roll back from; repeating it changes nothing.")
@as_json
def alias_rollback(reference: str, leave: str | None, json_: bool) -> None:
    """Set an alias back to its previous release. REFERENCE is REGISTRY/NAME@ALIAS.

    Each rollback goes one release further back; with --from, scripts can repeat the command. To go forward, use
    `tandem alias set`.
    """
    ref = parse_reference(reference)
    before, now = roll_back(ref.url, ref.name, ref.wanted, leave)
    line = f"{pointer(ref.wanted, f'{ref.name}@{now}')} (before: {before})"
    print_result({"alias": ref.wanted, "from": before, "to": now}, line, as_json=json_)
