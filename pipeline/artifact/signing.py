"""Signatures over `manifest.json` by OpenSSF model-signing, with a key or keyless, and policies that require them.

A manifest pins every other file by its sha256, so its signature covers the artifact. Signatures are checked before any
other file is fetched, and again before an artifact is opened for execution. Needs the extra `sign` only when used.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from pipeline.artifact.keys import NEW_KEY, check_public, public_key_of
from pipeline.artifact.manifest import MANIFEST, SIGNATURE, Artifact, Manifest, parse, read, read_bytes
from pipeline.artifact.provenance import PROVENANCE, builder_of
from pipeline.artifact.pulled import pull_record
from pipeline.artifact.signer import GITHUB, Signer, fault_of, first_line, library
from pipeline.artifact.verify import difference
from pipeline.errors import CorruptError, HostError, InputError, RecipeError, RefusedError, reason, together
from pipeline.files.atomic import write_atomic
from pipeline.files.home import expanded
from pipeline.files.limits import DO_NOT_USE, MAX_BYTES, SIGNATURE_BYTES, json_object
from pipeline.files.unfinished import work_folder
from pipeline.recipe.document import Document
from pipeline.recipe.document import read as read_document
from pipeline.records import Record

WILD = re.compile(r"[*?[]")
"""Wildcards of patterns."""

KEYLESS = "check the network and this job's identity (permission id-token: write), or sign with --key"


class Rule(Record):
    """A pattern of releases (`URL/name@version`) and their accepted signers; one signature is enough.

    Folders are compared as absolute paths without links, so that no spelling of a folder avoids a rule or gets one; a
    relative folder in a pattern starts at the policy. For an artifact on disk, the reference that it was pulled by is
    compared; an artifact that was not pulled is `name@version`, which no pattern of a registry matches.
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

    def check(self, manifest: bytes, signatures: Sequence[bytes], where: str, place: str = "") -> Accepted:
        """Return the first signature that this policy accepts, with its signer.

        `where` selects the rule; errors about signatures name `place`, an artifact's folder, if it is given.

        Raises:
            RefusedError: no signature, or none by an accepted signer.
            HostError: signatures cannot be checked on this host.

        """
        rule = self.rule(where)
        signers = " or ".join(map(str, rule.signed_by))
        if not signatures:
            raise RefusedError(
                "not signed", where=place or where, fix=f"tandem sign ARTIFACT (required signer: {signers})"
            )
        faults = []
        for data in signatures:
            for signer in rule.signed_by:
                fault = fault_of(manifest, data, signer, self._base)
                if fault is None:
                    return Accepted(data, signer)
                faults.append(fault)
        what = f"not signed by {signers}: {'; '.join(dict.fromkeys(faults))}"
        raise RefusedError(what, where=place or where, fix=DO_NOT_USE)

    def check_builder(self, provenance: Callable[[], bytes], where: str) -> None:
        """Compare the builder in the provenance with the rule's pattern; the signed manifest pins the provenance.

        `provenance` is called only if the rule has a pattern.

        Raises:
            RefusedError: the provenance names another builder, or none.

        """
        pattern = self.rule(where).builder
        if pattern == "*":
            return
        try:
            builder = builder_of(json_object(provenance(), where, "provenance"))
        except CorruptError:
            builder = ""
        if not fnmatchcase(builder, pattern):
            actual = f"builder mismatch: found {builder}" if builder else "provenance names no builder"
            what = f"{actual}; the policy requires {pattern}"
            raise RefusedError(what, where=where, fix=DO_NOT_USE)

    def rule(self, where: str) -> Rule:
        """Return the first rule that matches a release.

        Raises:
            RefusedError: no rule matches.

        """
        release = absolute(where)
        rule = next((rule for rule in self.rules if _matches(release, rule.releases, self._base)), None)
        if rule is None:
            patterns = ", ".join(each.releases for each in self.rules)
            what = f"no rule of the policy matches {release}; patterns: {patterns}"
            local = "" if "/" in release else "; it has no record of a pull: pull it, or add a rule without a registry"
            raise RefusedError(f"{what}{local}", where=where, fix="add a rule to the policy, or use another release")
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


def policy_of(path: Path | None, identity: str | None = None, issuer: str | None = None) -> Policy | None:
    """Return the policy of `--policy` or `--require-signature`; None if no signature is required.

    Raises:
        InputError: both are given, or an unusable file.

    """
    if path is None:
        return None if identity is None else require(identity, issuer or GITHUB)
    if identity is not None:
        fix = "use one of the two; unset TANDEM_POLICY if it is set"
        raise InputError("cannot be combined with a policy", where="--require-signature", fix=fix)
    return read_policy(path)


def require(identity: str, issuer: str = GITHUB) -> Policy:
    """Return the policy of `--require-signature`, from the file of a public key or a keyless identity.

    Raises:
        InputError: no such file, or not a public key.

    """
    if is_key(identity):
        check_public(Path(identity), "--require-signature", "; a keyless identity contains `@` or `://`")
    signer = Signer(key=identity) if is_key(identity) else Signer(identity=identity, issuer=issuer)
    return Policy(rules=(Rule(signed_by=(signer,)),))


def is_key(identity: str) -> bool:
    """Return whether `--require-signature` names a key's file: an identity is an e-mail address or a URL."""
    is_identity = "@" in identity or "://" in identity
    is_file = os.path.isfile(identity)  # noqa: PTH113 - an identity may be no name
    return not is_identity or is_file or identity.endswith((".pem", ".pub"))


def sign(root: Path, key: Path | None = None, *, password: str | None = None, token: str | None = None) -> Path:
    """Write `signature` beside the manifest: with a private key, or keyless with the identity of this CI job.

    Raises:
        InputError: no such key, or an unusable key.
        HostError: this job has no identity, or the signing services cannot be reached.

    """
    document = read(root).data  # raises unless the directory holds a valid manifest
    write_atomic(root / SIGNATURE, signature_over(document, str(root), key, password, token))
    return root / SIGNATURE


def signature_over(document: bytes, where: str, key: Path | None, password: str | None, token: str | None) -> bytes:
    """Return a signature over a manifest or the index of a release, as the only file of a folder.

    Raises:
        InputError: no such key, or an unusable key.
        HostError: this job has no identity, or the signing services cannot be reached.

    """
    config = _signer(key, password, token, where)
    with work_folder("sign") as work:
        folder, signature = work / "artifact", work / SIGNATURE
        folder.mkdir()
        (folder / MANIFEST).write_bytes(document)
        try:
            config.sign(folder, signature)
        except Exception as error:
            raise HostError(f"cannot sign: {first_line(error)}", where=where, fix=KEYLESS) from error
        return signature.read_bytes()


def _signer(key: Path | None, password: str | None, token: str | None, where: str) -> Any:
    config = library("signing").Config()
    if key is None:
        try:
            return config.use_sigstore_signer(use_ambient_credentials=token is None, identity_token=token)
        except Exception as error:
            raise HostError(f"cannot sign: {first_line(error)}", where=where, fix=KEYLESS) from error
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
    with work_folder("key") as folder:
        path = folder / "key.pub"
        path.write_bytes(public)
        return any(fault_of(document, data, Signer(key=str(path)), Path()) is None for data in signatures)


@dataclass(frozen=True)
class Trusted:
    """An artifact on disk whose signature was checked over the bytes that were parsed, and its signer.

    `signer` is None if no signature was required.
    """

    artifact: Artifact
    signer: Signer | None = None


def read_trusted(root: Path, policy: Policy | None) -> Trusted:
    """Read the manifest of an artifact on disk once: check the signature over its bytes, then parse them.

    The policy's rule is that of the reference by which the artifact was pulled. `artifact.verify` checks the files.

    Raises:
        RefusedError: no signature, none by an accepted signer, or no rule for this artifact.
        ArtifactError: as `manifest.read`.

    """
    if policy is None:
        return Trusted(read(root))
    data = read_bytes(root)
    where = _reference(root, data)
    place = f"{root} (pulled as {where})" if pull_record(root, data) is not None else str(root)
    accepted = policy.check(data, _own_signatures(root), where, place)
    artifact = Artifact(root, parse(data, str(root / MANIFEST)), data=data)
    policy.check_builder(lambda: _own_provenance(root, artifact.manifest), where)
    return Trusted(artifact, accepted.signer)


def check_artifact(root: Path, policy: Policy) -> Signer:
    """Return the accepted signer of an artifact on disk, as `read_trusted` does."""
    signer = read_trusted(root, policy).signer
    assert signer is not None
    return signer


def _reference(root: Path, data: bytes) -> str:
    """Return the reference by which an artifact was pulled, or `name@version` for one that was not."""
    if (record := pull_record(root, data)) is not None:
        return record.reference
    found = json_object(data, str(root / MANIFEST))
    return f"{found.get('name')}@{found.get('version')}".replace("/", "?")


def _own_signatures(root: Path) -> list[bytes]:
    if not has_signature(root):
        return []
    with (root / SIGNATURE).open("rb") as file:
        data = file.read(SIGNATURE_BYTES + 1)
    if len(data) > SIGNATURE_BYTES:
        raise CorruptError(f"more than {SIGNATURE_BYTES:,} bytes", where=str(root / SIGNATURE), fix=DO_NOT_USE)
    return [data]


def has_signature(root: Path) -> bool:
    """Return whether a signature file is beside the manifest; neither signer nor content is checked."""
    return (root / SIGNATURE).is_file() and not (root / SIGNATURE).is_symlink()


def _own_provenance(root: Path, manifest: Manifest) -> bytes:
    """Return the provenance of an artifact on disk; empty if it differs from the manifest's digest."""
    entry = manifest.files.get(PROVENANCE)
    path = root / PROVENANCE
    if entry is None or entry.size > MAX_BYTES or not path.is_file() or difference(path, entry):
        return b""
    return (root / PROVENANCE).read_bytes()


def absolute(reference: str) -> str:
    """Return a reference as policies compare it: a folder as its absolute path without links."""
    return _absolute(reference, Path()) if "/" in reference else reference


def _matches(release: str, pattern: str, base: Path) -> bool:
    """Return whether a pattern matches; an artifact that was not pulled has no registry, nor may the pattern."""
    if "/" not in release:
        return "/" not in pattern and fnmatchcase(release, pattern)
    return fnmatchcase(release, _absolute(pattern, base))


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


def _with_base(policy: Policy, base: Path) -> Policy:
    policy._base = base  # noqa: SLF001
    return policy
