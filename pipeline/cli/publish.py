"""Commands that release artifacts: publish, sign."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from pipeline.artifact import signing
from pipeline.cli.console import MIB, Console, print_error
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json, collected
from pipeline.cli.paths import artifact_dir
from pipeline.cli.results import print_json, print_result
from pipeline.errors import no_string
from pipeline.registry.publish import Outcome, Place, PublishSettings, Sign, listed_places, publish_all

REGISTRY = "artifacts/registry"


@dataclass(frozen=True)
class PublishOptions:
    """The options of `tandem publish`."""

    artifacts: tuple[str, ...]
    urls: tuple[str, ...]
    aliases: tuple[str, ...]
    version: str | None
    key: Path | None
    keyless: bool
    unvalidated: bool
    dry_run: bool
    json_: bool

    @property
    def signs(self) -> bool:
        """Whether the release is to be signed."""
        return self.key is not None or self.keyless

    def places(self, roots: Sequence[Path]) -> list[Place]:
        """Return the registries to publish to: those given, those of the recipe, or the default one."""
        no_string(roots, "roots", "paths")
        places = [Place(url) for url in self.urls] or listed_places(roots) or [Place(REGISTRY)]
        return [Place(place.url, tuple(dict.fromkeys((*place.aliases, *self.aliases)))) for place in places]


@click.command(cls=Command)
@click.argument("artifacts", nargs=-1, required=True)
@click.option("--to", "urls", multiple=True, metavar="REGISTRY",
              help="A folder, s3://bucket/prefix, or hf://org; may be repeated (default: what the recipe's `publish` "
                   f"lists, or else {REGISTRY}).")  # fmt: skip
@click.option(
    "--alias",
    "aliases",
    multiple=True,
    help="Alias to set to the release, in addition to the recipe's; may be repeated.",
)
@click.option("--version", "version", help="Version of the release (default: from its content).")
@click.option("--sign", "key", type=click.Path(path_type=Path), help="Sign with this private key, then publish.")
@click.option("--keyless", is_flag=True, help="Sign with the identity of this CI job, then publish.")
@click.option("--unvalidated", is_flag=True,
              help="Allow artifacts without validation gates: NxD Inference packages, compile caches.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show what would be sent.")
@as_json
@collected(PublishOptions)
def publish(console: Console, options: PublishOptions) -> None:
    """Publish ARTIFACTS as an immutable release. Several artifacts of one recipe become its variants."""
    roots = [artifact_dir(name) for name in options.artifacts]
    places = options.places(roots)
    if options.signs and not options.dry_run:
        for root in roots:
            _sign(root, options.key)
    settings = PublishSettings(
        version=options.version, sign=_signer(options.key) if options.signs else None,
        unvalidated=options.unvalidated, dry_run=options.dry_run,
    )  # fmt: skip
    outcomes = publish_all(roots, places, settings, console.transfer("publish"))
    if options.json_:
        print_json([_data(outcome) for outcome in outcomes])
    else:
        for outcome in outcomes:
            click.echo(_line(outcome, "would send" if options.dry_run else "sent"))
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    for error in errors[:-1]:
        print_error(error, with_traceback=console.verbose)
    if errors:
        raise errors[-1]


def _line(outcome: Outcome, verb: str) -> str:
    release = outcome.release
    if release is None:
        return f"not published to {outcome.url}: see the error below"
    aliases = f"; {', '.join(release.aliases)} -> {release.version}" if release.aliases else ""
    sent = f"{verb} {release.sent} blobs, {release.sent_bytes / MIB:.1f} MiB to {outcome.url}"
    return f"{release.name}@{release.version}: {sent}{aliases}"


def _data(outcome: Outcome) -> dict[str, Any]:
    if outcome.release is not None:
        return asdict(outcome.release)
    error = outcome.error
    fault = {"where": error.where, "what": error.what, "fix": error.fix} if error else None
    return {"url": outcome.url, "error": fault}


@click.command(cls=Command)
@click.argument("artifact")
@click.option("--key", type=click.Path(path_type=Path), help="Private key, PEM (default: keyless, this CI job).")
@as_json
def sign(artifact: str, key: Path | None, json_: bool) -> None:
    """Sign the manifest of ARTIFACT. `tandem publish` sends the signature along."""
    signature = _sign(artifact_dir(artifact), key)
    print_result({"signature": signature}, str(signature), as_json=json_)


def _sign(root: Path, key: Path | None) -> Path:
    return signing.sign(root, key, password=_password(), token=_token())


def _signer(key: Path | None) -> Sign:
    return lambda index: signing.signature_over(index, "release", key, password=_password(), token=_token())


def _password() -> str | None:
    return os.environ.get("TANDEM_KEY_PASSWORD")


def _token() -> str | None:
    return os.environ.get("SIGSTORE_ID_TOKEN")
