"""Options for required signers of an artifact, with the function that reads them."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.artifact.signing import policy_of

__all__ = ["identity_option", "issuer_option", "policy_of", "policy_option"]

identity_option = click.option(
    "--require-signature", "identity", help="Require a signature by this key file or identity; not with a policy."
)
issuer_option = click.option("--issuer", help="Issuer of the required identity (default: GitHub Actions).")
policy_option = click.option(
    "--policy", "policy_file", type=click.Path(path_type=Path), envvar="TANDEM_POLICY",
    help="Policy file with the required signers.",
)  # fmt: skip
