"""Signatures over `manifest.json` by OpenSSF model-signing, with a key or keyless, and policies that require them.

A manifest pins every other file by its sha256, so its signature covers the artifact. Signatures are checked before any
other file is fetched, and again before an artifact is opened for execution. Needs the extra `sign` only when used.
"""

from __future__ import annotations

import difflib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from pipeline.artifact.keys import NEW_KEY, check_public, public_key_of
from pipeline.artifact.manifest import MANIFEST, SIGNATURE, Manifest, read
from pipeline.artifact.provenance import PROVENANCE, builder_of
from pipeline.artifact.verify import difference
from pipeline.errors import ArtifactError, HostError, InputError, RecipeError, reason, together
from pipeline.extras import require as require_extras
from pipeline.files.atomic import write_atomic
from pipeline.files.home import expanded
from pipeline.recipe.document import Document
from pipeline.recipe.document import read as read_document
from pipeline.records import Record

WILD = re.compile(r"[*?[]")
"""Wildcards of patterns."""

GITHUB = "https://token.actions.githubusercontent.com"
"""Issuer of GitHub Actions' identities, the usual one for keyless signatures."""


KEYLESS = "check the network and this job's identity (permission id-token: write), or sign with --key"


class Signer(Record):
    """An accepted signer: the holder of a key, or a keyless identity as its issuer names it."""

    key: str | None = Field(default=None, description="file of a public key (PEM), relative to the policy")
    identity: str | None = Field(default=None, description="for example the URL of a workflow and its branch")
    issuer: str = GITHUB

    @model_validator(mode="after")
    def _one_of(self) -> Signer:
        if (self.key is None) == (self.identity is None):
            raise ValueError("exactly one of key and identity is needed")
        return self

    def __str__(self) -> str:
        return self.key or f"{self.identity} (issuer {self.issuer})"


class Rule(Record):
    """A pattern of releases (`URL/name@version`) and their accepted signers; one signature is enough.

    Folders are compared as absolute paths without links, so that no spelling of a folder avoids a rule or gets one; a
    relative folder in a pattern starts at the policy. An artifact on disk has no URL: only the part of the pattern
    after its last slash applies to it.
    """

    releases: str = "*"
    builder: str = Field(default="*", description="pattern of the builder that provenance.json must name")
    signed_by: Annotated[tuple[Signer, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Accepted:
    """A signature that a policy accepts, and its signer."""

    signature: bytes
    signer: Signer


class Policy(Record):
    """Rules for signatures. The first rule that matches decides; a release without a matching rule is rejected."""

    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]
    _base: Path = Path()

    def check(self, manifest: bytes, signatures: Sequence[bytes], where: str) -> Accepted:
        """Return the first signature that this policy accepts, with its signer.

        Raises:
            ArtifactError: no signature, or none by an accepted signer.
            HostError: signatures cannot be checked on this host.

        """
        rule = self.rule(where)
        signers = " or ".join(map(str, rule.signed_by))
        if not signatures:
            raise ArtifactError("not signed", where=where, fix=f"tandem sign ARTIFACT (required signer: {signers})")
        faults = []
        for data in signatures:
            for signer in rule.signed_by:
                fault = _fault(manifest, data, signer, self._base)
                if fault is None:
                    return Accepted(data, signer)
                faults.append(fault)
        what = f"not signed by {signers}: {'; '.join(dict.fromkeys(faults))}"
        raise ArtifactError(what, where=where, fix="do not use this artifact")

    def check_builder(self, provenance: Callable[[], bytes], where: str) -> None:
        """Compare the builder in the provenance with the rule's pattern; the signed manifest pins the provenance.

        `provenance` is called only if the rule has a pattern.

        Raises:
            ArtifactError: the provenance names another builder, or none.

        """
        pattern = self.rule(where).builder
        if pattern == "*":
            return
        try:
            builder = builder_of(json.loads(provenance()))
        except ValueError:
            builder = ""
        if not fnmatchcase(builder, pattern):
            actual = f"builder mismatch: found {builder}" if builder else "provenance names no builder"
            what = f"{actual}; the policy requires {pattern}"
            raise ArtifactError(what, where=where, fix="do not use this artifact")

    def rule(self, where: str) -> Rule:
        """Return the first rule that matches a release.

        Raises:
            ArtifactError: no rule matches.

        """
        release = _absolute(where, Path()) if "/" in where else where
        rule = next((rule for rule in self.rules if _matches(release, rule.releases, self._base)), None)
        if rule is None:
            patterns = ", ".join(each.releases for each in self.rules)
            what = f"no rule of the policy matches {release}; patterns: {patterns}"
            raise ArtifactError(what, where=where, fix="add a rule to the policy, or use another release")
        return rule


def read_policy(path: Path) -> Policy:
    """Read a policy from its YAML file.

    Raises:
        InputError: the file is missing or damaged; the message names the key.

    """
    if not path.is_file():
        raise InputError("cannot read the policy: no such file", where=str(path), fix="check the path")
    document = read_document(path)
    if document.problems:
        raise RecipeError(document.problems)
    try:
        policy = Policy.model_validate_json(json.dumps(document.data))
    except ValidationError as error:
        raise together(list(_faults(error, document))) from error
    for rule_number, rule in enumerate(policy.rules):
        for number, signer in enumerate(rule.signed_by):
            if signer.key is not None:
                place = document.place(("rules", rule_number, "signed_by", number, "key"))
                check_public(path.parent / signer.key, place)
    return _with_base(policy, path.parent)


def _faults(error: ValidationError, document: Document) -> Iterator[InputError]:
    """Yield an error for each fault of a policy, in the words of recipes."""
    meant, places = set(), [fault["loc"] for fault in error.errors()]
    for fault in sorted(error.errors(), key=lambda fault: fault["type"] == "missing"):  # unknown keys first
        *above, name = fault["loc"] or ("",)
        where = document.place(tuple(fault["loc"]))
        if any(len(loc) > len(fault["loc"]) and loc[: len(fault["loc"])] == fault["loc"] for loc in places):
            continue  # a fault inside is reported
        if fault["type"] == "extra_forbidden":
            names = list((Policy, Rule, Signer)[min(len(above) // 2, 2)].model_fields)
            near = difflib.get_close_matches(str(name), names, 1)
            meant.update(near)
            yield InputError("unknown key", where=where, fix=f"did you mean {near[0]}?" if near else f"keys: {names}")
        elif fault["type"] == "missing":
            if name not in meant:
                yield InputError("missing", where=where, fix=f"add `{name}:`; see docs/how-to/sign.md")
        else:
            yield InputError(fault["msg"].removeprefix("Value error, "), where=where, fix="see docs/how-to/sign.md")


def require(identity: str, issuer: str = GITHUB) -> Policy:
    """Return the policy of `--require-signature`, from the file of a public key or a keyless identity.

    Raises:
        InputError: no such file, or not a public key.

    """
    is_key = identity.endswith((".pem", ".pub")) or Path(identity).is_file()
    if is_key:
        check_public(Path(identity), "--require-signature")
    signer = Signer(key=identity) if is_key else Signer(identity=identity, issuer=issuer)
    return Policy(rules=(Rule(signed_by=(signer,)),))


def sign(root: Path, key: Path | None = None, *, password: str | None = None, token: str | None = None) -> Path:
    """Write `signature` beside the manifest: with a private key, or keyless with the identity of this CI job.

    Raises:
        InputError: no such key, or an unusable key.
        HostError: this job has no identity, or the signing services cannot be reached.

    """
    read(root)  # raises unless the directory holds a valid manifest
    write_atomic(root / SIGNATURE, signature_over((root / MANIFEST).read_bytes(), str(root), key, password, token))
    return root / SIGNATURE


def signature_over(document: bytes, where: str, key: Path | None, password: str | None, token: str | None) -> bytes:
    """Return a signature over a manifest or the index of a release, as the only file of a folder.

    Raises:
        InputError: no such key, or an unusable key.
        HostError: this job has no identity, or the signing services cannot be reached.

    """
    config = _signer(key, password, token, where)
    with tempfile.TemporaryDirectory(prefix="tandem-sign-") as work:
        folder, signature = Path(work) / "artifact", Path(work) / SIGNATURE
        folder.mkdir()
        (folder / MANIFEST).write_bytes(document)
        try:
            config.sign(folder, signature)
        except Exception as error:
            raise HostError(f"cannot sign: {_first_line(error)}", where=where, fix=KEYLESS) from error
        return signature.read_bytes()


def _signer(key: Path | None, password: str | None, token: str | None, where: str) -> Any:
    config = _library("signing").Config()
    if key is None:
        try:
            return config.use_sigstore_signer(use_ambient_credentials=token is None, identity_token=token)
        except Exception as error:
            raise HostError(f"cannot sign: {_first_line(error)}", where=where, fix=KEYLESS) from error
    public_key_of(key, password)
    try:
        return config.use_elliptic_key_signer(private_key=key, password=password.encode() if password else None)
    except ValueError as error:
        raise InputError(f"unusable private key: {reason(error)}", where=str(key), fix=NEW_KEY) from error


def signed_by_key(document: bytes, signatures: Sequence[bytes], key: Path, password: str | None) -> bool:
    """Return whether one of the signatures over a document is by the holder of a private key.

    Raises:
        InputError: no such key, or an unusable key.

    """
    public = public_key_of(key, password)
    with tempfile.TemporaryDirectory(prefix="tandem-key-") as folder:
        path = Path(folder) / "key.pub"
        path.write_bytes(public)
        return any(_fault(document, data, Signer(key=str(path)), Path()) is None for data in signatures)


def check_artifact(root: Path, policy: Policy) -> Signer:
    """Return the accepted signer of an artifact on disk; `artifact.verify` checks its files.

    Raises:
        ArtifactError: no signature, or none by an accepted signer.

    """
    manifest = read(root).manifest
    signatures = [(root / SIGNATURE).read_bytes()] if has_signature(root) else []
    where = f"{manifest.name}@{manifest.version}"
    accepted = policy.check((root / MANIFEST).read_bytes(), signatures, where)
    policy.check_builder(lambda: _own_provenance(root, manifest), where)
    return accepted.signer


def has_signature(root: Path) -> bool:
    """Return whether a signature file is beside the manifest; neither signer nor content is checked."""
    return (root / SIGNATURE).is_file() and not (root / SIGNATURE).is_symlink()


def _own_provenance(root: Path, manifest: Manifest) -> bytes:
    """Return the provenance of an artifact on disk; empty if it differs from the manifest's digest."""
    entry = manifest.files.get(PROVENANCE)
    if entry is None or not (root / PROVENANCE).is_file() or difference(root / PROVENANCE, entry):
        return b""
    return (root / PROVENANCE).read_bytes()


def _matches(release: str, pattern: str, base: Path) -> bool:
    return fnmatchcase(release, _absolute(pattern, base) if "/" in release else pattern.rpartition("/")[2])


def _absolute(address: str, base: Path) -> str:
    """Return a release in a folder, or a pattern of such releases, as an absolute path without links and `..`.

    Only the folders before the first wildcard of a pattern are resolved; other addresses are returned unchanged.
    """
    path = address.removeprefix("file://")
    if "://" in path or WILD.match(path):
        return address
    parts = path.split("/")
    fixed = next((index for index, part in enumerate(parts) if WILD.search(part)), len(parts) - 1)
    folder = (base / expanded("/".join(parts[:fixed]) or ("/" if path.startswith("/") else "."))).resolve()
    return "/".join([str(folder).rstrip("/"), *parts[fixed:]])


def _fault(manifest: bytes, signature: bytes, signer: Signer, base: Path) -> str | None:
    """Return why a signature is not accepted as this signer's over this manifest; None if accepted."""
    config = _library("verifying").Config()
    with tempfile.TemporaryDirectory(prefix="tandem-verify-") as work:
        folder, signature_file = Path(work) / "artifact", Path(work) / SIGNATURE
        folder.mkdir()
        (folder / MANIFEST).write_bytes(manifest)
        signature_file.write_bytes(signature)
        try:
            _configure(config, signer, base)
            config.verify(folder, signature_file)
        except InputError:
            raise
        except Exception as error:
            return _meaning(error, signer)
    return None


def _meaning(error: Exception, signer: Signer) -> str:
    """Return one line on why a signature is not accepted."""
    if type(error).__name__ == "TUFError":
        fix = "check the network: keyless signatures need the signing services' public keys"
        raise HostError("keyless signatures cannot be checked on this host", where=str(signer), fix=fix) from error
    text = _first_line(error)
    return "the signature is over another manifest" if text.startswith("Signature mismatch") else text


def _configure(config: Any, signer: Signer, base: Path) -> None:
    if signer.key is None:
        config.use_sigstore_verifier(identity=signer.identity, oidc_issuer=signer.issuer)
        return
    path = base / signer.key
    try:
        config.use_elliptic_key_verifier(public_key=path)
    except Exception as error:
        what, fix = f"unusable public key: {_first_line(error)}", "name a public key in PEM on an elliptic curve"
        raise InputError(what, where=str(path), fix=fix) from error


def _library(module: str) -> Any:
    from importlib import import_module

    require_extras(["sign"], "signature")
    return import_module(f"model_signing.{module}")


def _with_base(policy: Policy, base: Path) -> Policy:
    policy._base = base  # noqa: SLF001
    return policy


def _first_line(error: Exception) -> str:
    return reason(error)[:300]
