"""Documents of a published release with their signatures: read, checked against a policy, then compared with the name.

A manifest or index is parsed only after its signatures were checked. Reads no blob but small ones.
"""

from __future__ import annotations

import hashlib

from pydantic import ConfigDict

from pipeline.artifact.manifest import SIGNATURE
from pipeline.artifact.signing import Accepted, Policy
from pipeline.errors import CorruptError, RefusedError
from pipeline.files.limits import json_object
from pipeline.records import Record
from pipeline.registry.release import INDEX_KIND, Document
from pipeline.registry.releases import Reference
from pipeline.stores.base import Store


class SignedDocument(Record):
    """A document and the signatures over it, which are not verified yet."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    data: bytes
    signatures: tuple[bytes, ...] = ()

    @property
    def sha256(self) -> str:
        """Digest of the document."""
        return hashlib.sha256(self.data).hexdigest()


def signed_document(store: Store, name: str, version: str, prefix: str, data: bytes) -> SignedDocument:
    """Return a document of a release with its signatures; `prefix` is the folder of its variant in the release."""
    digest = hashlib.sha256(data).hexdigest()
    return SignedDocument(data=data, signatures=tuple(store.signatures(name, version, f"{prefix}{SIGNATURE}", digest)))


def check_signatures(policy: Policy | None, signed: SignedDocument, where: str) -> Accepted | None:
    """Check the signatures over a document, whose bytes are all that is read; `where` selects the policy's rule.

    Raises:
        RefusedError: no signature, or none that the policy accepts.

    """
    if policy is None:
        return None
    if not signed.signatures and json_object(signed.data, where).get("kind") == INDEX_KIND:
        what, fix = "the index of this release is not signed", "publish the release as another version, with --sign"
        raise RefusedError(what, where=where, fix=fix)
    return policy.check(signed.data, signed.signatures, where)


def check_names(document: Document, ref: Reference, version: str) -> None:
    """Reject a document that names another release.

    Raises:
        CorruptError: it does; with both values.

    """
    if document.name != ref.name:
        raise mismatch("name", ref.name, document.name, ref)
    if document.version != version:
        raise mismatch("version", version, document.version, ref)


def mismatch(field: str, expected: str, found: str, ref: Reference) -> CorruptError:
    """Return the error for a document of another release."""
    what = f"{field} mismatch in the manifest: expected {expected!r}, found {found!r}"
    return CorruptError(what, where=str(ref), fix="publish the release again")
