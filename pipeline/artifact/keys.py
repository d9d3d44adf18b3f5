"""Key files in PEM for signatures: checks of the files that options and policies name, before they are used.

Signs and verifies nothing: see `signing.py`.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import InputError, reason
from pipeline.extras import require

NEW_KEY = "to create a key: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
PUBLIC = b"-----BEGIN PUBLIC KEY-----"


def public_key_of(path: Path, password: str | None) -> bytes:
    """Return the public key of a private key's file, as PEM. Needs the extra `sign`.

    Raises:
        InputError: no such file, a public key, an unusable key, or a wrong password.

    """
    require(["sign"], "signature")
    from cryptography.hazmat.primitives import serialization  # of the extra
    from cryptography.hazmat.primitives.asymmetric import ec

    where, data = str(path), _read(path, "private")
    if PUBLIC in data:
        raise InputError("a public key, expected the private key", where=where, fix=f"name the private key; {NEW_KEY}")
    try:
        key = serialization.load_pem_private_key(data, None if password is None else password.encode())
    except (ValueError, TypeError) as error:
        fix = "set TANDEM_KEY_PASSWORD to the key's password" if _has_password(data) else f"name a PEM file; {NEW_KEY}"
        raise InputError(f"unusable private key: {reason(error)}", where=where, fix=fix) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError("unusable private key: not on an elliptic curve", where=where, fix=NEW_KEY)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form)


def check_public(path: Path, where: str) -> None:
    """Reject a file that is not a public key; `where` names the option or the policy's key.

    Raises:
        InputError: no such file, a private key, or another file.

    """
    if PUBLIC in _read(path, "public", where):
        return
    beside = path.with_suffix(".pub")
    named = f"{beside}" if beside != path and beside.is_file() else "a public key in PEM, usually a .pub file"
    raise InputError(f"{path} is not a public key", where=where, fix=f"name {named}")


def _read(path: Path, kind: str, where: str = "") -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        what = f"cannot read the {kind} key: {error.strerror}"
        fix = f"check the path; the {kind} key is a PEM file{f'; {NEW_KEY}' if kind == 'private' else ''}"
        if where:
            what = f"{what}: {path}"
        raise InputError(what, where=where or str(path), fix=fix) from error


def _has_password(data: bytes) -> bool:
    return b"ENCRYPTED" in data
