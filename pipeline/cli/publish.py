"""Commands that release artifacts: publish, sign."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from pipeline.artifact import signing
from pipeline.artifact.keys import public_key_of
from pipeline.artifact.manifest import read
from pipeline.cli.console import Console, print_error
from pipeline.cli.groups import Command
from pipeline.cli.options import as_json, collected
from pipeline.cli.paths import artifact_dir, check_not_building, complete_artifact
from pipeline.cli.results import print_json, print_line
from pipeline.cli.tables import Verdict
from pipeline.cli.words import counted, pointer, size
from pipeline.errors import InputError, as_data, no_string
from pipeline.extras import require
from pipeline.registry.aliases import check_name
from pipeline.registry.publish import (
    Outcome,
    Own,
    Place,
    PublishSettings,
    Release,
    Sign,
    any_signature,
    listed_places,
    publish_all,
)
from pipeline.stores.base import check_spelling, extras_of

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
    image: bool
    dry_run: bool
    json_: bool

    @property
    def signs(self) -> bool:
        """Whether `publish` signs the release."""
        return self.key is not None or self.keyless

    def places(self, roots: Sequence[Path]) -> list[Place]:
        """Return the registries to publish to: those given, those of the recipe, or the default one."""
        no_string(roots, "roots", "paths")
        places = [Place(url) for url in self.urls] or listed_places(roots) or [Place(REGISTRY)]
        return [Place(place.url, tuple(dict.fromkeys((*place.aliases, *self.aliases)))) for place in places]


@click.command(cls=Command)
@click.argument("artifacts", shell_complete=complete_artifact, nargs=-1, required=True)
@click.option("--to", "urls", multiple=True, metavar="REGISTRY",
              help="A folder, s3://bucket/prefix, hf://org, or oci://host/path; may be repeated (default: what the "
                   f"recipe's `publish` lists, or else {REGISTRY}).")  # fmt: skip
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
@click.option("--image", is_flag=True,
              help="In registries oci://, also store an image that Kubernetes mounts as a volume.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show what would be sent.")
@as_json
@collected(PublishOptions)
def publish(console: Console, options: PublishOptions) -> None:
    """Publish ARTIFACTS as an immutable release. Several artifacts of one recipe become its variants."""
    roots = [artifact_dir(name) for name in options.artifacts]
    for alias in options.aliases:
        check_name(alias, "--alias")
    places = options.places(roots)
    _check_places(places, options)
    if options.key is not None:
        public_key_of(options.key, _password())  # an unusable key ends the command before files are read
    settings = PublishSettings(
        version=options.version, sign=_signer(options.key) if options.signs else None, own=_own(options.key),
        unvalidated=options.unvalidated, dry_run=options.dry_run, image=options.image,
    )  # fmt: skip
    for root in roots:
        if read(root).manifest.passed is None:
            check_not_building(root)
    how = _how(options, roots)
    outcomes = publish_all(roots, places, settings, console.transfer("publish"))
    _show(console, outcomes, options, how)
    _report_errors(console, outcomes)


def _show(console: Console, outcomes: Sequence[Outcome], options: PublishOptions, how: _How) -> None:
    if options.json_:
        print_json([_data(outcome) for outcome in outcomes])
    for release in [outcome.release for outcome in outcomes if outcome.release]:
        if not options.json_:
            print_line(Verdict(_line(release, how), good=None if options.dry_run else True))
            for image in release.images:
                print_line(f"image for a volume of Kubernetes: {image}")
        if warning := _index_warning(release, how):
            console.log(warning)


def _check_places(places: Sequence[Place], options: PublishOptions) -> None:
    """Reject misspelt registries, those whose client is not installed, and images without a registry for them."""
    for place in places:
        check_spelling(place.url)
    if options.image and not any(place.url.startswith("oci://") for place in places):
        raise InputError("only OCI registries hold images", where="--image", fix="publish to oci://host/path")
    require([*extras_of(*(place.url for place in places)), *(("sign",) if options.signs else ())], "tandem publish")


def _report_errors(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Show the error of each place that failed; the last one has the exit code. `--json` has printed them."""
    failed = [(outcome.url, outcome.error) for outcome in outcomes if outcome.error is not None]
    for url, error in failed:
        console.log(f"not published to {url}:")
        print_error(error, with_traceback=console.verbose)
    if failed:
        sys.exit(failed[-1][1].exit_code)


@dataclass(frozen=True)
class _How:
    """Facts for the result of `publish`: dry run or not, the id of a single artifact, and how it is signed.

    `signs`: with --sign (`key`) or --keyless. `in_folder`: the folders of all artifacts have signatures.
    """

    dry_run: bool
    digest: str
    signs: bool
    key: Path | None
    in_folder: bool


def _how(options: PublishOptions, roots: Sequence[Path]) -> _How:
    digest = read(roots[0]).manifest.version if len(roots) == 1 else ""
    in_folder = all(map(signing.has_signature, roots))
    return _How(options.dry_run, digest, options.signs, options.key, in_folder)


def _line(release: Release, how: _How) -> str:
    """Return the state of a release in its registry, in one line."""
    name = f"{release.name}@{release.version}"
    digest = f" {how.digest}" if how.digest not in ("", release.version) else ""
    sent = f"{counted(release.sent, 'blob')}, {size(release.sent_bytes)}"
    aliases = f"; {pointer(', '.join(release.aliases), name)}" if release.aliases else ""
    if how.dry_run:
        done = "would send" if release.fresh else "is published already; would send"
        return f"{name}{digest}: {done} {sent} to {release.url}{aliases}"
    if not release.fresh:
        signature = _old_signature(release, how)
        return f"{name}{digest}: published already in {release.url}, sent {sent}, {signature}{aliases}"
    return f"published {name}{digest} to {release.url}: sent {sent}, {_new_signature(how)}{aliases}"


def _new_signature(how: _How) -> str:
    if how.signs:
        return f"signed with {how.key or 'the identity of this job'}"
    return "with the signature in its folder" if how.in_folder else "not signed"


def _old_signature(release: Release, how: _How) -> str:
    """Return how a release is signed that the registry had already; its signer is compared with --sign only."""
    if how.key is not None:
        return f"already signed with {how.key}"
    if release.has_signature:
        return "its signer was not checked"
    not_added = "; the signature in the folder was not added: a release never changes" if how.in_folder else ""
    return f"not signed{not_added}"


def _index_warning(release: Release, how: _How) -> str | None:
    """Return a warning about signed artifacts under an index without a signature: pulls check the index first."""
    if how.signs or not how.in_folder or release.has_signature or release.version == how.digest:
        return None
    what = f"the index of {release.version} is not signed; pulls with --require-signature reject it"
    return f"warning: {what}; to sign the index, publish {'' if how.dry_run else 'another version '}with --sign KEY"


def _data(outcome: Outcome) -> dict[str, Any]:
    if outcome.release is not None:
        return asdict(outcome.release)
    assert outcome.error is not None
    return {"url": outcome.url} | as_data(outcome.error.problems, outcome.error.exit_code)


@click.command(cls=Command)
@click.argument("artifact", shell_complete=complete_artifact)
@click.option("--key", type=click.Path(path_type=Path), help="Private key, PEM (default: keyless, this CI job).")
@as_json
def sign(artifact: str, key: Path | None, json_: bool) -> None:
    """Sign the manifest of ARTIFACT. `tandem publish` sends the signature along.

    A release of several artifacts, or with a version of its own, also has an index, which only `tandem publish --sign`
    signs. Pulls that require signatures reject a release whose index is not signed.
    """
    root = artifact_dir(artifact)
    signature = _sign(root, key)
    if json_:
        print_json({"signature": signature})
        return
    manifest, by = read(root).manifest, key or "the identity of this job"
    print_line(Verdict(f"signed {manifest.name} {manifest.version} with {by}: {signature}", good=True))


def _sign(root: Path, key: Path | None) -> Path:
    return signing.sign(root, key, password=_password(), token=_token())


def _signer(key: Path | None) -> Sign:
    return lambda index: signing.signature_over(index, "release", key, password=_password(), token=_token())


def _own(key: Path | None) -> Own:
    if key is None:
        return any_signature
    return lambda document, signatures: signing.signed_by_key(document, signatures, key, _password())


def _password() -> str | None:
    return os.environ.get("TANDEM_KEY_PASSWORD")


def _token() -> str | None:
    return os.environ.get("SIGSTORE_ID_TOKEN")
