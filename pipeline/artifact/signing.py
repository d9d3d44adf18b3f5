"""Who signed a manifest, and who must have: OpenSSF model-signing over `manifest.json`, with a key or keyless.

A manifest pins every other file by its sha256, so its signature covers the artifact. A signature is looked at before a
byte of the artifact is fetched, and again before it is opened for execution. Needs the extra `sign` only when used.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from pipeline.artifact.manifest import MANIFEST, SIGNATURE, Manifest, read
from pipeline.artifact.provenance import PROVENANCE, builder_of
from pipeline.artifact.verify import difference
from pipeline.errors import ArtifactError, HostError, InputError, reason
from pipeline.files.atomic import write_atomic
from pipeline.records import Record

GITHUB = "https://token.actions.githubusercontent.com"
"""Issuer of GitHub Actions' identities, the usual one for keyless signatures."""


KEYLESS = "check the network and this job's identity (permission id-token: write), or sign with --key"


class Signer(Record):
    """Someone to be trusted: the holder of a key, or a keyless identity as its issuer names it."""

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
    """Releases, as patterns of `URL/name@version`, and those of whom one must have signed.

    Of an artifact on disk, which has no URL, the part of a pattern after its last slash is compared.
    """

    releases: str = "*"
    builder: str = Field(default="*", description="pattern of the builder that provenance.json must name")
    signed_by: Annotated[tuple[Signer, ...], Field(min_length=1)]


class Policy(Record):
    """What must be signed by whom. The first rule that matches decides; without one, a release is refused."""

    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]
    _base: Path = Path()

    def check(self, manifest: bytes, signatures: Sequence[bytes], where: str) -> bytes:
        """The signature that this policy accepts.

        Raises:
            ArtifactError: unsigned, or signed by somebody else.
            HostError: signatures cannot be checked here.

        """
        rule = self.rule(where)
        wanted = " or ".join(map(str, rule.signed_by))
        if not signatures:
            raise ArtifactError("not signed", where=where, fix=f"have it signed by {wanted}: tandem sign")
        faults = []
        for data in signatures:
            for signer in rule.signed_by:
                fault = _fault(manifest, data, signer, self._base)
                if fault is None:
                    return data
                faults.append(fault)
        what = f"not signed by {wanted}: {'; '.join(dict.fromkeys(faults))}"
        raise ArtifactError(what, where=where, fix="do not use this artifact")

    def check_builder(self, provenance: Callable[[], bytes], where: str) -> None:
        """Compare the builder that a statement names, if the rule asks; the manifest that was signed pins it.

        Raises:
            ArtifactError: another builder.

        """
        wanted = self.rule(where).builder
        if wanted == "*":
            return
        try:
            found = builder_of(json.loads(provenance()))
        except ValueError:
            found = ""
        if not fnmatchcase(found, wanted):
            what = f"built by {found or 'nobody that is named'}, the policy wants {wanted}"
            raise ArtifactError(what, where=where, fix="do not use this artifact")

    def rule(self, where: str) -> Rule:
        """The first rule that matches a release.

        Raises:
            ArtifactError: none does.

        """
        found = next((one for one in self.rules if _matches(where, one.releases)), None)
        if found is None:
            what = "no rule of the policy allows this release"
            raise ArtifactError(what, where=where, fix="add one, or do not use it")
        return found


def read_policy(path: Path) -> Policy:
    """A policy from its YAML file.

    Raises:
        InputError: not there, or damaged; names the key.

    """
    from ruamel.yaml import YAML  # few pulls have a policy: keeps ruamel out of the others
    from ruamel.yaml.error import YAMLError

    try:
        data = YAML(typ="safe", pure=True).load(path.read_bytes())
        policy = Policy.model_validate_json(json.dumps(data, default=str))
    except OSError as error:
        raise InputError(f"no policy: {error.strerror}", where=str(path), fix="see docs/operations.md") from error
    except YAMLError as error:
        raise InputError("the policy is not YAML", where=str(path), fix="see docs/operations.md") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{place}: {first['msg']}", where=str(path), fix="see docs/operations.md") from error
    return _with_base(policy, path.parent)


def require(identity: str, issuer: str = GITHUB) -> Policy:
    """The policy of `--require-signature`: a public key's file, or a keyless identity."""
    is_key = identity.endswith((".pem", ".pub")) or Path(identity).is_file()
    signer = Signer(key=identity) if is_key else Signer(identity=identity, issuer=issuer)
    return Policy(rules=(Rule(signed_by=(signer,)),))


def sign(root: Path, key: Path | None = None, *, password: str | None = None, token: str | None = None) -> Path:
    """Write `signature` beside the manifest: with a private key, or keyless with the identity of this CI job.

    Raises:
        InputError: no such key, or it cannot be used.
        HostError: no identity here, or the signing services cannot be reached.

    """
    read(root)  # only a manifest that can be trusted to be one
    write_atomic(root / SIGNATURE, signature_over((root / MANIFEST).read_bytes(), str(root), key, password, token))
    return root / SIGNATURE


def signature_over(document: bytes, where: str, key: Path | None, password: str | None, token: str | None) -> bytes:
    """A signature over a manifest, or over the index of a release, as if it lay in a folder by itself.

    Raises:
        InputError: no such key, or it cannot be used.
        HostError: no identity here, or the signing services cannot be reached.

    """
    config = _signer(key, password, token, where)
    with tempfile.TemporaryDirectory(prefix="tandem-sign-") as work:
        lone, made = Path(work) / "artifact", Path(work) / SIGNATURE
        lone.mkdir()
        (lone / MANIFEST).write_bytes(document)
        try:
            config.sign(lone, made)
        except Exception as error:
            raise HostError(f"cannot sign: {_first_line(error)}", where=where, fix=KEYLESS) from error
        return made.read_bytes()


def _signer(key: Path | None, password: str | None, token: str | None, where: str) -> Any:
    config = _library("signing").Config()
    if key is None:
        try:
            return config.use_sigstore_signer(use_ambient_credentials=token is None, identity_token=token)
        except Exception as error:
            raise HostError(f"cannot sign: {_first_line(error)}", where=where, fix=KEYLESS) from error
    try:
        return config.use_elliptic_key_signer(private_key=key, password=password)
    except (ValueError, OSError, TypeError) as error:
        fix = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
        raise InputError(f"not a private key that can be used: {error}", where=str(key), fix=fix) from error


def check_artifact(root: Path, policy: Policy) -> None:
    """Refuse an artifact on disk that is not signed as the policy demands. Its files are `artifact.verify`'s.

    Raises:
        ArtifactError: unsigned, or signed by somebody else.

    """
    manifest = read(root).manifest
    path = root / SIGNATURE
    signatures = [path.read_bytes()] if path.is_file() and not path.is_symlink() else []
    where = f"{manifest.name}@{manifest.version}"
    policy.check((root / MANIFEST).read_bytes(), signatures, where)
    policy.check_builder(lambda: _own_provenance(root, manifest), where)


def _own_provenance(root: Path, manifest: Manifest) -> bytes:
    """The statement of an artifact on disk; empty if it is not the one that its manifest pins."""
    entry = manifest.files.get(PROVENANCE)
    if entry is None or not (root / PROVENANCE).is_file() or difference(root / PROVENANCE, entry):
        return b""
    return (root / PROVENANCE).read_bytes()


def _matches(where: str, pattern: str) -> bool:
    return fnmatchcase(where, pattern if "/" in where else pattern.rpartition("/")[2])


def _fault(manifest: bytes, signature: bytes, signer: Signer, base: Path) -> str | None:
    """Why a signature over this manifest is not that signer's, or None."""
    config = _library("verifying").Config()
    with tempfile.TemporaryDirectory(prefix="tandem-verify-") as work:
        lone, made = Path(work) / "artifact", Path(work) / SIGNATURE
        lone.mkdir()
        (lone / MANIFEST).write_bytes(manifest)
        made.write_bytes(signature)
        try:
            _configure(config, signer, base)
            config.verify(lone, made)
        except HostError:
            raise
        except Exception as error:
            return _meaning(error, signer)
    return None


def _meaning(error: Exception, signer: Signer) -> str:
    """One line on why a signature is not accepted."""
    if type(error).__name__ == "TUFError":
        fix = "check the network: keyless signatures need the signing services' public keys"
        raise HostError("a keyless signature cannot be checked here", where=str(signer), fix=fix) from error
    text = _first_line(error)
    return "it is over another manifest" if text.startswith("Signature mismatch") else text


def _configure(config: Any, signer: Signer, base: Path) -> None:
    if signer.key is None:
        config.use_sigstore_verifier(identity=signer.identity, oidc_issuer=signer.issuer)
        return
    path = base / signer.key
    if not path.is_file():
        raise HostError("no such public key", where=str(path), fix="name a PEM file")
    config.use_elliptic_key_verifier(public_key=path)


def _library(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"model_signing.{module}")
    except ModuleNotFoundError as error:
        what = f"signatures need the package {error.name}"
        raise HostError(what, where="signature", fix="pip install 'tandem[sign]'") from error


def _with_base(policy: Policy, base: Path) -> Policy:
    policy._base = base  # noqa: SLF001
    return policy


def _first_line(error: Exception) -> str:
    return reason(error)[:300]
