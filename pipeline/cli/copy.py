"""Commands that move whole releases between registries: copy, save, load."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import click

from pipeline.cli.console import Console
from pipeline.cli.facts import signature_words
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json, collected
from pipeline.cli.results import print_json, print_line
from pipeline.cli.tables import Verdict
from pipeline.cli.trust import identity_option, issuer_option, policy_of, policy_option
from pipeline.cli.words import counted, pointer, size
from pipeline.registry.aliases import check_name
from pipeline.registry.archives import load, save
from pipeline.registry.copy import Copied, CopySettings, copy
from pipeline.registry.publish import Place

alias_option = click.option(
    "--alias", "aliases", multiple=True, help="Alias to set to the release at the destination; may be repeated."
)
yanked_option = click.option("--allow-yanked", is_flag=True, help="Accept a release that was yanked, and its yank.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Show what would be sent.")


@dataclass(frozen=True)
class _Trust:
    """The options for required signers and yanked releases, which all three commands have."""

    identity: str | None
    issuer: str | None
    policy_file: Path | None
    allow_yanked: bool
    json_: bool

    def settings(self, *, dry_run: bool) -> CopySettings:
        """Return the settings of the copy."""
        return CopySettings(policy_of(self.policy_file, self.identity, self.issuer), self.allow_yanked, dry_run)


@dataclass(frozen=True)
class CopyOptions(_Trust):
    """The options of `tandem copy`."""

    reference: str
    destination: str
    aliases: tuple[str, ...]
    dry_run: bool


@dataclass(frozen=True)
class SaveOptions(_Trust):
    """The options of `tandem save`."""

    reference: str
    file: Path


@dataclass(frozen=True)
class LoadOptions(_Trust):
    """The options of `tandem load`."""

    file: Path
    destination: str
    aliases: tuple[str, ...]
    dry_run: bool


@click.command("copy", cls=Command)
@click.argument("reference")
@click.argument("destination")
@alias_option
@dry_run_option
@yanked_option
@identity_option
@issuer_option
@policy_option
@as_json
@collected(CopyOptions)
def copy_(console: Console, options: CopyOptions) -> None:
    """Copy a release to another registry. REFERENCE is REGISTRY/NAME@VERSION-or-ALIAS, DESTINATION a registry.

    All variants and signatures are copied byte for byte, so digests stay. Bytes are not stored on this machine, except
    parts of a release that goes to a Hub. A policy is asked for the release's version and aliases at the destination,
    before anything is written. `tandem ls` shows who copied a release, and from where.
    """
    place = _place(options.destination, options.aliases)
    settings = options.settings(dry_run=options.dry_run)
    copied = copy(options.reference, place, settings, console.transfer("copy"))
    _print(copied, _sent(copied, "copied", dry_run=options.dry_run), options)


@click.command("save", cls=Command)
@click.argument("reference")
@click.argument("file", type=click.Path(path_type=Path))
@yanked_option
@identity_option
@issuer_option
@policy_option
@as_json
@collected(SaveOptions)
def save_(console: Console, options: SaveOptions) -> None:
    """Save a release to one file. REFERENCE is REGISTRY/NAME@VERSION-or-ALIAS; `tandem load` reads the file.

    The file is a tar with all variants and signatures. A save that was interrupted continues: the blobs in FILE.partial
    are kept, after a check of their digests.
    """
    settings = options.settings(dry_run=False)
    saved = save(options.reference, options.file, settings, console.transfer("save"), console.transfer("check"))
    name, blobs = f"{saved.name}@{saved.version}", f"{counted(saved.blobs, 'blob')}, {size(saved.size_bytes)}"
    kept = saved.blobs - saved.sent
    how = f"saved {name} to {saved.url}" if saved.fresh else f"{name}: saved already in {saved.url}"
    again = f" ({kept} kept from an interrupted save)" if saved.fresh and kept else ""
    _print(saved, f"{how}: {blobs}{again}, {_signature(saved)}", options)


@click.command("load", cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("destination")
@alias_option
@dry_run_option
@yanked_option
@identity_option
@issuer_option
@policy_option
@as_json
@collected(LoadOptions)
def load_(console: Console, options: LoadOptions) -> None:
    """Load a release from one file into a registry. FILE is one that `tandem save` wrote, DESTINATION a registry.

    A policy is asked as by `tandem copy`. A file that is truncated or damaged is rejected, and the registry stays as it
    is, without a release of the file.
    """
    place = _place(options.destination, options.aliases)
    loaded = load(options.file, place, options.settings(dry_run=options.dry_run), console.transfer("load"))
    _print(loaded, _sent(loaded, "loaded", dry_run=options.dry_run), options)


def _place(url: str, aliases: tuple[str, ...]) -> Place:
    for alias in aliases:
        check_name(alias, "--alias")
    return Place(url, aliases)


def _print(copied: Copied, line: str, options: CopyOptions | SaveOptions | LoadOptions) -> None:
    if options.json_:
        print_json(asdict(copied))
    else:
        dry_run = not isinstance(options, SaveOptions) and options.dry_run
        print_line(Verdict(line, good=None if dry_run else True))


def _sent(copied: Copied, verb: str, *, dry_run: bool) -> str:
    """Return the state of a release at its destination, in one line."""
    name = f"{copied.name}@{copied.version}"
    blobs = f"{counted(copied.sent, 'blob')}, {size(copied.sent_bytes)}"
    aliases = f"; {pointer(', '.join(copied.aliases), name)}" if copied.aliases else ""
    if dry_run:
        done = "would send" if copied.fresh else f"is in {copied.url} already; would send"
        to = f" to {copied.url}" if copied.fresh else ""
        return f"{name}: {done} {blobs}{to}, {_signature(copied)}{aliases}"
    if not copied.fresh:
        return f"{name}: is in {copied.url} already, sent {blobs}, {_signature(copied)}{aliases}"
    return f"{verb} {name} from {_origin(copied)} to {copied.url}: sent {blobs}, {_signature(copied)}{aliases}"


def _origin(copied: Copied) -> str:
    """Return the registry or file that a release was copied from."""
    return copied.source.removesuffix(f"/{copied.name}@{copied.version}")


def _signature(copied: Copied) -> str:
    return signature_words(copied.signer, present=copied.has_signature)
