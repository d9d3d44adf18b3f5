"""Options for required signers of an artifact, and the policy that follows from them."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.artifact import signing
from pipeline.artifact.signing import Policy
from pipeline.errors import InputError

identity_option = click.option(
    "--require-signature", "identity", help="Require a signature by this key file or identity; not with a policy."
)
issuer_option = click.option("--issuer", help="Issuer of the required identity (default: GitHub Actions).")
policy_option = click.option(
    "--policy", "policy_file", type=click.Path(path_type=Path), envvar="TANDEM_POLICY",
    help="Policy file with the required signers.",
)  # fmt: skip


def policy_of(path: Path | None, identity: str | None = None, issuer: str | None = None) -> Policy | None:
    """Return the policy that the options describe; None if no signature is required.

    Raises:
        InputError: both a policy and an identity are given.

    """
    if path is None:
        return None if identity is None else signing.require(identity, issuer or signing.GITHUB)
    if identity is not None:
        fix = "use one of the two; unset TANDEM_POLICY if it is set"
        raise InputError("cannot be combined with a policy", where="--require-signature", fix=fix)
    return signing.read_policy(path)
