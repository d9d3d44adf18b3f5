"""Key files in PEM for signatures: checks of the files that options and policies name, before they are used.

Signs and verifies nothing: see `signing.py`.
"""

from __future__ import annotations

import difflib
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


def check_public(path: Path, where: str, otherwise: str = "") -> None:
    """Reject a file that is not a public key; `where` names the option or the policy's key.

    `otherwise` ends the fix for a file that does not exist: what else the value may be.

    Raises:
        InputError: no such file, a private key, or another file.

    """
    if PUBLIC in _read(path, "public", where, otherwise):
        return
    beside = path.with_suffix(".pub")
    named = f"{beside}" if beside != path and beside.is_file() else "a public key in PEM, usually a .pub file"
    raise InputError(f"{path} is not a public key", where=where, fix=f"name {named}")


def _nearest(path: Path) -> Path | None:
    """Return the file of a folder whose name is nearest to a name that no file has; None if none is near."""
    try:
        names = [file.name for file in path.parent.iterdir() if file.is_file()]
    except OSError:
        return None
    return next((path.parent / name for name in difflib.get_close_matches(path.name, names, 1)), None)


def _read(path: Path, kind: str, where: str = "", otherwise: str = "") -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        what = f"cannot read the {kind} key: {error.strerror}"
        if where:
            what = f"no such file: `{path}`" if is_missing else f"{what}: {path}"
        fix = f"check the path; the {kind} key is a PEM file{f'; {NEW_KEY}' if kind == 'private' else ''}"
        if is_missing and (near := _nearest(path)):
            fix = f"the nearest name is `{near}`"
        raise InputError(what, where=where or str(path), fix=f"{fix}{otherwise}") from error


def _has_password(data: bytes) -> bool:
    return b"ENCRYPTED" in data
