"""Publish an artifact with a signature and pull it: `python examples/publish_and_pull.py [ARTIFACT] [FOLDER]`.

FOLDER gets a registry and the pulled artifact, in place of two machines. The example needs the install profile `pull`,
openssl, and a validated artifact, for example from `make build RECIPE=pico-spec`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tandem_spec import ArtifactError, publish, pull, require_signature, sign, verify


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Return the files of a new private key and of its public key."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    curve = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(private)]
    subprocess.run(curve, check=True)
    subprocess.run(["openssl", "ec", "-in", str(private), "-pubout", "-out", str(public)], check=True)
    return private, public


def main(artifact: Path, folder: Path) -> Path:
    """Sign and publish an artifact into a registry, pull it by its alias, and show that another key is rejected."""
    folder.mkdir(parents=True, exist_ok=True)
    registry, pulled = folder / "registry", folder / "pulled"
    private, public = key_pair(folder, "release")
    _, other = key_pair(folder, "other")

    sign(artifact, private)
    release = publish(artifact, str(registry), ["prod"])
    print(f"published {release.name}@{release.version}: {release.sent} files, {release.sent_bytes} bytes")

    reference = f"{registry}/{release.name}@prod"
    pull(reference, pulled, policy=require_signature(str(public)))
    verify(pulled)
    print(f"pulled {pulled}, signed by {public.name}")
    try:
        pull(reference, folder / "rejected", policy=require_signature(str(other)))
    except ArtifactError as error:
        print(f"rejected: {error.what}")
    return pulled


if __name__ == "__main__":
    arguments = [Path(argument) for argument in sys.argv[1:]]
    main(*arguments, *(Path("artifacts/pico-spec"), Path("artifacts/example-release"))[len(arguments) :])
