"""One accepted signer, and whether a signature over a document is by it, by OpenSSF model-signing. Reads no policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from pipeline.artifact.manifest import MANIFEST, SIGNATURE
from pipeline.errors import HostError, InputError, reason
from pipeline.extras import require as require_extras
from pipeline.files.unfinished import work_folder
from pipeline.records import Record

GITHUB = "https://token.actions.githubusercontent.com"
"""Issuer of GitHub Actions' identities, the usual one for keyless signatures."""


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


def fault_of(manifest: bytes, signature: bytes, signer: Signer, base: Path) -> str | None:
    """Return why a signature is not accepted as this signer's over this manifest; None if accepted."""
    config = library("verifying").Config()
    with work_folder("verify") as work:
        folder, signature_file = work / "artifact", work / SIGNATURE
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
    text = first_line(error)
    meanings = {"Signature mismatch": "the signature is over another manifest", "Key mismatch": "signed by another key"}
    return next((meaning for start, meaning in meanings.items() if text.startswith(start)), text)


def _configure(config: Any, signer: Signer, base: Path) -> None:
    if signer.key is None:
        config.use_sigstore_verifier(identity=signer.identity, oidc_issuer=signer.issuer)
        return
    path = base / signer.key
    try:
        config.use_elliptic_key_verifier(public_key=path)
    except Exception as error:
        what, fix = f"unusable public key: {first_line(error)}", "name a public key in PEM on an elliptic curve"
        raise InputError(what, where=str(path), fix=fix) from error


def library(module: str) -> Any:
    """Return a module of model-signing, of the extra `sign`."""
    from importlib import import_module

    require_extras(["sign"], "signature")
    return import_module(f"model_signing.{module}")


def first_line(error: Exception) -> str:
    """Return the first line of an error of the library, shortened."""
    return reason(error)[:300]
